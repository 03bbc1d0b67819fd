"""bigsmall.integrations.sglang on a stub of SGLang (tests/py/stubs)."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import types
from pathlib import Path

import pytest

import bigsmall
from bigsmall import errors
from bigsmall.integrations import sglang as integration
from helpers import array_bytes, bfloat16, weights, write_safetensors

torch = pytest.importorskip("torch")

STUBS = Path(__file__).parent / "stubs"
LOADER = "sglang.srt.model_loader.loader"

FIRST = {
    "model.embed.weight": ("BF16", (64, 16), bfloat16(weights(1, 64, 16))),
    "model.mtp.layers.0.a.weight": ("F32", (4, 4), weights(2, 4, 4).tobytes()),
    "model.mtp.layers.1.a.weight": ("F32", (4, 4), weights(3, 4, 4).tobytes()),
}
SECOND = {"model.scale": ("F32", (), weights(4, 1).tobytes()), "model.empty": ("F16", (0, 16), b"")}
ALL = {**FIRST, **SECOND}


@pytest.fixture
def loaders(monkeypatch):
    """The stub's `sglang.srt.model_loader.loader`."""
    monkeypatch.syspath_prepend(str(STUBS))
    yield importlib.import_module(LOADER)
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        del sys.modules[name]


@pytest.fixture
def packed(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for name, tensors in {"model-00001-of-00002": FIRST, "model-00002-of-00002": SECOND}.items():
        write_safetensors(folder / f"{name}.safetensors", tensors)
        weight_map.update(dict.fromkeys(tensors, f"{name}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    bigsmall.compress(folder, tmp_path / "packed")
    return tmp_path / "packed"


class Model:
    def __init__(self, **attributes) -> None:
        self.given = {}
        self.__dict__.update(attributes)

    def load_weights(self, tensors) -> None:
        for name, tensor in tensors:
            self.given[name] = array_bytes(tensor)


def make_loader(loaders, *, extra=None, **fields):
    config = importlib.import_module("sglang.srt.configs.load_config").LoadConfig(
        load_format=integration.get_loader_class(), model_loader_extra_config=extra or {}, **fields
    )
    return loaders.get_model_loader(config)


def load(loader, path, **attributes) -> dict[str, bytes]:
    config = types.SimpleNamespace(model_path=str(path), revision=None, make_model=lambda: Model(**attributes))
    return loader.load_model(model_config=config, device_config=None).given


def test_loads_every_tensor(loaders, packed) -> None:
    given = load(make_loader(loaders, extra={"workers": 1, "verify": True}), packed)
    assert given == {name: data for name, (_, _, data) in ALL.items()}
    assert list(given) == list(ALL)


def test_class_reaches_other_processes(loaders) -> None:
    """SGLang sends its arguments, the class among them, to the processes that it starts."""
    made = integration.get_loader_class()
    assert pickle.loads(pickle.dumps(made)) is made
    assert issubclass(made, loaders.DefaultModelLoader)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = integration.Nothing


def test_draft_layer(loaders, packed) -> None:
    given = load(make_loader(loaders, draft_model_idx=1), packed)
    assert given["model.mtp.layers.0.a.weight"] == FIRST["model.mtp.layers.1.a.weight"][2]
    assert len(given) == len(ALL) - 1


def test_secondary_weights(loaders, packed, tmp_path) -> None:
    (tmp_path / "plain").mkdir()
    write_safetensors(tmp_path / "plain" / "model.safetensors", {"x": ("F32", (1,), b"abcd")})
    bigsmall.compress(tmp_path / "plain", tmp_path / "plain-bs")
    source = loaders.DefaultModelLoader.Source
    others = [source(str(tmp_path / "plain"), None, "st."), source(str(tmp_path / "plain-bs"), None, "bs.")]
    given = load(make_loader(loaders), packed, secondary_weights=others)
    assert given["st.x"] == given["bs.x"] == b"abcd"
    assert len(given) == len(ALL) + 2


def test_missing_shard(loaders, packed) -> None:
    (packed / "model-00002-of-00002.bs").unlink()
    with pytest.raises(errors.FileMissing, match=r"model-00002-of-00002\.bs"):
        load(make_loader(loaders), packed)


def test_directory_without_bs(loaders, tmp_path) -> None:
    for use in (
        lambda: load(make_loader(loaders), tmp_path),
        lambda: make_loader(loaders).download_model(types.SimpleNamespace(model_path=str(tmp_path), revision=None)),
    ):
        with pytest.raises(errors.FileMissing, match=r"holds no \.bs file"):
            use()


def test_options(loaders) -> None:
    extra = {"workers": 2}
    assert make_loader(loaders, extra=extra)._options.workers == 2
    assert extra == {"workers": 2}
    for wrong in ({"workres": 2}, {"workers": 0}, {"num_threads": 2}):
        with pytest.raises(ValueError, match="work"):
            make_loader(loaders, extra=wrong)


def test_without_sglang() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install sglang"):
        integration.get_loader_class()


def test_unknown_layout(loaders, monkeypatch) -> None:
    monkeypatch.delattr(loaders.DefaultModelLoader, "_get_weights_iterator")
    with pytest.raises(errors.Unsupported, match=r"_get_weights_iterator.*decompress_to_temp"):
        integration.get_loader_class()
