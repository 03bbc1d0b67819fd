#!/usr/bin/env python3
"""One contender of the benchmark in a process of its own: worker.py CONTENDER

Reads one JSON object a line from standard input, {"op", "source", "packed", "restored", "threads"}, runs it and answers
with {"seconds"}, or {"error"}. Only the operation is timed; imports and first-time setup are not.
The same rules hold for all contenders.

    compress  the file `source` to the file `packed`
    decode    `packed` to tensors (or bytes) in fresh memory
    reuse     the same into memory that was used before
    restore   `packed` to the file `restored`
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
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


class Task(NamedTuple):
    op: str
    source: str
    packed: str
    restored: str
    threads: int


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def write(path: str, data: Any) -> None:
    with open(path, "wb") as f:
        f.write(data)


def main_dtype(path: str) -> str:
    """Dtype of most bytes of a safetensors file."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    sizes: dict[str, int] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return max(sizes, key=lambda dtype: sizes[dtype])


class Memcpy:
    """The yardstick: one copy of the bytes of the source, between memory that was used before."""

    def __init__(self) -> None:
        self.path = ""

    def __call__(self, task: Task) -> float:
        if self.path != task.source:
            self.path = task.source
            data = read(task.source)
            self.size = len(data)
            self.src = ctypes.create_string_buffer(data, self.size)
            self.dst = ctypes.create_string_buffer(self.size)
        src, dst = ctypes.addressof(self.src), ctypes.addressof(self.dst)
        cuts = [self.size * i // task.threads for i in range(task.threads + 1)]

        def copy() -> None:
            # ctypes releases the GIL, so that the parts are copied at once.
            parts = [
                threading.Thread(target=ctypes.memmove, args=(dst + begin, src + begin, end - begin))
                for begin, end in zip(cuts[1:], cuts[2:])
            ]
            for part in parts:
                part.start()
            ctypes.memmove(dst, src, cuts[1])
            for part in parts:
                part.join()

        return timed(copy)


class BigSmall:
    def __init__(self, mode: str) -> None:
        import bigsmall
        import bigsmall.numpy
        import bigsmall.reader

        self.bigsmall = bigsmall
        self.mode = mode
        self.path = ""

    def __call__(self, task: Task) -> float:
        bigsmall = self.bigsmall
        if task.op == "compress":
            return timed(lambda: bigsmall.compress(task.source, task.packed, mode=self.mode, workers=task.threads))
        if task.op == "decode":
            return timed(lambda: bigsmall.decompress(task.packed, workers=task.threads))
        if task.op == "restore":
            return timed(lambda: bigsmall.decompress(task.packed, task.restored, workers=task.threads))
        if self.path != task.packed:
            self.path = task.packed
            self.arrays = bigsmall.decompress(task.packed)

        def reuse() -> None:
            with bigsmall.reader.Reader(task.packed) as reader:
                addresses = [bigsmall.numpy.address(self.arrays[tensor.name]) for tensor in reader.tensors]
                reader.decode_many(map(bigsmall.reader.Destination, reader.tensors, addresses), workers=task.threads)

        return timed(reuse)


class Zstd:
    """One frame of the whole file, level 3. Only compression has threads."""

    def __init__(self) -> None:
        import zstandard

        self.zstandard = zstandard

    def __call__(self, task: Task) -> float:
        if task.op == "compress":
            threads = 0 if task.threads == 1 else task.threads
            packer = self.zstandard.ZstdCompressor(level=3, threads=threads)
            return timed(lambda: write(task.packed, packer.compress(read(task.source))))
        unpacker = self.zstandard.ZstdDecompressor()
        if task.op == "decode":
            return timed(lambda: unpacker.decompress(read(task.packed)))
        return timed(lambda: write(task.restored, unpacker.decompress(read(task.packed))))


class ZipNN:
    """The whole file as bytes of its main dtype. FP8 is told to be bfloat16, which gives the smaller size there."""

    DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "bfloat16"}  # noqa: RUF012

    def __init__(self) -> None:
        import zipnn

        self.make = zipnn.ZipNN

    def __call__(self, task: Task) -> float:
        dtype = self.DTYPES[main_dtype(task.source)]
        coder = self.make(input_format="byte", bytearray_dtype=dtype, threads=task.threads)
        if task.op == "compress":
            # It reorders its input in place, so it gets a fresh one.
            return timed(lambda: write(task.packed, coder.compress(bytearray(read(task.source)))))
        if task.op == "decode":
            return timed(lambda: coder.decompress(read(task.packed)))
        return timed(lambda: write(task.restored, coder.decompress(read(task.packed))))


class Lmz:
    """Works from file to file only."""

    def __init__(self) -> None:
        import lmz

        self.lmz = lmz

    def __call__(self, task: Task) -> float:
        if task.op == "compress":
            return timed(lambda: self.lmz.compress(task.source, task.packed, workers=task.threads))
        return timed(lambda: self.lmz.decompress(task.packed, task.restored, workers=task.threads, overwrite=True))


class Original:
    """The original package, whose decoding is serial. It codes with one process: its pool costs more than it brings."""

    def __init__(self, version: str) -> None:
        import bigsmall

        if bigsmall.__version__ != version:
            raise RuntimeError(f"bigsmall {bigsmall.__version__} was imported, not {version}")
        self.bigsmall = bigsmall
        self.quiet = {} if version.startswith("1.") else {"progress": False}

    def __call__(self, task: Task) -> float:
        bigsmall = self.bigsmall
        if task.op == "compress":
            return timed(lambda: bigsmall.compress(task.source, task.packed, workers=1, **self.quiet))
        if task.op == "decode":
            return timed(lambda: bigsmall.decompress(task.packed, **self.quiet))
        return timed(lambda: bigsmall.decompress(task.packed, task.restored, **self.quiet))


def timed(call: Callable[[], Any]) -> float:
    """The fastest of up to three calls within a fifth of a second, since the first after a pause meets cold memory."""
    fastest = float("inf")
    begin = time.perf_counter()
    for _ in range(MAX_CALLS):
        start = time.perf_counter()
        kept = call()
        end = time.perf_counter()
        del kept  # freed with the clock stopped
        fastest = min(fastest, end - start)
        if end - begin > ENOUGH_SECONDS:
            break
    return fastest


CONTENDERS: dict[str, Callable[[], Callable[[Task], float]]] = {
    "memcpy": Memcpy,
    "balanced": lambda: BigSmall("balanced"),
    "inference": lambda: BigSmall("inference"),
    "storage": lambda: BigSmall("storage"),
    "zstandard": Zstd,
    "zipnn": ZipNN,
    "lmzip": Lmz,
    "bigsmall-1.0.0": lambda: Original("1.0.0"),
    "bigsmall-4.0.0": lambda: Original("4.0.0"),
}


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
            answer: dict[str, Any] = {"seconds": contender(Task(**json.loads(line)))}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
