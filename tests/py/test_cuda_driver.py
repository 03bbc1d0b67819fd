"""The library's path to a CUDA device, whole, on a machine without one: a driver made for tests (fakecuda.cpp) runs the
committed kernels as C++ and keeps to what the manual allows, copies that come late included."""

from __future__ import annotations

import contextlib
import re
import textwrap
from pathlib import Path

import fakecuda
import numpy as np
import pytest

import bigsmall
from bigsmall import _native
from bigsmall.reader import Reader
from helpers import MODES, bfloat16, every_dtype, run_script, weights, write_safetensors

HERE = Path(__file__).resolve().parent

# What every child begins with.
PRELUDE = '''
import os, sys, threading
sys.path.insert(0, HERE)
import numpy as np
import bigsmall
from bigsmall import _native, errors
from bigsmall.reader import Destination, Reader
from fakecuda import Driver

ffi, lib = _native.library()
NOTHING = _native.Memory(0, 0)
GUARD = bytes(range(64))  # behind every destination

def no_device():
    error = ffi.new("bs_error *")
    try:
        _native.check(lib.bs_cuda_available(error), error)
    except errors.NoDevice as reason:
        return str(reason)

def cpu(reader, tensor):
    out = np.empty(max(tensor.n_bytes, 1), np.uint8)
    reader.decode_many([Destination(tensor, out.ctypes.data)])
    return out[:tensor.n_bytes].tobytes()

def decode(reader, places, host=NOTHING, device=NOTHING, stream=0, job=ffi.NULL):
    """places: (position, address, room)"""
    items = ffi.new("bs_cuda_item[]", len(places))
    for item, place in zip(items, places):
        item.index, item.dst, item.dst_cap = place
    cuda, error = _native.cuda_job(stream, host, device), ffi.new("bs_error *")
    _native.check(lib.bs_reader_decode_cuda(reader._live().raw, items, len(places), cuda, job, error), error)

def check_all(driver, reader, **how):
    tensors = list(reader.tensors)
    places = [(t.position, driver.alloc(t.n_bytes + 64), t.n_bytes) for t in tensors]
    for _, address, n in places:
        driver.write(address + n, GUARD)
    decode(reader, places, **how)
    for t, (_, address, n) in zip(tensors, places):
        assert driver.read(address, n) == cpu(reader, t), t.name
        assert driver.read(address + n, 64) == GUARD, t.name
        driver("cuMemFree_v2", address)

def why(*arguments, **how):
    """Kind and text of the error of a call."""
    call, *arguments = arguments
    try:
        call(*arguments, **how)
    except errors.BigSmallError as error:
        return type(error), str(error)
    raise AssertionError(f"no error of {call} with {arguments}")

def span(reader, tensor):
    """Where its payload stands: (offset in the file, bytes)."""
    place, error = ffi.new("uint64_t[3]"), ffi.new("bs_error *")
    _native.check(lib.bs_reader_locate(reader._live().raw, tensor.position, place, place + 1, place + 2, error), error)
    return place[1], place[2]

def weight(reader, tensor, address, room, cuda=ffi.NULL):
    out, error = ffi.new("bs_weight **"), ffi.new("bs_error *")
    raw = reader._live().raw
    _native.check(lib.bs_weight_open(raw, tensor.position, address, room, cuda, ffi.NULL, out, error), error)
    return out[0]

def weight_bytes(reader, tensor):
    n, error = ffi.new("size_t *"), ffi.new("bs_error *")
    _native.check(lib.bs_reader_weight_bytes(reader._live().raw, tensor.position, n, error), error)
    return n[0]

def clean(driver):
    assert driver.faults() == "", driver.faults()
    assert driver.report() == BASE, (BASE, driver.report())
'''


def child(code: str, *arguments: object, fake_driver: bool = True, **fake: object) -> str:
    """Runs code in a process that finds the fake driver; its output."""
    variables = fakecuda.environment(**fake) if fake_driver else {}
    script = f"HERE = {str(HERE)!r}\n" + PRELUDE + textwrap.dedent(code)
    return run_script(script, *arguments, timeout=150, env=variables)


def zoo(path: Path, rows: int = 300) -> None:
    """Tensors of every form that a device decodes, and some that it leaves to the host."""
    rng = np.random.default_rng(7)
    small = (rng.standard_normal((rows, 517)) * 0.02).astype(np.float32)
    spiky = small.copy()
    spiky.reshape(-1)[rng.integers(0, spiky.size, 300)] *= 1e20
    spiky.reshape(-1)[::9973] = np.nan
    shape = small.shape
    eight = (small * 2000).astype(np.int8).tobytes()  # not floats, but as few bits as they have
    tensors = {
        "bf16": ("BF16", shape, bfloat16(small)),
        "bf16.spiky": ("BF16", shape, bfloat16(spiky)),
        "f16": ("F16", shape, small.astype(np.float16).tobytes()),
        "f32": ("F32", shape, small.tobytes()),
        "f32.spiky": ("F32", shape, spiky.tobytes()),
        "f32.of.f16": ("F32", shape, small.astype(np.float16).astype(np.float32).tobytes()),
        "f32.of.bf16": ("F32", shape, (small.view(np.uint32) & 0xFFFF0000).tobytes()),
        "f8": ("F8_E4M3", shape, ((small * 900).astype(np.int32) & 0xBF).astype(np.uint8).tobytes()),
        "i8": ("I8", shape, eight),
        "i64": ("I64", (1000,), rng.integers(0, 50, 1000).astype(np.int64).tobytes()),
        "f64": ("F64", (5000,), rng.standard_normal(5000).tobytes()),
        "ones": ("BF16", (70000,), bfloat16(np.ones(70000))),
        "noise": ("BF16", (70000,), rng.bytes(140000)),
        "scalar": ("F32", (), np.float32(3).tobytes()),
        "empty": ("BF16", (0, 4), b""),
        "tie": ("BF16", shape, bfloat16(small)),
    }
    for n in (1, 31, 32, 33, 127, 128, 129, 4095, 65535, 65536, 65537):
        tensors[f"bf16.{n}"] = ("BF16", (n,), bfloat16(rng.standard_normal(n) * 0.02))
        tensors[f"f32.{n}"] = ("F32", (n,), (rng.standard_normal(n) * 0.02).astype(np.float32).tobytes())
    write_safetensors(path, {**tensors, **every_dtype()})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "zoo.safetensors"
    zoo(source)
    made = {}
    for mode in MODES:
        made[mode] = folder / f"{mode}.bs"
        bigsmall.compress(source, made[mode], mode=mode)
    return made


