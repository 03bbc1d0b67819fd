"""Decoding by Triton, for GPUs that are none of CUDA: the same programs as the library's kernels take, in the same
order of work (codecs/gpu of the source describes both).

One program instance decodes one field of one block, lane l of 32 having lane l of the coder. Tables are looked up in
their alias form. The program that the library makes is trusted; what a stream says is not: an index of a word is kept
within the stream, and what does not end as an encoder ends it is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from bigsmall import _native, errors
from bigsmall.reader import Destination, Reader, TensorInfo

_SLACK = 8  # bytes that may be read behind a payload
_LANES = 32


@triton.jit
def _place(low, high, bits, rest, width, rotate):  # type: ignore[no-untyped-def]
    """The rest of a field, from the bit `bits` of two words on, where it belongs in the field."""
    wide = tl.where(bits == 0, low, (low >> bits) | (high << ((32 - bits) & 31)))
    v = wide & ((1 << rest) - 1)
    turned = (v >> 1) | ((v & 1) << (width - 1))
    return tl.where(rotate == 1, turned, v)


@triton.jit
def _rest_of(payload32, at, i, there, rest, width, rotate):  # type: ignore[no-untyped-def]
    """The rest of words i."""
    bit = i * rest
    some = there & (bit * 0 + rest > 0)
    low = tl.load(payload32 + at + (bit >> 5), mask=some, other=0).to(tl.uint32)
    crosses = some & ((bit & 31) + rest > 32)
    high = tl.load(payload32 + at + (bit >> 5) + 1, mask=crosses, other=0).to(tl.uint32)
    v = _place(low, high, (bit & 31).to(tl.uint32), rest.to(tl.uint32), width.to(tl.uint32), rotate)
    return tl.where(rest > 0, v, v & 0)


@triton.jit
def _widen(h):  # type: ignore[no-untyped-def]
    """Bits of the binary32 with the value of a binary16; NaNs keep theirs."""
    sign = (h & 0x8000) << 16
    e = (h >> 10) & 31
    m = h & 1023
    small = (m.to(tl.float32) * 5.9604644775390625e-08).to(tl.uint32, bitcast=True)  # 2**-24
    normal = ((e + 112) << 23) | (m << 13)
    special = (m << 13) | 0x7F800000
    return sign | tl.where(e == 31, special, tl.where(e == 0, small, normal))


@triton.jit  # type: ignore[untyped-decorator]
def _decode_field(  # type: ignore[no-untyped-def]
    payload8,
    payload16,
    payload32,
    program8,
    program16,
    program32,
    out,
    carried_numbers,
    status,
    n_words,
    field,
    n_fields,
    half: tl.constexpr,
    join: tl.constexpr,
):
    """Field `field` of block program_id(0): to its place, or, with join, beside the fields that are there. status: 1
    for every block that is in order. The payloads and programs are the same memory as elements of 8, 16 and 32 bits."""
    block = tl.program_id(0)
    lane = tl.arange(0, 32)
    planes = tl.load(program32 + 4)
    blocks = tl.load(program32 + 5)
    shift = (tl.load(program8 + 14) + tl.load(program8 + 32 + 16 * field)).to(tl.int32)
    sym = tl.load(program8 + 33 + 16 * field).to(tl.int32)
    rest = tl.load(program8 + 34 + 16 * field).to(tl.int32)
    rotate = tl.load(program8 + 35 + 16 * field).to(tl.int32)
    width = sym + rest
    above = (rest - rotate).to(tl.uint32)
    up = shift.to(tl.uint32)
    entry = (blocks >> 2) + block * 6
    low = tl.load(program32 + entry).to(tl.uint32).to(tl.int64)
    start = low | (tl.load(program32 + entry + 1).to(tl.int64) << 32)
    plane = (planes >> 2) + (block * n_fields + field) * 8
    data = start + tl.load(program32 + plane)
    words = tl.load(program32 + plane + 1)
    rest_at = (start + tl.load(program32 + plane + 2)) >> 2
    listed = (start + tl.load(program32 + plane + 3)) >> 1
    table = tl.load(program32 + plane + 4) >> 2
    patches = tl.load(program16 + plane * 2 + 10).to(tl.int32) & 0xFFFF
    symbol = tl.load(program16 + plane * 2 + 11).to(tl.uint32) & 0xFFFF
    kind = tl.load(program8 + plane * 4 + 24).to(tl.int32)
    first = block.to(tl.int64) * 65536
    n = tl.minimum(n_words - first, 65536).to(tl.int32)
    target = out + first

    good = lane >= 0
    carried = tl.minimum(patches * 2, 32)
    carried = tl.where(kind == 2, carried, 0)
    if kind == 2:
        x = tl.load(payload16 + (data >> 1) + lane).to(tl.uint32) & 0xFFFF
        x = x | ((tl.load(payload16 + (data >> 1) + 32 + lane).to(tl.uint32) & 0xFFFF) << 16)
        good = x >= 65536
        buckets = tl.load(program32 + table)
        log = tl.where(buckets == 64, 6, 8).to(tl.uint32)
        own = program32 + table + 2
        other = own + buckets
        stream = payload16 + (data >> 1) + 64
        taken = words * 0
        for i0 in range(0, n, 32):
            i = i0 + lane
            active = i < n
            slot = x & 4095
            k = (slot & (buckets - 1).to(tl.uint32)).to(tl.int32)
            r = slot >> log
            o = tl.load(other + k).to(tl.uint32)
            mine = r < (o >> 24)
            number = tl.where(mine, k, ((o >> 16) & 255).to(tl.int32))
            rank = tl.where(mine, r, (o + r) & 4095)
            e = tl.load(own + number).to(tl.uint32)
            y = (e & 0xFFFF) * (x >> 12) + rank
            wants = active & (y < 65536)
            count = wants.to(tl.int32)
            before = tl.cumsum(count, 0) - count
            at = tl.maximum(tl.minimum(taken + before, words - 1), 0)
            word = tl.load(stream + at, mask=wants, other=0).to(tl.uint32) & 0xFFFF
            x = tl.where(active, tl.where(wants, (y << 16) | word, y), x)
            taken += tl.sum(count, 0)
            v = (e >> 16) << above
            v = (v | _rest_of(payload32, rest_at, i, active, rest, width, rotate)) << up
            if half:
                v = _widen(v)
            if join:
                v = v | tl.load(target + i, mask=active, other=0).to(tl.uint32)
            tl.store(target + i, v.to(out.dtype.element_ty), mask=active)
        number = x & 0xFFFF
        good = good & ((x >> 16) == 1) & (taken == words) & ((lane < patches * 2) | (number == 0))
        tl.store(carried_numbers + block * 32 + lane, number.to(tl.int32))
    else:
        for i0 in range(0, n, 32):
            i = i0 + lane
            active = i < n
            v = tl.load(payload8 + data + i, mask=i < tl.where(kind == 0, n, 0), other=0).to(tl.uint32)
            v = tl.where(kind == 0, v, symbol)
            good = good & ((v >> sym.to(tl.uint32)) == 0)
            v = ((v << above) | _rest_of(payload32, rest_at, i, active, rest, width, rotate)) << up
            if half:
                v = _widen(v)
            if join:
                v = v | tl.load(target + i, mask=active, other=0).to(tl.uint32)
            tl.store(target + i, v.to(out.dtype.element_ty), mask=active)

    # Patches: positions, then symbols. Other lanes have written what is replaced here, and what they carry.
    tl.debug_barrier()
    mask = (((1 << width) - 1).to(tl.uint32)) << up
    for k0 in range(0, patches, 32):
        k = k0 + lane
        there = k < patches
        position = tl.load(carried_numbers + block * 32 + k, mask=there & (k < carried), other=0)
        position += (
            tl.load(payload16 + listed + k - carried, mask=there & (k >= carried), other=0).to(tl.int32) & 0xFFFF
        )
        k1 = k - 1
        after = tl.load(carried_numbers + block * 32 + k1, mask=there & (k > 0) & (k1 < carried), other=0)
        listed_before = tl.load(payload16 + listed + k1 - carried, mask=there & (k > 0) & (k1 >= carried), other=0)
        after += (listed_before.to(tl.int32) & 0xFFFF) + 1
        k2 = k + patches
        value = tl.load(carried_numbers + block * 32 + k2, mask=there & (k2 < carried), other=0)
        value += tl.load(payload16 + listed + k2 - carried, mask=there & (k2 >= carried), other=0).to(tl.int32) & 0xFFFF
        fits = (position < n) & ((value >> sym) == 0) & ((k == 0) | (position >= after))
        good = good & (fits | (k >= patches))
        use = there & fits
        v = value.to(tl.uint32) << above
        v = (v | _rest_of(payload32, rest_at, position, use, rest, width, rotate)) << up
        old = tl.load(target + position, mask=use, other=0).to(tl.uint32) & ~mask
        v = _widen(v) if half else v | old
        tl.store(target + position, v.to(out.dtype.element_ty), mask=use)
    tl.store(status + block, tl.min(good.to(tl.int32), 0))


_ELEMENTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class _Plan:
    """Payload and program of a tensor, verified by the library, on the host; None where the CPU has to decode it."""

    def __init__(self, reader: Reader, tensor: TensorInfo, pinned: bool) -> None:
        payload_bytes, program_bytes = reader.plan(tensor)
        self.payload = torch.zeros(-(-(payload_bytes + _SLACK) // 8) * 8, dtype=torch.uint8, pin_memory=pinned)
        self.program = torch.zeros(program_bytes, dtype=torch.uint8, pin_memory=pinned)
        reader.plan(
            tensor,
            _native.Memory(self.payload.data_ptr(), payload_bytes),
            _native.Memory(self.program.data_ptr(), program_bytes),
        )
        head = self.program[:32]
        self.n_words = int(head[:8].view(torch.int64)[0])
        self.n_blocks = int(head[8:12].view(torch.int32)[0])
        self.n_fields, self.word_bytes, self.half = int(head[12]), int(head[13]), bool(head[15])

    def launch(self, destination: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Starts decoding to contiguous memory; the result has a 1 for every field of a block that was in order."""
        payload = self.payload.to(device, non_blocking=True)
        program = self.program.to(device, non_blocking=True)
        out = destination.reshape(-1).view(_ELEMENTS[self.word_bytes])
        status = torch.zeros(self.n_fields, self.n_blocks, dtype=torch.int32, device=device)
        carried = torch.zeros(self.n_blocks * _LANES, dtype=torch.int32, device=device)
        views = [payload, payload.view(torch.int16), payload.view(torch.int32)]
        views += [program, program.view(torch.int16), program.view(torch.int32)]
        for field in range(self.n_fields):
            _decode_field[(self.n_blocks,)](
                *views,
                out,
                carried,
                status[field],
                self.n_words,
                field,
                self.n_fields,
                half=self.half,
                join=field > 0,
                num_warps=1,
            )
        return status


