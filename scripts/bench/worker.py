#!/usr/bin/env python3
"""One contender of the benchmark in a process of its own: worker.py CONTENDER

Reads one JSON object a line from standard input, {"op", "source", "packed", "restored", "threads"}, runs it and answers
with {"seconds", "read"}, or {"error"}. Only the operation is timed; imports and first-time setup are not. The same
rules hold for all contenders, and all threads of the process run on the first `threads` CPUs only.

    compress  the file `source` to the file `packed`
    reuse     `packed`, opened, to memory that was used before
    memory    the same from a file in memory; where a contender knows no such memory, into fresh one
    fresh     the file `packed` to arrays (or bytes) in fresh memory
    load      the file `packed` to torch tensors in fresh memory
    restore   `packed` to the file `restored`
    row       one row of the tensor "weight" of `packed`, which was just opened
    columns   64 columns of it
    copy      the yardstick: memcpy of memory that was used before
    check     compares what `reuse`, `memory`, `fresh` and `load` give with `source`
    about     answers with {"versions", "cpu"}
    rest      frees what was kept between calls

"read" is what the operation read from files by system calls, in bytes; a mapped file does not count.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import mmap
import os
import random
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_CALLS = 3
ENOUGH_SECONDS = 0.2
COPY_BYTES = 256 << 20
SLICED = "weight"
COLUMNS = 64
LIBRARIES = ("bigsmall", "safetensors", "torch", "numpy", "zstandard", "zipnn", "lmzip")


class Task(NamedTuple):
    op: str
    source: str = ""
    packed: str = ""
    restored: str = ""
    threads: int = 1


class Sample(NamedTuple):
    seconds: float
    read: int


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def write(path: str, data: Any) -> None:
    with open(path, "wb") as f:
        f.write(data)


def header_of(path: str) -> tuple[dict[str, Any], int]:
    """The tensors' entries of a safetensors file, and where their data begins."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def main_dtype(path: str) -> str:
    """Dtype of most bytes of a safetensors file."""
    sizes: dict[str, int] = {}
    for entry in header_of(path)[0].values():
        begin, end = entry["data_offsets"]
        sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return max(sizes, key=lambda dtype: sizes[dtype])