@pytest.mark.parametrize(
    ("mode", "order"),
    [(mode, order) for mode in MODES for order in ("late", "random")] + [("balanced", "early"), ("balanced", "thread")],
)
def test_every_form(files: dict[str, Path], mode: str, order: str) -> None:
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        check_all(driver, reader)  # the module is loaded, and stays
        BASE = driver.report()
        check_all(driver, reader)
        stream = driver.make("cuStreamCreate", 1)
        check_all(driver, reader, stream=stream)
        driver("cuStreamDestroy_v2", stream)
        clean(driver)
        """,
        files[mode],
        order=order,
    )


def test_callers_memory_of_any_size(files: dict[str, Path]) -> None:
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        check_all(driver, reader)
        BASE = driver.report()
        # Of any length, and beginning anywhere.
        for size, off in ((1, 0), (1009, 1), ((1 << 20) + 7, 255), (128 << 20, 0)):
            host, there = driver.make("cuMemHostAlloc", off + size, 0), driver.alloc(off + size + 64)
            driver.write(there + off + size, GUARD)
            mine = {"host": _native.Memory(host + off, size), "device": _native.Memory(there + off, size)}
            taken = driver.calls("cuMemAlloc_v2"), driver.calls("cuMemHostAlloc")
            check_all(driver, reader, **mine)
            assert driver.read(there + off + size, 64) == GUARD
            if size == 128 << 20:  # which is always enough
                own = driver.calls("cuMemAlloc_v2") - taken[0] - len(reader.tensors)
                assert (own, driver.calls("cuMemHostAlloc") - taken[1]) == (0, 0)
            driver("cuMemFree_v2", there)
            driver("cuMemFreeHost", host)
        # Only one of the two; and memory that is not page-locked does too, only slower.
        plain = np.zeros(8 << 20, np.uint8)
        check_all(driver, reader, host=_native.Memory(plain.ctypes.data, plain.nbytes))
        assert driver.pageable() > 0
        clean(driver)
        """,
        files["balanced"],
    )


@pytest.mark.parametrize("order", ["late", "random", "thread"])
def test_what_was_queued_before(files: dict[str, Path], order: str) -> None:
    """Device memory that the caller gives may still be in use by his stream: what is queued there ends first."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        check_all(driver, reader)
        tensors = [t for t in reader.tensors if t.n_bytes]
        stream, n = driver.make("cuStreamCreate", 1), 16 << 20
        host, there = driver.make("cuMemHostAlloc", n, 0), driver.alloc(n)
        places = [(t.position, driver.alloc((t.n_bytes + 3) // 4 * 4), t.n_bytes) for t in tensors]
        room = weight_bytes(reader, tensors[0])
        kept_at = driver.alloc(room)
        BASE = driver.report()
        how = {"host": _native.Memory(host, n), "device": _native.Memory(there, n), "stream": stream}

        def queue():
            for _, address, size in places:
                driver("cuMemsetD32Async", address, 0x5A5A5A5A, (size + 3) // 4, stream)
            driver("cuMemsetD32Async", there, 0x5A5A5A5A, n // 4, stream)
            driver("cuMemsetD32Async", kept_at, 0x5A5A5A5A, room // 4, stream)

        for _ in range(3):
            queue()
            decode(reader, places, **how)
            for t, (_, address, size) in zip(tensors, places):
                assert driver.read(address, size) == cpu(reader, t), t.name
            queue()
            kept = weight(reader, tensors[0], kept_at, room, _native.cuda_job(**how))
            # What follows in the stream finds what was decoded.
            t, (_, address, size) = tensors[0], places[0]
            error = ffi.new("bs_error *")
            handle = ffi.cast("void *", stream)
            _native.check(lib.bs_weight_decode(kept, 0, size // t.dtype.size, address, size, handle, error), error)
            driver("cuMemcpyDtoHAsync_v2", host, address, size, stream)
            driver("cuStreamSynchronize", stream)
            assert bytes(ffi.buffer(ffi.cast("char *", host), size)) == cpu(reader, t)
            lib.bs_weight_close(kept)
            clean(driver)
        """,
        files["balanced"],
        order=order,
    )


