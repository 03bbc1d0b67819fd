"""transformers models from `.bs` files: by from_pretrained of the integration, and by the hook. `make test-matrix` runs
this with other versions of transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from helpers import run_script

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bigsmall.integrations import huggingface  # noqa: E402

transformers.utils.logging.disable_progress_bar()

V5 = not hasattr(transformers.modeling_utils, "load_shard_file")


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, **options
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128))


MODELS = {
    "llama": lambda: llama().to(torch.bfloat16),
    "llama-tied": lambda: llama(tie_word_embeddings=True).to(torch.bfloat16),
    "gpt2": gpt2,
}


class Made:
    """A model, its directory of safetensors, and that compressed."""

    def __init__(self, model: Any, source: Path, target: Path) -> None:
        self.model, self.source, self.target = model.eval(), source, target

    def equals(self, other: Any, dtype: Any = None) -> None:
        ours, theirs = other.state_dict(), self.model.state_dict()
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            want = tensor if dtype is None else tensor.to(dtype)
            assert ours[name].dtype == want.dtype, name
            assert torch.equal(ours[name], want), name


def make(root: Path, name: str, sharded: bool) -> Made:
    torch.manual_seed(7)
    model = MODELS[name]()
    source, target = root / "source", root / "bs"
    model.save_pretrained(source, max_shard_size="100KB" if sharded else "10GB")
    bigsmall.compress(source, target)
    assert (len(list(target.glob("*.bs"))) > 1) == sharded
    assert not list(target.glob("*.safetensors*"))
    return Made(model, source, target)


@pytest.fixture(scope="module", params=[f"{name}-{kind}" for name in MODELS for kind in ("single", "sharded")])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, _, kind = request.param.rpartition("-")
    return make(tmp_path_factory.mktemp(request.param), name, kind == "sharded")


@pytest.fixture(scope="module")
def llama_sharded(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llama"), "llama", True)


@pytest.fixture
def hook() -> Iterator[None]:
    bigsmall.install_hook()
    yield
    bigsmall.uninstall_hook()


def complete(info: dict[str, Any], tied: bool = False) -> None:
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert not info["missing_keys"]


# ---- the hook, local -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize("auto", [True, False])
def test_every_class_loads_the_same_model(made: Made, auto: bool) -> None:
    cls = transformers.AutoModelForCausalLM if auto else type(made.model)
    model, info = cls.from_pretrained(made.target, output_loading_info=True, dtype="auto")
    made.equals(model)
    complete(info)
    assert model.config.tie_word_embeddings == made.model.config.tie_word_embeddings
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


@pytest.mark.usefixtures("hook")
def test_base_model_of_a_head(made: Made) -> None:
    model = transformers.AutoModel.from_pretrained(str(made.target), dtype="auto")
    for name, tensor in made.model.base_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.usefixtures("hook")
def test_ways_to_name_the_directory(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.target, tmp_path / "inner" / "weights")
    cls = transformers.AutoModelForCausalLM
    made.equals(cls.from_pretrained(pretrained_model_name_or_path=str(made.target), dtype="auto"))
    made.equals(cls.from_pretrained(tmp_path / "inner", subfolder="weights", dtype="auto"))
    made.equals(type(made.model).from_pretrained(str(tmp_path / "inner"), subfolder="weights", dtype="auto"))


@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_devices_and_dtypes(made: Made, device_map: Any, dtype: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made.target, device_map=device_map, dtype=dtype)
    made.equals(model, None if dtype == "auto" else getattr(torch, dtype))


@pytest.mark.usefixtures("hook")
def test_dtype_none_is_what_safetensors_gives(made: Made) -> None:
    ours = transformers.AutoModelForCausalLM.from_pretrained(made.target, dtype=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.source, dtype=None)
    assert {n: t.dtype for n, t in ours.state_dict().items()} == {n: t.dtype for n, t in theirs.state_dict().items()}


@pytest.mark.usefixtures("hook")
def test_meta_device(made: Made) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made.target, device_map="meta", dtype="auto")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.usefixtures("hook")
def test_config_without_dtype(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.target, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    made.equals(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto"))


@pytest.mark.usefixtures("hook")
def test_offload_to_disk(llama_sharded: Made, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places.update({"model.layers.0": "disk", "model.layers.1": "cpu"})
    cls = transformers.AutoModelForCausalLM
    whole = cls.from_pretrained(llama_sharded.source, dtype="auto")
    model = cls.from_pretrained(llama_sharded.target, device_map=places, offload_folder=tmp_path / "off", dtype="auto")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
    with pytest.raises(ValueError, match="offload_folder"):
        cls.from_pretrained(llama_sharded.target, device_map=places, dtype="auto")


@pytest.mark.usefixtures("hook")
def test_saves_again(made: Made, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made.target, dtype="auto")
    sharded = len(list(made.source.glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB" if sharded else "10GB")
    bigsmall.uninstall_hook()
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == len(list(made.source.glob("*.safetensors")))
    made.equals(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto"))


@pytest.mark.usefixtures("hook")
def test_variant(tmp_path: Path) -> None:
    torch.manual_seed(3)
    for sharded in (False, True):
        model = gpt2().to(torch.float16)
        source, target = tmp_path / f"s{sharded}", tmp_path / f"b{sharded}"
        gpt2().save_pretrained(source)  # the variant stands beside the ordinary weights
        model.save_pretrained(source, variant="fp16", max_shard_size="100KB" if sharded else "10GB")
        bigsmall.compress(source, target)
        loaded = transformers.GPT2LMHeadModel.from_pretrained(target, variant="fp16", dtype="auto")
        Made(model, source, target).equals(loaded)
        plain = transformers.GPT2LMHeadModel.from_pretrained(target, dtype=torch.float32)
        Made(transformers.GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32), source, target).equals(plain)


@pytest.mark.usefixtures("hook")
def test_safetensors_go_first(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.source, tmp_path / "both")
    for file in made.target.glob("*.bs"):
        (tmp_path / "both" / file.name).write_bytes(b"broken")
    made.equals(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype="auto"))


# ---- nothing is ever loaded in part ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("hook")
def test_damage_raises(llama_sharded: Made, tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> Path:
        target = tmp_path / name
        shutil.copytree(llama_sharded.target, target)
        change(sorted(target.glob("*.bs"))[1])
        return target

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        position = data.index(b"BGSMEND\n") // 2 + 2048  # in the payloads
        data[position] ^= 16
        file.write_bytes(data)

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1000])

    def other_model(file: Path) -> None:
        shutil.copy(sorted(file.parent.glob("*.bs"))[0], file)

    cases: list[tuple[str, Any, Any]] = [
        ("missing", Path.unlink, FileNotFoundError),
        ("flipped", flip, errors.Corrupt),
        ("cut", cut, errors.Truncated),
        ("other", other_model, errors.Corrupt),
        ("empty", lambda file: file.write_bytes(b""), errors.Corrupt),
    ]
    for name, change, expected in cases:
        directory = broken(name, change)
        shard = "model-00002-of-"
        for load in (
            lambda: transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto"),  # noqa: B023
            lambda: huggingface.from_pretrained(directory, transformers.AutoModelForCausalLM),  # noqa: B023
        ):
            with pytest.raises(expected, match=shard):
                load()


@pytest.mark.usefixtures("hook")
def test_hostile_index(llama_sharded: Made, tmp_path: Path) -> None:
    shutil.copytree(llama_sharded.target, tmp_path / "m")
    path = tmp_path / "m" / "bigsmall.index.json"
    index = json.loads(path.read_text())
    for name, text in (
        ("leads out", json.dumps({"metadata": {}, "weight_map": {"x": "../../etc/passwd"}})),
        ("no map", json.dumps({"metadata": {}})),
        ("no json", "{"),
        ("bytes", "\udcff"),
        (
            "leads out by the source",
            json.dumps(
                {
                    **index,
                    "metadata": {
                        "source_indexes": [
                            {
                                "name": "model.safetensors.index.json",
                                "text": '{"weight_map": {"x": "../x.safetensors"}}',
                            }
                        ]
                    },
                }
            ),
        ),
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(errors.Corrupt, match=r"bigsmall\.index\.json"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert name


@pytest.mark.usefixtures("hook")
def test_what_torchao_quantised_is_refused(llama_sharded: Made, tmp_path: Path) -> None:
    """transformers reads the safetensors metadata of such files by itself."""
    shutil.copytree(llama_sharded.target, tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    config.quantization_config = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    with pytest.raises(errors.Unsupported, match=r"torchao.*bigsmall decompress"):
        huggingface.from_pretrained(tmp_path / "m", transformers.AutoModelForCausalLM, config=config)


# ---- what else is hooked --------------------------------------------------------------------------------------------


def test_uninstall_restores_the_very_objects() -> None:
    import inspect

    import accelerate.utils.modeling
    import safetensors.torch

    def names() -> list[Any]:
        return [
            safetensors.safe_open,
            safetensors.torch.safe_open,
            transformers.modeling_utils.safe_open,
            transformers.modeling_utils._get_resolved_checkpoint_files,
            transformers.modeling_utils.load_state_dict,
            inspect.getattr_static(transformers.PreTrainedModel, "_load_pretrained_model"),
            accelerate.utils.modeling.load_state_dict,
            accelerate.utils.modeling.load_checkpoint_in_model,
        ]

    before = names()
    bigsmall.install_hook()
    during = names()
    bigsmall.install_hook()
    assert [a is b for a, b in zip(names(), during)] == [True] * len(before)  # twice is once
    changed = [a is not b for a, b in zip(before, during)]
    if not V5:  # there load_shard_file is the one
        changed[5] = True
    assert changed == [True] * len(before)
    bigsmall.uninstall_hook()
    assert [a is b for a, b in zip(before, names())] == [True] * len(before)
    bigsmall.uninstall_hook()
    # Who took a name meanwhile has one that passes on.
    assert during[1] is not safetensors.safe_open


@pytest.mark.usefixtures("hook")
def test_safetensors_functions(made: Made) -> None:
    import safetensors
    import safetensors.numpy
    import safetensors.torch

    file = sorted(made.target.glob("*.bs"))[0]
    source = made.source / (file.stem + ".safetensors")
    want = safetensors.torch.load_file(source)
    got = safetensors.torch.load_file(str(file))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    with safetensors.safe_open(file, "pt") as ours, safetensors.safe_open(source, "pt") as theirs:
        assert isinstance(ours, safetensors.safe_open)
        assert isinstance(theirs, safetensors.safe_open)
        assert list(ours.keys()) == list(theirs.keys())
        assert ours.metadata() == theirs.metadata()
    with pytest.raises(FileNotFoundError):
        safetensors.torch.load_file("nowhere.bs")
    with pytest.raises(FileNotFoundError):
        safetensors.torch.load_file("nowhere.safetensors")
    bigsmall.uninstall_hook()
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(str(file))


@pytest.mark.usefixtures("hook")
def test_load_model(tmp_path: Path) -> None:
    import safetensors.torch

    torch.manual_seed(1)
    model = gpt2()
    safetensors.torch.save_model(model, str(tmp_path / "m.safetensors"))
    bigsmall.compress(tmp_path / "m.safetensors", tmp_path / "m.bs")
    other = gpt2()
    missing, unexpected = safetensors.torch.load_model(other, str(tmp_path / "m.bs"))
    assert not missing
    assert not unexpected
    Made(model, tmp_path, tmp_path).equals(other)


@pytest.mark.usefixtures("hook")
def test_accelerate(made: Made) -> None:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model

    plain = type(made.model)(made.model.config).to(made.model.dtype)
    load_checkpoint_in_model(plain, str(made.target))
    plain.tie_weights()
    made.equals(plain)
    with init_empty_weights():
        empty = type(made.model)(made.model.config)
    empty.tie_weights()
    dispatched = load_checkpoint_and_dispatch(empty, str(made.target), device_map={"": "cpu"}, dtype=made.model.dtype)
    made.equals(dispatched)


@pytest.mark.usefixtures("hook")
def test_peft_adapter_stays_as_it_is(llama_sharded: Made, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_sharded.target, dtype="auto")
    torch.manual_seed(2)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        want = adapted(tokens).logits
        again = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(llama_sharded.target, dtype="auto"), tmp_path / "adapter"
        )
        assert torch.equal(again(tokens).logits, want)


def test_hook_before_the_libraries_are_imported(made: Made) -> None:
    run_script(
        """
