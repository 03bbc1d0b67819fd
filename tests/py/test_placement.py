"""Tensors decoded to other devices: the ring of host buffers on engines that copy as late, as unevenly or as badly as
they may, and what the devices say that are not there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from bigsmall._dtypes import BY_NAME, DTYPES
from bigsmall.reader import Reader, TensorInfo
from helpers import DTYPES as SPELLINGS
from helpers import array_bytes, bfloat16, every_dtype, n_bytes, run_script, weights, write_safetensors

torch = pytest.importorskip("torch")

from bigsmall import placement  # noqa: E402
from bigsmall import torch as bigsmall_torch  # noqa: E402

POISON = 0xA5
BLOCK = 1 << 16


# ---- engines ---------------------------------------------------------------------------------------------------------


class Copy:
    """One `send`: it holds no reference to the buffer, just as a copy engine has none."""

    def __init__(self, number: int, buffer: torch.Tensor, chunk: placement.Chunk) -> None:
        self.number = number
        self.buffer = weakref.ref(buffer)
        self.chunk = chunk
        self.expected = buffer[: chunk.n_bytes].clone()


class Late(placement.Device):
    """Copies nothing until it is waited for, and then in any order. Notices a buffer that was filled again or freed too
    early; spoils one as soon as it is copied, and destinations in the beginning."""

    def __init__(self, tensors, seed: int = 0) -> None:
        super().__init__(tensors)
        for destination in self._bytes.values():
            destination.fill_(POISON)
        self.random = random.Random(seed)
        self.pending: list[Copy] = []
        self.sizes: list[int] = []
        self.n_sent = self.n_copied = 0

    def host_buffer(self, n_bytes: int) -> torch.Tensor:
        self.sizes.append(n_bytes)
        return torch.full((n_bytes,), POISON, dtype=torch.uint8)

    def send(self, buffer: torch.Tensor, chunk: placement.Chunk) -> Copy:
        copy = Copy(self.n_sent, buffer, chunk)
        self.n_sent += 1
        self.pending.append(copy)
        return copy

    def perform(self, copy: Copy) -> None:
        buffer = copy.buffer()
        assert buffer is not None, "a buffer was freed before it was copied"
        assert torch.equal(buffer[: copy.chunk.n_bytes], copy.expected), (
            "a buffer was filled again before it was copied"
        )
        super().send(buffer, copy.chunk)
        buffer.fill_(POISON)
        self.n_copied += 1

    def wait(self, sent: Copy) -> None:
        while sent in self.pending:
            self.perform(self.pending.pop(self.random.randrange(len(self.pending))))

    def drain(self) -> None:
        while self.pending:
            self.wait(self.pending[0])


class Busy(Late):
    """Copies on two threads, after delays of any length."""

    def __init__(self, tensors, seed: int = 0) -> None:
        super().__init__(tensors, seed)
        self.engine = ThreadPoolExecutor(2)
        self.under_way: set = set()

    def send(self, buffer: torch.Tensor, chunk: placement.Chunk):
        copy = Copy(self.n_sent, buffer, chunk)
        self.n_sent += 1
        delay = self.random.choice([0, 0, 0.001, 0.003])

        def work() -> None:
            time.sleep(delay)
            self.perform(copy)

        sent = self.engine.submit(work)
        self.under_way.add(sent)
        return sent

    def wait(self, sent) -> None:
        self.under_way.discard(sent)
        sent.result()

    def drain(self) -> None:
        failures = [sent.exception() for sent in self.under_way]
        self.under_way.clear()
        self.engine.shutdown()
        for failure in filter(None, failures):
            raise failure


class Broken(Late):
    """The copy of that number fails, which shows when it is waited for."""

    def __init__(self, tensors, number: int) -> None:
        super().__init__(tensors)
        self.number = number

    def perform(self, copy: Copy) -> None:
        if copy.number == self.number:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        super().perform(copy)

    def drain(self) -> None:
        # As a real one: after an error it does nothing more.
        try:
            super().drain()
        finally:
            self.pending.clear()


ENGINES = {"as it is": placement.Device, "late": Late, "busy": Busy}


def storable(tensors):
    """Without the dtypes that this torch lacks."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(getattr(torch, SPELLINGS[tensor[0]][1], None), torch.dtype)
    }


def destinations(reader: Reader):
    return {tensor.name: bigsmall_torch.empty(tensor) for tensor in reader.tensors}


