"""A CUDA driver for machines without a GPU: builds tests/cuda/fakecuda.cpp as libcuda.so.1, gives the environment in
which a process finds it, and, in such a process, what a caller of bigsmall does with a driver."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "tests" / "cuda"
KERNEL = REPOSITORY / "codecs" / "gpu" / "kernel.cu"

# Kernels read the same bytes as words of several widths, as CUDA allows; the pragmas are those of CUDA.
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(source: str, target: str, *flags: str) -> Path:
    """Path of a program or library made from a file of tests/cuda, which stays under build/ until a source changes.
    Skips the test where there is no g++."""
    import pytest  # not in the processes that only call the driver

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    command = [compiler, *FLAGS, *flags]
    digest = hashlib.sha256(repr((command, target)).encode())
    for path in (KERNEL, SOURCES / "emu.h", SOURCES / source):
        digest.update(path.read_bytes())
    root = REPOSITORY / "build" / "fakecuda"
    folder = root / digest.hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            making = root / "making"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            done = subprocess.run(
                [*command, "-o", str(making / target), str(SOURCES / source), "-pthread"],
                capture_output=True,
                text=True,
                check=False,
            )
            if "asan" in done.stderr and "cannot find" in done.stderr:
                pytest.skip("needs g++ with AddressSanitizer")
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stderr, done.stderr
            making.rename(folder)
    return folder / target


def environment(**variables: object) -> dict[str, str]:
    """Environment variables for a process that is to find the fake driver; devices=0 is FAKECUDA_DEVICES, and so on."""
    library = build(
        "fakecuda.cpp", "libcuda.so.1", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"
    )
    paths = [str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": ":".join(paths),
        **{f"FAKECUDA_{name.upper()}": str(value) for name, value in variables.items()},
    }


class Driver:
    """The driver in a process that environment() was made for. Its functions raise RuntimeError where they fail."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libcuda.so.1")
        for name in ("fakecuda_calls", "fakecuda_live", "fakecuda_pageable"):
            getattr(self.lib, name).restype = ctypes.c_ulong
        for name in ("fakecuda_faults", "fakecuda_report"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        for name in ("cuMemAlloc_v2", "cuMemHostAlloc"):
            getattr(self.lib, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def __call__(self, name: str, *arguments: object) -> None:
        """Calls a function; whole numbers go as 64 bits, bytes and buffers as pointers."""
        plain = [ctypes.c_uint64(one) if isinstance(one, int) else one for one in arguments]
        status = getattr(self.lib, name)(*plain)
        if status != 0:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {status} {(text.value or b'').decode()}")

    def make(self, name: str, *arguments: object) -> int:
        """Calls a function whose first argument says where to put a handle or an address."""
        value = ctypes.c_uint64()
        self(name, ctypes.byref(value), *arguments)
        return value.value

    def context(self, device: int = 0) -> int:
        """Makes a context and makes it current."""
        self("fakecuda_context", device)
        return self.make("cuCtxGetCurrent")

    def alloc(self, n_bytes: int) -> int:
        return self.make("cuMemAlloc_v2", n_bytes)

    @contextlib.contextmanager
    def memory(self, n_bytes: int) -> Iterator[int]:
        """Device memory, freed at the end."""
        address = self.alloc(max(n_bytes, 1))
        try:
            yield address
        finally:
            self("cuMemFree_v2", address)

    def read(self, address: int, n_bytes: int) -> bytes:
        """What device memory holds when everything queued in streams that block is done."""
        buffer = ctypes.create_string_buffer(max(n_bytes, 1))
        self("cuMemcpyDtoH_v2", buffer, address, n_bytes)
        return buffer.raw[:n_bytes]

    def write(self, address: int, data: bytes) -> None:
        self("cuMemcpyHtoD_v2", address, data, len(data))

    def calls(self, name: str) -> int:
        """How often a function was called."""
        return int(self.lib.fakecuda_calls(name.encode()))

    def fail(self, failures: str) -> None:
        """Lets calls fail from now on: "name:n:error", the n-th from here; "" takes all such back."""
        self.lib.fakecuda_fail(failures.encode())

    def flip(self, data: bytes) -> None:
        """Damages the next copy to the device that has these bytes, in the last of them."""
        self.lib.fakecuda_flip(data, ctypes.c_size_t(len(data)))

    def flipped(self) -> bool:
        """Whether that has happened."""
        return bool(self.lib.fakecuda_flipped())

    def report(self) -> str:
        """What exists, or "" where everything was given back."""
        return str(self.lib.fakecuda_report().decode())

    def faults(self) -> str:
        """What was done wrong, a line each."""
        return str(self.lib.fakecuda_faults().decode())

    def pageable(self) -> int:
        """Copies from or to memory that was not page-locked."""
        return int(self.lib.fakecuda_pageable())