def test_many_chunks(tmp_path: Path) -> None:
    """A model larger than the ring of buffers, from a file, from memory, and from page-locked memory, and a weight."""
    rng = np.random.default_rng(3)
    # Of numbers from 1 to 2 hardly a byte in four is coded: much to copy, little to emulate.
    n = 1 << 20
    values = (1 + rng.random(34 * n)).astype("<f4")
    tensors = {"big": ("F32", (34 * n,), values.tobytes())}
    for k in range(12):
        values[:4] = k  # no two alike, or they would be stored once
        tensors[f"t{k:02}"] = ("F32", (n,), values[:n].tobytes())
    tensors["weights"] = ("BF16", (n,), bfloat16(weights(3, n)))
    write_safetensors(tmp_path / "m.safetensors", tensors)
    bigsmall.compress(tmp_path / "m.safetensors", tmp_path / "m.bs", mode="inference")
    assert (tmp_path / "m.bs").stat().st_size > 128 << 20
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        tensors = list(reader.tensors)
        want = {t.name: cpu(reader, t) for t in tensors}
        data = open(sys.argv[1], "rb").read()
        pinned = driver.make("cuMemHostAlloc", len(data), 0)
        ffi.memmove(ffi.cast("void *", pinned), data, len(data))

        def from_memory(address):
            files = ffi.new("bs_memory_file *")
            files.size = ffi.sizeof("bs_memory_file")
            files.src, files.src_len = ffi.cast("void *", address), len(data)
            out, error = ffi.new("bs_reader **"), ffi.new("bs_error *")
            _native.check(lib.bs_reader_open_memory(files, 1, ffi.NULL, out, error), error)
            return out[0]

        plain = ffi.from_buffer(data)
        raws = [from_memory(int(ffi.cast("uintptr_t", plain))), reader._live().raw, from_memory(pinned)]
        for turn, raw in enumerate(raws):
            some = tensors if turn else tensors[1::4]
            items = ffi.new("bs_cuda_item[]", len(some))
            for item, t in zip(items, some):
                item.index, item.dst, item.dst_cap = t.position, driver.alloc(t.n_bytes), t.n_bytes
            error = ffi.new("bs_error *")
            pageable = driver.pageable()
            _native.check(lib.bs_reader_decode_cuda(raw, items, len(items), ffi.NULL, ffi.NULL, error), error)
            assert driver.pageable() == pageable
            for item, t in zip(items, some):
                assert driver.read(item.dst, t.n_bytes) == want[t.name], (turn, t.name)
                driver("cuMemFree_v2", item.dst)

        # A weight larger than what it is staged through.
        big = tensors[0]
        room = weight_bytes(reader, big)
        with driver.memory(room) as there, driver.memory(big.n_bytes) as address:
            kept, error = weight(reader, big, there, room), ffi.new("bs_error *")
            status = lib.bs_weight_decode(kept, 0, big.n_bytes // 4, address, big.n_bytes, ffi.NULL, error)
            _native.check(status, error)
            assert driver.read(address, big.n_bytes) == want["big"]
            lib.bs_weight_close(kept)
        driver("cuMemFreeHost", pinned)
        BASE = "1 modules"
        clean(driver)
        """,
        tmp_path / "m.bs",
        order="late",
        memory=2 << 30,
    )


def test_many_chunks_of_the_host(tmp_path: Path) -> None:
    """Blocks that are no device's go through the same buffers, more of them than these hold."""
    n = 170 << 20
    noise = np.random.default_rng(4).bytes(n)
    write_safetensors(tmp_path / "m.safetensors", {"noise": ("U8", (n,), noise)})
    bigsmall.compress(tmp_path / "m.safetensors", tmp_path / "m.bs")
    child(
        """
        driver = Driver()
        driver.context()
        with Reader(sys.argv[1]) as reader:
            check_all(driver, reader)
        BASE = "1 modules"
        clean(driver)
        """,
        tmp_path / "m.bs",
        order="late",
    )


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"devices": 0}, "there is no CUDA device|does not start"),
        ({"driver": 10020}, r"CUDA 10\.2, 11\.0 is needed"),
        ({"cc": 61}, r"6\.1, 7\.5 is needed"),
    ],
)
def test_no_device(files: dict[str, Path], fake: dict[str, object], words: str) -> None:
    out = child(
        """
        print(no_device())
        reader = Reader(sys.argv[1])
        kind, text = why(decode, reader, [])
        assert kind is errors.NoDevice
        print(text)
        kind, text = why(weight, reader, reader.tensors[0], 256, 1 << 20)
        assert kind is errors.NoDevice
        print(text)
        """,
        files["balanced"],
        **fake,
    )
    assert len(re.findall(words, out)) == 3, out
    assert "CPU" in out


def test_no_driver(files: dict[str, Path], tmp_path: Path) -> None:
    with contextlib.suppress(OSError):
        import ctypes

        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a CUDA driver")
    out = child("print(no_device())", fake_driver=False)
    assert "there is no CUDA driver" in out
    assert "CPU" in out