def used_memory(size: int) -> mmap.mmap:
    """Memory that was written to, in huge pages where there are any."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    ctypes.memset(address_of(memory), 1, size)
    return memory


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


# ---- timing ----------------------------------------------------------------------------------------------------------


def run_on(threads: int) -> None:
    """Keeps every thread of this process, also those of libraries, on the first `threads` CPUs."""
    if not hasattr(os, "sched_setaffinity"):
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), CPUS[:threads])


CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def bytes_read() -> int:
    with contextlib.suppress(OSError), open("/proc/self/io", "rb") as f:
        return int(f.readline().split()[1])
    return 0


def timed(call: Callable[[], Any], calls: int = MAX_CALLS) -> Sample:
    """The fastest of up to `calls` calls in a fifth of a second, since the first after a pause meets cold memory."""
    fastest = float("inf")
    begin = time.perf_counter()
    unread = -bytes_read() + bytes_read()  # what asking for the number reads
    before = bytes_read()
    done = 0
    for _ in range(calls):
        start = time.perf_counter()
        kept = call()
        end = time.perf_counter()
        del kept  # freed with the clock stopped
        done += 1
        fastest = min(fastest, end - start)
        if end - begin > ENOUGH_SECONDS:
            break
    return Sample(fastest, (bytes_read() - before - unread) // done)


# ---- contenders ------------------------------------------------------------------------------------------------------


class Contender:
    """`rest` frees what an operation kept for the next one."""

    def __call__(self, task: Task) -> Sample:
        """Runs one operation."""
        operation: Callable[[Task], Sample] = getattr(self, task.op)
        return operation(task)

    def rest(self) -> None:
        pass

    def cpu(self) -> str:
        return ""


class Memcpy(Contender):
    """glibc's, called from C."""

    def __init__(self) -> None:
        self.memcpy = ctypes.CDLL(None).memcpy
        self.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self.src, self.dst = used_memory(COPY_BYTES), used_memory(COPY_BYTES)

    def copy(self, task: Task) -> Sample:
        src, dst = address_of(self.src), address_of(self.dst)
        cuts = [COPY_BYTES * i // task.threads for i in range(task.threads + 1)]

        def copy() -> None:
            # ctypes releases the GIL, so that the parts are copied at once.
            parts = [
                threading.Thread(target=self.memcpy, args=(dst + begin, src + begin, end - begin))
                for begin, end in zip(cuts[1:], cuts[2:])
            ]
            for part in parts:
                part.start()
            self.memcpy(dst, src, cuts[1])
            for part in parts:
                part.join()

        return timed(copy)


class Sliced(Contender):
    """Reads parts of a tensor."""

    def row(self, task: Task) -> Sample:
        return self.part(task, lambda rows, columns: random.randrange(rows))

    def columns(self, task: Task) -> Sample:
        def block(rows: int, columns: int) -> Any:
            first = random.randrange(columns - COLUMNS)
            return slice(None), slice(first, first + COLUMNS)

        return self.part(task, block)

    def part(self, task: Task, where: Callable[[int, int], Any]) -> Sample:
        """Opens the file and reads what `where` says of its numbers of rows and columns. Only reading is timed."""
        raise NotImplementedError


class BigSmall(Sliced):
    def __init__(self, mode: str, cpu: str = "") -> None:
        import bigsmall
        import bigsmall._native
        import bigsmall.torch

        bigsmall.set_cpu(cpu)  # loads the library, before run_on() hides CPUs from it
        self.bigsmall = bigsmall
        self.native = bigsmall._native
        self.mode = mode
        self.rest()

    def rest(self) -> None:
        self.room: mmap.mmap | None = None

    def cpu(self) -> str:
        name: str = self.bigsmall.cpu()
        return name

    def compress(self, task: Task) -> Sample:
        return timed(lambda: self.bigsmall.compress(task.source, task.packed, mode=self.mode, workers=task.threads))

    def restore(self, task: Task) -> Sample:
        return timed(lambda: self.bigsmall.decompress(task.packed, task.restored, workers=task.threads))

    def fresh(self, task: Task) -> Sample:
        return timed(lambda: self.bigsmall.decompress(task.packed, workers=task.threads))

    def load(self, task: Task) -> Sample:
        return timed(lambda: self.bigsmall.load(task.packed, workers=task.threads))

    def reuse(self, task: Task) -> Sample:
        return self.from_c(task, None)

    def memory(self, task: Task) -> Sample:
        return self.from_c(task, read(task.packed))

    def from_c(self, task: Task, data: bytes | None) -> Sample:
        """bs_reader_decode_many into one buffer, as C calls it."""
        from bigsmall.reader import Reader

        ffi, lib = self.native.library()
        with Reader(task.packed) if data is None else Reader.from_memory(data) as reader:
            size = sum(tensor.n_bytes for tensor in reader.tensors)
            if self.room is None or len(self.room) < size:
                self.room = used_memory(size)
            items = ffi.new("bs_decode_item[]", len(reader.tensors))
            where = address_of(self.room)
            self.layout = {}
            for item, tensor in zip(items, reader.tensors):
                item.index, item.dst_cap = tensor.position, tensor.n_bytes
                item.dst = ffi.cast("void *", where)
                self.layout[tensor.name] = (where - address_of(self.room), tensor.n_bytes)
                where += tensor.n_bytes
            job = ffi.new("bs_job *", {"size": ffi.sizeof("bs_job"), "workers": task.threads})
            error = ffi.new("bs_error *")
            raw = reader._handle.raw

            def decode() -> None:
                self.native.check(lib.bs_reader_decode_many(raw, items, len(items), job, error), error)

            return timed(decode)

    def check(self, task: Task) -> Sample:
        import numpy as np
        import torch

        header, start = header_of(task.source)
        source = np.fromfile(task.source, np.uint8)[start:]

        def same(got: dict[str, Any]) -> None:
            if got.keys() != header.keys() or not all(
                np.array_equal(got[name], source[slice(*entry["data_offsets"])]) for name, entry in header.items()
            ):
                raise RuntimeError("decoded tensors differ from the source")

        arrays = self.bigsmall.decompress(task.packed)
        same({name: array.reshape(-1).view(np.uint8) for name, array in arrays.items()})
        loaded = self.bigsmall.load(task.packed)
        same({name: tensor.flatten().view(torch.uint8).numpy() for name, tensor in loaded.items()})
        for op in (self.reuse, self.memory):
            self.rest()
            op(task)
            decoded = np.frombuffer(self.room, np.uint8)
            same({name: decoded[at : at + size] for name, (at, size) in self.layout.items()})
        return Sample(0, 0)

    def part(self, task: Task, where: Callable[[int, int], Any]) -> Sample:
        with self.bigsmall.safe_open(task.packed, "pt", workers=task.threads) as file:
            index = where(*file.get_slice(SLICED).get_shape())
            return timed(lambda: file.get_slice(SLICED)[index], 1)


class Safetensors(Sliced):
    """The uncompressed file. load_file maps it, so that its pages are shared with the page cache and come with their
    first use; a clone of every tensor is what other loaders give, private memory."""

    def __init__(self, clone: bool) -> None:
        import safetensors
        import safetensors.torch
        import torch

        self.safetensors = safetensors
        self.torch = torch
        self.clone = clone

    def load(self, task: Task) -> Sample:
        self.torch.set_num_threads(task.threads)
        load = self.safetensors.torch.load_file
        if self.clone:
            return timed(lambda: {name: tensor.clone() for name, tensor in load(task.source).items()})
        return timed(lambda: load(task.source))

    def part(self, task: Task, where: Callable[[int, int], Any]) -> Sample:
        with self.safetensors.safe_open(task.source, "pt") as file:
            index = where(*file.get_slice(SLICED).get_shape())

            def part() -> Any:
                return file.get_slice(SLICED)[index].clone()

            return timed(part, 1)


class Bytes(Contender):
    """A rival that packs bytes to bytes: `pack` and `unpack`."""

    pack: Callable[[Task], Any]
    unpack: Callable[[Task, bytes], Any]

    def compress(self, task: Task) -> Sample:
        return timed(lambda: write(task.packed, self.pack(task)))

    def fresh(self, task: Task) -> Sample:
        return timed(lambda: self.unpack(task, read(task.packed)))

    def memory(self, task: Task) -> Sample:
        data = read(task.packed)
        return timed(lambda: self.unpack(task, data))

    def restore(self, task: Task) -> Sample:
        return timed(lambda: write(task.restored, self.unpack(task, read(task.packed))))


class Zstd(Bytes):
    """One frame of the whole file, level 3. Only compression has threads."""

    def __init__(self) -> None:
        import zstandard

        self.zstandard = zstandard

    def pack(self, task: Task) -> Any:
        packer = self.zstandard.ZstdCompressor(level=3, threads=0 if task.threads == 1 else task.threads)
        return packer.compress(read(task.source))

    def unpack(self, task: Task, data: bytes) -> Any:
        return self.zstandard.ZstdDecompressor().decompress(data)


class ZstdPlanes(Zstd):
    """A frame for each byte of an element, all of one kind together, level 3."""

    WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}  # noqa: RUF012

    def pack(self, task: Task) -> Any:
        import numpy as np

        width = self.WIDTHS[main_dtype(task.source)]
        packer = self.zstandard.ZstdCompressor(level=3, threads=0 if task.threads == 1 else task.threads)
        data = np.fromfile(task.source, np.uint8)
        whole = len(data) // width * width
        frames = [packer.compress(np.ascontiguousarray(data[i:whole:width])) for i in range(width)]
        frames.append(packer.compress(data[whole:]))
        return struct.pack(f"<{len(frames) + 1}Q", len(frames), *map(len, frames)) + b"".join(frames)

    def unpack(self, task: Task, data: bytes) -> Any:
        import numpy as np

        (count,) = struct.unpack_from("<Q", data)
        at = 8 + 8 * count
        unpacker = self.zstandard.ZstdDecompressor()
        planes = []
        for size in struct.unpack_from(f"<{count}Q", data, 8):
            planes.append(np.frombuffer(unpacker.decompress(memoryview(data)[at : at + size]), np.uint8))
            at += size
        out = np.empty(sum(map(len, planes)), np.uint8)
        whole = len(out) - len(planes[-1])
        for i, plane in enumerate(planes[:-1]):
            out[i : whole : count - 1] = plane
        out[whole:] = planes[-1]
        return out


