"""Damaged files through every way to read them: an error that names the file and the tensor, or the right bytes where
the damage is elsewhere. TestDamage, in Go, has every flip and cut of every codec; here is a sample through each reader.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bigsmall
from bigsmall import _native, errors
from bigsmall.numpy import address, read
from bigsmall.reader import Reader
from helpers import bfloat16, every_dtype, weights, write_safetensors

LONG = bool(os.environ.get("BIGSMALL_LONG"))
DAMAGES = 2000 if LONG else 250

Bytes = dict[str, bytes]


def numpy_bytes(arrays: dict[str, Any]) -> Bytes:
    return {name: array.tobytes() for name, array in arrays.items()}


def torch_bytes(tensors: dict[str, Any]) -> Bytes:
    import torch

    return {
        name: bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        for name, tensor in tensors.items()
    }


def restored(path: Path, base: Path | None = None) -> Bytes:
    """What a decompression to a file made; nothing is left where it fails."""
    target = path.with_name(path.name + ".restored")
    try:
        bigsmall.decompress(path, target, base=base)
        made = numpy_bytes(read_tree(target))
    finally:
        assert not list(path.parent.glob(".*"))
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
    return made


def read_tree(target: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, or of those in a directory, without a reader of ours."""
    made = {}
    for path in sorted(target.glob("*.safetensors")) if target.is_dir() else [target]:
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        for name, fields in json.loads(data[8 : 8 + length]).items():
            begin, end = (8 + length + at for at in fields["data_offsets"])
            made[name] = np.frombuffer(data[begin:end], np.uint8)
    return made


def decompressed(path: Path, base: Path | None = None) -> Bytes:
    return numpy_bytes(bigsmall.decompress(path, base=base))


def loaded(path: Path, base: Path | None = None) -> Bytes:
    return torch_bytes(bigsmall.load(path, base=base))


def verified(path: Path, base: Path | None = None) -> Bytes:
    return torch_bytes(bigsmall.load(path, verify=True, base=base))