def test_no_context(files: dict[str, Path]) -> None:
    out = child(
        """
        print(no_device())
        kind, text = why(decode, Reader(sys.argv[1]), [])
        assert kind is errors.NoDevice
        print(text)
        """,
        files["balanced"],
    )
    assert out.startswith("None")
    assert "no CUDA context is current" in out


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A file that takes few calls, of every kind."""
    values = weights(1, 70000)
    tensors = {
        "a": ("BF16", (70000,), bfloat16(values)),
        "b": ("F32", (5000,), values[:5000].tobytes()),
        "host": ("I64", (3000,), np.arange(3000, dtype="<i8").tobytes()),
    }
    write_safetensors(tmp_path / "few.safetensors", tensors)
    bigsmall.compress(tmp_path / "few.safetensors", tmp_path / "few.bs")
    return tmp_path / "few.bs"


@pytest.mark.parametrize("order", ["late", "early"])
def test_any_call_fails(few: Path, order: str) -> None:
    """Whichever call of the driver fails, the error names it, nothing is left, and the next call works."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        tensors = list(reader.tensors)
        places = [(t.position, driver.alloc(t.n_bytes), t.n_bytes) for t in tensors]
        room = weight_bytes(reader, tensors[0])
        there = driver.alloc(room)

        def load():
            decode(reader, places)

        def keep():
            lib.bs_weight_close(weight(reader, tensors[0], there, room))

        load()
        keep()
        BASE = driver.report()
        kinds = {2: "CUDA_ERROR_OUT_OF_MEMORY (2)", 719: "CUDA_ERROR_LAUNCH_FAILED (719)"}
        called = {
            "cuMemAlloc_v2", "cuMemHostAlloc", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemsetD32Async",
            "cuLaunchKernel", "cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuStreamCreate",
            "cuStreamSynchronize", "cuStreamWaitEvent",
        }
        failed = {name: 0 for name in called}
        for work in (load, keep):
            for name in sorted(called):
                for k in range(1, 100):
                    error = list(kinds)[k % 2]
                    before = driver.calls(name)
                    driver.fail(f"{name}:{k}:{error}")
                    try:
                        work()
                        hit = driver.calls(name) >= before + k
                        # The last two wait once more, for what an error may have left: nobody asks them.
                        assert not hit or name == "cuStreamSynchronize", (name, k)
                    except errors.DeviceError as reason:
                        text = str(reason)
                        assert type(reason) is errors.DeviceError
                        # An event is made and recorded in one.
                        told = "cuEventRecord" if name == "cuEventCreate" else name.removesuffix("_v2")
                        assert told in text, text
                        assert kinds[error] in text, text
                        failed[name] += 1
                        hit = True
                    driver.fail("")
                    clean(driver)
                    if not hit:
                        break
                else:
                    raise AssertionError(name)
                work()
        # Events are waited for only where there are more chunks than buffers.
        assert all(n for name, n in failed.items() if name != "cuEventSynchronize"), failed
        for t, (_, address, n) in zip(tensors, places):
            assert driver.read(address, n) == cpu(reader, t), t.name
        """,
        few,
        order=order,
    )


def test_first_calls_fail(few: Path) -> None:
    """What is done once, such as loading the kernels, is done again after it failed."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        assert "CUDA_ERROR_UNKNOWN" in no_device()
        assert "no CUDA device" in no_device()
        assert no_device() is None
        for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuDeviceGetAttribute"):
            kind, text = why(check_all, driver, reader)
            assert kind is errors.DeviceError and name in text, text
        kind, text = why(check_all, driver, reader)
        assert kind is errors.NoDevice and "driver is too old" in text, text
        check_all(driver, reader)
        assert driver.faults() == "", driver.faults()
        """,
        few,
        # Counted per function; cuInit is called by the test too.
        fail="cuInit:2:999,cuDeviceGetCount:1:999,cuModuleLoadData:1:2,cuModuleGetFunction:1:999,"
        "cuDeviceGetAttribute:13:999,cuModuleLoadData:3:222",
    )


def test_kernel_faults(few: Path) -> None:
    """After an illegal address nothing works on that context any more; all calls say so, and none waits for ever."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        tensors = list(reader.tensors)
        places = [(t.position, driver.alloc(t.n_bytes), t.n_bytes) for t in tensors]
        for _ in range(2):
            kind, text = why(decode, reader, places)
            assert kind is errors.DeviceError and "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in text, text
        kind, text = why(weight, reader, tensors[0], 4096, 1 << 30)
        assert kind is errors.DeviceError and "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in text, text
        assert cpu(reader, tensors[0])
        assert driver.faults() == "", driver.faults()
        """,
        few,
        fail="kernel:2",
    )


def test_out_of_memory(files: dict[str, Path]) -> None:
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        t = next(t for t in reader.tensors if t.name == "f32")
        address = driver.alloc(t.n_bytes)
        BASE = driver.report()
        kind, text = why(decode, reader, [(t.position, address, t.n_bytes)])
        assert kind is errors.DeviceError, text
        assert "cuMemAlloc" in text and "CUDA_ERROR_OUT_OF_MEMORY" in text and "free some" in text, text
        BASE = "1 modules, " + BASE
        clean(driver)
        """,
        files["balanced"],
        memory=900_000,
    )


def test_damage_on_the_way(files: dict[str, Path]) -> None:
    """A bit that flips between host and device: the file is right, so the library says that the device is not."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        file = open(sys.argv[1], "rb").read()
        check_all(driver, reader)
        BASE = driver.report()
        random = np.random.default_rng(4)
        flips = 0
        for t in reader.tensors:
            if t.name not in ("bf16", "bf16.spiky", "f16", "f32", "f32.of.f16", "f8", "bf16.4095"):
                continue  # of others some blocks are decoded by the host, whose copies nobody can check
            at, n = span(reader, t)
            room = weight_bytes(reader, t)
            for k in random.integers(2000, n - 100, 12):
                with driver.memory(t.n_bytes) as address, driver.memory(room) as there:
                    for call, arguments in (
                        (decode, (reader, [(t.position, address, t.n_bytes)])),
                        (weight, (reader, t, there, room)),
                    ):
                        driver.flip(file[at + k - 15 : at + k + 1])
                        kind, text = why(call, *arguments)
                        assert driver.flipped()
                        assert kind is errors.InternalError, text
                        assert sys.argv[1] in text and t.name in text, text
                        assert "the device or the way to it is at fault" in text, text
                        flips += 1
                clean(driver)
        assert flips == 7 * 12 * 2, flips
        check_all(driver, reader)
        clean(driver)
        """,
        files["balanced"],
    )


def payload_of(path: Path, name: str) -> bytes:
    ffi, lib = _native.library()
    with Reader(path) as reader:
        place, error = ffi.new("uint64_t[3]"), ffi.new("bs_error *")
        position = reader.find(name).position
        _native.check(lib.bs_reader_locate(reader._live().raw, position, place, place + 1, place + 2, error), error)
    return path.read_bytes()[place[1] : place[1] + place[2]]


def test_damaged_files(files: dict[str, Path], tmp_path: Path) -> None:
    """Every flip in a payload is an error that names the file and the tensor, the same as the CPU's."""
    whole = files["balanced"].read_bytes()
    out = child(
        """
        driver = Driver()
        driver.context()
        whole = open(sys.argv[1], "rb").read()
        path = sys.argv[2]
        rng = np.random.default_rng(5)
        with Reader(sys.argv[1]) as reader:
            spans = [(t, *span(reader, t)) for t in reader.tensors if span(reader, t)[1] and t.name != "tie"]
        found = 0
        for t, at, n in spans:
            for turn in range(3 if n > 100000 else 2):
                k = at + int(rng.integers(0, n))
                damaged = bytearray(whole)
                damaged[k] ^= 1 << int(rng.integers(0, 8))
                open(path, "wb").write(damaged)
                with Reader(path) as reader:
                    address = driver.alloc(t.n_bytes)
                    texts = []
                    for way in (lambda: cpu(reader, t), lambda: decode(reader, [(t.position, address, t.n_bytes)])):
                        try:
                            way()
                            raise SystemExit(f"{t.name}: byte {k}: no error")
                        except errors.BigSmallError as error:
                            texts.append((type(error), str(error)))
                    assert texts[0] == texts[1], texts
                    assert path in texts[0][1] and repr(t.name).strip("'") in texts[0][1]
                    driver("cuMemFree_v2", address)
                    found += 1
        print(found)
        assert driver.faults() == "", driver.faults()
        """,
        files["balanced"],
        tmp_path / "damaged.bs",
        order="random",
    )
    assert int(out) > 60
    assert whole == files["balanced"].read_bytes()


