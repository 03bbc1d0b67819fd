"""Damaged files through every way to read them: an error that names the file and the tensor, or the right bytes where
the damage is elsewhere. TestDamage, in Go, has every flip and cut of every codec; here is a sample through each reader.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from bigsmall.numpy import address, read
from bigsmall.reader import Reader
from helpers import bfloat16, every_dtype, weights, write_safetensors

LONG = bool(os.environ.get("BIGSMALL_LONG"))
DAMAGES = 3000 if LONG else 250

Bytes = dict[str, bytes]


def numpy_bytes(arrays: dict[str, Any]) -> Bytes:
    return {name: array.tobytes() for name, array in arrays.items()}


def torch_bytes(tensors: dict[str, Any]) -> Bytes:
    import torch

    return {
        name: bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        for name, tensor in tensors.items()
    }


def restored(path: Path) -> Bytes:
    target = path.with_suffix(".restored")
    try:
        bigsmall.decompress(path, target)
        return numpy_bytes(bigsmall.decompress(path))
    finally:
        if not target.exists():
            assert not list(path.parent.glob(".*"))
        target.unlink(missing_ok=True)


def loaded(path: Path) -> Bytes:
    return torch_bytes(bigsmall.load(path))


def verified(path: Path) -> Bytes:
    return torch_bytes(bigsmall.load(path, verify=True))


def one_by_one(path: Path) -> Bytes:
    with bigsmall.safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def by_slices(path: Path) -> Bytes:
    with bigsmall.safe_open(path, "np") as file:
        made = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            rows = part.get_shape()[0] if part.get_shape() else 0
            made[name] = b"".join(part[at : at + 1].tobytes() for at in range(rows)) if rows else part[...].tobytes()
        return made


def by_ranges(path: Path) -> Bytes:
    made = {}
    with Reader(path) as reader:
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


READERS: dict[str, Callable[[Path], Bytes]] = {
    "decompress": restored,
    "load": loaded,
    "load and verify": verified,
    "safe_open": one_by_one,
    "slices": by_slices,
    "ranges": by_ranges,
    "memory": from_memory,
    "StreamingLoader": streamed,
}
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
    return made


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
@pytest.mark.parametrize("kind", ["balanced", "storage", "parity", "dtypes"])
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


def test_the_tensor_is_named(files: dict[str, tuple[bytes, Bytes]], tmp_path: Path) -> None:
    """Damage of one payload is an error of that tensor; the others can be read."""
    data, want = files["balanced"]
    path = tmp_path / "damaged.bs"
    path.write_bytes(data)
    with Reader(path) as reader:
        spans = {tensor.name: reader.locate(tensor) for tensor in reader.tensors}
    dice = random.Random(4)
    for name, span in spans.items():
        for _ in range(20):
            changed = bytearray(data)
            changed[span.offset + dice.randrange(span.n_bytes)] ^= 1 << dice.randrange(8)
            path.write_bytes(changed)
            with bigsmall.safe_open(path, "np") as file:
                for other in spans:
                    if other != name:
                        assert file.get_tensor(other).tobytes() == want[other]
                with pytest.raises(errors.Corrupt, match=rf"damaged\.bs.*{name}"):
                    file.get_tensor(name)
                with pytest.raises(errors.Corrupt, match=rf"damaged\.bs.*{name}"):
                    file.get_slice(name)[2:3]
            with pytest.raises(errors.Corrupt, match=rf"damaged\.bs.*{name}"):
                bigsmall.decompress(path)
            assert [bad.tensor for bad in bigsmall.verify(path).bad] == [name]


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
