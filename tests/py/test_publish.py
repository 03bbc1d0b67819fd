"""Publishing: what becomes of a model directory, its card, and the way to a fake Hub and back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

import bigsmall
from bigsmall import api, errors, publish
from bigsmall.publish import compress_for_hub, upload_to_hub
from fakehub import FakeHub
from helpers import bfloat16, run_script, tree, weights, write_safetensors

CARD = """---
license: apache-2.0
language: no
pipeline_tag: text-generation
library_name: transformers
tags:
- causal-lm
- bigsmall
date: 2024-01-01
base_model: owner/older
model-index:
- name: x
---

# The model

Its card.
"""
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": ("BF16", (64, 64), bfloat16(weights(1, 64, 64)))},
    "model-00002-of-00002.safetensors": {"b": ("BF16", (300, 64), bfloat16(weights(2, 300, 64)))},
}
LEFT_OUT = [
    "flax_model.msgpack",
    "model.Q4_K_M.gguf",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "openvino/openvino_model.bin",
    "openvino/openvino_model.xml",
    "original/consolidated.00.pth",
    "pytorch_model-00001-of-00001.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "training_args.bin",
]
KEPT = [
    ".gitattributes",
    "1_Dense/pytorch_model.bin",  # the only weights of this component
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "modeling_own.py",
    "onnx/config.json",
    "original/params.json",
    "tokenizer.json",
]
MADE = ["bigsmall.index.json", "model-00001-of-00002.bs", "model-00002-of-00002.bs", "sub/model.bs"]


def write_files(folder, files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    write_files(folder, {name: f"contents of {name}".encode() for name in (*LEFT_OUT, *KEPT)})
    write_files(folder, {".git/objects/aa/bb": b"git", ".cache/huggingface/download/x.lock": b""})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    (folder / ".gitattributes").write_bytes(b"*.safetensors filter=lfs diff=lfs merge=lfs -text")
    for name, tensors in SHARDS.items():
        write_safetensors(folder / name, tensors, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {t: name for name, shard in SHARDS.items() for t in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "sub").mkdir()
    write_safetensors(folder / "sub" / "model.safetensors", {"c": ("F32", (8,), weights(3, 8).tobytes())})
    return folder


@pytest.fixture
def small(tmp_path):
    """A model of one file, where only the card matters."""
    folder = tmp_path / "small"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {"x": ("F32", (8,), weights(3, 8).tobytes())})
    return folder


@pytest.fixture
def hub(tmp_path):
    with FakeHub(tmp_path) as fake:
        yield fake


def weight_files(folder) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if ".safetensors" in name}


def state(root) -> dict[str, tuple[float, bytes]]:
    return {name: ((root / name).stat().st_mtime_ns, data) for name, data in tree(root).items()}


def beside(path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()}


# ---- directories -----------------------------------------------------------------------------------------------------


def test_directory(model, tmp_path, capsys) -> None:
    before, output = state(model), tmp_path / "out"
    result = compress_for_hub(model, output)
    assert state(model) == before
    assert result.path == str(output)
    assert beside(output) == {"model", "out"}
    assert sorted(tree(output)) == sorted([*KEPT, *MADE])
    assert result.left_out == LEFT_OUT
    said = capsys.readouterr()
    assert said.out == ""
    assert all(name in said.err for name in LEFT_OUT)
    for name in set(KEPT) - {"README.md", ".gitattributes"}:
        assert (output / name).read_bytes() == (model / name).read_bytes()
    assert (output.stat().st_mode & 0o777) == (model.stat().st_mode & 0o777)

    sources = {name: data for name, data in weight_files(model).items() if not name.endswith(".json")}
    assert {file.name: (file.source_bytes, file.compressed_bytes, file.sha256) for file in result.files} == {
        name.replace(".safetensors", ".bs"): (
            len(data),
            (output / name.replace(".safetensors", ".bs")).stat().st_size,
            hashlib.sha256(data).hexdigest(),
        )
        for name, data in sources.items()
    }
    assert result.source_bytes == sum(map(len, sources.values()))
    assert result.ratio_pct == pytest.approx(100 * result.compressed_bytes / result.source_bytes)

    index = json.loads((output / "bigsmall.index.json").read_text())
    assert index["weight_map"] == {"a": MADE[1], "b": MADE[2]}
    assert index["metadata"]["shards"] == MADE[1:3]
    bigsmall.decompress(output, tmp_path / "restored")
    assert weight_files(tmp_path / "restored") == weight_files(model)


def test_gitattributes(model, tmp_path) -> None:
    (model / "a large.json").write_bytes(b" " * 10_000_001)
    compress_for_hub(model, tmp_path / "out")
    assert (tmp_path / "out" / ".gitattributes").read_text().splitlines() == [
        "*.safetensors filter=lfs diff=lfs merge=lfs -text",
        "*.bs filter=lfs diff=lfs merge=lfs -text",
        "a[[:space:]]large.json filter=lfs diff=lfs merge=lfs -text",
    ]
    (model / ".gitattributes").write_text("*.bs filter=lfs diff=lfs merge=lfs -text\n*.json filter=lfs\n")
    compress_for_hub(model, tmp_path / "out")
    assert (tmp_path / "out" / ".gitattributes").read_bytes() == (model / ".gitattributes").read_bytes()


def test_again_gives_the_same_bytes(model, tmp_path) -> None:
    output = tmp_path / "out"
    compress_for_hub(model, output, workers=1)
    first = tree(output)
    compress_for_hub(model, output, workers=2)
    assert tree(output) == first
    (tmp_path / "empty" / "out").mkdir(parents=True)
    compress_for_hub(os.path.relpath(model), os.path.relpath(tmp_path / "empty" / "out"))
    assert tree(tmp_path / "empty" / "out") == first
    assert beside(output) == {"model", "out", "empty"}


def test_links_are_followed(model, tmp_path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for entry in model.iterdir():
        (linked / entry.name).symlink_to(entry)
    compress_for_hub(linked, tmp_path / "from-links")
    compress_for_hub(model, tmp_path / "out")
    by_name = {**tree(tmp_path / "from-links"), "README.md": b""}
    assert by_name == {**tree(tmp_path / "out"), "README.md": b""}
    assert not [path for path in (tmp_path / "from-links").rglob("*") if path.is_symlink()]
    (linked / "loop").symlink_to(linked)
    with pytest.raises(errors.InvalidArgument, match="links to a directory above it"):
        compress_for_hub(linked, tmp_path / "loop")
    (linked / "loop").unlink()
    (linked / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"broken\.txt links to what does not exist"):
        compress_for_hub(linked, tmp_path / "broken")
    assert "broken" not in beside(linked)


def test_keep(model, tmp_path) -> None:
    result = compress_for_hub(model, tmp_path / "out", keep=["tf_model.h5", "onnx/*"])
    assert compress_for_hub(model, tmp_path / "one", keep="tf_model.h5").left_out == [
        name for name in LEFT_OUT if name != "tf_model.h5"
    ]
    assert result.left_out == [name for name in LEFT_OUT if name != "tf_model.h5" and not name.startswith("onnx/")]
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == (model / "onnx" / "model.onnx").read_bytes()


def test_second_copies(model, tmp_path) -> None:
    one = {"x": ("F32", (8,), weights(3, 8).tobytes())}
    (model / "mistral").mkdir()
    for name in (
        "original/model.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "mistral/consolidated.safetensors",  # the only one there
    ):
        write_safetensors(model / name, one)
    (model / "original" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    (model / "consolidated.safetensors.index.json").write_text("{}")
    result = compress_for_hub(model, tmp_path / "out")
    assert set(result.left_out) - set(LEFT_OUT) == {
        "consolidated-00001-of-00002.safetensors",
        "consolidated.safetensors.index.json",
        "original/model.safetensors",
        "original/model.safetensors.index.json",
    }
    assert "mistral/consolidated.bs" in tree(tmp_path / "out")
    kept = compress_for_hub(model, tmp_path / "out-original", keep=["original/model.*"])
    assert "original/model.bs" in {file.name for file in kept.files}
    only = tmp_path / "only"
    (only / "original").mkdir(parents=True)
    write_safetensors(only / "original" / "model.safetensors", one)
    assert compress_for_hub(only, tmp_path / "out-only").left_out == []


def test_adapters_stay_as_they_are(model, tmp_path) -> None:
    adapters = ["adapter_model.safetensors", "lora/adapter_model.safetensors", "lora/pytorch_lora_weights.safetensors"]
    (model / "lora").mkdir()
    for name in adapters:
        write_safetensors(model / name, {name: ("F32", (64,), weights(4, 64).tobytes())})
    write_files(
        model, {"lora/adapter_model.bin": b"the same", "lora/adapter_config.json": b"{}", "lora/other.bin": b"x"}
    )
    (model / adapters[0]).chmod(0o640)
    output = tmp_path / "out"
    result = compress_for_hub(model, output)
    assert set(result.left_out) - set(LEFT_OUT) == {"lora/adapter_model.bin"}
    assert [file.name for file in result.files] == MADE[1:]
    assert sorted(tree(output)) == sorted([*KEPT, *MADE, *adapters, "lora/adapter_config.json", "lora/other.bin"])
    for name in adapters:
        assert (output / name).read_bytes() == (model / name).read_bytes()
    assert (output / adapters[0]).stat().st_mode & 0o777 == 0o640
    bigsmall.decompress(output, tmp_path / "restored")
    assert weight_files(tmp_path / "restored") == weight_files(model)

    write_safetensors(model / adapters[1], {"x": ("F32", (64,), weights(5, 64).tobytes())})
    with pytest.raises(
        FileExistsError, match=r"other weights than the source: lora/adapter_model\.safetensors differs"
    ):
        compress_for_hub(model, output)
    lone = model / "lora"
    with pytest.raises(errors.InvalidArgument, match=r"only an adapter \(adapter_model\.safetensors, pytorch_lora"):
        compress_for_hub(lone, tmp_path / "lone")
    (model / adapters[0]).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(errors.InvalidArgument, match="is a pointer of Git LFS"):
        compress_for_hub(model, tmp_path / "pointer")


# ---- the card --------------------------------------------------------------------------------------------------------


def load_card(path):
    from huggingface_hub import ModelCard

    return ModelCard.load(path)


def test_card(model, tmp_path) -> None:
    output = tmp_path / "out"
    result = compress_for_hub(model, output, base_model="owner/source", repo_id="me/source-bs")
    card = load_card(output / "README.md")
    assert card.data.to_dict() == {
        "library_name": "bigsmall",
        "base_model": "owner/source",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": "no",
        "pipeline_tag": "text-generation",
        "date": "2024-01-01",
        "tags": ["causal-lm", "bigsmall", "transformers", "lossless", "compression"],
    }
    assert card.text.endswith("\n# The model\n\nIts card.\n")
    for file in result.files:
        percent = f"{100 * file.compressed_bytes / file.source_bytes:.2f}"
        row = f"| `{file.name}` | {file.source_bytes:,} | {file.compressed_bytes:,} | {percent} | `{file.sha256}` |"
        assert row in card.text.splitlines()
    assert f"| total | {result.source_bytes:,} | {result.compressed_bytes:,} | {result.ratio_pct:.2f} | |" in card.text
    example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert example
    assert example[1].splitlines() == [
        "import bigsmall, transformers",
        "bigsmall.install_hook()",
        'model = transformers.LlamaForCausalLM.from_pretrained("me/source-bs")',
    ]


def test_card_of_a_directory_keeps_its_base_model(model, tmp_path) -> None:
    compress_for_hub(model, tmp_path / "out")
    data = load_card(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["base_model"], data.get("base_model_relation")) == ("owner/older", None)


def test_card_of_what_was_compressed_before(model, tmp_path) -> None:
    compress_for_hub(model, tmp_path / "out", base_model="owner/source")
    bigsmall.decompress(tmp_path / "out", tmp_path / "restored")
    compress_for_hub(tmp_path / "restored", tmp_path / "again", base_model="owner/source")
    assert (tmp_path / "again" / "README.md").read_bytes().count(b"| total |") == 1
    assert load_card(tmp_path / "again" / "README.md").text.endswith("\n# The model\n\nIts card.\n")


@pytest.mark.parametrize(
    "original",
    [
        b"",
        b"# No metadata\r\n\r\n---\r\nA rule above.\r\n",
        b"---\nlicense: [unclosed\n---\n# Bad metadata\n",
        b"---\n- a list\n---\n# Bad metadata\n",
        b"---\nlicense: mit\n---\nlatin \xe9\n",
        b"\xef\xbb\xbf---\nlicense: mit\ntags: one\n---\nmarked\n",
    ],
)
def test_odd_cards(small, tmp_path, original: bytes) -> None:
    (small / "README.md").write_bytes(original)
    compress_for_hub(small, tmp_path / "out")
    made = (tmp_path / "out" / "README.md").read_bytes()
    readable = b"license: mit" in original
    assert made.endswith(original.split(b"---\n")[-1] if readable else original)
    (tmp_path / "out" / "README.md").write_bytes(made.replace(b"\xe9", b""))  # which the Hub's own reader refuses
    data = load_card(tmp_path / "out" / "README.md").data.to_dict()
    assert data["library_name"] == "bigsmall"
    assert data.get("license") == ("mit" if readable else None)
    assert set(data["tags"]) == {"bigsmall", "lossless", "compression"} | ({"one"} if b"one" in original else set())


@pytest.mark.parametrize(
    ("front", "tags"),
    [
        ("tags: [{a: b}, one, 7, null, '']", ["one"]),
        ("tags: [[x], two]\nlibrary_name: {a: b}", ["two"]),
        ("tags: {a: b}\nlibrary_name: [a]", []),
        ("tags: 3\nlibrary_name: peft", ["peft"]),
        ("base_model: [a/b, {c: d}]\nwidget: [[x], {y: [z]}]\n7: seven", []),
        ("a: !!bool x", None),
        ("a: !!timestamp x", None),
        ("a: " + "[" * 1000, None),
    ],
)
def test_odd_metadata(small, tmp_path, front: str, tags: list[str] | None) -> None:
    (small / "README.md").write_text(f"---\n{front}\n---\nbody\n")
    compress_for_hub(small, tmp_path / "out")
    card = load_card(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["tags"] == [*(tags or []), "bigsmall", "lossless", "compression"]
    # What cannot be read as metadata stays as text.
    assert card.text.endswith("\nbody\n" if tags is not None else f"\n---\n{front}\n---\nbody\n")


def test_the_metadata_is_made_before_the_work(small, tmp_path, monkeypatch) -> None:
    import yaml

    def fails(*_, **__):
        raise ValueError("this metadata")

    def late(*_, **__):
        raise AssertionError("compressed first")

    monkeypatch.setattr(yaml, "safe_dump", fails)
    monkeypatch.setattr(api, "compress", late)
    with pytest.raises(ValueError, match="this metadata"):
        compress_for_hub(small, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("model_index.json", "{}", 'pipeline = load_pipeline("OWNER/out")'),
        ("modules.json", "[]", 'model = sentence_transformers.SentenceTransformer("OWNER/out")'),
        ("config.json", "{", 'tensors = bigsmall.from_pretrained("OWNER/out")  # name -> torch tensor'),
        ("config.json", '{"model_type": "x"}', 'model = transformers.AutoModel.from_pretrained("OWNER/out")'),
        (
            "config.json",
            '{"model_type": "x", "architectures": ["X"], "auto_map": {}}',
            'model = transformers.AutoModel.from_pretrained("OWNER/out", trust_remote_code=True)',
        ),
    ],
)
def test_example_fits_the_model(small, tmp_path, name, contents, expected) -> None:
    (small / name).write_text(contents)
    compress_for_hub(small, tmp_path / "out")
    example = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert example
    compile(example[1], "README.md", "exec")
    assert example[1].splitlines()[-1] == expected


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "out", "..", "../model/./", "link"])
def test_output_in_the_source_is_refused(model, tmp_path, where) -> None:
    (tmp_path / "link").symlink_to(model)
    output = tmp_path / "link" if where == "link" else model / where
    before = state(model)
    with pytest.raises(errors.InvalidArgument, match="lie within each other"):
        compress_for_hub(model, output)
    assert state(model) == before
    assert beside(model) == {"link", "model"}


def test_other_files_are_not_replaced(model, tmp_path) -> None:
    output = tmp_path / "out"
    write_files(output, {"config.json": b"someone's", "README.md": b"someone's"})
    for added in ({}, {"notes.txt": b"mine"}, {".git/config": b"mine"}):
        write_files(output, added)
        before = tree(output)
        with pytest.raises(FileExistsError, match="holds other files"):
            compress_for_hub(model, output)
        assert tree(output) == before
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="exists and is no directory"):
        compress_for_hub(model, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="missing, where out is to be written"):
        compress_for_hub(model, tmp_path / "missing" / "out")
    compress_for_hub(model, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        compress_for_hub(model, tmp_path / "mine")


@pytest.fixture
def other(model, tmp_path):
    """A model with the same files, of which one tensor of the last shard is another."""
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    name, tensors = list(SHARDS.items())[-1]
    write_safetensors(folder / name, {key: ("BF16", (300, 64), bfloat16(weights(9, 300, 64))) for key in tensors})
    return folder


@pytest.mark.parametrize("how", ["compress", "compress with SHA-256", "for the Hub", "damaged", "no weights"])
def test_only_an_earlier_result_is_replaced(model, other, tmp_path, monkeypatch, how: str) -> None:
    output, fresh = tmp_path / "out", tmp_path / "fresh"
    compress_for_hub(model, fresh)
    for name in LEFT_OUT:
        (other / name).unlink()
    shutil.rmtree(other / ".git")
    shutil.rmtree(other / ".cache")
    if how.startswith("compress"):
        shutil.copy(model / MADE[2].replace(".bs", ".safetensors"), other)  # the very same weights, but no card
        bigsmall.compress(other, output, sha256="SHA" in how)
    else:
        compress_for_hub(other if how == "for the Hub" else model, output)
    if how == "damaged":
        (output / MADE[1]).write_bytes((output / MADE[1]).read_bytes()[:-9])
    if how == "no weights":
        for name in MADE:
            (output / name).unlink()
    shutil.rmtree(other)
    before = state(output)
    with monkeypatch.context() as patched:
        patched.delattr(api, "compress")  # refused before the work
        with pytest.raises(FileExistsError, match=r"(other|damaged).*replace it by force=True"):
            compress_for_hub(model, output)
    assert state(output) == before
    compress_for_hub(model, output, force=True, repo_id="OWNER/fresh")
    assert tree(output) == tree(fresh)
    assert beside(output) == {"model", "out", "fresh"}


def test_force(model, tmp_path) -> None:
    output = tmp_path / "out"
    write_files(output, {"notes.txt": b"mine", ".git/config": b"mine"})
    (output / "broken").symlink_to("nowhere")
    compress_for_hub(model, output, force=True)
    assert sorted(tree(output)) == sorted([*KEPT, *MADE])
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="exists and is no directory"):
        compress_for_hub(model, tmp_path / "file", force=True)
    with pytest.raises(errors.InvalidArgument, match="lie within each other"):
        compress_for_hub(model, tmp_path, force=True)


@pytest.mark.parametrize(
    ("start", "appears", "force"),
    [
        ("missing", "out/notes.txt", False),
        ("missing", "out/notes.txt", True),
        ("missing", "out", False),  # a file
        ("empty", "out/notes.txt", False),
        ("empty", f"out/{MADE[2]}", True),
        ("earlier", "out/notes.txt", False),
        ("earlier", f"out/{MADE[2]}", False),
    ],
)
def test_what_appears_meanwhile_is_kept(model, other, tmp_path, monkeypatch, start, appears, force) -> None:
    output = tmp_path / "out"
    if start == "empty":
        output.mkdir()
    if start == "earlier":
        compress_for_hub(model, output)
    bigsmall.compress(other / MADE[2].replace(".bs", ".safetensors"), tmp_path / "x.bs", sha256=True)
    compress = api.compress

    def meanwhile(*args, **options) -> None:
        compress(*args, **options)
        (tmp_path / appears).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "x.bs", tmp_path / appears)

    monkeypatch.setattr(api, "compress", meanwhile)
    with pytest.raises(FileExistsError, match=r"files appeared there|holds other"):
        compress_for_hub(model, output, force=force)
    assert (tmp_path / appears).read_bytes() == (tmp_path / "x.bs").read_bytes()
    assert beside(output) == {"model", "other", "out", "x.bs"}


def test_bad_sources(model, tmp_path) -> None:
    def refused(kind, text, source=model) -> None:
        with pytest.raises(kind, match=text) as caught:
            compress_for_hub(source, tmp_path / "out")
        assert isinstance(caught.value, errors.BigSmallError)
        assert ".tmp-" not in str(caught.value)
        assert "out" not in beside(model)
        assert not [name for name in beside(model) if name.startswith(".")]

    (tmp_path / "empty").mkdir()
    refused(errors.InvalidArgument, r"empty holds no \.safetensors file$", tmp_path / "empty")
    write_files(tmp_path / "empty", {"pytorch_model.bin": b"x"})
    refused(errors.InvalidArgument, r"pytorch_model\.bin\) have to be converted", tmp_path / "empty")
    refused(FileNotFoundError, "nowhere", tmp_path / "nowhere")
    refused(FileNotFoundError, "owner/name", Path("owner/name"))  # a Path is none of the Hub's
    with pytest.raises(errors.InvalidArgument, match="mode must be one of"):
        compress_for_hub(model, tmp_path / "out", "smallest")
    refused(NotADirectoryError, "give the one that holds the model", model / "config.json")

    shard = model / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(errors.BigSmallError, re.escape(str(shard)))
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    refused(errors.InvalidArgument, f"{shard} is a pointer of Git LFS")
    shard.unlink()
    refused(errors.InvalidArgument, rf"{model}/model\.safetensors\.index\.json: lists the shard {shard.name}")
    shard.write_bytes(whole)
    (model / "sub" / "x.bs").write_bytes(b"")
    refused(errors.InvalidArgument, r"holds sub/x\.bs: it is compressed already")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_a_failure_leaves_what_was_there(model, tmp_path, monkeypatch, failure) -> None:
    output = tmp_path / "out"
    compress_for_hub(model, output)
    before = state(output)
    (model / "config.json").write_text("{}")

    def fails(*_, **__):
        raise failure

    for name in ("compress", "info"):
        with monkeypatch.context() as patched:
            patched.setattr(api, name, fails)
            with pytest.raises(failure):
                compress_for_hub(model, output)
        assert state(output) == before
        assert beside(output) == {"model", "out"}

    rename = os.rename

    def fails_for_the_new(src, dst) -> None:
        if os.fspath(src).endswith("made"):
            raise failure
        rename(src, dst)

    monkeypatch.setattr(os, "rename", fails_for_the_new)
    with pytest.raises(failure):
        compress_for_hub(model, output)
    assert state(output) == before
    assert beside(output) == {"model", "out"}


@pytest.mark.parametrize("second", [KeyboardInterrupt(), OSError(5, "broken disk")])
def test_what_cannot_be_put_back_is_kept(model, tmp_path, monkeypatch, second) -> None:
    output = tmp_path / "out"
    compress_for_hub(model, output)
    before = state(output)
    rename = os.rename

    def fails(src, dst) -> None:
        if os.path.basename(src) in ("made", "old"):
            raise KeyboardInterrupt if os.path.basename(src) == "made" else second
        rename(src, dst)

    monkeypatch.setattr(os, "rename", fails)
    kind = KeyboardInterrupt if isinstance(second, KeyboardInterrupt) else errors.IOFailure
    with pytest.raises(kind) as caught:
        compress_for_hub(model, output)
    assert not output.exists()
    kept = re.search(r"it is in (\S+), move it back", str(caught.value))
    assert kept
    assert os.path.dirname(os.path.dirname(kept[1])) == str(tmp_path)
    rename(kept[1], output)
    assert state(output) == before


def test_what_a_killed_process_left(model, tmp_path) -> None:
    output = tmp_path / "out"
    compress_for_hub(model, output)
    before = state(output)
    left = tmp_path / ".out.hub-abcd1234"  # killed between its two renames
    (left / "made").mkdir(parents=True)
    output.rename(left / "old")
    (tmp_path / ".out.hub-abcd5678" / "made").mkdir(parents=True)  # and before them
    living = tmp_path / ".out.hub-abcd9012"
    living.mkdir()
    lock = publish._lock(str(living))
    assert lock is not None
    publish._sweep(str(output))
    assert state(output) == before
    assert beside(output) == {"model", "out", living.name}
    os.close(lock)
    compress_for_hub(model, output)
    assert beside(output) == {"model", "out"}


# ---- the Hub ---------------------------------------------------------------------------------------------------------

ROUND_TRIP = """
import sys
from bigsmall.publish import compress_for_hub, upload_to_hub
from huggingface_hub import snapshot_download
import bigsmall