def test_wrong_streams_with_right_checksums(files: dict[str, Path], tmp_path: Path) -> None:
    """Files that an encoder with a fault may have made, or somebody who means harm: the device finds what the CPU
    finds, and where that finds nothing both give the same bytes."""
    pytest.importorskip("xxhash")
    child(
        """
        import json, struct
        from xxhash import xxh3_64_intdigest as xxh3

        def forge(name, change):
            \"""A file whose first block of a tensor is changed by change(bytearray), under checksums that fit.\"""
            data = bytearray(whole)
            start = 10 + int.from_bytes(data[6:10], "little")
            entry = next(one for one in json.loads(data[10:start])["tensors"] if one["name"] == name)
            payload, head = start + entry["offset"], entry["extra"]["head"]
            index = payload + 24 + int.from_bytes(data[payload + 20 : payload + 24], "little")
            length = int.from_bytes(data[index : index + 4], "little")
            block = data[payload + head : payload + head + length]
            change(block)
            data[payload + head : payload + head + length] = block
            data[index + 4 : index + 12] = struct.pack("<Q", xxh3(bytes(block)))
            old, new = entry["extra"]["checksum"], f"{xxh3(bytes(data[payload : payload + head])):016x}"
            data[:start] = data[:start].replace(old.encode(), new.encode())
            trailer = len(data) - 48
            data[trailer + 24 : trailer + 32] = struct.pack("<Q", xxh3(bytes(data[:start])))
            data[trailer + 40 :] = struct.pack("<Q", xxh3(bytes(data[trailer : trailer + 40])))
            return bytes(data)

        def outcome(call, *arguments):
            try:
                return call(*arguments)
            except errors.BigSmallError as error:
                return type(error), str(error)

        def by_decode(reader, t):
            with driver.memory(t.n_bytes) as address:
                decode(reader, [(t.position, address, t.n_bytes)])
                return driver.read(address, t.n_bytes)

        def by_weight(reader, t):
            room = weight_bytes(reader, t)
            with driver.memory(room) as there, driver.memory(t.n_bytes) as address:
                kept, error = weight(reader, t, there, room), ffi.new("bs_error *")
                n = t.n_bytes // t.dtype.size
                status = lib.bs_weight_decode(kept, 0, n, address, t.n_bytes, ffi.NULL, error)
                lib.bs_weight_close(kept)
                _native.check(status, error)
                return driver.read(address, t.n_bytes)

        driver = Driver()
        driver.context()
        random = np.random.default_rng(int(sys.argv[3]))
        whole, path = open(sys.argv[1], "rb").read(), sys.argv[2]
        found = {"right": 0, "wrong": 0}
        names = ("bf16", "bf16.spiky", "f16", "f32", "f32.spiky", "f32.of.f16", "f8", "ones", "bf16.4095", "f32.4095")
        for name in names:
            for turn in range(int(sys.argv[4])):
                def change(block):
                    n = len(block)
                    where = random.integers(0, (n, min(160, n), n)[turn % 3])  # anywhere, or where a stream begins
                    if turn % 5 == 4:
                        block[where : where + 40] = random.bytes(len(block[where : where + 40]))
                    else:
                        block[where] ^= 1 << int(random.integers(0, 8))
                open(path, "wb").write(forge(name, change))
                with Reader(path) as reader:
                    t = next(t for t in reader.tensors if t.name == name)
                    expected = outcome(cpu, reader, t)
                    got = outcome(by_decode, reader, t)
                    assert got == expected, (name, turn, expected[:200], got[:200])
                    got = outcome(by_weight, reader, t)
                    assert got == expected or got[0] is errors.Unsupported, (name, turn, expected[:200], got[:200])
                    found["right" if isinstance(expected, bytes) else "wrong"] += 1
        print(found)
        assert all(found.values()), found
        BASE = "1 modules"
        clean(driver)
        """,
        files["balanced"],
        tmp_path / "forged.bs",
        1,
        6,
    )


