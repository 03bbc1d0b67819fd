"""Model directories: every file comes back, and a sharded model opens as one."""

from __future__ import annotations

import json
import os

import pytest

import bigsmall
from bigsmall.reader import Reader
from helpers import array_bytes, bfloat16, tree, weights, write_safetensors

EMBED = bfloat16(weights(1, 300, 64))
SHARDS = {
    "model-00001-of-00002.safetensors": {
        "embed": ("BF16", (300, 64), EMBED),
        "layer.0": ("BF16", (64, 64), bfloat16(weights(2, 64, 64))),
    },
    "model-00002-of-00002.safetensors": {
        "layer.1": ("BF16", (64, 64), bfloat16(weights(3, 64, 64))),
        "head": ("BF16", (300, 64), EMBED),  # the same bytes as in the other shard
        "norm": ("F32", (64,), weights(4, 64).tobytes()),
    },
}
TENSORS = {name: tensor for shard in SHARDS.values() for name, tensor in shard.items()}
# Spaced and ordered as no library would write it: the text has to come back, not only what it means.
INDEX = (
    '{"weight_map":  {'
    + ",\n\t".join(f'"{name}": "{file}"' for file, shard in SHARDS.items() for name in shard)
    + '},\r\n "metadata": {"total_size": 1, "note": "\\u00fc"} }  \n'
)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub" / "deeper").mkdir(parents=True)
    for name, tensors in SHARDS.items():
        write_safetensors(folder / name, tensors, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_bytes(INDEX.encode())
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)) * 10)
    (folder / "README.md").write_text("# Модель\n", encoding="utf-8")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_text("x")
    (folder / "sub" / "deeper" / "code.py").write_text("print()\n")
    write_safetensors(folder / "sub" / "adapter.safetensors", {"a": ("F32", (3,), b"abcdefghijkl")})
    return folder


def test_tree_comes_back(model, tmp_path) -> None:
    before = tree(model)
    packed, restored = tmp_path / "packed", tmp_path / "restored"
    assert bigsmall.compress(model, packed) == str(packed)
    assert tree(model) == before
    assert bigsmall.decompress(packed, restored) == str(restored)
    assert tree(restored) == before
    names = set(tree(packed))
    assert "bigsmall.index.json" in names
    assert "model-00001-of-00002.bs" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert {"config.json", "tokenizer.model", "README.md", ".hidden", "empty.txt"} <= names
    # Tools that look for *.index.json refuse a folder with two of them.
    assert "model.safetensors.index.json" not in names


def test_index_maps_the_tensors(model, tmp_path) -> None:
    bigsmall.compress(model, tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / "bigsmall.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"] == {
        name: file.replace(".safetensors", ".bs") for file, shard in SHARDS.items() for name in shard
    }
    assert isinstance(index["metadata"], dict)


@pytest.mark.parametrize("with_index", [True, False])
def test_opens_as_one_model(model, tmp_path, with_index: bool) -> None:
    packed = tmp_path / "packed"
    bigsmall.compress(model, packed)
    if not with_index:
        (packed / "bigsmall.index.json").unlink()
    arrays = bigsmall.decompress(packed)
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: data for name, (_, _, data) in TENSORS.items()
    }
    with bigsmall.safe_open(packed, "np") as file:
        assert file.keys() == sorted(TENSORS)
        assert file.get_slice("head")[7].tobytes() == EMBED[7 * 128 : 8 * 128]
    info = bigsmall.info(packed)
    assert info["tensor_count"] == len(TENSORS)
    assert {entry["file"] for entry in info["tensors"]} == {name.replace(".safetensors", ".bs") for name in SHARDS}


def test_load(model, tmp_path) -> None:
    pytest.importorskip("torch")
    bigsmall.compress(model, tmp_path / "packed")
    loaded = bigsmall.load(tmp_path / "packed", verify=True)
    assert {name: array_bytes(tensor) for name, tensor in loaded.items()} == {
        name: data for name, (_, _, data) in TENSORS.items()
    }
    loaded["embed"].zero_()
    assert array_bytes(loaded["head"]) == EMBED


def test_verify(model, tmp_path) -> None:
    packed = tmp_path / "packed"
    bigsmall.compress(model, packed)
    assert bigsmall.verify(packed)
    assert bigsmall.verify(packed, model)
    shard = packed / "model-00002-of-00002.bs"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    report = bigsmall.verify(packed)
    assert not report
    assert {os.path.basename(bad.file) for bad in report.bad} == {shard.name}


def test_missing_shard(model, tmp_path) -> None:
    packed = tmp_path / "packed"
    bigsmall.compress(model, packed)
    (packed / "model-00002-of-00002.bs").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.bs"):
        bigsmall.decompress(packed)


def test_one_file_in_a_directory(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", TENSORS)
    bigsmall.compress(folder, tmp_path / "packed")
    assert (tmp_path / "packed" / "model.bs").is_file()
    with Reader(tmp_path / "packed") as reader:
        assert [tensor.name for tensor in reader.tensors] == list(TENSORS)
    bigsmall.decompress(tmp_path / "packed", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(folder)


def test_target_directory_in_the_way(model, tmp_path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    bigsmall.compress(model, packed)  # an empty one is fine
    (packed / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError):
        bigsmall.compress(model, packed)
    assert (packed / "mine.txt").read_text() == "keep"
    bigsmall.compress(model, packed, force=True)
    assert not (packed / "mine.txt").exists()
    restored = tmp_path / "restored"
    restored.mkdir()
    (restored / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError):
        bigsmall.decompress(packed, restored)
    bigsmall.decompress(packed, restored, force=True)
    assert tree(restored) == tree(model)


def test_failure_leaves_nothing(model, tmp_path) -> None:
    (model / "model-00002-of-00002.safetensors").write_bytes(b"not a safetensors file at all")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors"):
        bigsmall.compress(model, tmp_path / "packed")
    assert sorted(os.listdir(tmp_path)) == before


def test_directory_without_weights(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(bigsmall.errors.BigSmallError):
        Reader(tmp_path / "empty")
