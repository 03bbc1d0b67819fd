"""The tools that stand for a GPU notice what they are there to notice; and the kernels stay inside their buffers
whatever bytes they are given, which sanitizers watch."""

from __future__ import annotations

import signal
import struct
import subprocess
from pathlib import Path

import fakecuda
import numpy as np
import pytest

from bigsmall import _native, errors
from bigsmall.reader import Reader
from helpers import bfloat16, run_script, weights

TESTS = Path(__file__).resolve().parent
PTX = fakecuda.REPOSITORY / "codecs" / "gpu" / "kernel.ptx"

PRELUDE = f"""
import ctypes, sys
sys.path.insert(0, {str(TESTS)!r})
from fakecuda import Driver
driver = Driver()

def fails(status, name, *arguments):
    try:
        driver(name, *arguments)
    except RuntimeError as error:
        assert str(error).startswith(f"{{name}}: {{status}} "), error
    else:
        raise AssertionError(f"{{name}} did not fail")
"""

sanitized = pytest.mark.parametrize("flags", [("-O2",), tuple(fakecuda.SANITIZE)], ids=["plain", "sanitized"])


def script(code: str, *arguments: object, **variables: object) -> str:
    return run_script(PRELUDE + code, *arguments, env=fakecuda.environment(**variables))


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=150, check=False
    )


# ---- emu.h ----


@sanitized
@pytest.mark.parametrize("case", ["right", "races"])
def test_lanes_meet(flags: tuple[str, ...], case: str) -> None:
    """Collectives give what the manual says, and code without a barrier where one belongs goes wrong."""
    done = run(fakecuda.build("meetings.cpp", "meetings", *flags), case)
    assert done.returncode == 0, done.stdout + done.stderr


@sanitized
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("lane_missing", "warp 0, lanes ffffffdf wait in __ballot_sync"),
        ("not_in_mask", "itself not among them"),
        ("masks_differ", "lanes 0000ffff wait in __syncwarp"),
        ("barrier_missed", "warp 2, lanes ffffffff have ended"),
        ("barrier_against_warp", "lanes aaaaaaaa wait in __syncthreads"),
    ],
)
def test_who_waits_for_ever_is_named(flags: tuple[str, ...], case: str, words: str) -> None:
    done = run(fakecuda.build("meetings.cpp", "meetings", *flags), case)
    assert done.returncode == -signal.SIGABRT, done.stdout + done.stderr
    assert words in done.stderr
    assert f"emu: {case}, CTA" in done.stderr


def test_sanitizer_sees_fibers() -> None:
    done = run(fakecuda.build("meetings.cpp", "meetings", *fakecuda.SANITIZE), "past_the_end")
    assert "heap-buffer-overflow" in done.stderr
    assert "in past_the_end" in done.stderr


# ---- the fake driver ----


def test_late_copies() -> None:
    """A buffer used again too early, and a result looked at too early."""
    script(
        """
driver.context()
host, there = driver.make("cuMemHostAlloc", 4096, 0), driver.alloc(4096)
a, b = driver.make("cuStreamCreate", 1), driver.make("cuStreamCreate", 1)
event = driver.make("cuEventCreate", 0)

def fill(value):
    ctypes.memset(host, value, 4096)

def seen():
    return ctypes.string_at(host, 4096)

fill(1)
driver("cuMemcpyHtoDAsync_v2", there, host, 4096, a)
fill(2)
driver("cuStreamSynchronize", b)  # the wrong one
fill(3)
driver("cuStreamSynchronize", a)
driver("cuMemcpyDtoHAsync_v2", host, there, 4096, a)
fill(4)
assert seen() == bytes([4]) * 4096
driver("cuEventRecord", event, a)
driver("cuEventSynchronize", event)
assert seen() == bytes([3]) * 4096

# One stream waits for the other only where it was told to.
driver("cuMemsetD32Async", there, 0x05050505, 1024, a)
driver("cuMemcpyDtoHAsync_v2", host, there, 4096, b)
driver("cuStreamSynchronize", b)
assert seen() == bytes([3]) * 4096
driver("cuEventRecord", event, a)
driver("cuStreamWaitEvent", b, event, 0)
driver("cuMemcpyDtoHAsync_v2", host, there, 4096, b)
driver("cuStreamSynchronize", b)
assert seen() == bytes([5]) * 4096

# Memory that is not page-locked is read at once.
data = bytearray(b"x" * 4096)
buffer = (ctypes.c_char * 4096).from_buffer(data)
assert driver.pageable() == 0
driver("cuMemcpyHtoDAsync_v2", there, buffer, 4096, a)
data[:] = bytes(4096)
driver("cuStreamSynchronize", a)
assert driver.pageable() == 1
assert driver.read(there, 4096) == b"x" * 4096

# What is queued keeps nothing alive.
driver("cuMemcpyHtoDAsync_v2", there, host, 4096, a)
assert "1 operations not waited for" in driver.report()
driver("cuMemFreeHost", host)
assert driver.faults() == ""
fails(700, "cuStreamSynchronize", a)
assert "page-locked memory is no longer there" in driver.faults()
fails(700, "cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 16)
"""
    )