@pytest.mark.parametrize("order", ["late", "random"])
def test_weights(files: dict[str, Path], order: str) -> None:
    """Tensors that stay compressed: whole, in parts, by rows; and what cannot be one."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        fits = 0
        error = ffi.new("bs_error *")
        for t in reader.tensors:
            try:
                room = weight_bytes(reader, t)
                there = driver.alloc(room + 64)
                driver.write(there + room, GUARD)
                try:
                    kept = weight(reader, t, there, room)
                except errors.BigSmallError:
                    driver("cuMemFree_v2", there)
                    raise
            except errors.Unsupported as reason:
                assert t.name in str(reason) and "keep it decoded" in str(reason), reason
                continue
            fits += 1
            want, size = cpu(reader, t), t.dtype.size
            elements = t.n_bytes // size
            address = driver.alloc(t.n_bytes)
            _native.check(lib.bs_weight_decode(kept, 0, elements, address, t.n_bytes, ffi.NULL, error), error)
            assert driver.read(address, t.n_bytes) == want, t.name
            for first in range(0, elements, 65536):
                count = min(65536, elements - first)
                _native.check(lib.bs_weight_decode(kept, first, count, address, count * size, ffi.NULL, error), error)
                assert driver.read(address, count * size) == want[first * size : (first + count) * size], t.name
            if size > 1 and len(t.shape) == 2:
                row = t.shape[1]
                ids = np.random.default_rng(1).integers(0, t.shape[0], 40).astype(np.int64)
                where = driver.alloc(ids.nbytes)
                driver.write(where, ids.tobytes())
                place = (address, 40 * row * size, ffi.NULL, error)
                _native.check(lib.bs_weight_gather(kept, where, 40, row, *place), error)
                expect = np.frombuffer(want, np.uint8).reshape(t.shape[0], row * size)[ids].tobytes()
                assert driver.read(address, 40 * row * size) == expect, t.name
                driver("cuMemFree_v2", where)
            wrong = [
                (1, 1, address, t.n_bytes),
                (0, elements + 1, address, 1 << 40),
                (65536, elements, address, 1 << 40),
                (0, elements, address, t.n_bytes - 1),
            ]
            if size > 1:
                wrong.append((0, elements, address + 1, t.n_bytes))
            for arguments in wrong:
                status = lib.bs_weight_decode(kept, *arguments, ffi.NULL, error)
                assert status in (errors.INVALID_ARGUMENT, errors.DST_TOO_SMALL), (t.name, arguments)
            lib.bs_weight_close(kept)
            driver("cuMemFree_v2", address)
            assert driver.read(there + room, 64) == GUARD
            driver("cuMemFree_v2", there)
        assert fits >= 8, fits
        BASE = "1 modules"
        clean(driver)
        """,
        files["inference"],
        order=order,
    )


