"""bigsmall.integrations.vllm on a stub of vLLM (tests/py/stubs); `make test-vllm` runs it in vLLM itself."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
import time
import types
import weakref
from importlib.metadata import distribution
from pathlib import Path

import pytest

import bigsmall
from bigsmall import errors
from bigsmall.integrations import vllm as integration
from fakehub import FakeHub
from helpers import array_bytes, bfloat16, run_script, tree, weights, write_safetensors

torch = pytest.importorskip("torch")

STUBS = Path(__file__).parent / "stubs"
LOADERS = "vllm.model_executor.model_loader"

FIRST = {
    "model.embed.weight": ("BF16", (64, 16), bfloat16(weights(1, 64, 16))),
    "model.layers.0.q.weight": ("BF16", (16, 16), bfloat16(weights(2, 16, 16))),
    "model.layers.0.k.weight": ("BF16", (8, 16), bfloat16(weights(3, 8, 16))),
    "model.layers.0.experts.0.w.weight": ("F32", (16, 4), weights(4, 16, 4).tobytes()),
    "model.layers.0.experts.1.w.weight": ("F32", (16, 4), weights(5, 16, 4).tobytes()),
}
SECOND = {
    "model.scale": ("F32", (), weights(6, 1).tobytes()),
    "model.empty": ("F16", (0, 16), b""),
    "lm_head.weight": ("BF16", (64, 16), bfloat16(weights(7, 64, 16))),
}
ALL = {**FIRST, **SECOND}


@pytest.fixture
def loaders(monkeypatch):
    """The stub's `vllm.model_executor.model_loader`, with bigsmall registered."""
    monkeypatch.syspath_prepend(str(STUBS))
    module = importlib.import_module(LOADERS)
    integration.register()
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(params=["single", "sharded"])
def source(request, tmp_path) -> Path:
    """A model directory of safetensors files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if request.param == "single":
        write_safetensors(folder / "model.safetensors", ALL, {"format": "pt"})
    else:
        write_shards(folder)
    return folder


@pytest.fixture
def packed(source, tmp_path) -> Path:
    bigsmall.compress(source, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder)
    bigsmall.compress(folder, tmp_path / "shards-bs")
    return tmp_path / "shards-bs"


def write_shards(folder: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {}
    for name, tensors in zip(names, (FIRST, SECOND)):
        write_safetensors(folder / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Model:
    """As vLLM's models do, it makes one parameter of two tensors; and it is full of NaN until it is loaded."""

    def __init__(self, **attributes) -> None:
        self.parameters = {}
        for name, (dtype, shape, _) in ALL.items():
            kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
            self.parameters[name] = torch.full(shape, torch.nan, dtype=kind)
        self.parameters.pop("model.layers.0.q.weight")
        self.parameters.pop("model.layers.0.k.weight")
        self.parameters["model.layers.0.qk.weight"] = torch.full((24, 16), torch.nan, dtype=torch.bfloat16)
        self.given = []
        self.__dict__.update(attributes)

    def named_parameters(self):
        return self.parameters.items()

    def load_weights(self, tensors):
        loaded = set()
        for name, tensor in tensors:
            self.given.append(name)
            assert tensor.device.type == "cpu"
            target, rows = name, slice(None)
            if name.endswith((".q.weight", ".k.weight")):
                target = "model.layers.0.qk.weight"
                rows = slice(0, 16) if ".q." in name else slice(16, 24)
            if target not in self.parameters:
                continue
            part = self.parameters[target] if self.parameters[target].dim() == 0 else self.parameters[target][rows]
            part.copy_(tensor)
            loaded.add(target)
        return loaded

    def check(self) -> None:
        for name, (_, _, data) in ALL.items():
            if name.endswith(".q.weight"):
                assert array_bytes(self.parameters["model.layers.0.qk.weight"][:16]) == data
            elif name.endswith(".k.weight"):
                assert array_bytes(self.parameters["model.layers.0.qk.weight"][16:]) == data
            else:
                assert array_bytes(self.parameters[name]) == data, name


