"""A process that damages a compressed file in its memory, decodes it and compares with the source. reliability.py
starts it, for BigSmall and, in environments of their own, for its rivals, so that one that crashes or hangs is seen to.

    python damage.py CONTENDER SOURCE COMPRESSED

makes COMPRESSED where it is not there, then reads lines KIND FIRST COUNT and answers each with JSON: how many of the
damages number FIRST and so on were "refused", "right", "wrong" or "other", which is an error that is none of the
contender's own; with examples of those, and the numbers of the wrong ones. A number is a seed: the damage is always the
same.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = 4096


def tensors_of(source: bytes) -> dict[str, bytes]:
    """The tensors of a safetensors file."""
    (length,) = struct.unpack_from("<Q", source)
    header = json.loads(source[8 : 8 + length])
    header.pop("__metadata__", None)
    made = {}
    for name, fields in header.items():
        begin, end = fields["data_offsets"]
        made[name] = source[8 + length + begin : 8 + length + end]
    return made


def damaged(data: bytes, kind: str, dice: random.Random) -> bytes:
    """One damage: a flipped bit, a cut, a part of another place, a page of zeros, bytes behind, two parts exchanged."""
    if kind == "mixed":
        kind = dice.choice(["flip", "flip", "cut", "splice", "zeros", "append", "exchange"])
    changed = bytearray(data)
    at = dice.randrange(len(data))
    if kind == "flip":
        changed[at] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "splice":
        other, n = dice.randrange(len(data)), dice.randrange(1, 2 * PAGE)
        part = data[other : other + min(n, len(data) - at)]
        changed[at : at + len(part)] = part
    elif kind == "zeros":
        at = at // PAGE * PAGE
        changed[at : at + PAGE] = bytes(len(changed[at : at + PAGE]))
    elif kind == "append":
        changed += dice.randbytes(dice.randrange(1, PAGE))
    else:
        n = dice.randrange(1, PAGE)
        other = dice.randrange(len(data))
        a, b = sorted((at, other))
        n = min(n, b - a, len(data) - b)
        changed[a : a + n], changed[b : b + n] = changed[b : b + n], changed[a : a + n]
    return bytes(changed)


# ---- who decodes: make(source path, compressed path), decode(bytes) -> the source's bytes, in tensors or whole ----


class BigSmall:
    def __init__(self, mode: str) -> None:
        import bigsmall
        from bigsmall.numpy import read
        from bigsmall.reader import Reader

        self.mode, self.parity = mode, 0
        if mode == "parity":
            self.mode, self.parity = "balanced", 5
        self.module, self.read, self.reader = bigsmall, read, Reader
        self.own: tuple[type[BaseException], ...] = (bigsmall.errors.Corrupt, bigsmall.errors.Unsupported)

    def make(self, source: str, packed: str) -> None:
        self.module.compress(source, packed, self.mode, parity=self.parity)

    def decode(self, data: bytes) -> dict[str, bytes]:
        reader = self.reader.from_memory(data)
        arrays = self.read(reader, reader.tensors, workers=1)
        return {name: memoryview(array).cast("B") if array.size else b"" for name, array in self.plain(arrays).items()}

    @staticmethod
    def plain(arrays: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        return {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}


class Repair(BigSmall):
    """Repairs the damage first: what is right then is repaired, what is refused is beyond repair."""

    def decode(self, data: bytes) -> dict[str, bytes]:
        with tempfile.NamedTemporaryFile(dir=folder(), suffix=".bs") as file:
            Path(file.name).write_bytes(data)
            self.module.repair(file.name)
            return super().decode(Path(file.name).read_bytes())


class Original:
    """The original package. Its decompress takes no option to look at the MD5s that its files hold."""

    own: tuple[type[BaseException], ...] = (Exception,)

    def __init__(self, version: str) -> None:
        import bigsmall

        if bigsmall.__version__ != version:
            raise RuntimeError(f"bigsmall {bigsmall.__version__} was imported, not {version}")
        self.bigsmall = bigsmall
        self.quiet: dict[str, Any] = {} if version.startswith("1.") else {"progress": False}

    def make(self, source: str, packed: str) -> None:
        self.bigsmall.compress(source, packed, workers=1, **self.quiet)

    def decode(self, data: bytes) -> dict[str, bytes]:
        with tempfile.NamedTemporaryFile(dir=folder(), suffix=".bs") as file:
            Path(file.name).write_bytes(data)
            arrays = self.bigsmall.decompress(file.name, **self.quiet)
        return {name: bytes_of(array) for name, array in arrays.items()}


def bytes_of(array: Any) -> bytes:
    if hasattr(array, "tobytes"):
        return bytes(array.tobytes())
    import torch

    return bytes(array.contiguous().reshape(-1).view(torch.uint8).numpy())


class Verified(Original):
    """The same by those who first have its verify compare the MD5s, which decodes all of the file."""

    def decode(self, data: bytes) -> dict[str, bytes]:
        with tempfile.NamedTemporaryFile(dir=folder(), suffix=".bs") as file:
            Path(file.name).write_bytes(data)
            if not self.bigsmall.verify(file.name):
                raise ValueError("verify says that it is damaged")
        return super().decode(data)


class ZipNN:
    """ZipNN packs bytes; the source's file is one string of them. It has no checksum to ask for."""

    own: tuple[type[BaseException], ...] = (Exception,)

    def __init__(self) -> None:
        import zipnn

        self.zipnn = zipnn

    def coder(self) -> Any:
        return self.zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

    def make(self, source: str, packed: str) -> None:
        Path(packed).write_bytes(self.coder().compress(bytearray(Path(source).read_bytes())))

    def decode(self, data: bytes) -> dict[str, bytes]:
        return {"": bytes(self.coder().decompress(data))}