@pytest.mark.parametrize("order", ["late", "early", "random", "thread"])
def test_streams_keep_their_order(order: str) -> None:
    script(
        """
driver.context()
blocking, own = driver.make("cuStreamCreate", 0), driver.make("cuStreamCreate", 1)
there = driver.alloc(4096)
for turn in range(20):
    # The default stream goes after streams that block, and before them.
    driver("cuMemsetD32Async", there, 1, 1024, blocking)
    driver("cuMemsetD32Async", there, 2, 1024, 0)
    driver("cuMemsetD32Async", there, turn, 512, blocking)
    driver("cuStreamSynchronize", blocking)
    assert driver.read(there, 4096) == turn.to_bytes(4, "little") * 512 + (2).to_bytes(4, "little") * 512
    event = driver.make("cuEventCreate", 0)
    driver("cuMemsetD32Async", there, 7, 1024, own)
    driver("cuEventRecord", event, own)
    driver("cuEventDestroy_v2", event)
    while driver.lib.cuStreamQuery(ctypes.c_uint64(own)) == 600:
        pass
    assert driver.read(there, 4) == (7).to_bytes(4, "little")
for stream in (blocking, own):
    driver("cuStreamDestroy_v2", stream)
driver("cuMemFree_v2", there)
assert driver.report() == "" and driver.faults() == ""
""",
        order=order,
        seed=3,
    )


def test_memory_is_guarded() -> None:
    script(
        """
fails(3, "cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 16)
driver("cuInit", 0)
fails(201, "cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 16)
driver.context()
fails(2, "cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), (1 << 20) + 1)
there = driver.alloc(1000)
assert there % 256 == 0
assert driver.read(there, 1000) == b"\\xdb" * 1000  # not zeros
fails(1, "cuMemcpyHtoD_v2", there, bytes(1001), 1001)
host = driver.make("cuMemHostAlloc", 1000, 0)
kind = ctypes.c_uint()
for address, expected in ((there, 2), (there + 999, 2), (host, 1), (host + 999, 1)):
    driver("cuPointerGetAttribute", ctypes.byref(kind), ctypes.c_int(2), address)
    assert kind.value == expected
for address in (there + 1000, host + 1000, ctypes.addressof(kind)):
    fails(1, "cuPointerGetAttribute", ctypes.byref(kind), ctypes.c_int(2), address)
ctypes.memset(host + 1000, 0, 1)
driver("cuMemFreeHost", host)
assert "somebody wrote 1000 bytes from the start of page-locked memory of 1000 bytes" in driver.faults()
driver("cuMemFree_v2", there)
fails(1, "cuMemFree_v2", there)
assert "freed that is not allocated" in driver.faults()
assert driver.report() == ""
""",
        memory=1 << 20,
    )


def test_host_cannot_touch_device_memory() -> None:
    with pytest.raises(AssertionError, match=f"exit code {-signal.SIGSEGV}"):
        script("driver.context(); ctypes.string_at(driver.alloc(64), 1)")