class ZipNN(Bytes):
    """The whole file as bytes of its main dtype. FP8 is told to be bfloat16, which gives the smaller size there."""

    DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "bfloat16"}  # noqa: RUF012

    def __init__(self) -> None:
        import zipnn

        self.make = zipnn.ZipNN

    def coder(self, task: Task) -> Any:
        dtype = self.DTYPES[main_dtype(task.source)]
        return self.make(input_format="byte", bytearray_dtype=dtype, threads=task.threads)

    def pack(self, task: Task) -> Any:
        # It reorders its input in place, so it gets a fresh one.
        return self.coder(task).compress(bytearray(read(task.source)))

    def unpack(self, task: Task, data: bytes) -> Any:
        return self.coder(task).decompress(data)


class Lmz(Contender):
    """Works from file to file only."""

    def __init__(self) -> None:
        import lmz

        self.lmz = lmz

    def compress(self, task: Task) -> Sample:
        return timed(lambda: self.lmz.compress(task.source, task.packed, workers=task.threads))

    def restore(self, task: Task) -> Sample:
        return timed(lambda: self.lmz.decompress(task.packed, task.restored, workers=task.threads, overwrite=True))


class Original(Contender):
    """The original package, whose decoding is serial. It codes with one process: its pool costs more than it brings."""

    def __init__(self, version: str) -> None:
        import bigsmall

        if bigsmall.__version__ != version:
            raise RuntimeError(f"bigsmall {bigsmall.__version__} was imported, not {version}")
        self.bigsmall = bigsmall
        self.quiet = {} if version.startswith("1.") else {"progress": False}

    def compress(self, task: Task) -> Sample:
        return timed(lambda: self.bigsmall.compress(task.source, task.packed, workers=1, **self.quiet))

    def fresh(self, task: Task) -> Sample:
        return timed(lambda: self.bigsmall.decompress(task.packed, **self.quiet))

    def restore(self, task: Task) -> Sample:
        return timed(lambda: self.bigsmall.decompress(task.packed, task.restored, **self.quiet))


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "memcpy": Memcpy,
    "balanced": lambda: BigSmall("balanced"),
    "inference": lambda: BigSmall("inference"),
    "storage": lambda: BigSmall("storage"),
    "balanced-avx2": lambda: BigSmall("balanced", "avx2"),
    "balanced-generic": lambda: BigSmall("balanced", "generic"),
    "safetensors": lambda: Safetensors(clone=False),
    "safetensors-clone": lambda: Safetensors(clone=True),
    "zstandard": Zstd,
    "zstandard-planes": ZstdPlanes,
    "zipnn": ZipNN,
    "lmzip": Lmz,
    "bigsmall-1.0.0": lambda: Original("1.0.0"),
    "bigsmall-4.0.0": lambda: Original("4.0.0"),
}


def versions() -> dict[str, str]:
    """Of the libraries that this process has used."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        module = {"lmzip": "lmz"}.get(name, name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if module in sys.modules:
                found[name] = importlib.metadata.version(name)
    return found


def answer(contender: Contender, task: Task) -> dict[str, Any]:
    if task.op == "about":
        return {"versions": versions(), "cpu": contender.cpu()}
    if task.op == "rest":
        contender.rest()
        return {}
    run_on(task.threads)
    return contender(task)._asdict()


def main() -> None:
    warnings.simplefilter("ignore")
    # Rivals print to standard output; answers go to a copy of it that they do not know.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = None
    for line in sys.stdin:
        try:
            if contender is None:
                contender = CONTENDERS[sys.argv[1]]()
            said = answer(contender, Task(**json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