work, token = sys.argv[1], sys.argv[2] or None
result = compress_for_hub("owner/source", work + "/packed", repo_id="owner/packed", token=token)
print(*result.left_out)
print(upload_to_hub(work + "/packed", "owner/packed", private=True, token=token))
path = snapshot_download("owner/packed", token=token)
bigsmall.decompress(path, work + "/restored")
"""


def test_there_and_back(model, tmp_path, hub) -> None:
    hub.redirect = True
    sha = hub.add("owner/source", model, private=True)
    before = state(model)
    said = run_script(ROUND_TRIP, tmp_path, "x", env=hub.env(tmp_path / "home", token=""))
    assert state(model) == before
    assert said.splitlines()[-2] == " ".join(LEFT_OUT)
    packed = hub.files("owner/packed")
    assert said.splitlines()[-1] == f"{hub.url}/owner/packed/commit/{hub.repos['owner/packed'].refs['main']}"
    assert packed == tree(tmp_path / "packed")
    assert sorted(packed) == sorted([*KEPT, *MADE])
    assert hub.repos["owner/packed"].private
    assert weight_files(tmp_path / "restored") == weight_files(model)
    card = packed["README.md"].decode()
    assert f"[owner/source](https://huggingface.co/owner/source) at commit `{sha}`" in card
    assert "base_model: owner/source\n" in card

    paths = [path for _, path, _, _ in hub.log]
    assert not [path for path in paths if "resolve" in path and path.endswith(tuple(LEFT_OUT))]
    storage = {authorization for _, path, _, authorization in hub.log if path.startswith(("/storage/", "/upload/"))}
    assert storage == {None}  # a token stays on the Hub
    assert {auth for _, path, _, auth in hub.log if not path.startswith(("/storage/", "/upload/"))} == {"Bearer x"}


FAILURES = """
import os, sys
from bigsmall import hub
from bigsmall.publish import compress_for_hub, upload_to_hub
from bigsmall.errors import BigSmallError