def place(reader: Reader, engine, buffer_bytes: int, **options):
    into = destinations(reader)
    device = engine(into)
    placement.fill(reader, reader.tensors, device, buffer_bytes=buffer_bytes, **options)
    return into, device


def expect(tensors, loaded) -> None:
    assert set(loaded) == set(tensors)
    for name, (_, _, data) in tensors.items():
        assert array_bytes(loaded[name]) == data, name


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    size = BY_NAME[dtype].size
    return TensorInfo(0, name, BY_NAME[dtype], shape, int(np.prod(shape, dtype=np.int64)) * size)


def many(count: int = 40, seed: int = 0):
    """Tensors of bytes of many lengths, of which some are larger than 2 KiB."""
    choice = random.Random(seed)
    data = {f"t{number}": choice.randbytes(choice.choice([0, 1, 3, 64, 700, 2048, 5000])) for number in range(count)}
    return {name: ("U8", (len(text),), text) for name, text in data.items()}


# ---- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_dtype_around_the_size_of_a_buffer(make, engine: str, verify: bool) -> None:
    buffer_bytes = 512
    tensors = {}
    for name, (dtype, _, _) in storable(every_dtype()).items():
        element = max(8, SPELLINGS[dtype][0]) // 8
        per_element = 2 if dtype == "F4" else 1
        for length in (0, element, 512 - element, 512, 512 + element, 3 * 512 + element):
            shape = (length // element * per_element,)
            bits = np.random.default_rng(length).integers(0, 2 if dtype == "BOOL" else 256, length, dtype=np.uint8)
            assert n_bytes(dtype, shape) == length
            tensors[f"{name}.{length}"] = (dtype, shape, bits.tobytes())
        tensors[f"{name}.scalar"] = ("BF16", (), b"ab") if dtype == "F4" else (dtype, (), bytes(element))
    _, target = make(tensors)
    with Reader(target) as reader:
        loaded, _ = place(reader, ENGINES[engine], buffer_bytes, verify=verify)
    expect(tensors, loaded)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "I64", "U8"])
@pytest.mark.parametrize("mode", ["balanced", "storage"])
def test_a_tensor_of_many_blocks(make, dtype: str, mode: str) -> None:
    count = 9 * BLOCK + 17
    values = weights(3, count)
    data = {
        "BF16": bfloat16(values),
        "F32": values.tobytes(),
        "I64": (values * 1000).astype("<i8").tobytes(),
        "U8": (values * 1000).astype("u1").tobytes(),
    }[dtype]
    tensors = {"before": ("U8", (3,), b"abc"), "w": (dtype, (count,), data), "after": ("U8", (5,), b"defgh")}
    _, target = make(tensors, mode=mode)
    size = len(data) // count
    with Reader(target) as reader:
        # A whole group of blocks, a block, and less than a block.
        for buffer_bytes in (5 * BLOCK * size, 2 * BLOCK * size - 1, 50_000 * size):
            loaded, _ = place(reader, Late, buffer_bytes, verify=True)
            expect(tensors, loaded)


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_copies(make, seed: int) -> None:
    tensors = many(60, seed)
    _, target = make(tensors)
    with Reader(target) as reader:
        for engine in (Late, Busy):
            loaded, device = place(reader, lambda into, engine=engine: engine(into, seed), 2048)
            expect(tensors, loaded)
            assert device.n_copied == device.n_sent > placement._BUFFERS


def test_ties_and_parts_of_a_model(make) -> None:
    embedding = bfloat16(weights(0, 3000))
    tensors = {"embed": ("BF16", (3000,), embedding), "head": ("BF16", (3000,), embedding)}
    _, target = make(tensors)
    with Reader(target) as reader:
        loaded, _ = place(reader, Late, 4000)
        expect(tensors, loaded)
        loaded["embed"].zero_()
        assert array_bytes(loaded["head"]) == embedding

        tensor = reader.find("head")
        into = {"head": bigsmall_torch.empty(tensor)}
        placement.fill(reader, [tensor], Late(into), buffer_bytes=1000)
        expect({"head": tensors["head"]}, into)


def test_a_name_given_twice_is_read_once(make, monkeypatch) -> None:
    _, target = make({"w": ("U8", (3,), b"abc")})
    asked = []
    decode_many = Reader.decode_many
    monkeypatch.setattr(
        Reader, "decode_many", lambda self, todo, **options: asked.append(todo) or decode_many(self, todo, **options)
    )
    with bigsmall.safe_open(target, "pt") as file:
        assert file.get_tensors(["w", "w"])["w"].tolist() == [97, 98, 99]
    assert [len(todo) for todo in asked] == [1]


