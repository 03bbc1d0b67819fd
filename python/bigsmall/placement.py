"""Tensors decoded into the memory of a device.

`decode` has the device decode them itself where it can: CUDA devices by the library (`cuda`), those of ROCm by Triton
(`_triton`). Else they are decoded on the CPU by way of a few host buffers: while the bytes of one are copied, the next
ones are decoded. `run` moves chunks and knows neither decoding nor CUDA. A producer fills a host buffer with the bytes
of a chunk, and a `Device` copies them from there to their place.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Callable, NamedTuple

import torch

from bigsmall import _native, cuda, errors
from bigsmall.reader import Destination, Reader, TensorInfo

# With two, decoding waits wherever a copy takes longer than a decode; the third evens that out.
_BUFFERS = 3

# Enough blocks for many workers, and no more memory that the system cannot page out than is needed for that.
_SMALLEST_BUFFER_BYTES = 64 << 20
_LARGEST_BUFFER_BYTES = 256 << 20

# Storage elements of a block, and of the group of blocks that is decoded the fastest.
_BLOCK_ELEMENTS = 1 << 16
_GROUP_ELEMENTS = 4 * _BLOCK_ELEMENTS

# Parts begin at multiples of this in a buffer: a cache line, which no two threads should write to.
_ALIGNMENT = 64


# ---- what goes into which buffer -------------------------------------------------------------------------------------


class Part(NamedTuple):
    """`n_elements` storage elements of a flattened tensor, from number `first` on, whose bytes stand at `offset` of a
    buffer."""

    tensor: TensorInfo
    first: int
    n_elements: int
    offset: int

    @property
    def n_bytes(self) -> int:
        return self.n_elements * self.tensor.dtype.size

    @property
    def whole(self) -> bool:
        return self.n_bytes == self.tensor.n_bytes

    @property
    def last(self) -> bool:
        """Whether the tensor ends with it."""
        return (self.first + self.n_elements) * self.tensor.dtype.size == self.tensor.n_bytes


class Chunk(NamedTuple):
    """What one buffer carries at a time."""

    parts: list[Part]

    @property
    def n_bytes(self) -> int:
        """The room it takes in the buffer."""
        return self.parts[-1].offset + self.parts[-1].n_bytes


def plan(tensors: Sequence[TensorInfo], buffer_bytes: int) -> list[Chunk]:
    """The tensors, in their order, in chunks of at most `buffer_bytes`, which is at least 8.

    Small tensors share a chunk; one that is larger than a buffer is cut, between groups of blocks where the buffer has
    room for one. An empty tensor is a part without elements, so that it is verified like any other.
    """
    chunks: list[Chunk] = []
    for tensor in tensors:
        total = tensor.n_bytes // tensor.dtype.size
        first = 0
        while True:
            count = _elements_of_a_chunk(tensor, total - first, buffer_bytes)
            offset = -(-chunks[-1].n_bytes // _ALIGNMENT) * _ALIGNMENT if chunks else 0
            if not chunks or offset + count * tensor.dtype.size > buffer_bytes:
                chunks.append(Chunk([]))
                offset = 0
            chunks[-1].parts.append(Part(tensor, first, count, offset))
            first += count
            if first == total:
                break
    return chunks


def _elements_of_a_chunk(tensor: TensorInfo, left: int, buffer_bytes: int) -> int:
    """How many of the elements that are left go into the next chunk."""
    room = buffer_bytes // tensor.dtype.size
    if left <= room:
        return left
    unit = next(unit for unit in (_GROUP_ELEMENTS, _BLOCK_ELEMENTS, 1) if unit <= room)
    return room // unit * unit


def buffer_bytes_for(tensors: Sequence[TensorInfo]) -> int:
    """The size of a buffer: so that most tensors go in one piece, and that filling and copying overlap."""
    sizes = [tensor.n_bytes for tensor in tensors]
    wanted = max(max(sizes, default=0), sum(sizes) // 16)
    size = _SMALLEST_BUFFER_BYTES
    while size < wanted and size < _LARGEST_BUFFER_BYTES:
        size *= 2
    return size


# ---- devices ---------------------------------------------------------------------------------------------------------


class Device:
    """Takes chunks to tensors in its memory. This class serves any device of torch, with copies that have ended when
    `send` returns; others go on meanwhile, and override all four methods.

    tensors : name to destination, contiguous
    """

    _non_blocking = False

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        # Bytes, since not every dtype can be copied everywhere. A scalar can be viewed only as one element.
        self._bytes = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}

    def host_buffer(self, n_bytes: int) -> torch.Tensor:
        """Host memory that this device copies from the fastest. RuntimeError where the system grants none: any host
        memory will do then."""
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")

    def send(self, buffer: torch.Tensor, chunk: Chunk) -> Any:
        """Begins to bring a chunk from the buffer to its place. Gives what `wait` takes."""
        for part in chunk.parts:
            start = part.first * part.tensor.dtype.size
            destination = self._bytes[part.tensor.name][start : start + part.n_bytes]
            destination.copy_(buffer[part.offset : part.offset + part.n_bytes], non_blocking=self._non_blocking)

    def wait(self, sent: Any) -> None:
        """Returns when that chunk has left its buffer."""

    def drain(self) -> None:
        """Returns when everything is in its place, or given up: no buffer is read any more, nor a destination written,
        not even by a `send` that failed half way."""


class Cuda(Device):
    """A CUDA (or ROCm) device: copies from page-locked buffers on a stream of their own."""

    _non_blocking = True

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        super().__init__(tensors)
        self._device = device
        self._stream = cuda.side_stream(device)

    def host_buffer(self, n_bytes: int) -> torch.Tensor:
        return cuda.page_locked(n_bytes, self._device)

    def send(self, buffer: torch.Tensor, chunk: Chunk) -> Any:
        with torch.cuda.stream(self._stream):
            super().send(buffer, chunk)
        return self._stream.record_event()

    def wait(self, sent: Any) -> None:
        sent.synchronize()

    def drain(self) -> None:
        # Waiting here, and not a stream for the other, lets the tensors be used on any stream, and brings the error of
        # a copy to light before they are handed out.
        self._stream.synchronize()


# ---- the ring --------------------------------------------------------------------------------------------------------


def run(device: Device, chunks: Sequence[Chunk], fill: Callable[[Chunk, int], None]) -> None:
    """Moves chunks to a device, in their order, each by way of one of a few buffers, which are used in turn.

    fill : puts the bytes of a chunk at an address; runs while the chunks before are under way

    When this returns everything is in its place. When it raises, the device does nothing more: what the destinations
    hold is undefined.
    """
    buffers: list[torch.Tensor] = []
    sent: list[Any] = []
    try:
        for number, chunk in enumerate(chunks):
            turn = number % _BUFFERS
            if number == turn:
                buffers.append(_host_buffer(device, max(later.n_bytes for later in chunks[turn::_BUFFERS])))
                sent.append(None)
            else:
                device.wait(sent[turn])
            fill(chunk, buffers[turn].data_ptr())
            sent[turn] = device.send(buffers[turn], chunk)
    finally:
        _drain(device)


def _host_buffer(device: Device, n_bytes: int) -> torch.Tensor:
    try:
        return device.host_buffer(n_bytes)
    except RuntimeError:  # the limit on locked memory of a user or a container, say
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")


def _drain(device: Device) -> None:
    """Ctrl-C must not free buffers that are still read: it is raised afterwards."""
    interrupt = None
    while True:
        try:
            device.drain()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode(
    reader: Reader,
    tensors: Sequence[TensorInfo],
    into: Mapping[str, torch.Tensor],
    device: torch.device,
    *,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = False,
) -> None:
    """Decodes whole tensors to where `into`, name to tensor, has them: contiguous, on a device other than the CPU.
    Where a GPU cannot decode them itself a warning says why, once in a process.

    tensors : of different names
    workers : threads, None for all available
    verify  : compare every tensor's MD5 too; ChecksumMismatch where one differs. What a GPU has decoded is copied back
              for that

    All are complete when this returns, for use on any stream. Raises what Reader.decode_many and Reader.decode_cuda
    raise, and torch's own errors of the device. The contents are undefined then.
    """
    if device.type == "cuda":
        obstacle = _decode_there(reader, tensors, into, device, workers, progress)
        if obstacle is None:
            if verify:
                _verify_there(reader, tensors, into)
            return
        reason = obstacle.removesuffix("; decode on the CPU and copy")  # so the library advises
        _warn_once(f"{reason}: tensors are decoded on the CPU and copied to the device, which takes longer")
        there: Device = Cuda(into, device)
    else:
        there = Device(into)
    fill(reader, tensors, there, workers=workers, verify=verify, progress=progress)


def _decode_there(
    reader: Reader,
    tensors: Sequence[TensorInfo],
    into: Mapping[str, torch.Tensor],
    device: torch.device,
    workers: int | None,
    progress: bool,
) -> str | None:
    """Has the GPU decode, or says why it does not."""
    if torch.version.hip is not None:
        try:
            from bigsmall import _triton
        except ImportError as missing:
            return f"decoding on a GPU of ROCm needs Triton ({missing})"
        _triton.decode(reader, [(tensor, into[tensor.name]) for tensor in tensors])
        return None
    obstacle = cuda.unavailable(device)
    if obstacle is None:
        try:
            cuda.decode(reader, tensors, into, device, workers=workers, progress="loading" if progress else None)
        except errors.NoDevice as reason:
            return str(reason)
    return obstacle


def _verify_there(reader: Reader, tensors: Sequence[TensorInfo], into: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors:
        digest = hashlib.md5(usedforsecurity=False)
        if tensor.n_bytes:
            for part in into[tensor.name].reshape(-1).view(torch.uint8).split(_SMALLEST_BUFFER_BYTES):
                digest.update(part.cpu().numpy())
        _compare_md5(reader, tensor, digest.hexdigest())


def _compare_md5(reader: Reader, tensor: TensorInfo, found: str) -> None:
    expected = reader.info()["tensors"][tensor.position]["md5"]
    if found != expected:
        raise errors.ChecksumMismatch(
            f"{reader.path}: tensor {tensor.name!r}: MD5 of the decoded bytes is {found}, the header says {expected}"
        )


_warned = False


def _warn_once(text: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(text, UserWarning, stacklevel=2)


def fill(
    reader: Reader,
    tensors: Sequence[TensorInfo],
    device: Device,
    *,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = False,
    buffer_bytes: int | None = None,
) -> None:
    """Decodes whole tensors to where the device has them.

    tensors      : of different names
    workers      : threads, None for all available
    verify       : compare every tensor's MD5 too; ChecksumMismatch where one differs
    buffer_bytes : the size of a buffer, None to choose it by the tensors

    Raises what Reader.decode_many raises, and the device's own errors. The contents are undefined then.
    """
    chunks = plan(tensors, buffer_bytes_for(tensors) if buffer_bytes is None else buffer_bytes)
    total = sum(tensor.n_bytes for tensor in tensors)
    with _native.bar("loading" if progress else None, total) as bar, _Decoder(reader, workers, verify) as decoder:

        def decode(chunk: Chunk, address: int) -> None:
            decoder.decode(chunk, address)
            if bar is not None:
                bar.update(sum(part.n_bytes for part in chunk.parts))

        run(device, chunks, decode)


class _Decoder:
    """Decodes chunks, in the order of `plan`."""

    def __init__(self, reader: Reader, workers: int | None, verify: bool) -> None:
        self._reader = reader
        self._workers = workers
        self._verify = verify
        self._digest = hashlib.md5(usedforsecurity=False)  # of the tensor whose parts are coming
        self._held = contextlib.ExitStack()

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def decode(self, chunk: Chunk, address: int) -> None:
        whole = [Destination(part.tensor, address + part.offset) for part in chunk.parts if part.whole]
        if whole:
            self._reader.decode_many(whole, workers=self._workers)
        for part in chunk.parts:
            if not part.whole:
                self._decode_cut(part, address + part.offset)
        if self._verify:
            for part in chunk.parts:
                self._check(part, address + part.offset)

    def _decode_cut(self, part: Part, address: int) -> None:
        if part.first == 0:
            # Of a model that is read over a network, the payload is fetched once and not for every part.
            self._held.enter_context(self._reader.holding(part.tensor))
        self._reader.decode_range(part.tensor, part.first, part.n_elements, address, workers=self._workers)
        if part.last:
            self._held.close()

    def _check(self, part: Part, address: int) -> None:
        # Not Reader.decode_verified, which needs the whole tensor in one piece.
        if part.first == 0:
            self._digest = hashlib.md5(usedforsecurity=False)
        if part.n_bytes:
            self._digest.update(_native.buffer_at(address, part.n_bytes))
        if part.last:
            _compare_md5(self._reader, part.tensor, self._digest.hexdigest())