def model_config(path, **fields) -> types.SimpleNamespace:
    config = types.SimpleNamespace(tie_word_embeddings=False)
    config.get_text_config = lambda: config
    defaults = {"revision": None, "quantization": None, "local_expert_ids": None, "hf_config": config}
    return types.SimpleNamespace(model=str(path), **{**defaults, **fields})


def load_config(**extra):
    module = importlib.import_module(f"{LOADERS}.default_loader")
    return module.LoadConfig(load_format="bigsmall", model_loader_extra_config=extra)


def make_loader(loaders, **extra):
    return loaders.get_model_loader(load_config(**extra))


def source_of(path, **fields):
    return importlib.import_module(f"{LOADERS}.default_loader").DefaultModelLoader.Source(str(path), None, **fields)


@pytest.fixture
def reads(monkeypatch):
    """The names of every group that was decoded, and on which thread."""
    module = importlib.import_module("bigsmall.torch")
    original, seen = module.read, []

    def read(reader, tensors, *args, **kwargs):
        seen.append(([tensor.name for tensor in tensors], threading.current_thread()))
        return original(reader, tensors, *args, **kwargs)

    monkeypatch.setattr(module, "read", read)
    return seen


# ---- the plugin ----------------------------------------------------------------------------------------------------


def test_registers_once(loaders) -> None:
    registered = loaders._LOAD_FORMAT_TO_MODEL_LOADER["bigsmall"]
    assert registered is integration.get_loader_class()
    assert issubclass(registered, loaders.DefaultModelLoader)
    assert registered.__name__ == "BigSmallModelLoader"
    integration.register()
    assert loaders._LOAD_FORMAT_TO_MODEL_LOADER["bigsmall"] is registered
    assert loaders.warnings == []


def test_entry_point_resolves() -> None:
    plugins = [point for point in distribution("bigsmall").entry_points if point.group == "vllm.general_plugins"]
    assert [(point.name, point.load()) for point in plugins] == [("bigsmall", integration.register)]


BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from bigsmall.integrations.vllm import register
assert "vllm" not in sys.modules
register()
register()
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as formats
assert "bigsmall" in formats
assert "torch" not in sys.modules
with open("/proc/self/maps") as maps:
    assert "libbigsmall" not in maps.read()
import pickle, types
from vllm.model_executor.model_loader.default_loader import LoadConfig
loader = formats["bigsmall"](LoadConfig("bigsmall"))
try:
    list(loader.get_all_weights(types.SimpleNamespace(model=sys.argv[2], revision=None), None))
except ImportError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_registers_without_a_working_library(shards) -> None:
    output = run_script(BROKEN, STUBS, shards, env={"BIGSMALL_LIB": "/nowhere/libbigsmall.so"})
    assert "/nowhere/libbigsmall.so is missing" in output


def test_without_vllm(caplog) -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install vllm"):
        integration.get_loader_class()
    integration.register()
    assert "pip install vllm" in caplog.text


@pytest.mark.parametrize("lacks", ["register_model_loader", "get_all_weights"])
def test_vllm_that_cannot_be_taught(loaders, monkeypatch, caplog, lacks: str) -> None:
    monkeypatch.delattr(loaders if lacks == "register_model_loader" else loaders.DefaultModelLoader, lacks)
    with pytest.raises(errors.Unsupported, match=r"vLLM 0\.32\.0 .*decompress_to_temp"):
        integration.get_loader_class()
    integration.register()
    assert "decompress_to_temp" in caplog.text


# ---- loading -------------------------------------------------------------------------------------------------------


def test_loads_every_parameter(loaders, packed) -> None:
    model = make_loader(loaders).load_model(
        types.SimpleNamespace(make_model=lambda config: Model()), model_config(packed)
    )
    model.check()
    assert model.given == list(ALL)  # in the order of the files


def test_same_as_safetensors(loaders, source, packed) -> None:
    plain = loaders.get_model_loader(importlib.import_module(f"{LOADERS}.default_loader").LoadConfig())
    expected = dict(plain._get_weights_iterator(source_of(source, prefix="a.")))
    loaded = dict(make_loader(loaders, verify=True, workers=1)._get_weights_iterator(source_of(packed, prefix="a.")))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert array_bytes(loaded[name]) == array_bytes(tensor)