def show(call, *args, **kw):
    try:
        print("nothing:", call(*args, **kw))
    except BigSmallError as error:
        print(f"{type(error).__name__}: {error}")

work = sys.argv[1]
show(compress_for_hub, "owner/private", work + "/out")
show(compress_for_hub, "owner/private", work + "/out", token="stranger")
show(compress_for_hub, "owner/private", work + "/out", token="unknown")
show(compress_for_hub, "owner/gated", work + "/out", token="reader")
show(compress_for_hub, "owner/public", work + "/out", revision="v7")
show(compress_for_hub, "owner/public", work + "/out", local_files_only=True)
show(compress_for_hub, "owner/pickles", work + "/out")
show(upload_to_hub, work + "/packed", "owner/new")
show(upload_to_hub, work + "/packed", "owner/new", token="reader")
show(upload_to_hub, work + "/packed", "owner/public", token="reader")
show(upload_to_hub, work + "/packed", "owner/new", token=True)
show(upload_to_hub, work + "/packed", "owner/public", token="x", private=True)
show(upload_to_hub, work + "/packed", "owner/no such name", token="x")

def lost(repo, **options):  # older huggingface_hub, where the connection is lost after the list came
    path = snapshot(repo, **options)
    os.remove(path + "/tokenizer.json")
    return path