def test_handles_end() -> None:
    script(
        """
first = driver.context()
stream = driver.make("cuStreamCreate", 1)
event = driver.make("cuEventCreate", 0)
driver("cuEventDestroy_v2", event)
fails(400, "cuEventRecord", event, stream)
second = driver.context(1)
fails(400, "cuStreamSynchronize", stream)
device = ctypes.c_int()
driver("cuCtxGetDevice", ctypes.byref(device))
assert device.value == 1
driver("cuCtxSetCurrent", first)
driver("cuStreamSynchronize", stream)
driver("cuStreamDestroy_v2", stream)
fails(400, "cuStreamDestroy_v2", stream)
assert "after its end" in driver.faults() and "another context" in driver.faults()
assert driver.report() == ""
fails(101, "fakecuda_context", 2)
""",
        devices=2,
    )


@pytest.mark.parametrize(
    ("driver", "cc", "status"), [(11000, 90, 0), (10010, 75, 0), (10000, 90, 222), (12040, 70, 209), (9000, 30, 222)]
)
def test_ptx_is_refused_as_drivers_do(driver: int, cc: int, status: int) -> None:
    script(
        """
driver.context()
text, module = open(sys.argv[1], "rb").read(), ctypes.c_uint64()
status = driver.lib.cuModuleLoadData(ctypes.byref(module), text)
assert status == int(sys.argv[2]), status
assert driver.lib.cuModuleLoadData(ctypes.byref(module), b"no PTX") == 218
newer = text.replace(b".version 6.4", b".version 9.9")
assert newer != text and driver.lib.cuModuleLoadData(ctypes.byref(module), newer) == 222
""",
        PTX,
        status,
        driver=driver,
        cc=cc,
    )


def test_launches_are_checked() -> None:
    script(
        """
driver.context()
module = driver.make("cuModuleLoadData", open(sys.argv[1], "rb").read())
fails(500, "cuModuleGetFunction", ctypes.byref(ctypes.c_uint64()), module, b"bs_nothing")
kernel = driver.make("cuModuleGetFunction", module, b"bs_verify")
none = ctypes.c_void_p()
values = (ctypes.c_uint64 * 4)()
at = (ctypes.c_void_p * 4)(*[ctypes.addressof(values) + 8 * k for k in range(4)])

def launch(ctas, threads):
    return (kernel, ctas, 1, 1, threads, 1, 1, 0, 0, at, none)

fails(1, "cuLaunchKernel", *launch(0, 128))
fails(701, "cuLaunchKernel", *launch(1, 256))
assert driver.faults() == ""
driver("cuModuleUnload", module)
fails(400, "cuLaunchKernel", *launch(1, 128))
assert driver.report() == ""
""",
        PTX,
    )


def test_failures_on_demand() -> None:
    script(
        """
driver.context()
fails(999, "cuStreamCreate", ctypes.byref(ctypes.c_uint64()), 0)
driver("cuStreamDestroy_v2", driver.make("cuStreamCreate", 0))
driver.fail("cuMemAlloc_v2:2,cuMemAlloc_v2:4:719")
pieces = [driver.alloc(16)]
fails(2, "cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 16)
pieces.append(driver.alloc(16))
fails(719, "cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 16)
assert driver.calls("cuMemAlloc_v2") == 4
driver.fail("cuMemAlloc_v2:1")
driver.fail("")
pieces.append(driver.alloc(16))
driver.flip(b"cde")
driver.write(pieces[0], b"abcd")
assert not driver.flipped() and driver.read(pieces[0], 4) == b"abcd"
driver.write(pieces[0], b"abcdefgh")
assert driver.flipped() and driver.read(pieces[0], 8) == b"abcddfgh"
driver.write(pieces[0], b"abcdefgh")
assert driver.read(pieces[0], 8) == b"abcdefgh"
""",
        fail="cuStreamCreate:1:999",
    )


def test_child_of_fork_has_no_driver() -> None:
    script(
        """
import os
driver.context()
child = os.fork()
if child == 0:
    os._exit(0 if driver.lib.cuInit(0) == 3 else 1)
assert os.waitpid(child, 0)[1] == 0
driver.alloc(16)
"""
    )


# ---- the kernels ----