def test_decodes_ahead_and_no_further(loaders, shards, monkeypatch, reads) -> None:
    monkeypatch.setattr("bigsmall.integrations._serving._GROUP_BYTES", 1)  # every tensor is a group of its own
    tensors = make_loader(loaders)._get_weights_iterator(source_of(shards))
    assert reads == []
    for used, (name, tensor) in enumerate(tensors, 1):
        assert array_bytes(tensor) == ALL[name][2]
        for _ in range(1000):  # the next one is decoded while this one is used
            if len(reads) == min(used + 1, len(ALL)):
                break
            time.sleep(0.01)
        assert len(reads) == min(used + 1, len(ALL))
    assert [names for names, _ in reads] == [[name] for name in ALL]
    assert {thread is threading.main_thread() for _, thread in reads} == {False}


def test_memory_of_used_tensors_is_given_back(loaders, shards, monkeypatch) -> None:
    """A tensor lives while it is used, and until the next is asked for."""
    tensors = make_loader(loaders)._get_weights_iterator(source_of(shards))
    used = []
    for _, tensor in tensors:
        assert all(gone() is None for gone in used[:-1])
        used.append(weakref.ref(tensor))
        del tensor
    assert len(used) == len(ALL)


def test_stopped_half_way(loaders, shards, monkeypatch) -> None:
    monkeypatch.setattr("bigsmall.integrations._serving._GROUP_BYTES", 1)
    tensors = make_loader(loaders)._get_weights_iterator(source_of(shards))
    next(tensors)
    assert any(thread.name.startswith("bigsmall") for thread in threading.enumerate())
    tensors.close()
    del tensors
    assert not any(thread.name.startswith("bigsmall") for thread in threading.enumerate())


@pytest.mark.parametrize("what", ["missing", "truncated", "corrupt"])
def test_bad_shard(loaders, shards, what: str) -> None:
    shard = shards / "model-00002-of-00002.bs"
    data = bytearray(shard.read_bytes())
    if what == "missing":
        shard.unlink()
    elif what == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    else:
        data[-200] ^= 1  # among the coded bytes of the last tensor
        shard.write_bytes(data)
    model = Model()
    error = FileNotFoundError if what == "missing" else errors.Corrupt
    with pytest.raises(error, match=r"model-00002-of-00002\.bs|lm_head") as raised:
        make_loader(loaders).load_weights(model, model_config(shards))
    assert isinstance(raised.value, errors.BigSmallError)
    if what == "missing":
        assert model.given == []


def test_strict_about_what_is_lacking(loaders, tmp_path) -> None:
    folder = tmp_path / "less"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", FIRST)
    bigsmall.compress(folder, tmp_path / "less-bs")
    with pytest.raises(ValueError, match=r"not initialized.*lm_head"):
        make_loader(loaders).load_weights(Model(), model_config(tmp_path / "less-bs"))
    make_loader(loaders, enable_weights_track=False).load_weights(Model(), model_config(tmp_path / "less-bs"))


def test_directory_without_bs(loaders, tmp_path) -> None:
    (tmp_path / "plain").mkdir()
    write_safetensors(tmp_path / "plain" / "model.safetensors", ALL)
    for use in (
        lambda: make_loader(loaders).load_weights(Model(), model_config(tmp_path / "plain")),
        lambda: make_loader(loaders).download_model(model_config(tmp_path / "plain")),
        lambda: make_loader(loaders).download_model(model_config(tmp_path / "none")),
    ):
        with pytest.raises(errors.FileMissing, match=r"plain: this holds no \.bs file|none: "):
            use()


def test_download_finds_a_local_model(loaders, packed, reads) -> None:
    make_loader(loaders).download_model(model_config(packed))
    assert reads == []


