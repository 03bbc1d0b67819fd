"""The custom node of examples/comfyui, on a stub of what it touches in ComfyUI (tests/py/stubs)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest

import bigsmall
from helpers import REPOSITORY, array_bytes

torch = pytest.importorskip("torch")

NODE = REPOSITORY / "examples" / "comfyui" / "__init__.py"
STUBS = Path(__file__).parent / "stubs"


def load_node():
    spec = importlib.util.spec_from_file_location("custom_node_under_test", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def comfy(monkeypatch):
    """The stub's `comfy.utils` before the node is loaded, and `folder_paths`."""
    monkeypatch.syspath_prepend(str(STUBS))
    utils = importlib.import_module("comfy.utils")
    paths = importlib.import_module("folder_paths")
    yield utils, paths
    for name in [name for name in sys.modules if name == "folder_paths" or name.split(".")[0] == "comfy"]:
        del sys.modules[name]


def test_files_are_listed(comfy, mixed) -> None:
    _, paths = comfy
    source, packed = mixed
    paths.folder_names_and_paths["vae"][0].append(str(packed.parent))
    assert paths.get_filename_list("vae") == [source.name]
    load_node()
    assert paths.get_filename_list("vae") == sorted([source.name, packed.name])


def test_tensors_and_metadata(comfy, make) -> None:
    utils, _ = comfy
    data = torch.randn(64, 32, dtype=torch.float32).to(torch.bfloat16)
    tensors = {
        "b": ("BF16", (64, 32), array_bytes(data)),
        "a": ("F32", (), b"abcd"),
        "empty": ("I64", (0, 3), b""),
    }
    source, packed = make(tensors, {"modelspec.title": "x"})
    node = load_node()
    assert node.NODE_CLASS_MAPPINGS == {}
    expected, metadata = utils.load_torch_file(str(source), return_metadata=True)
    assert metadata == {"modelspec.title": "x"}
    for loaded in (
        utils.load_torch_file(str(packed)),
        utils.load_torch_file(str(packed), True, torch.device("cpu")),
        utils.load_torch_file(ckpt=str(packed), device=torch.device("cpu"), safe_load=True),
        utils.load_torch_file(str(packed), return_metadata=True)[0],
    ):
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert array_bytes(loaded[name]) == array_bytes(tensor)
    assert utils.load_torch_file(str(packed), return_metadata=True)[1] == metadata
    _, packed = make(tensors, None, stem="plain")
    assert utils.load_torch_file(str(packed), return_metadata=True)[1] is None


def test_other_files_go_to_comfyui(comfy, tmp_path) -> None:
    utils, _ = comfy
    load_node()
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    loaded, metadata = utils.load_torch_file(str(tmp_path / "x.pt"), return_metadata=True)
    assert loaded["a"].tolist() == [1, 1, 1]
    assert metadata is None


def test_loaded_twice_and_imported_by_name(comfy, make) -> None:
    utils, _ = comfy
    _, packed = make({"a": ("F32", (2,), b"abcdefgh")})
    original = utils.load_torch_file
    by_name = types.ModuleType("comfy.clip_vision")
    by_name.load_torch_file = original
    sys.modules["comfy.clip_vision"] = by_name
    load_node()
    once = utils.load_torch_file
    load_node()
    assert utils.load_torch_file is once is not original
    assert list(by_name.load_torch_file(str(packed))) == ["a"]


def test_errors_name_the_file(comfy, make, tmp_path) -> None:
    utils, _ = comfy
    load_node()
    with pytest.raises(FileNotFoundError, match=r"none\.bs"):
        utils.load_torch_file(str(tmp_path / "none.bs"))
    (tmp_path / "bad.bs").write_bytes(b"not a .bs file")
    with pytest.raises(bigsmall.errors.Corrupt, match=r"bad\.bs"):
        utils.load_torch_file(str(tmp_path / "bad.bs"), return_metadata=True)
