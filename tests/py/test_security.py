"""What a file cannot do, whoever made it: run code, use the network, start a program or name a place elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bigsmall
from bigsmall import errors
from helpers import bfloat16, run_script, tree, weights, write_safetensors

# Everything that Python tells its audit hooks of these, while the library works.
WATCH = """
import sys
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "pickle.",
             "urllib.", "http.", "webbrowser.")
watching, seen = False, []

def hook(event, arguments):
    if watching and event.startswith(FORBIDDEN):
        seen.append((event, repr(arguments)[:100]))

sys.addaudithook(hook)
import bigsmall, os
folder = sys.argv[1]
path, packed = os.path.join(folder, "model", "model.safetensors"), os.path.join(folder, "model.bs")
if len(sys.argv) > 2:
    import torch
bigsmall.info(os.path.join(folder, "first.bs"))  # loads the library
watching = True
bigsmall.compress(path, packed, sha256=True, parity=3)
bigsmall.compress(os.path.join(folder, "model"), os.path.join(folder, "packed"))
bigsmall.decompress(packed, os.path.join(folder, "out.safetensors"))
bigsmall.decompress(os.path.join(folder, "packed"), os.path.join(folder, "out"))
bigsmall.decompress(packed)
bigsmall.verify(packed, path)
bigsmall.repair(packed)
bigsmall.info(os.path.join(folder, "packed"))
with bigsmall.safe_open(packed, "np") as file:
    for name in file.keys():
        file.get_slice(name)[0]
if len(sys.argv) > 2:
    bigsmall.load(packed)
    with bigsmall.StreamingLoader(packed, device="cpu") as loader:
        list(loader.iter_layers())
watching = False
assert not seen, seen
"""


@pytest.mark.parametrize("with_torch", [False, True])
def test_local_files_run_nothing_and_ask_nobody(tmp_path: Path, with_torch: bool) -> None:
    if with_torch:
        pytest.importorskip("torch")
    (tmp_path / "model").mkdir()
    tensors = {f"model.layers.{i}.weight": ("BF16", (4, 300), bfloat16(weights(i, 4, 300))) for i in range(2)}
    source = write_safetensors(tmp_path / "model" / "model.safetensors", tensors)
    (tmp_path / "model" / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('code of a model ran')")
    bigsmall.compress(source, tmp_path / "first.bs")
    run_script(WATCH, tmp_path, *(["torch"] if with_torch else []), env={"PYTHONPATH": str(tmp_path / "model")})


def test_names_of_tensors_are_text(tmp_path: Path) -> None:
    """Also such that would be paths, keys or commands elsewhere."""
    names = [
        "../../escape",
        "/etc/passwd",
        "a\\b",
        "$(touch x)",
        "`x`",
        "__class__",
        "..",
        "",
        "x" * 1000,
        "\n",
        "a\x01b",
    ]
    tensors = {name: ("U8", (3,), bytes([i, i, i])) for i, name in enumerate(names)}
    inside = tmp_path / "in"
    inside.mkdir()
    source = write_safetensors(inside / "model.safetensors", tensors)
    bigsmall.compress(source, inside / "model.bs")
    found = bigsmall.decompress(inside / "model.bs")
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: data for name, (_, _, data) in tensors.items()
    }
    bigsmall.decompress(inside / "model.bs", inside / "back.safetensors")
    assert (inside / "back.safetensors").read_bytes() == source.read_bytes()
    assert sorted(tree(tmp_path)) == ["in/back.safetensors", "in/model.bs", "in/model.safetensors"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shards", ["../outside.bs"]),
        ("shards", ["/outside.bs"]),
        ("shards", ["..\\outside.bs"]),
        ("source_indexes", [{"name": "../model.safetensors.index.json", "text": "{}"}]),
        ("source_indexes", [{"name": "/tmp/model.safetensors.index.json", "text": "{}"}]),
        ("source_indexes", [{"name": "config.json", "text": "{}"}]),
    ],
)
def test_an_index_names_no_other_place(tmp_path: Path, key: str, value: list[object]) -> None:
    model, packed = tmp_path / "model", tmp_path / "packed"
    model.mkdir()
    shard = "model-00001-of-00001.safetensors"
    source = write_safetensors(model / shard, {"w": ("U8", (3,), b"abc")})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    bigsmall.compress(model, packed)
    bigsmall.compress(source, tmp_path / "outside.bs")
    index = packed / "bigsmall.index.json"
    text = json.loads(index.read_text())
    text["metadata"][key] = value
    index.write_text(json.dumps(text))
    before = tree(tmp_path)
    for call in (
        lambda: bigsmall.decompress(packed),
        lambda: bigsmall.decompress(packed, tmp_path / "deep" / "out"),
        lambda: bigsmall.decompress(packed, tmp_path / "out"),
        lambda: bigsmall.info(packed),
    ):
        with pytest.raises(errors.BigSmallError):
            call()
    assert tree(tmp_path) == before