def test_reload(loaders, packed) -> None:
    """vLLM gives the tensors of another directory to a model that is loaded already."""
    loader, model = make_loader(loaders), Model()
    loader.load_weights(model, model_config(packed))
    again = Model()
    again.load_weights(loader.get_all_weights(model_config(packed), again))
    again.check()


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"workres": 2}, "workres"),
        ({"workers": 0}, "workers must be"),
        ({"workers": True}, "workers must be"),
        ({"workers": "2"}, "workers must be"),
        ({"verify": 1}, "verify must be"),
        ({"base": 3}, "base must be"),
        ({"enable_multithread_load": True}, "workers"),
        ({"num_threads": 4}, "workers"),
    ],
)
def test_wrong_options(loaders, extra, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_loader(loaders, **extra)


def test_options_stay_in_the_engines_config(loaders) -> None:
    """The engine makes more than one loader of one config."""
    config = load_config(workers=2, verify=True, enable_weights_track=False)
    for _ in range(2):
        loader = loaders.get_model_loader(config)
        assert (loader._options.workers, loader._options.verify) == (2, True)
        assert not loader.enable_weights_track
    assert config.model_loader_extra_config == {"workers": 2, "verify": True, "enable_weights_track": False}
    config.model_loader_extra_config = None
    with pytest.raises(ValueError, match="must be a dict"):
        loaders.get_model_loader(config)


def test_delta(loaders, tmp_path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    write_safetensors(tmp_path / "base" / "model.safetensors", ALL)
    tuned = {**ALL, "lm_head.weight": ("BF16", (64, 16), bfloat16(weights(8, 64, 16)))}
    write_safetensors(tmp_path / "tuned" / "model.safetensors", tuned)
    delta = tmp_path / "delta"
    bigsmall.compress_delta(tmp_path / "tuned", tmp_path / "base", delta)
    loaded = dict(make_loader(loaders, base=str(tmp_path / "base"))._get_weights_iterator(source_of(delta)))
    assert {name: array_bytes(tensor) for name, tensor in loaded.items()} == {name: t[2] for name, t in tuned.items()}
    with pytest.raises(errors.WrongBase):
        list(make_loader(loaders)._get_weights_iterator(source_of(delta)))


# ---- what vLLM's own loader does besides ---------------------------------------------------------------------------


def test_experts_of_others_are_not_decoded(loaders, packed, reads) -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"experts\.0"):  # the stub's tracking is stricter than vLLM's
        make_loader(loaders).load_weights(model, model_config(packed, local_expert_ids={1}))
    decoded = [name for names, _ in reads for name in names]
    assert decoded == [name for name in ALL if ".experts.0." not in name] == model.given


def test_unused_weights_are_not_decoded(loaders, packed, reads) -> None:
    model = Model(is_unused_checkpoint_weight=lambda name: name.startswith("lm_head"))
    model.parameters.pop("lm_head.weight")
    make_loader(loaders).load_weights(model, model_config(packed))
    assert "lm_head.weight" not in [name for names, _ in reads for name in names]


def test_secondary_weights(loaders, packed, tmp_path) -> None:
    """Another model in `.bs`, one in safetensors, folders of the first in either, and a file of another kind."""
    small = {"x": ("F32", (2,), b"abcdefgh")}
    for name in ("other", "plain"):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", small)
    bigsmall.compress(tmp_path / "other", tmp_path / "other-bs")
    bigsmall.compress(tmp_path / "other", packed / "sub")
    shutil.copytree(tmp_path / "plain", packed / "plain")
    torch.save({"x": torch.zeros(2)}, packed / "head.pt")
    model = Model(
        secondary_weights=[
            source_of(tmp_path / "other-bs", prefix="bs."),
            source_of(tmp_path / "plain", prefix="st."),
            source_of(packed, subfolder="sub", prefix="sub."),
            source_of(packed, subfolder="plain", prefix="sub-st."),
            source_of(packed, allow_patterns_overrides=["head.pt"], prefix="pt."),
        ]
    )
    make_loader(loaders).load_weights(model, model_config(packed))
    model.check()
    assert model.given == [*ALL, "bs.x", "st.x", "sub.x", "sub-st.x", "pt.x"]


def test_model_that_names_its_files(loaders, tmp_path) -> None:
    """A pattern for safetensors files stands for the `.bs` files made of them."""
    for part, tensors in {"transformer": FIRST, "vision_encoder": SECOND, "vae": {"x": ("F32", (1,), b"abcd")}}.items():
        (tmp_path / "whole" / part).mkdir(parents=True)
        write_safetensors(tmp_path / "whole" / part / "model.safetensors", tensors)
    bigsmall.compress(tmp_path / "whole", tmp_path / "whole-bs")
    model = Model(allow_patterns_overrides=["[tv]*er/*.safetensors"])
    make_loader(loaders).load_weights(model, model_config(tmp_path / "whole-bs"))
    model.check()
    assert model.given == list(ALL)
    with pytest.raises(errors.FileMissing):
        wrong = Model(allow_patterns_overrides=["nothing/*.safetensors"])
        make_loader(loaders).load_weights(wrong, model_config(tmp_path / "whole-bs"))


def test_torchao_is_refused(loaders, packed) -> None:
    with pytest.raises(errors.Unsupported, match=r"torchao.*decompress_to_temp"):
        make_loader(loaders).load_weights(Model(), model_config(packed, quantization="torchao"))


def test_modelscope(loaders, packed, monkeypatch) -> None:
    asked = []
    utils = importlib.import_module(f"{LOADERS}.weight_utils")
    monkeypatch.setattr(utils, "maybe_download_from_modelscope", lambda *given: asked.append(given) or str(packed))
    model = Model()
    make_loader(loaders).load_weights(model, model_config("owner/name", revision="v1"))
    model.check()
    assert asked == [("owner/name", "v1")]


@pytest.mark.parametrize("has_head", [True, False])
def test_own_head_beside_tied_embeddings(loaders, shards, tmp_path, has_head: bool) -> None:
    """As vLLM does for safetensors files: a head in the file is loaded, whatever config.json says of it."""
    path = shards
    if not has_head:
        (tmp_path / "headless").mkdir()
        write_safetensors(tmp_path / "headless" / "model.safetensors", {**FIRST, "model.scale": ALL["model.scale"]})
        path = tmp_path / "headless-bs"
        bigsmall.compress(tmp_path / "headless", path)
    config = model_config(path, word_embeddings_untied_by_checkpoint=False)
    config.hf_config.tie_word_embeddings = True
    seen = []

    def make_model(config):
        seen.append(config.hf_config.tie_word_embeddings)
        return Model()

    loader = make_loader(loaders, enable_weights_track=False)
    loader.load_model(types.SimpleNamespace(make_model=make_model), config)
    assert seen == [not has_head]
    assert config.word_embeddings_untied_by_checkpoint is has_head
    old = model_config(path)  # an older vLLM, which ties safetensors files in any case
    old.hf_config.tie_word_embeddings = True
    loader.load_model(types.SimpleNamespace(make_model=make_model), old)
    assert seen[-1] is True


def test_dense_module_that_vllm_would_miss(loaders, packed) -> None:
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (packed / "modules.json").write_text(json.dumps(modules))
    (packed / "2_Dense").mkdir()
    dense = write_safetensors(packed / "2_Dense" / "model.safetensors", {"linear.weight": ("F32", (1,), b"abcd")})
    bigsmall.compress(dense, packed / "2_Dense" / "model.bs")
    engine = types.SimpleNamespace(make_model=lambda config: Model())
    make_loader(loaders).load_model(engine, model_config(packed)).check()
    dense.unlink()
    with pytest.raises(errors.Unsupported, match=r"2_Dense.*bigsmall decompress"):
        make_loader(loaders).load_model(engine, model_config(packed))


# ---- repositories ----------------------------------------------------------------------------------------------------

FROM_HUB = """
import sys, types
stubs, expected = sys.argv[1:]
sys.path.insert(0, stubs)
import safetensors.torch, torch
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader, LoadConfig
from bigsmall import errors
from bigsmall.integrations.vllm import decompress_to_temp, register
register()
loader = get_model_loader(LoadConfig("bigsmall"))
expected = safetensors.torch.load_file(expected)
one = types.SimpleNamespace(model="owner/name", revision="main")
def same(tensors):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
loader.download_model(one)
same(dict(loader.get_all_weights(one, None)))
parts = types.SimpleNamespace(allow_patterns_overrides=["[a]*part/*.safetensors"])
same(dict(loader.get_all_weights(types.SimpleNamespace(model="owner/parts", revision="main"), parts)))
for name in ("owner/plain", "owner/parts"):
    try:
        loader.download_model(types.SimpleNamespace(model=name, revision="main"))
    except errors.FileMissing as error:
        assert name in str(error)
    else:
        raise AssertionError(name)
with decompress_to_temp("owner/name") as directory:
    same(safetensors.torch.load_file(directory + "/model.safetensors"))
    with open(directory + "/config.json") as file:
        assert file.read() == "{}"
"""


def test_from_the_hub(tmp_path) -> None:
    pytest.importorskip("huggingface_hub")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    write_safetensors(plain / "model.safetensors", ALL)
    bigsmall.compress(plain, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    bigsmall.compress(plain, tmp_path / "parts" / "apart")
    bigsmall.compress(plain, tmp_path / "parts" / "other")
    with FakeHub(tmp_path) as hub:
        for name, folder in {"plain": plain, "name": tmp_path / "whole", "parts": tmp_path / "parts"}.items():
            hub.add(f"owner/{name}", folder)
        env = hub.env(tmp_path / "home")
        run_script(FROM_HUB, STUBS, plain / "model.safetensors", env=env)
        fetched = [path for method, path, *_ in hub.log if method == "GET" and path.endswith((".bs", ".safetensors"))]
        assert sorted(path.split("/", 4)[-1].split("/", 1)[-1] for path in fetched) == ["apart/model.bs", "model.bs"]


# ---- decompress_to_temp --------------------------------------------------------------------------------------------


def test_decompress_to_temp_directory(source, packed, tmp_path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    with integration.decompress_to_temp(packed, temp_dir=room) as directory:
        assert Path(directory).name == "packed"
        assert tree(Path(directory)) == tree(source)
    assert list(room.iterdir()) == []


def test_decompress_to_temp_is_deleted_after_errors(packed, tmp_path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    with pytest.raises(KeyboardInterrupt), integration.decompress_to_temp(packed, temp_dir=room):
        raise KeyboardInterrupt
    assert list(room.iterdir()) == []
    last = sorted(packed.glob("*.bs"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(errors.Corrupt), integration.decompress_to_temp(packed, temp_dir=room):
        raise AssertionError("a damaged model was restored")
    assert list(room.iterdir()) == []
    with pytest.raises(errors.FileMissing, match="nowhere"), integration.decompress_to_temp(room / "nowhere"):
        raise AssertionError("nothing was restored")


def test_decompress_to_temp_file(make, tmp_path) -> None:
    source, packed = make(ALL)
    (tmp_path / "notes.json").write_text("not of a model")
    with integration.decompress_to_temp(packed) as directory:
        assert tree(Path(directory)) == {"model.safetensors": source.read_bytes()}
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(packed, folder / "model.bs")
    for name in ("config.json", "tokenizer.model", "README.md", "bigsmall.index.json"):
        (folder / name).write_text(name)
    with integration.decompress_to_temp(folder / "model.bs") as directory:
        assert sorted(tree(Path(directory))) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert not Path(directory).exists()


def test_decompress_to_temp_delta(make) -> None:
    base, _ = make(ALL, stem="base")
    tuned, _ = make({**ALL, "model.scale": ("F32", (), b"abcd")}, stem="tuned")
    delta = tuned.with_name("delta.bs")
    bigsmall.compress_delta(tuned, base, delta)
    with integration.decompress_to_temp(delta, base=base) as directory:
        assert (Path(directory) / "delta.safetensors").read_bytes() == tuned.read_bytes()
