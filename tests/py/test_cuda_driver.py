"""The library's path to a CUDA device, whole, on a machine without one: a driver made for tests (fakecuda.cpp) runs the
committed kernels as C++ and keeps to what the manual allows, copies that come late included."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import fakecuda
import numpy as np
import pytest

import bigsmall

HERE = Path(__file__).resolve().parent

# What every child begins with.
PRELUDE = '''
import sys, threading
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

def decode(reader, places, host=NOTHING, device=NOTHING, stream=0):
    """places: (position, address, room)"""
    items = ffi.new("bs_cuda_item[]", len(places))
    for item, place in zip(items, places):
        item.index, item.dst, item.dst_cap = place
    error = ffi.new("bs_error *")
    _native.check(lib.bs_reader_decode_cuda(reader._live().raw, items, len(places), _native.cuda_job(stream, host, device), ffi.NULL, error), error)

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

def clean(driver):
    assert driver.faults() == "", driver.faults()
    assert driver.report() == BASE, (BASE, driver.report())
'''


def child(
    code: str, *arguments: object, env: dict[str, str] | None = None, fake_driver: bool = True, **fake: object
) -> str:
    """Runs code in a process that finds the fake driver; its output."""
    variables = fakecuda.environment(**fake) if fake_driver else {}
    script = f"HERE = {str(HERE)!r}\n" + PRELUDE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **variables, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    import json

    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def bf16(values: np.ndarray) -> bytes:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


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
        "bf16": ("BF16", shape, bf16(small)),
        "bf16.spiky": ("BF16", shape, bf16(spiky)),
        "f16": ("F16", shape, small.astype(np.float16).tobytes()),
        "f32": ("F32", shape, small.tobytes()),
        "f32.spiky": ("F32", shape, spiky.tobytes()),
        "f32.of.f16": ("F32", shape, small.astype(np.float16).astype(np.float32).tobytes()),
        "f32.of.bf16": ("F32", shape, (small.view(np.uint32) & 0xFFFF0000).tobytes()),
        "f8": ("F8_E4M3", shape, ((small * 900).astype(np.int32) & 0xBF).astype(np.uint8).tobytes()),
        "i8": ("I8", shape, eight),
        "i64": ("I64", (1000,), rng.integers(0, 50, 1000).astype(np.int64).tobytes()),
        "f64": ("F64", (5000,), rng.standard_normal(5000).tobytes()),
        "ones": ("BF16", (70000,), bf16(np.ones(70000))),
        "noise": ("BF16", (70000,), rng.bytes(140000)),
        "scalar": ("F32", (), np.float32(3).tobytes()),
        "empty": ("BF16", (0, 4), b""),
        "tie": ("BF16", shape, bf16(small)),
    }
    for n in (1, 31, 32, 33, 127, 128, 129, 4095, 65535, 65536, 65537):
        tensors[f"bf16.{n}"] = ("BF16", (n,), bf16(rng.standard_normal(n) * 0.02))
        tensors[f"f32.{n}"] = ("F32", (n,), (rng.standard_normal(n) * 0.02).astype(np.float32).tobytes())
    write_safetensors(path, tensors)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "zoo.safetensors"
    zoo(source)
    made = {}
    for mode in ("balanced", "inference", "storage"):
        made[mode] = folder / f"{mode}.bs"
        bigsmall.compress(source, made[mode], mode=mode)
    return made


@pytest.mark.parametrize("order", ["late", "random", "early"])
@pytest.mark.parametrize("mode", ["balanced", "inference", "storage"])
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
        for size in (1, 1000, 1 << 20, 128 << 20):
            host, there = driver.make("cuMemHostAlloc", size, 0), driver.alloc(size)
            check_all(driver, reader, host=_native.Memory(host, size), device=_native.Memory(there, size))
            driver("cuMemFree_v2", there)
            driver("cuMemFreeHost", host)
        clean(driver)
        """,
        files["balanced"],
    )