import sys, bigsmall
bigsmall.install_hook()
heavy = {"torch", "transformers", "diffusers", "accelerate", "safetensors.torch"} & set(sys.modules)
assert not heavy, heavy
import inspect, transformers, torch
from safetensors.torch import load_file
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
plain = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
assert inspect.getsource(transformers.modeling_utils)  # sources are found as ever
bigsmall.uninstall_hook()
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    assert "model.safetensors" in str(error)
else:
    raise AssertionError
""",
        made.target,
        made.source,
    )


def test_unknown_transformers_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    before = safetensors.safe_open
    monkeypatch.delattr(transformers.modeling_utils, "_get_resolved_checkpoint_files")
    with pytest.raises(errors.Unsupported, match=rf"transformers \({transformers.__version__}\).*from_pretrained"):
        bigsmall.install_hook()
    assert safetensors.safe_open is before


# ---- without the hook -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", [True, False])
def test_from_pretrained(made: Made, auto: bool) -> None:
    cls = transformers.AutoModelForCausalLM if auto else type(made.model)
    model, info = huggingface.from_pretrained(made.target, cls, output_loading_info=True, dtype="auto")
    made.equals(model)
    complete(info)
    assert not model.training
    assert model.name_or_path == str(made.target)
    tokens = torch.arange(10)[None]
    plain = cls.from_pretrained(made.source, dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        ids = [m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*ids)


def test_from_pretrained_file_and_config_elsewhere(made: Made, tmp_path: Path) -> None:
    if len(list(made.target.glob("*.bs"))) > 1:
        pytest.skip("one file")
    alone = tmp_path / "alone.bs"
    shutil.copy(made.target / "model.bs", alone)
    cls = transformers.AutoModelForCausalLM
    made.equals(huggingface.from_pretrained(alone, cls, made.source, dtype="auto"))
    made.equals(huggingface.from_pretrained(made.target / "model.bs", cls, dtype="auto"))
    with pytest.raises(OSError, match=r"config\.json"):
        huggingface.from_pretrained(alone, cls)


def test_from_pretrained_options(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.target, tmp_path / "in" / "sub")
    cls = transformers.AutoModelForCausalLM
    model = huggingface.from_pretrained(
        tmp_path / "in", cls, subfolder="sub", dtype=torch.float16, device_map="cpu", use_cache=False
    )
    made.equals(model, torch.float16)
    assert model.config.use_cache is False


def test_from_pretrained_delta(made: Made, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    model = transformers.AutoModelForCausalLM.from_pretrained(made.source, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(torch.int16 if parameter.element_size() == 2 else torch.int32).add_(1)
    model.save_pretrained(tuned, max_shard_size="100KB" if len(list(made.source.glob("*.safetensors"))) > 1 else "10GB")
    bigsmall.compress_delta(tuned, made.source, tmp_path / "delta")
    loaded = huggingface.from_pretrained(
        tmp_path / "delta", transformers.AutoModelForCausalLM, base=made.source, dtype="auto"
    )
    Made(model, tuned, tmp_path).equals(loaded)
    with pytest.raises(errors.WrongBase):
        huggingface.from_pretrained(tmp_path / "delta", transformers.AutoModelForCausalLM)


def test_from_pretrained_variant(tmp_path: Path) -> None:
    torch.manual_seed(4)
    plain, half = gpt2(), gpt2().to(torch.float16)
    for sharded in (False, True):
        source, target = tmp_path / f"s{sharded}", tmp_path / f"b{sharded}"
        plain.save_pretrained(source)
        half.save_pretrained(source, variant="fp16", max_shard_size="100KB" if sharded else "10GB")
        bigsmall.compress(source, target)
        load = huggingface.from_pretrained
        Made(half, source, target).equals(load(target, transformers.GPT2LMHeadModel, variant="fp16", dtype="auto"))
        if sharded:  # the folder's index is one of the variant only
            Made(plain, source, target).equals(load(target, transformers.GPT2LMHeadModel, dtype="float32"))
            assert {tensor.dtype for tensor in bigsmall.load(target).values()} == {torch.float32}
        with pytest.raises(FileNotFoundError, match=r"model\.bf16\.bs.*variant"):
            load(target, transformers.GPT2LMHeadModel, variant="bf16")


def test_from_pretrained_refuses_what_it_cannot_do(made: Made) -> None:
    cls = transformers.AutoModelForCausalLM
    for options, text in (
        ({"use_safetensors": False}, "pickles"),
        ({"state_dict": {}}, "state_dict"),
        ({"gguf_file": "x.gguf"}, "gguf_file"),
        ({"stream": True, "variant": "fp16"}, "variant"),
    ):
        with pytest.raises(errors.InvalidArgument, match=text):
            huggingface.from_pretrained(made.target, cls, **options)
    with pytest.raises(errors.InvalidArgument, match="no class of a model"):
        huggingface.from_pretrained(made.target, transformers.PreTrainedModel)


def test_from_pretrained_offloads_to_disk(llama_sharded: Made, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places.update({"model.layers.0": "disk", "model.layers.1": "cpu"})
    cls = transformers.AutoModelForCausalLM
    options = {"device_map": places, "offload_folder": tmp_path / "off", "dtype": "auto"}
    if not V5:
        with pytest.raises(errors.Unsupported, match="install_hook"):
            huggingface.from_pretrained(llama_sharded.target, cls, **options)
        return
    model = huggingface.from_pretrained(llama_sharded.target, cls, **options)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, cls.from_pretrained(llama_sharded.source, dtype="auto")(tokens).logits)


@pytest.mark.usefixtures("hook")
def test_accelerate_refuses_a_shard_of_another_model(llama_sharded: Made, tmp_path: Path) -> None:
    from accelerate import load_checkpoint_in_model

    shutil.copytree(llama_sharded.target, tmp_path / "m")
    first, second, *_ = sorted((tmp_path / "m").glob("*.bs"))
    shutil.copy(first, second)
    for checkpoint in (tmp_path / "m", tmp_path / "m" / "bigsmall.index.json"):
        with pytest.raises(errors.Corrupt, match=second.name):
            load_checkpoint_in_model(llama().to(torch.bfloat16), str(checkpoint))


def test_hook_while_another_thread_imports_transformers() -> None:
    run_script("""