CONTENDERS: dict[str, Callable[[], Any]] = {
    "balanced": lambda: BigSmall("balanced"),
    "inference": lambda: BigSmall("inference"),
    "storage": lambda: BigSmall("storage"),
    "parity": lambda: BigSmall("parity"),
    "repair": lambda: Repair("parity"),
    "bigsmall-1.0.0": lambda: Original("1.0.0"),
    "bigsmall-4.0.0": lambda: Original("4.0.0"),
    "bigsmall-1.0.0 verify": lambda: Verified("1.0.0"),
    "bigsmall-4.0.0 verify": lambda: Verified("4.0.0"),
    "zipnn": ZipNN,
}


def folder() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def main() -> None:
    name, source, packed = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # rivals print
    contender = CONTENDERS[name]()
    if not os.path.exists(packed):
        contender.make(source, packed)
    data, whole = Path(packed).read_bytes(), Path(source).read_bytes()
    want: dict[str, bytes] = {"": whole} if name == "zipnn" else tensors_of(whole)

    def same(got: dict[str, Any]) -> bool:
        return got.keys() == want.keys() and all(got[key] == want[key] for key in want)

    if not same(contender.decode(data)):
        raise RuntimeError(f"{name} does not decode its own file")
    print(json.dumps({"bytes": len(data)}), file=answers, flush=True)
    for line in sys.stdin:
        kind, first, count = line.split()
        found: dict[str, Any] = {"refused": 0, "right": 0, "wrong": 0, "other": 0, "examples": [], "wrong_ones": []}
        for number in range(int(first), int(first) + int(count)):
            changed = damaged(data, kind, random.Random(number))
            if changed == data:
                found["right"] += 1
                continue
            try:
                outcome = "right" if same(contender.decode(changed)) else "wrong"
                if outcome == "wrong":
                    found["wrong_ones"].append(number)
            except contender.own:
                outcome = "refused"
            except BaseException as error:
                outcome = "other"
                found["examples"].append(f"{number}: {error!r}"[:200])
            found[outcome] += 1
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