def test_batches_of_weights(files: dict[str, Path]) -> None:
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        names = ["bf16", "f16", "bf16.spiky", "bf16.65536"]
        weights, kept = [], []
        n, error, out = ffi.new("size_t *"), ffi.new("bs_error *"), ffi.new("bs_weight **")
        raw = reader._live().raw
        for name in names:
            t = next(t for t in reader.tensors if t.name == name)
            _native.check(lib.bs_reader_weight_bytes(raw, t.position, n, error), error)
            there = driver.alloc(n[0])
            _native.check(lib.bs_weight_open(raw, t.position, there, n[0], ffi.NULL, ffi.NULL, out, error), error)
            weights.append(out[0])
            kept.append((t, there, driver.alloc(t.n_bytes)))
        handles = ffi.new("bs_weight *[]", weights)
        places = ffi.new("uint64_t[]", [address for _, _, address in kept])
        _native.check(lib.bs_weight_batch_bytes(handles, len(weights), n, error), error)
        notes = driver.alloc(n[0])
        batch = ffi.new("bs_weight_batch **")
        assert lib.bs_weight_batch_open(handles, places, len(weights), notes, n[0] - 1, ffi.NULL, batch, error) == 12
        assert lib.bs_weight_batch_open(handles, places, len(weights), notes + 8, n[0], ffi.NULL, batch, error) == 10
        status = lib.bs_weight_batch_open(handles, places, len(weights), notes, n[0], ffi.NULL, batch, error)
        _native.check(status, error)
        for _ in range(2):
            launches = driver.calls("cuLaunchKernel")
            _native.check(lib.bs_weight_batch_decode(batch[0], ffi.NULL, error), error)
            assert driver.calls("cuLaunchKernel") == launches + 1
            for t, _, address in kept:
                assert driver.read(address, t.n_bytes) == cpu(reader, t), t.name
                driver.write(address, bytes(t.n_bytes))
        lib.bs_weight_batch_close(batch[0])
        for weight in weights:
            lib.bs_weight_close(weight)
        assert driver.faults() == "", driver.faults()
        """,
        files["inference"],
    )


def test_plan(files: dict[str, Path]) -> None:
    """The program and the payload that other devices get are those of the file."""
    child(
        """
        reader = Reader(sys.argv[1])
        t = next(t for t in reader.tensors if t.name == "bf16")
        a, b, error = ffi.new("size_t *"), ffi.new("size_t *"), ffi.new("bs_error *")
        raw = reader._live().raw
        _native.check(lib.bs_reader_plan(raw, t.position, ffi.NULL, 0, ffi.NULL, 0, a, b, ffi.NULL, error), error)
        payload, program = np.zeros(a[0], np.uint8), np.zeros(b[0], np.uint8)
        def go(n, m):
            room = (ffi.from_buffer(payload), n, ffi.from_buffer(program), m)
            return lib.bs_reader_plan(raw, t.position, *room, a, b, ffi.NULL, error)
        assert go(a[0] - 1, b[0]) == 12 and not payload.any()
        _native.check(go(a[0], b[0]), error)
        open(sys.argv[2], "wb").write(payload.tobytes())
        assert program[:8].view(np.uint64)[0] == t.n_bytes // 2 and program[12] == 1 and program[13] == 2
        assert program[28:32].view(np.uint32)[0] == len(program)
        """,
        files["balanced"],
        files["balanced"].with_suffix(".payload"),
        fake_driver=False,
    )
    assert files["balanced"].with_suffix(".payload").read_bytes() == payload_of(files["balanced"], "bf16")


@pytest.mark.parametrize(("name", "order"), [("bf16.spiky", "late"), ("f32.of.f16", "random")])
def test_rows(files: dict[str, Path], name: str, order: str) -> None:
    """Rows of any length that the library takes; numbers of no row leave their place as it is."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        t = next(t for t in reader.tensors if t.name == sys.argv[2])
        size, want, error = t.dtype.size, np.frombuffer(cpu(reader, t), np.uint8), ffi.new("bs_error *")
        elements, room = t.n_bytes // size, weight_bytes(reader, t)
        there = driver.alloc(room)
        kept = weight(reader, t, there, room)
        reader.close()  # the weight needs it no more

        def gather(ids, n, row, address, cap):
            return lib.bs_weight_gather(kept, ids, n, row, address, cap, ffi.NULL, error)

        random = np.random.default_rng(2)
        for row in (1, 2, 63, 517, 8192, 8193, 16383, 16384):
            n = elements // row
            ids = np.array([0, n - 1, n, -1, 1 << 62, -(1 << 62), *random.integers(0, n, 30)], np.int64)
            expect = np.full((len(ids), row * size), 0xDB, np.uint8)  # what the driver fills new memory with
            inside = (ids >= 0) & (ids < n)
            expect[inside] = want[: n * row * size].reshape(n, row * size)[ids[inside]]
            with driver.memory(ids.nbytes) as where, driver.memory(expect.nbytes) as address:
                driver.write(where, ids.tobytes())
                _native.check(gather(where, len(ids), row, address, expect.nbytes), error)
                assert driver.read(address, expect.nbytes) == expect.tobytes(), row
                assert gather(where, len(ids), row, address, expect.nbytes - 1) == errors.DST_TOO_SMALL
                assert gather(where, len(ids), 0, address, expect.nbytes) == errors.UNSUPPORTED_FEATURE
                assert gather(where, len(ids), 16385, address, 1 << 40) == errors.UNSUPPORTED_FEATURE
                assert gather(where + 1, len(ids), row, address, expect.nbytes) == errors.INVALID_ARGUMENT
                assert gather(where, len(ids), row, address + 1, expect.nbytes) == errors.INVALID_ARGUMENT
                assert gather(where, 1 << 62, row, address, (1 << 64) - 1) == errors.INVALID_ARGUMENT
                assert gather(0, 0, row, 0, 0) == 0
        lib.bs_weight_close(kept)
        lib.bs_weight_close(ffi.NULL)
        driver("cuMemFree_v2", there)
        BASE = "1 modules"
        clean(driver)
        """,
        files["balanced"],
        name,
        order=order,
    )


def test_weights_of_other_files(files: dict[str, Path], tmp_path: Path) -> None:
    """What is wrong with a file, and with the room for a weight, is said as the CPU says it."""
    child(
        """
        driver = Driver()
        driver.context()
        whole, path = open(sys.argv[1], "rb").read(), sys.argv[2]
        with Reader(sys.argv[1]) as reader:
            t = next(t for t in reader.tensors if t.name == "bf16")
            at, n = span(reader, t)
            room = weight_bytes(reader, t)
            there = driver.alloc(room)
            for wrong in ((there, room - 1), (there + 8, room), (0, room)):
                kind, text = why(weight, reader, t, *wrong)
                assert kind is errors.InvalidArgument, text
                assert t.name in text, text
            missing = next(t for t in reader.tensors if t.name == "empty")
            kind, text = why(weight_bytes, reader, missing)
            assert kind is errors.Unsupported and "empty" in text, text
        random = np.random.default_rng(6)
        for k in random.integers(0, n, 20):
            damaged = bytearray(whole)
            damaged[at + k] ^= 1 << int(random.integers(0, 8))
            open(path, "wb").write(damaged)
            with Reader(path) as reader:
                assert why(cpu, reader, t) == why(weight, reader, t, there, room)
        open(path, "wb").write(whole)
        with Reader(path) as reader:
            os.truncate(path, at + n // 2)
            assert why(cpu, reader, t) == why(weight, reader, t, there, room)
        driver("cuMemFree_v2", there)
        BASE = "1 modules"
        clean(driver)
        """,
        files["balanced"],
        tmp_path / "damaged.bs",
    )


def test_truncated_meanwhile(files: dict[str, Path], tmp_path: Path) -> None:
    child(
        """
        driver = Driver()
        driver.context()
        check_all(driver, Reader(sys.argv[1]))
        BASE = driver.report()
        whole, path = open(sys.argv[1], "rb").read(), sys.argv[2]
        for name in ("bf16", "f32", "i64", "noise"):
            open(path, "wb").write(whole)
            with Reader(path) as reader:
                t = next(t for t in reader.tensors if t.name == name)
                at, n = span(reader, t)
                os.truncate(path, at + n - 9)
                with driver.memory(t.n_bytes) as address:
                    kind, text = why(decode, reader, [(t.position, address, t.n_bytes)])
                    assert (kind, text) == why(cpu, reader, t)
                    assert path in text and name in text, text
            clean(driver)
        """,
        files["balanced"],
        tmp_path / "short.bs",
    )


def test_wrong_arguments(files: dict[str, Path]) -> None:
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        raw, error = reader._live().raw, ffi.new("bs_error *")
        t = next(t for t in reader.tensors if t.name == "f32")
        address = driver.alloc(t.n_bytes)
        decode(reader, [(t.position, address, t.n_bytes)])
        BASE = driver.report()

        def go(position=t.position, dst=address, room=t.n_bytes, n=1, **members):
            items = ffi.new("bs_cuda_item[]", [(position, dst, room)])
            cuda = ffi.new("bs_cuda_job *", {"size": ffi.sizeof("bs_cuda_job"), **members})
            status = lib.bs_reader_decode_cuda(raw, items, n, cuda, ffi.NULL, error)
            clean(driver)
            return status

        assert go() == 0
        assert go(room=t.n_bytes - 1) == errors.DST_TOO_SMALL and "f32" in ffi.string(error.text).decode()
        assert go(room=0) == errors.DST_TOO_SMALL
        assert go(position=len(reader.tensors)) == errors.NOT_FOUND
        assert go(dst=address + 2) == errors.INVALID_ARGUMENT and "f32" in ffi.string(error.text).decode()
        assert go(size=8) == errors.INVALID_ARGUMENT
        assert go(host_bytes=64) == errors.INVALID_ARGUMENT
        assert go(device_bytes=64) == errors.INVALID_ARGUMENT
        assert go(n=(1 << 64) - 1) == errors.INVALID_ARGUMENT
        assert lib.bs_reader_decode_cuda(raw, ffi.NULL, 1, ffi.NULL, ffi.NULL, error) == errors.INVALID_ARGUMENT
        assert lib.bs_reader_decode_cuda(ffi.NULL, ffi.NULL, 0, ffi.NULL, ffi.NULL, error) == errors.INVALID_ARGUMENT
        assert lib.bs_reader_decode_cuda(raw, ffi.NULL, 0, ffi.NULL, ffi.NULL, error) == 0
        assert lib.bs_weight_decode(ffi.NULL, 0, 0, 0, 0, ffi.NULL, error) == errors.INVALID_ARGUMENT
        assert lib.bs_cuda_available(ffi.NULL) == 0
        """,
        files["balanced"],
    )