snapshot, hub.snapshot = hub.snapshot, lost
show(compress_for_hub, "owner/public", work + "/out")
"""


def test_refusals_of_the_hub(model, tmp_path, hub) -> None:
    hub.add("owner/private", model, private=True)
    hub.add("owner/gated", model, gated=True)
    hub.add("owner/public", model)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x" * 1000)
    hub.add("owner/pickles", tmp_path / "pickles")
    compress_for_hub(model, tmp_path / "packed")
    said = run_script(FAILURES, tmp_path, env=hub.env(tmp_path / "home", token="")).splitlines()
    lines = [line for line in said if re.match(r"[A-Za-z]+: ", line)]
    expected = [
        rf"FileMissing: {hub.url}/owner/private: no such repo, or a private one; .*HF_TOKEN.*",
        r"FileMissing: .*owner/private: no such repo, or a private one; .*",
        r"NotPermitted: .*owner/private: the Hub knows no such token, or none was given: .*",
        r"NotPermitted: .*owner/gated: access is gated: accept its conditions there.*",
        r"FileMissing: .*owner/public has no revision 'v7'",
        r"FileMissing: .*owner/public: .*",
        r"InvalidArgument: owner/pickles holds no \.safetensors file; .*pytorch_model\.bin\) have to be converted .*",
        r"NotPermitted: .*owner/new: the Hub knows no such token, or none was given: .*HF_TOKEN.*",
        r"NotPermitted: .*owner/new: the token may not do this: it needs the right to write there.*",
        r"NotPermitted: .*owner/public: the token may not do this: it needs the right to write there.*",
        r"NotPermitted: .*owner/new: there is no token: .*",
        r"InvalidArgument: owner/public exists and is public: .*",
        r"InvalidArgument: .*no such name.*",
        r"FileMissing: owner/public: the cache lacks 1 of its files \(tokenizer\.json\): download it once more",
    ]
    assert len(lines) == len(expected), said
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line), line
    assert len(hub.repos["owner/public"].commits) == 1
    assert "owner/new" not in hub.repos
    assert "out" not in beside(model)


UNREACHABLE = """
import sys
from bigsmall.publish import compress_for_hub, upload_to_hub
from bigsmall.errors import IOFailure