def decode(reader: Reader, items: Sequence[tuple[TensorInfo, torch.Tensor]]) -> None:
    """Decodes whole tensors to contiguous memory of a GPU, each to the tensor beside it. All are in place when this
    returns. Raises what Reader.decode_many raises."""
    begun: list[tuple[TensorInfo, torch.Tensor, torch.Tensor, _Plan]] = []
    for tensor, destination in items:
        if tensor.n_bytes == 0:
            continue
        device = destination.device
        with reader.holding(tensor):
            try:
                plan = _Plan(reader, tensor, pinned=device.type != "cpu")
            except errors.Unsupported:
                _by_cpu(reader, tensor, destination)
                continue
        # The plan is kept until the end: its memory is read while this goes on.
        begun.append((tensor, destination, plan.launch(destination, device), plan))
    for tensor, destination, status, _ in begun:
        if not bool((status == 1).all()):
            with reader.holding(tensor):
                _by_cpu(reader, tensor, destination)
            raise errors.InternalError(
                f"{reader.path}: tensor {tensor.name!r}: the device found damage, while the same bytes decode well on "
                "the CPU: the device or the way to it is at fault"
            )


def _by_cpu(reader: Reader, tensor: TensorInfo, destination: torch.Tensor) -> None:
    memory = torch.empty(tensor.n_bytes, dtype=torch.uint8)
    reader.decode_many([Destination(tensor, memory.data_ptr())])
    destination.reshape(-1).view(torch.uint8).copy_(memory)