import threading, time
started = threading.Event()
def imports():
    started.set()
    import transformers.modeling_utils
thread = threading.Thread(target=imports)
thread.start()
started.wait()
import bigsmall
for _ in range(20):
    bigsmall.install_hook()
    time.sleep(0.05)
    bigsmall.uninstall_hook()
bigsmall.install_hook()
thread.join()
import transformers
assert transformers.modeling_utils.load_state_dict.__wrapped__
bigsmall.uninstall_hook()
assert not hasattr(transformers.modeling_utils.load_state_dict, "__wrapped__")
""")


def test_mistyped_paths_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in (
        "model.bs", "nowhere", "./owner/name", "/nowhere/model", "~/model", "owner/name/more", "owner/name.bs",
        "models/lama", "../owner/name", "owner/", "/", "", " owner/name", tmp_path / "none", Path("owner/name"),
    ):  # fmt: skip
        if path == "/":
            continue
        with pytest.raises(FileNotFoundError):
            bigsmall.from_pretrained(path)
        with pytest.raises(FileNotFoundError):
            huggingface.from_pretrained(path, transformers.AutoModel)
    with pytest.raises(errors.InvalidArgument, match="hf://owner/name"):
        bigsmall.from_pretrained("hf://owner")


def test_state_dict(made: Made) -> None:
    weights = bigsmall.from_pretrained(made.target)
    plain: dict[str, Any] = {}
    for file in made.source.glob("*.safetensors"):
        from safetensors.torch import load_file

        plain.update(load_file(file))
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    if not made.model.config.tie_word_embeddings:
        made.model.load_state_dict(weights, strict=True)


def test_state_dict_of_save_model_is_complete(tmp_path: Path) -> None:
    import safetensors.torch

    model = gpt2()
    safetensors.torch.save_model(model, str(tmp_path / "m.safetensors"))
    bigsmall.compress(tmp_path / "m.safetensors", tmp_path / "m.bs")
    weights = bigsmall.from_pretrained(tmp_path / "m.bs")
    other = gpt2()
    other.load_state_dict(weights, strict=True)
    Made(model, tmp_path, tmp_path).equals(other)
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]


# ---- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import os, sys, tempfile
import torch, transformers, bigsmall
transformers.utils.logging.disable_progress_bar()
from bigsmall.integrations import huggingface
way, directory, dtype = sys.argv[1:4]
small = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=256
)
transformers.LlamaForCausalLM(small)(torch.arange(4)[None])  # what a first model imports and allocates
bigsmall.cpu()

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS:")
others = len(os.listdir(tempfile.gettempdir()))  # an import of torch may leave some
cls = transformers.AutoModelForCausalLM
if way == "hook":
    bigsmall.install_hook()
    model = cls.from_pretrained(directory, dtype=dtype)
else:
    model = huggingface.from_pretrained(directory, cls, dtype=dtype)
peak = status("VmHWM:") - before
size = sum(p.numel() * p.element_size() for p in model.parameters())
largest = max(p.numel() * p.element_size() for p in model.parameters())
print(peak, size, largest, len(os.listdir(tempfile.gettempdir())) - others)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.3 GB in shards of 64 MB, of noise that is quick to make."""
    root = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, vocab_size=16000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    random = np.random.default_rng(1)
    noise = torch.from_numpy(random.standard_normal(1 << 20, dtype=np.float32) * 0.02).to(torch.bfloat16)
    weights = {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        weights[name] = noise.repeat(-(-count // noise.numel()))[:count].view(parameter.shape).clone()
    real = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    real.load_state_dict(weights)
    real.save_pretrained(root / "source", max_shard_size="64MB")
    bigsmall.compress(root / "source", root / "bs", "inference")
    shutil.rmtree(root / "source")
    return root / "bs"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
@pytest.mark.parametrize("way", ["hook", "plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory(large: Path, tmp_path: Path, way: str, dtype: str) -> None:
    output = run_script(MEMORY, way, large, dtype, timeout=150, env={"TMPDIR": str(tmp_path)})
    peak, size, largest, left = map(int, output.split()[-4:])
    assert left == 0, "temporary files"
    assert size > 250 << 20
    room = (100 << 20) if dtype == "bfloat16" else (100 << 20) + 4 * largest
    assert peak < size + room, f"{peak >> 20} MiB for {size >> 20} MiB"