def one_by_one(path: Path, base: Path | None = None) -> Bytes:
    with bigsmall.safe_open(path, "np", base=base) as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def by_slices(path: Path, base: Path | None = None) -> Bytes:
    """Each tensor in about ten slices of rows."""
    with bigsmall.safe_open(path, "np", base=base) as file:
        made = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            rows = part.get_shape()[0] if part.get_shape() else 0
            step = max(1, rows // 10)
            parts = [part[at : at + step] for at in range(0, rows, step)] or [part[...]]
            made[name] = b"".join(array.tobytes() for array in parts)
    return made


def by_ranges(path: Path, base: Path | None = None) -> Bytes:
    made = {}
    with Reader(path, base) as reader:
        for tensor in reader.tensors:
            count = tensor.n_bytes // tensor.dtype.size
            parts = []
            for first in range(0, count, max(1, count // 3)):
                part = np.empty(min(count // 3 or 1, count - first) * tensor.dtype.size, np.uint8)
                reader.decode_range(tensor, first, part.size // tensor.dtype.size, address(part))
                parts.append(part.tobytes())
            made[tensor.name] = b"".join(parts)
    return made


def from_memory(path: Path) -> Bytes:
    reader = Reader.from_memory(path.read_bytes())
    return numpy_bytes(read(reader, reader.tensors))


def streamed(path: Path) -> Bytes:
    with bigsmall.StreamingLoader(path, device="cpu") as loader:
        made = torch_bytes(loader.load_non_layer_tensors())
        if loader.stacks:
            for _, tensors in loader.iter_layers():
                made.update(torch_bytes(tensors))
    return made


def by_c(path: Path, base: Path | None = None) -> Bytes:
    """The functions of bigsmall.h, through cffi: each tensor by every call that decodes, which must agree."""
    ffi, lib = _native.library()
    error, handle, number = ffi.new("bs_error *"), ffi.new("bs_reader **"), ffi.new("uint64_t *")
    described, length, text = ffi.new("bs_tensor *"), ffi.new("size_t *"), ffi.new("char[]", 256)
    described.size = ffi.sizeof("bs_tensor")

    def call(function: Any, *arguments: Any) -> None:
        status = function(*arguments, error)
        assert status in (0, error.status)
        if status:
            assert ffi.string(error.text)
        _native.check(status, error, [str(path)])

    call(lib.bs_reader_open, str(path).encode(), ffi.NULL if base is None else str(base).encode(), handle)
    made, failures = {}, {}
    try:
        call(lib.bs_reader_count, handle[0], number)
        for index in range(number[0]):
            call(lib.bs_reader_describe, handle[0], index, described)
            call(lib.bs_reader_name, handle[0], index, text, 256, length)
            name, n = bytes(ffi.buffer(text, length[0])).decode(), described.n_bytes
            count = described.n_elements
            items = ffi.new("bs_decode_item *", {"index": index, "dst": ffi.NULL, "dst_cap": n})

            def many(reader: Any, index: int, dst: Any, cap: int, job: Any, error: Any, items: Any = items) -> int:
                items.dst = dst
                return int(lib.bs_reader_decode_many(reader, items, 1, job, error))

            def part(
                reader: Any, index: int, dst: Any, cap: int, job: Any, error: Any, count: int = count, name: str = name
            ) -> int:
                half, width = count // 2, cap // max(1, count)
                status = lib.bs_reader_decode_range(reader, index, 0, half, dst, half * width, job, error)
                rest = (half, count - half, dst + half * width, cap - half * width)
                return int(status or lib.bs_reader_decode_range(reader, index, *rest, job, error))

            for function in (lib.bs_reader_decode, lib.bs_reader_decode_verified, many, part):
                dst = ffi.new("char[]", b"\xa5" * (n + 8))
                try:
                    call(function, handle[0], index, dst, n, ffi.NULL)
                except errors.BigSmallError as failure:
                    failures[name] = failure
                else:
                    data = bytes(ffi.buffer(dst, n))
                    assert made.setdefault(name, data) == data, f"{name}: two calls disagree"
                    assert name not in failures, f"{name}: one call failed, {failures[name]}, another did not"
                assert bytes(ffi.buffer(dst + n, 8)) == b"\xa5" * 8, f"{name}: bytes behind the room were written"
    finally:
        lib.bs_reader_close(handle[0])
    for failure in failures.values():
        raise failure
    return made


READERS: dict[str, Callable[..., Bytes]] = {
    "decompress": decompressed,
    "decompress to a file": restored,
    "load": loaded,
    "load and verify": verified,
    "safe_open": one_by_one,
    "slices": by_slices,
    "ranges": by_ranges,
    "memory": from_memory,
    "StreamingLoader": streamed,
    "C": by_c,
}
WITH_BASE = [name for name in READERS if name not in ("memory", "StreamingLoader")]
WITH_SHARDS = [name for name in READERS if name != "memory"]
NEEDS_TORCH = ("load", "load and verify", "StreamingLoader")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, Bytes]]:
    """Files, and what is in them."""
    folder = tmp_path_factory.mktemp("corruption")
    layers = {f"model.layers.{i}.weight": ("BF16", (10, 90), bfloat16(weights(i, 10, 90))) for i in range(3)}
    source = write_safetensors(folder / "layers.safetensors", layers)
    made = {}
    for mode in ("balanced", "storage"):
        bigsmall.compress(source, folder / f"{mode}.bs", mode)
        made[mode] = ((folder / f"{mode}.bs").read_bytes(), {name: data for name, (_, _, data) in layers.items()})
    bigsmall.compress(source, folder / "parity.bs", parity=30)
    made["parity"] = ((folder / "parity.bs").read_bytes(), made["balanced"][1])
    kinds = {name: value for name, value in every_dtype((3, 8, 4)).items() if not value[0].startswith(("F4", "F6"))}
    source = write_safetensors(folder / "kinds.safetensors", kinds)
    bigsmall.compress(source, folder / "kinds.bs")
    made["dtypes"] = ((folder / "kinds.bs").read_bytes(), {name: data for name, (_, _, data) in kinds.items()})
    source = write_safetensors(folder / "codecs.safetensors", CODECS)
    bigsmall.compress(source, folder / "codecs.bs")
    made["codecs"] = ((folder / "codecs.bs").read_bytes(), {name: data for name, (_, _, data) in CODECS.items()})
    with Reader(folder / "codecs.bs") as reader:
        used = {tensor["codec"] for tensor in reader.info()["tensors"]}
        assert used == {"bs_planes", "bs_stored", "bs_lowcard", "bs_rowdelta", "tied_ref"}
    return made


def rows() -> bytes:
    """Noise, but from row to row."""
    random = np.random.default_rng(1)
    first = random.integers(0, 1 << 16, 128, "u2")
    steps = 3 * np.arange(64, dtype="u2")[:, None] + random.integers(0, 2, (64, 128), "u2")
    return (first + steps).astype("<u2").tobytes()


# A tensor for each codec.
CODECS = {
    "planes": ("BF16", (12, 40), bfloat16(weights(1, 12, 40))),
    "patches": ("F32", (300,), (weights(2, 300) * np.where(np.arange(300) % 40, 1, 1e20)).astype("<f4").tobytes()),
    "halves": ("F16", (400,), weights(3, 400).astype("<f2").tobytes()),
    "palette": ("U8", (9, 40), bytes([1, 2, 3, 2, 1, 1]) * 60),
    "constant": ("I64", (30,), bytes(240)),
    "rows": ("I16", (64, 128), rows()),
    "stored": ("U8", (300,), np.random.default_rng(2).integers(0, 256, 300, "u1").tobytes()),
    "text": ("U8", (1125,), b"zstd: quick brown foxes jump over lazy dogs; " * 25),
    "tied": ("BF16", (480,), bfloat16(weights(1, 12, 40))),
    "empty": ("F16", (0, 3), b""),
}
OWNERS = {**{name: name for name in CODECS}, "tied": "planes"}  # whose payload a tensor has


def damages(data: bytes, dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """What can happen to a file; in its header's padding and its parity not more often than elsewhere."""
    text = data.index(b"}]}") + 3 if b"}]}" in data else len(data)
    while True:
        places = [*range(text), *range(4096, len(data))]
        at = dice.choice(places)
        kind = dice.choice(["flip", "flip", "flip", "cut", "zeros", "splice", "append", "byte"])
        changed = bytearray(data)
        if kind == "flip":
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == "byte":
            changed[at] = dice.randrange(256)
        elif kind == "cut":
            del changed[at:]
        elif kind == "zeros":
            changed[at : at + 64] = bytes(len(changed[at : at + 64]))
        elif kind == "splice":
            other, n = dice.choice(places), dice.randrange(1, 300)
            part = data[other : other + n]
            changed[at : at + len(part)] = part
        else:
            changed += dice.randbytes(dice.randrange(1, 100))
        if changed != data:
            yield f"{kind} at {at}", bytes(changed)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["balanced", "storage", "parity", "dtypes", "codecs"])
def test_damage(files: dict[str, tuple[bytes, Bytes]], tmp_path: Path, name: str, kind: str) -> None:
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    data, want = files[kind]
    path = tmp_path / "damaged.bs"
    path.write_bytes(data)
    reader = READERS[name]
    assert reader(path) == want
    parity = Reader(path).info()["parity_bytes"]
    noticed = 0
    source = damages(data, random.Random(f"{name} {kind}"))
    for _ in range(DAMAGES):
        what, changed = next(source)
        path.write_bytes(changed)
        try:
            got = reader(path)
        except errors.BigSmallError as error:
            noticed += 1
            assert isinstance(error, (errors.Corrupt, errors.Unsupported)), f"{what}: {error!r}"
            if name != "memory":
                assert str(path) in str(error), f"{what}: {error}"
        else:
            assert parity, f"{what}: not noticed"
            assert got == want, what
    assert noticed


@pytest.mark.parametrize("name", READERS)
def test_the_tensor_is_named(files: dict[str, tuple[bytes, Bytes]], tmp_path: Path, name: str) -> None:
    """Damage of a payload is an error that names its tensor, whichever codec it has and whoever reads it."""
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    data, _ = files["codecs"]
    path = tmp_path / "damaged.bs"
    path.write_bytes(data)
    with Reader(path) as reader:
        spans = {tensor.name: reader.locate(tensor) for tensor in reader.tensors if tensor.n_bytes}
    dice = random.Random(f"names {name}")
    for owner in sorted(set(OWNERS.values()) & spans.keys()):
        for _ in range(100 if LONG else 6):
            span = spans[owner]
            at = span.offset + dice.randrange(span.n_bytes)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
            with pytest.raises(errors.Corrupt, match=f'"{owner}"') as caught:
                READERS[name](path)
            assert name == "memory" or str(path) in str(caught.value)


def test_other_tensors_can_be_read(files: dict[str, tuple[bytes, Bytes]], tmp_path: Path) -> None:
    """Damage of one payload is an error of those that have it; the others are right."""
    data, want = files["codecs"]
    path = tmp_path / "damaged.bs"
    path.write_bytes(data)
    with Reader(path) as reader:
        spans = {tensor.name: reader.locate(tensor) for tensor in reader.tensors if tensor.n_bytes}
    dice = random.Random(4)
    for owner in sorted(set(OWNERS.values()) & spans.keys()):
        for _ in range(10):
            at = spans[owner].offset + dice.randrange(spans[owner].n_bytes)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
            with bigsmall.safe_open(path, "np") as file:
                for other, its in OWNERS.items():
                    if its != owner:
                        assert file.get_tensor(other).tobytes() == want[other]
                        part = file.get_slice(other)[:3].tobytes()
                        assert bool(part) == bool(want[other])
                        assert want[other].startswith(part)
                        continue
                    with pytest.raises(errors.Corrupt, match=rf'damaged\.bs.*"{owner}"'):
                        file.get_tensor(other)
                    with pytest.raises(errors.Corrupt, match=rf'damaged\.bs.*"{owner}"'):
                        file.get_slice(other)[2:3]
            assert [bad.tensor for bad in bigsmall.verify(path).bad] == [
                owner
            ]  # once, also where others are tied to it


def test_slices_need_their_blocks_alone(tmp_path: Path) -> None:
    """Of a tensor of several blocks, one of which is damaged, the others' rows are right."""
    rows, width, block = 1024, 256, 65536
    data = bfloat16(weights(6, rows, width))
    source = write_safetensors(tmp_path / "large.safetensors", {"w": ("BF16", (rows, width), data)})
    path = tmp_path / "large.bs"
    bigsmall.compress(source, path)
    packed = path.read_bytes()
    with Reader(path) as reader:
        span = reader.locate(reader.find("w"))
    dice = random.Random(6)
    blocks = rows * width // block
    per = rows // blocks
    alone = 0
    for _ in range(60):
        at = span.offset + dice.randrange(span.n_bytes)
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 1 << dice.randrange(8)]) + packed[at + 1 :])
        failed = set()
        with bigsmall.safe_open(path, "np") as file:
            part = file.get_slice("w")
            for number in range(blocks):
                first = number * per + dice.randrange(per - 2)
                try:
                    got = part[first : first + 2].tobytes()
                except errors.Corrupt as error:
                    failed.add(number)
                    assert str(path) in str(error)
                    assert '"w"' in str(error)
                else:
                    assert got == data[2 * width * first : 2 * width * (first + 2)]
            with pytest.raises(errors.Corrupt, match="w"):
                file.get_tensor("w")
        assert len(failed) in (1, blocks)  # a block, or the head that all need
        alone += len(failed) == 1
    assert alone


@pytest.mark.parametrize("name", WITH_BASE)
def test_damage_of_a_delta(tmp_path: Path, name: str) -> None:
    """A damaged delta, or one whose base is damaged, is an error that names the file, or what was asked for."""
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    base, tune, delta = tmp_path / "base.safetensors", tmp_path / "tune.safetensors", tmp_path / "delta.bs"
    plain = {f"w{i}": bytearray(bfloat16(weights(i, 900))) for i in range(2)}
    write_safetensors(base, {key: ("BF16", (900,), bytes(value)) for key, value in plain.items()})
    for value in plain.values():
        value[::40] = bytes(byte ^ 1 for byte in value[::40])
    write_safetensors(tune, {key: ("BF16", (900,), bytes(value)) for key, value in plain.items()})
    bigsmall.compress_delta(tune, base, delta)
    want = {key: bytes(value) for key, value in plain.items()}
    with Reader(delta, base) as reader:
        assert {tensor["codec"] for tensor in reader.info()["tensors"]} == {"bs_delta"}
    assert READERS[name](delta, base) == want
    dice = random.Random(f"delta {name}")
    for path, kinds in ((delta, (errors.Corrupt, errors.Unsupported)), (base, (errors.BigSmallError,))):
        data = path.read_bytes()
        source = damages(data, dice)
        for _ in range(DAMAGES // 2):
            what, changed = next(source)
            path.write_bytes(changed)
            try:
                got = READERS[name](delta, base)
            except errors.BigSmallError as error:
                assert isinstance(error, kinds), f"{what}: {error!r}"
                assert not isinstance(error, (errors.InternalError, errors.IOFailure)), f"{what}: {error!r}"
                assert path.name in str(error), f"{what}: {error}"
            else:
                assert path == base, f"{what}: not noticed"
                assert got == want, what
        path.write_bytes(data)


@pytest.mark.parametrize("name", WITH_SHARDS)
def test_damage_of_a_directory(tmp_path: Path, name: str) -> None:
    """A damaged shard is an error that names it, and a damaged index an error, or what was asked for."""
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    folder, packed = tmp_path / "model", tmp_path / "packed"
    folder.mkdir()
    shards = {i: f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)}
    want, weight_map = {}, {}
    for i, shard in shards.items():
        # The second of each is the same in both: it is stored once.
        own = {f"model.layers.{i}.w": bfloat16(weights(i, 900)), f"tied.{i}": bfloat16(weights(9, 900))}
        write_safetensors(folder / shard, {key: ("BF16", (900,), data) for key, data in own.items()})
        want.update(own)
        weight_map.update(dict.fromkeys(own, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    bigsmall.compress(folder, packed)
    assert READERS[name](packed) == want
    dice = random.Random(f"directory {name}")
    for target in [*(shard.replace(".safetensors", ".bs") for shard in shards.values()), "bigsmall.index.json"]:
        path = packed / target
        data = path.read_bytes()
        source = damages(data, dice)
        for _ in range(DAMAGES // 4):
            what, changed = next(source)
            path.write_bytes(changed)
            try:
                got = READERS[name](packed)
            except errors.BigSmallError as error:
                # An index that was damaged may name a shard that there is not.
                missing = (errors.FileMissing,) if path.suffix == ".json" else ()
                assert isinstance(error, (errors.Corrupt, errors.Unsupported, *missing)), f"{target}: {what}: {error!r}"
                assert str(packed) in str(error), f"{target}: {what}: {error}"
                if path.suffix == ".bs":
                    assert target in str(error), f"{target}: {what}: {error}"
            else:
                assert path.suffix == ".json", f"{target}: {what}: not noticed"
                assert got == want, f"{target}: {what}"
        path.write_bytes(data)


def test_shards_and_deltas(tmp_path: Path) -> None:
    """Damage of a shard names the shard; of a base, the base; of the index, the index."""
    folder, packed = tmp_path / "model", tmp_path / "packed"
    folder.mkdir()
    shards = {i: f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)}
    for i, shard in shards.items():
        write_safetensors(folder / shard, {f"w{i}": ("BF16", (900,), bfloat16(weights(i, 900)))})
    weight_map = {f"w{i}": shard for i, shard in shards.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    bigsmall.compress(folder, packed)
    whole = numpy_bytes(bigsmall.decompress(packed))
    dice = random.Random(5)
    for _ in range(60):
        i = dice.randrange(2)
        path = packed / shards[i].replace(".safetensors", ".bs")
        data = path.read_bytes()
        header = data.index(b"}]}")
        at = dice.choice([*range(header), *range(4096, len(data))])
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
        with pytest.raises(errors.BigSmallError, match=path.name):
            bigsmall.decompress(packed)
        with pytest.raises(errors.BigSmallError, match=path.name):
            bigsmall.decompress(packed, tmp_path / "out")
        path.write_bytes(data)
    index = packed / "bigsmall.index.json"
    text = index.read_text()
    for wrong in (text[:-5], text.replace("w0", "w7"), text.replace("00001-of", "00009-of"), "[]", ""):
        index.write_text(wrong)
        with pytest.raises(errors.BigSmallError, match=r"bigsmall\.index\.json|number 1 is missing"):
            bigsmall.decompress(packed)
    index.write_text(text)
    assert numpy_bytes(bigsmall.decompress(packed)) == whole
    base, tune, delta = tmp_path / "base.safetensors", tmp_path / "tune.safetensors", tmp_path / "delta.bs"
    write_safetensors(base, {"w": ("BF16", (5000,), bfloat16(weights(1, 5000)))})
    data = bytearray(base.read_bytes())
    data[-7] ^= 1
    tune.write_bytes(data)
    bigsmall.compress_delta(tune, base, delta)
    assert bigsmall.decompress_delta(delta, base)["w"].tobytes() == bytes(data[-10_000:])
    for at in (-10_000, -5000, -1):
        other = bytearray(base.read_bytes())
        other[at] ^= 4
        (tmp_path / "other.safetensors").write_bytes(other)
        with pytest.raises(errors.WrongBase, match=r"delta\.bs.*other|other.*delta\.bs"):
            bigsmall.decompress_delta(delta, tmp_path / "other.safetensors")


def test_the_command_line(files: dict[str, tuple[bytes, Bytes]], tmp_path: Path) -> None:
    data, _ = files["balanced"]
    path, out = tmp_path / "damaged.bs", tmp_path / "out.safetensors"
    for at in (5, 300, 5000, len(data) - 30):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        for command in (["verify", path], ["decompress", path, "-o", out]):
            done = subprocess.run(
                [sys.executable, "-m", "bigsmall", *map(str, command)],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 1
            assert str(path) in done.stdout + done.stderr
            assert "Traceback" not in done.stderr
        assert not out.exists()