@pytest.mark.parametrize("order", ["late", "thread"])
def test_cancelled(files: dict[str, Path], order: str) -> None:
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        check_all(driver, reader)
        tensors = [t for t in reader.tensors if t.n_bytes]
        places = [(t.position, driver.alloc(t.n_bytes), t.n_bytes) for t in tensors]
        BASE = driver.report()
        cancel, done, total = ffi.new("int32_t *"), ffi.new("int64_t *"), ffi.new("int64_t *")
        job = ffi.new("bs_job *", {"size": ffi.sizeof("bs_job"), "cancel": cancel, "done": done, "total": total})
        decode(reader, places, job=job)
        assert done[0] == total[0] == sum(t.n_bytes for t in tensors)
        cancel[0] = 1
        kind, text = why(decode, reader, places, job=job)
        assert kind is errors.Cancelled, text
        clean(driver)
        # In the midst of it: as soon as something was done.
        for _ in range(3):
            cancel[0], done[0] = 0, 0
            ended = threading.Event()

            def watch():
                while not done[0] and not ended.is_set():
                    pass
                cancel[0] = 1

            thread = threading.Thread(target=watch)
            thread.start()
            try:
                decode(reader, places, job=job)
            except errors.Cancelled:
                pass
            ended.set()
            thread.join()
            clean(driver)
        cancel[0] = 0
        decode(reader, places, job=job)
        for t, (_, address, n) in zip(tensors, places):
            assert driver.read(address, n) == cpu(reader, t), t.name
        clean(driver)
        """,
        files["balanced"],
        order=order,
    )


def test_many_files(tmp_path: Path) -> None:
    """A model of several files, two of whose tensors are stored once; and differences to another model."""
    folder = tmp_path / "model"
    folder.mkdir()
    values = weights(1, 300, 300)
    shards = {
        "model-00001-of-00002.safetensors": {"a": ("BF16", (300, 300), bfloat16(values)), "b": ("F32", (), b"abcd")},
        "model-00002-of-00002.safetensors": {
            "c": ("F32", (300, 300), values.tobytes()),
            "d": ("BF16", (300, 300), bfloat16(values)),
        },
    }
    for name, tensors in shards.items():
        write_safetensors(folder / name, tensors)
    bigsmall.compress(folder, tmp_path / "packed")
    base = write_safetensors(tmp_path / "base.safetensors", shards["model-00002-of-00002.safetensors"])
    fine = values * (1 + 0.003 * np.random.default_rng(2).standard_normal(values.shape)).astype("<f4")
    changed = {"c": ("F32", (300, 300), fine.tobytes()), "d": ("BF16", (300, 300), bfloat16(fine))}
    tuned = write_safetensors(tmp_path / "fine.safetensors", changed)
    bigsmall.compress_delta(tuned, base, tmp_path / "fine.bs")
    child(
        """
        driver = Driver()
        driver.context()
        folder, delta, base = sys.argv[1:]
        with Reader(folder) as reader:
            assert sorted(t.name for t in reader.tensors) == ["a", "b", "c", "d"]
            check_all(driver, reader)
        with Reader(delta, base) as reader:
            check_all(driver, reader)
            kind, text = why(weight_bytes, reader, reader.tensors[0])
            assert kind is errors.Unsupported, text
        with Reader(delta) as reader:
            t = reader.tensors[0]
            with driver.memory(t.n_bytes) as address:
                assert why(decode, reader, [(t.position, address, t.n_bytes)]) == why(cpu, reader, t)
        BASE = "1 modules"
        clean(driver)
        """,
        tmp_path / "packed",
        tmp_path / "fine.bs",
        base,
        order="random",
    )


def test_contexts(few: Path) -> None:
    """Each context has its own kernels, and a weight belongs to its context."""
    child(
        """
        driver = Driver()
        reader = Reader(sys.argv[1])
        t = reader.tensors[0]
        contexts = [driver.context(k) for k in (0, 1)]
        for turn in range(2):
            for k, context in enumerate(contexts):
                driver("cuCtxSetCurrent", context)
                check_all(driver, reader)
                assert driver.report() == f"{max(turn * 2, k + 1)} modules", driver.report()
        for _ in contexts:
            driver("cuCtxSetCurrent", 0)  # takes the last one off a stack
        kind, text = why(decode, reader, [])
        assert kind is errors.NoDevice and "no CUDA context is current" in text
        assert driver.faults() == "", driver.faults()
        """,
        few,
        devices=2,
    )


def test_threads_and_fork(files: dict[str, Path]) -> None:
    child(
        """
        driver = Driver()
        context = driver.context()
        reader = Reader(sys.argv[1])
        failed = []
        def work():
            try:
                driver("cuCtxSetCurrent", context)
                for _ in range(2):
                    check_all(driver, reader)
            except BaseException as error:
                failed.append(error)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert not failed, failed
        assert driver.faults() == "", driver.faults()
        BASE = "1 modules"
        clean(driver)

        def forked(work):
            child = os.fork()
            if child == 0:
                try:
                    work()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0

        def raw():
            assert lib.bs_cuda_available(ffi.new("bs_error *")) == errors.FORKED

        def package():
            # A library of its own, but the driver is the parent's, which does not work here.
            assert "CUDA_ERROR_NOT_INITIALIZED" in _native.why_no_cuda()
            for t in reader.tensors:
                cpu(reader, t)

        forked(raw)
        forked(package)
        check_all(driver, reader)
        clean(driver)
        """,
        files["balanced"],
        order="random",
    )