for call in (lambda: compress_for_hub("owner/source", sys.argv[1] + "/out"),
             lambda: upload_to_hub(sys.argv[1] + "/packed", "owner/new")):
    try:
        call()
    except IOFailure as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_no_hub(model, tmp_path, hub) -> None:
    compress_for_hub(model, tmp_path / "packed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = run_script(UNREACHABLE, tmp_path, env={**hub.env(tmp_path / "home"), "HF_ENDPOINT": endpoint})
    lines = [line for line in said.splitlines() if line.startswith("IOFailure: ")]
    assert [line.split(": ")[1:3] for line in lines] == [
        [f"{endpoint}/owner/source", "the Hub was not reached"],
        [f"{endpoint}/owner/new", "the Hub was not reached"],
    ]


COMPRESS = """
import json, sys, time
from huggingface_hub import constants
from bigsmall.publish import compress_for_hub

time.sleep = lambda seconds: None
constants.DOWNLOAD_CHUNK_SIZE = 1024  # so that a part is on disk when the connection is lost
for output, options in json.loads(sys.argv[1]):
    result = compress_for_hub("owner/source", output, **options)
    print(json.dumps([sorted(result.left_out), [file.sha256 for file in result.files]]))
"""


def compressed(hub, home, *jobs, **environment) -> list[list[list[str]]]:
    calls = json.dumps([(str(output), options) for output, options in jobs])
    said = run_script(COMPRESS, calls, env={**hub.env(home), **environment})
    return [json.loads(line) for line in said.splitlines() if line.startswith("[[")]


def test_resumes_after_a_lost_connection(model, tmp_path, hub) -> None:
    hub.add("owner/source", model)
    hub.cut(2, after=10_000)
    compressed(hub, tmp_path / "home", (tmp_path / "out", {}))
    assert hub.cuts_left == 0
    ranges = {range_header for method, _, range_header, _ in hub.log if method == "GET" and range_header}
    assert ranges
    assert all(int(re.fullmatch(r"bytes=(\d+)-", header)[1]) > 0 for header in ranges)
    bigsmall.decompress(tmp_path / "out", tmp_path / "restored")
    assert weight_files(tmp_path / "restored") == weight_files(model)


OFTEN_LOST = """
import sys, time
from bigsmall.publish import compress_for_hub

time.sleep = lambda seconds: None
compress_for_hub("owner/source", sys.argv[1])
"""


def test_goes_on_where_the_client_gave_up(model, tmp_path, hub) -> None:
    hub.add("owner/source", model)
    hub.cut(7, after=10_000)  # the client begins anew five times, where nothing came
    run_script(OFTEN_LOST, tmp_path / "out", env=hub.env(tmp_path / "home"))
    assert hub.cuts_left == 0
    bigsmall.decompress(tmp_path / "out", tmp_path / "restored")
    assert weight_files(tmp_path / "restored") == weight_files(model)


def test_revisions(model, tmp_path, hub) -> None:
    first = hub.add("owner/source", model)
    write_safetensors(
        model / "model-00002-of-00002.safetensors", {"b": ("BF16", (30, 64), bfloat16(weights(9, 30, 64)))}
    )
    second = hub.add("owner/source", model)
    hub.add("owner/source", model, revision="dev")
    outputs = [tmp_path / f"out{i}" for i in range(4)]
    options = [{"revision": first}, {"revision": "main"}, {}, {"revision": "dev"}]
    said = compressed(hub, tmp_path / "home", *zip(outputs, options))
    assert said[1] == said[2] == said[3] != said[0]
    assert f"commit `{first}`" in (outputs[0] / "README.md").read_text()
    assert f"commit `{second}`" in (outputs[2] / "README.md").read_text()
    sums = [hashlib.sha256(hub.files("owner/source", first)[name]).hexdigest() for name in SHARDS]
    assert said[0][1][:2] == sums


OFFLINE = """
import json, pathlib, shutil, sys
from huggingface_hub import snapshot_download
from bigsmall.errors import FileMissing
from bigsmall.publish import compress_for_hub

work, options = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])

def attempt(name, **more):
    try:
        result = compress_for_hub("owner/source", work / name, **options, **more)
        print("left out:", *result.left_out)
    except FileMissing as error:
        print("FileMissing:", error)

attempt("again")
cached = pathlib.Path(snapshot_download("owner/source", local_files_only=True, ignore_patterns=["*"]))
compress_for_hub(cached, work / "by-path")
shutil.copytree(cached.parents[2], work / "cache", symlinks=True)
shutil.rmtree(work / "cache" / "models--owner--source" / "trees", ignore_errors=True)
attempt("unknown", cache_dir=work / "cache")
(cached / "tokenizer.json").unlink()
attempt("half")
"""


def test_offline(model, tmp_path, hub) -> None:
    sha = hub.add("owner/source", model)
    compressed(hub, tmp_path / "home", (tmp_path / "out", {}))
    hub.log.clear()
    shutil.copytree(tmp_path / "home", tmp_path / "home2", symlinks=True)
    said = {}
    for home, options, offline in (("home", {"local_files_only": True}, "0"), ("home2", {}, "1")):
        (tmp_path / f"for-{home}").mkdir()
        env = {**hub.env(tmp_path / home), "HF_HUB_OFFLINE": offline}
        output = run_script(OFFLINE, tmp_path / f"for-{home}", json.dumps(options), env=env).splitlines()
        said[home] = [line for line in output if line.startswith(("left out: ", "FileMissing: "))]
    assert hub.log == []
    import huggingface_hub

    refused = (
        r"FileMissing: owner/source: no network, and no list of .*snapshot_download\('owner/source'\) once with .*"
    )
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        made = ["again", "by-path"]
        patterns = [f"left out: {re.escape(' '.join(LEFT_OUT))}", refused, r"FileMissing: .*tokenizer\.json.*"]
    else:  # then nobody knows what else the repo has
        made, patterns = ["by-path"], [refused] * 3
    for home, lines in said.items():
        assert len(lines) == 3, lines
        for line, pattern in zip(lines, patterns):
            assert re.fullmatch(pattern, line), line
        assert sorted(entry.name for entry in (tmp_path / f"for-{home}").iterdir()) == [*made, "cache"]
        for name in made:  # only the name of the directory differs, in the card's example
            again = tree(tmp_path / f"for-{home}" / name)
            assert f"(https://huggingface.co/owner/source) at commit `{sha}`" in again["README.md"].decode()
            assert {**again, "README.md": b""} == {**tree(tmp_path / "out"), "README.md": b""}


UPLOADS = """
import sys
from bigsmall.publish import upload_to_hub

for folder, options in (
    ("first", {}),
    ("second", {}),
    ("second", {"revision": "v2", "commit_message": "once more"}),
    ("delta", {"create_pr": True}),
):
    print(upload_to_hub(f"{sys.argv[1]}/{folder}", "owner/packed", **options))
"""


def test_uploads(model, tmp_path, hub) -> None:
    compress_for_hub(model, tmp_path / "first")
    lone = write_safetensors(tmp_path / "lone.safetensors", SHARDS["model-00002-of-00002.safetensors"])
    for folder in ("second", "delta"):
        (tmp_path / folder).mkdir()
    bigsmall.compress(lone, tmp_path / "second" / "model.bs")
    bigsmall.compress_delta(lone, lone, tmp_path / "delta" / "model.bs")
    said = run_script(UPLOADS, tmp_path, env=hub.env(tmp_path / "home")).splitlines()
    repo = hub.repos["owner/packed"]
    assert [line for line in said if line.startswith("http")] == [
        f"{hub.url}/owner/packed/commit/{sha}" for sha in list(repo.commits)[1:3]
    ] + [
        f"{hub.url}/owner/packed/commit/{repo.refs['v2']}",
        f"{hub.url}/owner/packed/discussions/{len(repo.commits) - 1}",
    ]
    # What would be mixed with the new weights is gone, the rest is not.
    assert sorted(hub.files("owner/packed")) == sorted([*KEPT, "model.bs"])
    assert hub.files("owner/packed", "v2") == hub.files("owner/packed")
    assert not repo.private
    pull = next(name for name in repo.refs if name.startswith("refs/pr/"))
    assert hub.files("owner/packed", pull)["model.bs"] == (tmp_path / "delta" / "model.bs").read_bytes()


def test_nothing_is_sent_of_a_damaged_directory(model, tmp_path, monkeypatch) -> None:
    import huggingface_hub

    def used(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", used)
    output = tmp_path / "out"
    variant = {}
    for name, tensors in SHARDS.items():
        named = name.replace("model-", "model.fp16-")
        write_safetensors(
            model / named, {key: ("F16", shape, bytes(len(data))) for key, (_, shape, data) in tensors.items()}
        )
        variant.update(dict.fromkeys(tensors, named))
    (model / "model.safetensors.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": variant}))
    compress_for_hub(model, output)
    shard, other = output / MADE[2], output / MADE[3]

    def refused(kind, name) -> None:
        with pytest.raises(kind, match=re.escape(name)):
            upload_to_hub(output, "owner/packed")

    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    refused(errors.Truncated, shard.name)
    shard.unlink()
    refused(FileNotFoundError, shard.name)
    shard.write_bytes((output / MADE[1]).read_bytes())
    refused(errors.BigSmallError, shard.name)
    shard.write_bytes(whole)
    index = output / "bigsmall.index.json"
    text = index.read_text()
    index.write_text(text.replace('"b": "model-00002', '"b": "model-00001'))
    refused(errors.Corrupt, "model-00001-of-00002.bs")
    index.write_text(text.replace('"model-00002-of-00002.bs"', '"../x.bs"'))
    refused(errors.Corrupt, "../x.bs")
    index.write_text(text)
    whole = other.read_bytes()
    other.write_bytes(b"BGSM")
    refused(errors.Truncated, other.name)
    other.write_bytes(whole)
    shard = output / "model.fp16-00002-of-00002.bs"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    refused(errors.Truncated, shard.name)
    shard.unlink()
    refused(FileNotFoundError, shard.name)
    shard.write_bytes((output / MADE[2]).read_bytes().replace(b'"b"', b'"x"'))
    refused(errors.BigSmallError, shard.name)
    bigsmall.compress(write_safetensors(tmp_path / "x.safetensors", {"x": ("F32", (), bytes(4))}), shard)
    refused(errors.Corrupt, f"tensor 'b' should be in {shard.name}")
    shard.write_bytes(whole)
    with pytest.raises(AssertionError, match="the Hub was asked"):  # all is right again
        upload_to_hub(output, "owner/packed")
    with pytest.raises(FileNotFoundError):
        upload_to_hub(tmp_path / "nowhere", "owner/packed")
    with pytest.raises(errors.InvalidArgument, match=r"holds no \.bs file"):
        upload_to_hub(model, "owner/packed")