def test_delta(tmp_path) -> None:
    values = weights(1, 3 * BLOCK)
    base = {"w": ("BF16", (3 * BLOCK,), bfloat16(values)), "b": ("BF16", (9,), bfloat16(values[:9]))}
    fine = {name: (dtype, shape, bytes(data[:-40]) + data[-40:][::-1]) for name, (dtype, shape, data) in base.items()}
    write_safetensors(tmp_path / "base.safetensors", base)
    write_safetensors(tmp_path / "fine.safetensors", fine)
    bigsmall.compress_delta(tmp_path / "fine.safetensors", tmp_path / "base.safetensors", tmp_path / "fine.bs")
    with Reader(tmp_path / "fine.bs", tmp_path / "base.safetensors") as reader:
        loaded, _ = place(reader, Late, 2 * BLOCK, verify=True)
    expect(fine, loaded)


def test_shards(tmp_path) -> None:
    shards = {"a": many(20, 1), "b": {f"more.{name}": tensor for name, tensor in many(20, 2).items()}}
    (tmp_path / "model").mkdir()
    for name, tensors in shards.items():
        write_safetensors(tmp_path / "model" / f"{name}.safetensors", tensors)
    bigsmall.compress(tmp_path / "model", tmp_path / "model-bs")
    with Reader(tmp_path / "model-bs") as reader:
        loaded, _ = place(reader, Busy, 2048, verify=True)
    expect({**shards["a"], **shards["b"]}, loaded)


def test_the_payload_of_a_tensor_that_is_cut_is_fetched_once(make) -> None:
    """Of a model of which only parts are in memory at a time."""
    tensors = {
        "before": ("U8", (3,), b"abc"),
        "w": ("BF16", (6 * BLOCK,), bfloat16(weights(1, 6 * BLOCK))),
        "x": ("BF16", (3 * BLOCK,), bfloat16(weights(2, 3 * BLOCK))),
    }
    _, target = make(tensors)

    class Fetching:
        label = "owner/model"
        files = (("model.bs", target.read_bytes()),)

        def __init__(self) -> None:
            self.users: dict = {}
            self.fetched = []

        @contextlib.contextmanager
        def hold(self, spans, stop=None):
            for span in spans:
                if not self.users.get(span):
                    assert sum(self.users.values()) == 0  # the one before was let go
                    self.fetched.append(span)
                self.users[span] = self.users.get(span, 0) + 1
            yield
            for span in spans:
                self.users[span] -= 1

    parts = Fetching()
    with Reader.from_parts(parts) as reader:
        loaded, _ = place(reader, Late, BLOCK)
        expect(tensors, loaded)
        assert parts.fetched == [reader.locate(tensor) for tensor in reader.tensors]
        assert not any(parts.users.values())


@pytest.mark.parametrize("tensors", [{}, {"e": ("F32", (0, 4), b"")}], ids=["none", "empty"])
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_to_do(make, engine: str, tensors) -> None:
    _, target = make(tensors)
    with Reader(target) as reader:
        loaded, _ = place(reader, ENGINES[engine], 4096, verify=True)
    expect(tensors, loaded)


# ---- what goes into which buffer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_plans(seed: int) -> None:
    choice = random.Random(seed)
    buffer_bytes = choice.choice([8, 100, BLOCK, 3 * BLOCK, 17 * BLOCK + 5, 64 << 20])
    dtypes = [dtype.name for dtype in DTYPES]
    tensors = [
        info(
            f"t{number}",
            choice.choice(dtypes),
            choice.choice([0, 1, 7, 60, 500 if buffer_bytes < 1000 else 20 * BLOCK]),
        )
        for number in range(20)
    ]
    chunks = placement.plan(tensors, buffer_bytes)
    assert all(0 <= chunk.n_bytes <= buffer_bytes for chunk in chunks)
    for chunk in chunks:
        end = 0
        for part in chunk.parts:
            assert part.offset >= end
            assert part.offset % 64 == 0
            end = part.offset + part.n_bytes
    parts = [part for chunk in chunks for part in chunk.parts]
    for tensor in tensors:
        own = [part for part in parts if part.tensor is tensor]
        assert sum(part.n_bytes for part in own) == tensor.n_bytes
        assert [part.first for part in own] == [sum(p.n_elements for p in own[:k]) for k in range(len(own))]
        assert (len(own) == 1) == (tensor.n_bytes <= buffer_bytes)  # only one too large for a buffer is cut
        assert own == parts[parts.index(own[0]) :][: len(own)]
        for part in own[1:]:
            room = buffer_bytes // tensor.dtype.size
            assert part.first % (4 * BLOCK if room >= 4 * BLOCK else BLOCK if room >= BLOCK else 1) == 0
        assert [part.last for part in own] == [False] * (len(own) - 1) + [True]
    assert [part.tensor for part in parts if part.last] == tensors  # in their order