def test_many_chunks(tmp_path: Path) -> None:
    """A model larger than the ring of buffers, from a file, from memory, and from page-locked memory."""
    rng = np.random.default_rng(3)
    block = bf16(rng.standard_normal(1 << 20) * 0.02)
    noise = rng.bytes(1 << 21)
    tensors = {f"t{k:02}": ("BF16", (1 << 20,), block if k % 3 else noise) for k in range(96)}
    for k, name in enumerate(tensors):  # no two alike, or they would be stored once
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, struct.pack("<H", k) + data[2:])
    write_safetensors(tmp_path / "m.safetensors", tensors)
    bigsmall.compress(tmp_path / "m.safetensors", tmp_path / "m.bs", mode="inference")
    child(
        """
        import bigsmall.reader
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
        raws = [reader._live().raw, from_memory(int(ffi.cast("uintptr_t", plain))), from_memory(pinned)]
        items = ffi.new("bs_cuda_item[]", len(tensors))
        for turn, raw in enumerate(raws):
            for item, t in zip(items, tensors):
                item.index, item.dst, item.dst_cap = t.position, driver.alloc(t.n_bytes), t.n_bytes
            error = ffi.new("bs_error *")
            pageable = driver.pageable()
            _native.check(lib.bs_reader_decode_cuda(raw, items, len(items), ffi.NULL, ffi.NULL, error), error)
            assert driver.pageable() == pageable
            for item, t in zip(items, tensors):
                assert driver.read(item.dst, t.n_bytes) == want[t.name], (turn, t.name)
                driver("cuMemFree_v2", item.dst)
        assert driver.faults() == "", driver.faults()
        """,
        tmp_path / "m.bs",
        order="random",
        memory=2 << 30,
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
    import re

    out = child(
        """
        print(no_device())
        reader = Reader(sys.argv[1])
        try:
            decode(reader, [])
        except errors.NoDevice as reason:
            print(reason)
        """,
        files["balanced"],
        **fake,
    )
    assert len(re.findall(words, out)) == 2, out
    assert "CPU" in out


def test_no_driver(files: dict[str, Path], tmp_path: Path) -> None:
    with contextlib.suppress(OSError):
        import ctypes

        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a CUDA driver")
    out = child("print(no_device())", fake_driver=False)
    assert "there is no CUDA driver" in out and "CPU" in out


def test_no_context(files: dict[str, Path]) -> None:
    out = child(
        """
        print(no_device())
        try:
            decode(Reader(sys.argv[1]), [])
        except errors.NoDevice as reason:
            print(reason)
        """,
        files["balanced"],
    )
    assert out.startswith("None") and "no CUDA context is current" in out


def test_failures_of_the_driver(files: dict[str, Path]) -> None:
    """Whichever call fails, the error names it, nothing is left, and the next call works."""
    out = child(
        """
        import os, subprocess
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        names = ["cuMemAlloc_v2", "cuMemHostAlloc", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemsetD32Async",
                 "cuLaunchKernel", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuStreamCreate"]
        check_all(driver, reader)
        print({name: driver.calls(name) for name in names})
        """,
        files["balanced"],
    )
    calls = eval(out)  # noqa: S307 - our own child's
    assert all(calls.values()), calls
    for name, n in calls.items():
        for k in sorted({1, (n + 1) // 2, n}):
            child(
                """
                driver = Driver()
                driver.context()
                reader = Reader(sys.argv[1])
                try:
                    check_all(driver, reader)
                    raise SystemExit("no error")
                except errors.DeviceError as error:
                    assert type(error) is errors.DeviceError, error
                    assert sys.argv[2].removesuffix("_v2") in str(error) or "cuEvent" in str(error), error
                check_all(driver, reader)
                assert driver.faults() == "", driver.faults()
                """
                if name != "cuMemAlloc_v2"
                else """
                driver = Driver()
                driver.context()
                reader = Reader(sys.argv[1])
                try:
                    check_all(driver, reader)
                except (errors.DeviceError, RuntimeError) as error:
                    assert "MEMORY" in str(error), error
                check_all(driver, reader)
                assert driver.faults() == "", driver.faults()
                """,
                files["balanced"],
                name,
                fail=f"{name}:{k}",
            )


def test_damage_on_the_way(files: dict[str, Path]) -> None:
    """A bit that flips between host and device: the file is right, so the library says that the device is not."""
    raw = files["balanced"].read_bytes()
    out = child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        tensor = next(t for t in reader.tensors if t.name == "bf16.spiky")
        address = driver.alloc(tensor.n_bytes)
        try:
            decode(reader, [(tensor.position, address, tensor.n_bytes)])
        except errors.InternalError as error:
            print(error)
        """,
        files["balanced"],
        flip=payload_of(files["balanced"], "bf16.spiky")[5000:5016].hex(),
    )
    assert "bf16.spiky" in out and "device" in out, out
    assert raw == files["balanced"].read_bytes()


def payload_of(path: Path, name: str) -> bytes:
    with bigsmall.reader.Reader(path) as reader:
        tensor = next(t for t in reader.tensors if t.name == name)
        from bigsmall import _native

        ffi, lib = _native.library()
        place = [ffi.new("uint64_t *") for _ in range(3)]
        error = ffi.new("bs_error *")
        _native.check(lib.bs_reader_locate(reader._live().raw, tensor.position, *place, error), error)
        at, n = place[1][0], place[2][0]
    return path.read_bytes()[at : at + n]


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
            spans = []
            for t in reader.tensors:
                place = [ffi.new("uint64_t *") for _ in range(3)]
                error = ffi.new("bs_error *")
                _native.check(lib.bs_reader_locate(reader._live().raw, t.position, *place, error), error)
                if place[2][0] and t.name != "tie":
                    spans.append((t, place[1][0], place[2][0]))
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


def test_weights(files: dict[str, Path]) -> None:
    """Tensors that stay compressed: whole, in parts, by rows; and what cannot be one."""
    child(
        """
        driver = Driver()
        driver.context()
        reader = Reader(sys.argv[1])
        fits = 0
        for t in reader.tensors:
            n, error = ffi.new("size_t *"), ffi.new("bs_error *")
            raw, out = reader._live().raw, ffi.new("bs_weight **")
            try:
                _native.check(lib.bs_reader_weight_bytes(raw, t.position, n, error), error)
                there = driver.alloc(n[0])
                try:
                    _native.check(lib.bs_weight_open(raw, t.position, there, n[0], ffi.NULL, ffi.NULL, out, error), error)
                except errors.BigSmallError:
                    driver("cuMemFree_v2", there)
                    raise
            except errors.Unsupported as why:
                assert t.name in str(why), why
                continue
            fits += 1
            weight, want, size = out[0], cpu(reader, t), t.dtype.size
            elements = t.n_bytes // size
            address = driver.alloc(t.n_bytes)
            _native.check(lib.bs_weight_decode(weight, 0, elements, address, t.n_bytes, ffi.NULL, error), error)
            assert driver.read(address, t.n_bytes) == want, t.name
            for first in range(0, elements, 65536):
                count = min(65536, elements - first)
                _native.check(lib.bs_weight_decode(weight, first, count, address, count * size, ffi.NULL, error), error)
                assert driver.read(address, count * size) == want[first * size : (first + count) * size], t.name
            if size > 1 and len(t.shape) == 2:
                row = t.shape[1]
                ids = np.random.default_rng(1).integers(0, t.shape[0], 40).astype(np.int64)
                where = driver.alloc(ids.nbytes)
                driver.write(where, ids.tobytes())
                _native.check(lib.bs_weight_gather(weight, where, 40, row, address, 40 * row * size, ffi.NULL, error), error)
                expect = np.frombuffer(want, np.uint8).reshape(t.shape[0], row * size)[ids].tobytes()
                assert driver.read(address, 40 * row * size) == expect, t.name
                driver("cuMemFree_v2", where)
            wrong = [(1, 1, address, t.n_bytes), (0, elements + 1, address, 1 << 40), (0, elements, address, t.n_bytes - 1)]
            if size > 1:
                wrong.append((0, elements, address + 1, t.n_bytes))
            for arguments in wrong:
                try:
                    _native.check(lib.bs_weight_decode(weight, *arguments, ffi.NULL, error), error)
                    raise SystemExit(f"{t.name}: {arguments}")
                except errors.BigSmallError:
                    pass
            lib.bs_weight_close(weight)
            driver("cuMemFree_v2", address)
            driver("cuMemFree_v2", there)
        print(fits)
        assert fits >= int(sys.argv[2]), fits
        assert driver.faults() == "", driver.faults()
        """,
        files["inference"],
        8,
        order="late",
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
            return lib.bs_reader_plan(raw, t.position, ffi.from_buffer(payload), n, ffi.from_buffer(program), m, a, b, ffi.NULL, error)
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


def test_threads_and_fork(files: dict[str, Path]) -> None:
    child(
        """
        import os
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
        pid = os.fork()
        if pid == 0:
            error = ffi.new("bs_error *")
            os._exit(0 if lib.bs_cuda_available(error) == 92 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        """,
        files["balanced"],
        order="random",
    )