def corpus() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors whose every block a device decodes, small, and with what is special about each."""
    random = np.random.default_rng(5)
    n = 20500
    values = weights(1, 65536 * 5)
    bits = values.view("<u4")
    spiky = values[:n].copy()
    spiky[::1999] *= 1e4
    spiky[::3001] = np.nan
    few = np.minimum(random.geometric(0.3, n) - 1, 255).astype("<u4")
    noise = random.integers(0, 256, n).astype("<u4")
    # The last block has so little to say that the states say it all, and no words follow.
    quiet = np.where(random.random(65536 + 300) < 0.003, 1.25, 2.5) * (1 + random.integers(0, 32, 65536 + 300) / 128)
    # A row may begin in one group of blocks and end in the next, which has another table.
    groups = np.concatenate([values[: 4 * 65536], values[:65536] * 1000])
    upper = bits[:n] & 0xFFFF0000
    return {
        "bf16": ("BF16", (n,), bfloat16(spiky)),
        "bf16.two": ("BF16", (65536 + n,), bfloat16(values[: 65536 + n])),
        "bf16.groups": ("BF16", (groups.size,), bfloat16(groups)),
        "bf16.quiet": ("BF16", (quiet.size,), bfloat16(quiet)),
        "f16": ("F16", (n,), values[:n].astype("<f2").tobytes()),
        "f32": ("F32", (n,), values[:n].tobytes()),
        "f32.coded": ("F32", (n,), (upper | few | few[::-1] << 8).tobytes()),
        "f32.mixed": ("F32", (n,), (upper | few | noise << 8).tobytes()),
        "f32.constant": ("F32", (n,), (upper | 0x1700 | few).tobytes()),
        "f32.half": ("F32", (n,), spiky.astype("<f2").astype("<f4").tobytes()),
        "f32.short": ("F32", (n,), (bits[:n] & 0xFFFFE000).tobytes()),
        "f8": ("F8_E4M3", (n,), (random.standard_normal(n) * 20).astype(np.int8).tobytes()),
        "u8": ("U8", (n,), np.clip(random.standard_normal(n) * 25 + 128, 0, 255).astype(np.uint8).tobytes()),
    }


def dump(reader: Reader, name: str, decoded: bytes, folder: Path) -> Path:
    """What decode.cpp reads."""
    ffi, lib = _native.library()
    raw, index = reader._live().raw, reader.find(name).position
    lengths, error = ffi.new("size_t[2]"), ffi.new("bs_error *")

    def plan(*room: object) -> None:
        _native.check(lib.bs_reader_plan(raw, index, *room, lengths, lengths + 1, ffi.NULL, error), error)

    plan(ffi.NULL, 0, ffi.NULL, 0)
    payload, program = (ffi.new("char[]", n) for n in lengths)
    plan(payload, len(payload), program, len(program))
    parts = [bytes(ffi.buffer(payload)), bytes(ffi.buffer(program)), decoded]
    path = folder / f"{name}.dump"
    path.write_bytes(struct.pack("<3Q", *map(len, parts)) + b"".join(parts))
    return path


@pytest.mark.parametrize("mode", ["inference", "balanced"])
def test_kernels_stay_inside_their_buffers(make, tmp_path: Path, mode: str) -> None:
    """Whole payloads, parts and rows are right; of damaged ones every block that changed is found, and no byte beside
    the buffers is touched."""
    tensors = corpus()
    _, target = make(tensors, mode=mode)
    dumps = []
    with Reader(target) as reader:
        for name, (_, _, data) in tensors.items():
            try:
                dumps.append(dump(reader, name, data, tmp_path))
            except errors.Unsupported as why:
                # What this mode stores in another way.
                assert (mode, name) in {("inference", "bf16.quiet")}, why
    program = fakecuda.build("decode.cpp", "decode", *fakecuda.SANITIZE)
    # Two at a time: there are as many CPUs in the smallest of runners.
    halves = [
        subprocess.Popen(
            [str(program), "6", *map(str, part)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for part in (dumps[::2], dumps[1::2])
    ]
    for half in halves:
        output, _ = half.communicate(timeout=150)
        assert half.returncode == 0, output