def test_cuts_are_between_groups_of_blocks_where_they_can_be() -> None:
    for dtype, size in (("uint8", 1), ("bfloat16", 2), ("complex64", 8)):
        for blocks, step in ((9, 8), (7, 4), (4, 4), (3, 3), (1, 1)):
            chunks = placement.plan([info("w", dtype, 20 * BLOCK + 5)], blocks * BLOCK * size + 3)
            first = [chunk.parts[0].first for chunk in chunks]
            assert first == [number * step * BLOCK for number in range(len(first))]
            assert len(first) > 2


def test_small_tensors_share_a_buffer() -> None:
    tensors = [info(f"t{number}", "float32", 100) for number in range(100)]
    (chunk,) = placement.plan(tensors, 64 << 20)
    assert len(chunk.parts) == 100
    # The end of a large one, too.
    chunks = placement.plan([info("w", "uint8", 4 * BLOCK + 9), *tensors[:3]], 4 * BLOCK)
    assert [len(chunk.parts) for chunk in chunks] == [1, 4]


def test_sizes_of_buffers() -> None:
    mib = 1 << 20
    for sizes, expected in (
        ([], 64),
        ([1], 64),
        ([64 * mib] * 4, 64),
        ([64 * mib + 1], 128),  # so that it need not be cut
        ([200 * mib], 256),
        ([1 << 40], 256),
        ([mib] * 1500, 128),  # a model of 1.5 GB
        ([mib] * 100_000, 256),
    ):
        tensors = [info("t", "uint8", size) for size in sizes]
        assert placement.buffer_bytes_for(tensors) == expected * mib


def test_no_more_host_memory_than_the_work_needs(make) -> None:
    tensors = many(60)
    _, target = make(tensors)
    with Reader(target) as reader:
        total = sum(tensor.n_bytes for tensor in reader.tensors)
        for buffer_bytes in (100, 2048, 30_000, 1 << 20, 1 << 30):
            _, device = place(reader, Late, buffer_bytes)
            assert len(device.sizes) == min(placement._BUFFERS, device.n_sent)
            assert max(device.sizes) <= buffer_bytes
            assert sum(device.sizes) <= total + 64 * len(tensors)  # and what begins at a cache line
        into = {"t": torch.empty(5, dtype=torch.uint8)}
        device = Late(into)
        placement.run(device, placement.plan([info("t", "uint8", 5)], 64 << 20), lambda chunk, address: None)
        assert device.sizes == [5]


# ---- overlap and reuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2])
def test_buffers_are_filled_while_others_are_copied(ahead: int) -> None:
    """No copy ends before the buffer that many turns later is full: a ring that waited would hang here, until it
    fails."""
    tensor = info("w", "uint8", 10 * BLOCK)
    chunks = placement.plan([tensor], BLOCK)
    assert len(chunks) == 10
    full = [threading.Event() for _ in chunks]
    log = []

    class Gated(Busy):
        def perform(self, copy: Copy) -> None:
            gate = full[min(copy.number + ahead, len(full) - 1)]
            assert gate.wait(60), "the ring waited for a copy before it filled the next buffer"
            super().perform(copy)
            log.append(("copied", copy.number))

    def fill(chunk: placement.Chunk, address: int) -> None:
        number = chunks.index(chunk)
        log.append(("filled", number))
        full[number].set()

    device = Gated({"w": torch.empty(10 * BLOCK, dtype=torch.uint8)})
    placement.run(device, chunks, fill)
    assert sorted(log) == [(what, number) for what in ("copied", "filled") for number in range(10)]
    for number in range(10 - ahead):
        assert log.index(("filled", number + ahead)) < log.index(("copied", number))
    for number in range(placement._BUFFERS, 10):
        assert log.index(("copied", number - placement._BUFFERS)) < log.index(("filled", number))


def test_the_engines_notice_a_ring_that_does_not_wait(monkeypatch, make) -> None:
    """A test of these tests."""
    tensors = many(60)
    _, target = make(tensors)

    class Deaf(Late):
        def wait(self, sent) -> None:
            if len(self.pending) < placement._BUFFERS:  # in the midst of drain()
                super().wait(sent)

        def drain(self) -> None:
            while self.pending:
                self.perform(self.pending.pop())

    with Reader(target) as reader, pytest.raises(AssertionError, match="filled again before it was copied"):
        place(reader, Deaf, 2048)

    monkeypatch.setattr(placement, "_drain", lambda device: None)
    with Reader(target) as reader:
        loaded, device = place(reader, Late, 2048)
        assert any(array_bytes(loaded[name]) != data for name, (_, _, data) in tensors.items())
        with pytest.raises(AssertionError, match="freed before it was copied"):
            device.drain()


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(make):
    _, target = make(many(60))
    with Reader(target) as opened:
        yield opened


@pytest.mark.parametrize("buffer_bytes", [300, 2048, 1 << 20])
@pytest.mark.parametrize("engine", [Late, Busy])
def test_corrupt_data(make, engine, buffer_bytes: int) -> None:
    tensors = many(60)
    _, target = make(tensors)
    name = [name for name, (_, _, data) in tensors.items() if len(data) == 5000][3]
    damaged = bytearray(target.read_bytes())
    damaged[damaged.index(tensors[name][2][-20:])] ^= 1  # random bytes are stored as they are
    target.write_bytes(damaged)
    with Reader(target) as reader:
        into = destinations(reader)
        device = engine(into)
        with pytest.raises(errors.ChecksumMismatch, match=name):
            placement.fill(reader, reader.tensors, device, buffer_bytes=buffer_bytes)
    assert device.n_copied == device.n_sent  # nothing is under way any more


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, -1])
def test_a_copy_fails(reader, number: int) -> None:
    count = len(placement.plan(reader.tensors, 2048))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        place(reader, lambda into: Broken(into, number % count), 2048)


def test_a_send_fails_half_way(reader) -> None:
    made = []

    class Halves(Busy):
        def send(self, buffer, chunk):
            made.append(self)
            if self.n_sent == 5:
                super().send(buffer, placement.Chunk(chunk.parts[:1]))
                raise RuntimeError("no room for another copy")
            return super().send(buffer, chunk)

    with pytest.raises(RuntimeError, match="no room for another copy"):
        place(reader, Halves, 2048)
    assert made[0].n_sent == made[0].n_copied == 6
    assert not made[0].under_way


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_no_page_locked_memory(reader, granted: int) -> None:
    class Poor(Late):
        def host_buffer(self, n_bytes: int) -> torch.Tensor:
            if len(self.sizes) == granted:
                raise RuntimeError("CUDA error: out of memory")
            return super().host_buffer(n_bytes)

    loaded, device = place(reader, Poor, 2048)
    expect(many(60), loaded)
    assert len(device.sizes) == granted


def test_verify_notices_another_md5(make, monkeypatch) -> None:
    tensors = {"small": ("U8", (9,), b"123456789"), "cut": ("U8", (5000,), bytes(5000)), "empty": ("F32", (0,), b"")}
    for name in tensors:
        _, target = make(tensors)
        with Reader(target) as reader:
            entry = reader.info()["tensors"][reader.find(name).position]
            true, entry["md5"] = entry["md5"], "0" * 32
            place(reader, Late, 2048)
            with pytest.raises(errors.ChecksumMismatch, match=f"{name}.*{true}.*the header says 0000") as caught:
                place(reader, Late, 2048, verify=True)
            assert str(target) in str(caught.value)


def fail_in_decode_many(monkeypatch, call: int, error: BaseException) -> None:
    decode_many = Reader.decode_many
    calls = []

    def failing(self, todo, **options) -> None:
        decode_many(self, todo, **options)
        calls.append(todo)
        if len(calls) == call:
            raise error

    monkeypatch.setattr(Reader, "decode_many", failing)


def test_control_c_while_decoding(reader, monkeypatch) -> None:
    made = []

    def engine(into):
        made.append(Busy(into))
        return made[0]

    fail_in_decode_many(monkeypatch, 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        place(reader, engine, 2048)
    assert made[0].n_sent == made[0].n_copied > 0


@pytest.mark.parametrize("failing", [False, True])
def test_control_c_while_the_last_copies_are_under_way(reader, monkeypatch, failing: bool) -> None:
    made = []

    class Interrupted(Late):
        interrupts = 2

        def drain(self) -> None:
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            super().drain()

    def engine(into):
        made.append(Interrupted(into))
        return made[0]

    if failing:
        fail_in_decode_many(monkeypatch, 6, errors.Corrupt("damaged"))
    with pytest.raises(KeyboardInterrupt):
        place(reader, engine, 2048)
    assert made[0].n_sent == made[0].n_copied > 0
    assert not made[0].pending


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_real_control_c(make) -> None:
    """On the ordinary device, at any time: KeyboardInterrupt, and the process goes on working."""
    tensors = {f"w{n}": ("BF16", (2 * BLOCK,), bfloat16(weights(n, 2 * BLOCK))) for n in range(8)}
    _, target = make(tensors)
    sending = threading.Event()
    sent = []

    class Slow(placement.Device):
        def send(self, buffer: torch.Tensor, chunk: placement.Chunk) -> None:
            sent.append(chunk)
            sending.set()
            time.sleep(0.05)
            super().send(buffer, chunk)

    def interrupt() -> None:
        sending.wait()
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Reader(target) as reader:
            into = destinations(reader)
            helper = threading.Thread(target=interrupt)
            helper.start()
            with pytest.raises(KeyboardInterrupt):
                placement.fill(reader, reader.tensors, Slow(into), buffer_bytes=100_000)
            assert 0 < len(sent) < len(placement.plan(reader.tensors, 100_000))
            placement.fill(reader, reader.tensors, placement.Device(into), buffer_bytes=100_000, verify=True)
            helper.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    expect(tensors, into)


def test_a_closed_reader(make) -> None:
    _, target = make(many(5))
    reader = Reader(target)
    tensors = reader.tensors
    into = destinations(reader)
    reader.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        placement.fill(reader, tensors, Late(into), buffer_bytes=2048)


# ---- threads, fork, progress -----------------------------------------------------------------------------------------


def test_threads_at_once(reader) -> None:
    def work(seed: int) -> None:
        loaded, _ = place(reader, lambda into: Busy(into, seed), 1000, verify=seed % 2 == 0)
        expect(many(60), loaded)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_children_of_fork(make) -> None:
    # By small buffers: torch copies more than that between CPU tensors with threads, which do not survive a fork.
    _, target = make({"w": ("BF16", (300, 400), bfloat16(weights(1, 300, 400)))})
    code = """
import os, sys
import torch
from bigsmall import placement
from bigsmall import torch as bigsmall_torch
from bigsmall.reader import Reader

def use(reader):
    into = {tensor.name: bigsmall_torch.empty(tensor) for tensor in reader.tensors}
    placement.fill(reader, reader.tensors, placement.Device(into), buffer_bytes=30_000, verify=True)
    return into["w"].view(torch.uint8).numpy().tobytes()

with Reader(sys.argv[1]) as reader:
    truth = use(reader)
    child = os.fork()
    if child == 0:
        os._exit(0 if use(reader) == truth else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert use(reader) == truth
"""
    run_script(code, target)


def test_progress(make, monkeypatch, reader) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for progress in (False, True):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        place(reader, Late, 2048, progress=progress)
        assert ("loading" in stream.getvalue()) is progress
    for verify in (False, True):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        bigsmall.load(reader.path, verify=True, progress=verify)
        assert ("loading" in stream.getvalue()) is verify

    # It counts all the bytes.
    bar = mock.Mock()
    monkeypatch.setattr(placement._native, "bar", lambda label, total: contextlib.nullcontext(bar))
    total = sum(tensor.n_bytes for tensor in reader.tensors)
    for show in (lambda: place(reader, Late, 2048, progress=True), lambda: bigsmall.load(reader.path, verify=True)):
        bar.reset_mock()
        show()
        assert sum(call.args[0] for call in bar.update.call_args_list) == total


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_decoded(monkeypatch):
    for name in ("decode_many", "decode_range", "decode_verified"):
        monkeypatch.setattr(Reader, name, mock.Mock(side_effect=AssertionError("something was decoded")))


@pytest.mark.usefixtures("nothing_is_decoded")
def test_meta_gives_shapes_only(make) -> None:
    tensors = storable(every_dtype())
    _, target = make({**tensors, "scalar": ("F16", (), b"ab"), "empty": ("F32", (0, 3), b"")})
    loaded = bigsmall.load(target, "meta")
    assert {tensor.device.type for tensor in loaded.values()} == {"meta"}
    assert tuple(loaded["scalar"].shape) == ()
    assert tuple(loaded["empty"].shape) == (0, 3)
    for name, (dtype, shape, _) in tensors.items():
        stored = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        assert tuple(loaded[name].shape) == stored
        assert loaded[name].dtype == getattr(torch, SPELLINGS[dtype][1])


def test_torchs_default_device_does_not_matter(make) -> None:
    tensors = many(5)
    _, target = make(tensors)
    with torch.device("meta"):
        expect(tensors, bigsmall.load(target))
        with Reader(target) as reader:
            loaded, _ = place(reader, placement.Device, 2048)
        expect(tensors, loaded)
        assert bigsmall.safe_open(target, "pt").get_slice("t0")[:2].device.type == "cpu"


@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_no_cuda_device(make, monkeypatch, device: str) -> None:
    _, target = make({"w": ("U8", (3,), b"abc")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    remedy = (
        rf'device {device} cannot be used: .*no CUDA device.*Install the driver .* CUDA build of torch.*device="cpu"'
    )
    with pytest.raises(errors.Unsupported, match=remedy) as caught:
        bigsmall.load(target, device)
    assert "CUDA_VISIBLE_DEVICES" not in str(caught.value)
    with Reader(target) as reader, pytest.raises(errors.Unsupported, match=remedy):
        bigsmall_torch.read(reader, reader.tensors, torch.device(device))
    safetensors = pytest.importorskip("safetensors")
    with pytest.raises(errors.Unsupported, match=remedy) as caught:
        bigsmall.safe_open(target, "pt", device)
    assert isinstance(caught.value, safetensors.SafetensorError)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(errors.Unsupported, match="CUDA_VISIBLE_DEVICES is ''"):
        bigsmall.load(target, device)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_cuda_that_cannot_be(make, monkeypatch) -> None:
    _, target = make({"w": ("U8", (3,), b"abc")})
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(errors.Unsupported, match=r"built without CUDA. Install a CUDA build of torch and the driver"):
        bigsmall.load(target, "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(errors.Unsupported, match=r"forked from one that had used CUDA. Start it by spawn"):
        bigsmall.load(target, "cuda")


@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize(("count", "words"), [(1, "is 1 CUDA device here"), (2, "are 2 CUDA devices here")])
def test_a_cuda_device_of_too_high_a_number(make, monkeypatch, count: int, words: str) -> None:
    _, target = make({"w": ("U8", (3,), b"abc")})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    for device in ("cuda:7", f"cuda:{count}"):
        with pytest.raises(errors.InvalidArgument, match=f"device {device} is invalid: there {words}"):
            bigsmall.load(target, device)
    assert bigsmall_torch.as_device(f"cuda:{count - 1}") == torch.device("cuda", count - 1)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_devices_that_are_not_there(make) -> None:
    _, target = make({"w": ("U8", (3,), b"abc")})
    there = {"xpu": getattr(torch, "xpu", None), "mps": torch.backends.mps}
    for device, module in there.items():
        if module is None or not module.is_available():
            with pytest.raises(errors.Unsupported, match=f'device {device} cannot be used; device="cpu" can'):
                bigsmall.load(target, device)
    with pytest.raises(errors.InvalidArgument, match="device nowhere is invalid"):
        bigsmall.load(target, "nowhere")


def test_a_dtype_that_the_device_does_not_take(monkeypatch) -> None:
    refusal = TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    monkeypatch.setattr(torch, "empty", mock.Mock(side_effect=refusal))
    with pytest.raises(errors.Unsupported, match="tensor 'w' is float64, which device mps does not take"):
        bigsmall_torch.empty(info("w", "float64", 3), device="mps")


@pytest.fixture
def stand_in_for_cuda(monkeypatch):
    """Torch's streams without a driver: whatever is not a method of the real classes fails. Gives the log of calls."""
    log = []
    real_stream, real_event = torch.cuda.Stream, torch.cuda.Event

    def event() -> mock.Mock:
        made = mock.create_autospec(real_event, instance=True)
        number = sum(entry[0] == "record" for entry in log)
        made.synchronize.side_effect = lambda: log.append(("wait", number))
        log.append(("record", number))
        return made

    def stream(device: object) -> mock.Mock:
        made = mock.create_autospec(real_stream, instance=True)
        made.wait_stream.side_effect = lambda other: log.append(("after", other))
        made.record_event.side_effect = event
        made.synchronize.side_effect = lambda: log.append(("drain",))
        return made

    @contextlib.contextmanager
    def current(stream):
        log.append(("on",))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return log


def test_cuda_on_a_stand_in(stand_in_for_cuda, monkeypatch, reader) -> None:
    log = stand_in_for_cuda
    copied = []
    copy = torch.Tensor.copy_

    def noted(self, source, non_blocking=False):
        copied.append(non_blocking)
        return copy(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    loaded, _ = place(reader, lambda into: placement.Cuda(into, torch.device("cpu")), 2048)
    expect(many(60), loaded)
    assert set(copied) == {True}
    chunks = len(placement.plan(reader.tensors, 2048))
    assert log[0] == ("after", "the current stream")
    assert [entry for entry in log if entry[0] == "record"] == [("record", number) for number in range(chunks)]
    assert [entry for entry in log if entry[0] == "wait"] == [("wait", n) for n in range(chunks - placement._BUFFERS)]
    assert log[-1] == ("drain",)
    for number in range(placement._BUFFERS, chunks):
        assert log.index(("wait", number - placement._BUFFERS)) < log.index(("record", number))


def test_load_chooses_the_device(stand_in_for_cuda, monkeypatch, reader) -> None:
    monkeypatch.setattr(bigsmall_torch, "as_device", torch.device)
    asked = []
    empty = torch.empty

    def on_the_cpu(*shape, device, pin_memory=False, **options):
        asked.append((str(device), pin_memory))
        return empty(*shape, device="cpu", **options)

    monkeypatch.setattr(torch, "empty", on_the_cpu)
    monkeypatch.setattr(placement, "_warned", False)
    monkeypatch.setattr(placement.cuda, "unavailable", lambda device: f"{device} is too old")
    with pytest.warns(UserWarning, match="cuda:1 is too old: tensors are decoded on the CPU and copied"):
        expect(many(60), bigsmall.load(reader.path, "cuda:1"))
    assert asked == [("cuda:1", False)] * 60 + [("cpu", True)]  # destinations first, then one page-locked buffer
    assert ("record", 0) in stand_in_for_cuda

    del asked[:], stand_in_for_cuda[:]
    expect(many(60), bigsmall.load(reader.path, "xpu", verify=True))
    assert asked == [("xpu", False)] * 60 + [("cpu", False)]
    assert stand_in_for_cuda == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device(make) -> None:
    """The same bits as on the CPU, through many small buffers and through those of real size."""
    tensors = storable(every_dtype((30, 40, 8)))
    tensors["large"] = ("BF16", (70 << 19,), bfloat16(np.resize(weights(1, 1 << 20), 70 << 19)))
    tensors["scalar"] = ("F32", (), b"abcd")
    tensors["empty"] = ("F32", (0, 3), b"")
    _, target = make(tensors)
    truth = bigsmall.load(target)

    def compare(loaded) -> None:
        assert set(loaded) == set(truth)
        for name, tensor in loaded.items():
            assert tensor.device.type == "cuda"
            assert tensor.shape == truth[name].shape
            assert tensor.dtype == truth[name].dtype
            # On the CPU, by a copy that is queued behind nothing of ours.
            flat = tensor.reshape(-1).view(torch.uint8).cpu()
            assert torch.equal(flat, truth[name].reshape(-1).view(torch.uint8)), name

    for verify in (False, True):
        compare(bigsmall.load(target, "cuda", verify=verify))
    with torch.cuda.stream(torch.cuda.Stream()):
        compare(bigsmall.load(target, f"cuda:{torch.cuda.device_count() - 1}"))
    with Reader(target) as reader:
        for buffer_bytes in (4096, 1 << 20):
            into = {tensor.name: bigsmall_torch.empty(tensor, device="cuda") for tensor in reader.tensors}
            device = placement.Cuda(into, torch.device("cuda"))
            assert device.host_buffer(4096).is_pinned()
            placement.fill(reader, reader.tensors, device, buffer_bytes=buffer_bytes)
            compare(into)
        with ThreadPoolExecutor(3) as threads:
            for loaded in threads.map(
                lambda _: bigsmall_torch.read(reader, reader.tensors, torch.device("cuda")), range(6)
            ):
                compare(loaded)
    with bigsmall.safe_open(target, "pt", "cuda") as file:
        compare(file.get_tensors())
