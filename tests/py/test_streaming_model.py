"""StreamingModel against the ordinary model of transformers, bit for bit. The models are small and random."""

from __future__ import annotations

import builtins
import copy
import functools
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from bigsmall.reader import Reader
from fakehub import FakeHub
from helpers import bfloat16, run_script, weights, write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bigsmall.streaming_model import StreamingModel  # noqa: E402

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 300,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
}
DTYPES = {"llama": torch.bfloat16, "llama-tied": torch.bfloat16, "gpt2": torch.float32}
TOKENS = torch.tensor([[1, 17, 250, 33, 5], [1, 9, 299, 40, 8]])


def save(config: Any, directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms too, which are all 0 or 1 in a new model
        parameter.data.normal_(0, 0.05)
    model.to(dtype).save_pretrained(directory, **options)
    return directory


def compressed(directory: Path) -> Path:
    target = directory.with_name(directory.name + "-bs")
    bigsmall.compress(directory, target)
    return target


def ordinary(directory: Path, dtype: Any = "auto") -> Any:
    """A copy, since weights mapped from the file may be aligned to 4 or 8 bytes, by which some kernels round."""
    return copy.deepcopy(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))


@pytest.fixture(scope="module", params=[f"{kind}-{files}" for kind in KINDS for files in ("single", "sharded")])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    kind, _, files = request.param.rpartition("-")
    directory = tmp_path_factory.mktemp("model") / "model"
    options = {"max_shard_size": "100KB"} if files == "sharded" else {}
    save(KINDS[kind](), directory, DTYPES[kind], **options)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (files == "sharded")
    return directory, compressed(directory)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    directory = save(KINDS["llama"](), tmp_path / "model", torch.bfloat16)
    return directory, compressed(directory)


def same_outputs(model: StreamingModel, plain: Any) -> None:
    with torch.no_grad():
        expected = plain(TOKENS).logits
    got = model(TOKENS).logits
    assert got.dtype == expected.dtype
    assert not got.requires_grad
    assert torch.equal(got, expected)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS)
    assert torch.equal(
        model.generate(TOKENS, attention_mask=mask, **options), plain.generate(TOKENS, attention_mask=mask, **options)
    )


def threads() -> int:
    return sum(thread.name == "bigsmall-layers" for thread in threading.enumerate())


def test_equal_to_the_ordinary_model(pair: tuple[Path, Path]) -> None:
    directory, target = pair
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        same_outputs(model, ordinary(directory))
        assert model.device == torch.device("cpu")
        assert model.dtype == ordinary(directory).dtype
        # Between calls only what is in no layer has data.
        away = {name for name, tensor in model.model.state_dict().items() if tensor.is_meta}
        assert away == {name for name in model.model.state_dict() if ".layers." in name or ".h." in name}
        assert threads() == 0


def test_two_layers_at_a_time(llama: tuple[Path, Path]) -> None:
    _, target = llama
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        filled = []
        for layer in model.model.model.layers:
            layer.mlp.register_forward_hook(
                lambda *_: filled.append(
                    [not any(p.is_meta for p in layer.parameters()) for layer in model.model.model.layers]
                )
            )
        model(TOKENS)
    assert filled == [[True, False, False], [False, True, False], [False, False, True]]


def test_the_bits_of_the_weights_and_their_alignment(pair: tuple[Path, Path]) -> None:
    """Of every tensor while it is in use."""
    directory, target = pair
    expected = ordinary(directory).state_dict()
    compared = set()

    def compare(module: Any, _: Any, prefix: str) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            name = prefix + leaf
            assert parameter.dtype == expected[name].dtype
            assert torch.equal(parameter.view(torch.uint8), expected[name].view(torch.uint8)), name
            assert parameter.data_ptr() % 64 == 0, name
            compared.add(name)

    with StreamingModel.from_pretrained(target, device="cpu") as model:
        for name, module in model.model.named_modules():
            module.register_forward_pre_hook(functools.partial(compare, prefix=f"{name}."))
        model(TOKENS)
    assert compared == {name for name, _ in ordinary(directory).named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("dtype", ["float16", torch.float32])
def test_other_dtype(llama: tuple[Path, Path], dtype: Any) -> None:
    directory, target = llama
    with StreamingModel.from_pretrained(target, device="cpu", dtype=dtype) as model:
        same_outputs(model, ordinary(directory, dtype))


def test_config_without_dtype(llama: tuple[Path, Path]) -> None:
    directory, target = llama
    for where in (directory, target):
        config = json.loads((where / "config.json").read_text())
        assert (config.pop("dtype", None) or config.pop("torch_dtype")) == "bfloat16"
        (where / "config.json").write_text(json.dumps(config))
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        assert model.dtype == torch.bfloat16
        same_outputs(model, ordinary(directory))


def test_file_config_dir_and_subfolder(llama: tuple[Path, Path], tmp_path: Path) -> None:
    directory, target = llama
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(target / "model.bs", alone / "weights.bs")
    with pytest.raises(errors.FileMissing, match=r"config\.json.*config_dir"):
        StreamingModel.from_pretrained(alone / "weights.bs", device="cpu")
    for arguments, options in (
        ((alone / "weights.bs", directory), {}),
        ((target / "model.bs",), {}),
        ((str(tmp_path),), {"subfolder": target.name}),
    ):
        with StreamingModel.from_pretrained(*arguments, device="cpu", **options) as model:
            same_outputs(model, ordinary(directory))


def test_generation_config(llama: tuple[Path, Path]) -> None:
    _, target = llama
    transformers.GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=0).save_pretrained(target)
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        assert model.generation_config.max_new_tokens == 3
        assert model.generate(TOKENS[:1, :2]).shape[1] <= 5


def rewrite(directory: Path, change: Any) -> Path:
    """The checkpoint with `change(tensors)` instead of its tensors."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, {"format": "pt"})
    shutil.rmtree(directory.with_name(directory.name + "-bs"), ignore_errors=True)
    return compressed(directory)


def test_names_without_the_prefix(tmp_path: Path) -> None:
    directory = save(KINDS["gpt2"](), tmp_path / "model")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        assert "h.0.attn.c_attn.weight" in stripped
        # Masks, as the checkpoints of OpenAI have them.
        return {**stripped, **{f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}}

    target = rewrite(directory, change)
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        same_outputs(model, ordinary(directory))


@pytest.mark.parametrize("same", [True, False])
def test_head_that_the_config_ties_and_the_checkpoint_has(tmp_path: Path, same: bool) -> None:
    directory = save(KINDS["llama-tied"](), tmp_path / "model", torch.bfloat16)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = tensors["model.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": embedding.clone() if same else embedding.flip(0).contiguous()}

    with StreamingModel.from_pretrained(rewrite(directory, change), device="cpu") as model:
        same_outputs(model, ordinary(directory))


def test_mixture_of_experts(tmp_path: Path) -> None:
    """transformers 5 fuses the experts of most of them on loading; 4 has them as the checkpoint does."""
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
    directory = save(config, tmp_path / "model", torch.bfloat16)
    target = compressed(directory)
    if hasattr(transformers, "conversion_mapping"):
        with pytest.raises(errors.Unsupported, match=r"MixtralForCausalLM.*experts.*'model\.layers\.0\..*w1\.weight'"):
            StreamingModel.from_pretrained(target, device="cpu")
    else:
        with StreamingModel.from_pretrained(target, device="cpu") as model:
            same_outputs(model, ordinary(directory))


def test_model_without_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLM names its parts "attentions.0", "ffns.0": nothing is decoded, where all of it would stay in memory."""
    config = transformers.XLMConfig(emb_dim=32, n_layers=2, n_heads=2, n_words=50)
    target = compressed(save(config, tmp_path / "model"))
    decoded = []
    monkeypatch.setattr(Reader, "decode_many", lambda self, todo, **_: decoded.extend(todo))
    with pytest.raises(errors.Unsupported, match=r"XLM.* layers, layer, blocks, block, h .*from_pretrained"):
        StreamingModel.from_pretrained(target, device="cpu")
    assert decoded == []
    assert threads() == 0


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "ours", "auto_map": {"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"}},
        {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "ours.Model"}},
    ],
    ids=["config", "model"],
)
def test_custom_code_is_neither_run_nor_asked_for(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    _, target = llama
    (target / "config.json").write_text(json.dumps(config))
    (target / "ours.py").write_text("raise SystemExit('it ran')")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *prompt: asked.append(prompt) or "y")
    with pytest.raises(errors.Unsupported, match="code of its repository, which StreamingModel does not run"):
        StreamingModel.from_pretrained(target, device="cpu")
    assert asked == []


def test_custom_code_beside_a_model_that_transformers_has(llama: tuple[Path, Path]) -> None:
    directory, target = llama
    config = json.loads((target / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"}
    (target / "config.json").write_text(json.dumps(config))
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        same_outputs(model, ordinary(directory))


def test_parts_that_stay_in_float32(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, target = llama
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm", "q_proj"])
    expected = {name: tensor.dtype for name, tensor in ordinary(directory).state_dict().items()}
    assert torch.float32 in expected.values()
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        assert {name: tensor.dtype for name, tensor in model.model.state_dict().items()} == expected
        running = {}
        for name, module in model.model.named_modules():
            for leaf, _ in module.named_parameters(recurse=False):
                module.register_forward_pre_hook(
                    lambda module, _, name=f"{name}.{leaf}", leaf=leaf: running.update(
                        {name: getattr(module, leaf).dtype}
                    )
                )
        with pytest.raises(RuntimeError, match="dtype"):  # Llama is not made for this
            model(TOKENS)
    assert running["model.layers.0.self_attn.q_proj.weight"] == torch.float32
    assert all(dtype == expected[name] for name, dtype in running.items())


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_missing_tensor(llama: tuple[Path, Path], name: str) -> None:
    directory, _ = llama
    target = rewrite(directory, lambda tensors: {other: tensors[other] for other in tensors if other != name})
    with pytest.raises(errors.NotFound, match=f"{name}.*LlamaForCausalLM"):
        StreamingModel.from_pretrained(target, device="cpu")


def test_wrong_shape(llama: tuple[Path, Path]) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    target = rewrite(llama[0], lambda tensors: {**tensors, name: tensors[name][:-1].clone()})
    with pytest.raises(errors.InvalidArgument, match=rf"{name}.*\[159, 64\].*\[160, 64\]"):
        StreamingModel.from_pretrained(target, device="cpu")


def test_two_tensors_for_one_parameter(llama: tuple[Path, Path]) -> None:
    target = rewrite(llama[0], lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"].clone()})
    with pytest.raises(errors.InvalidArgument, match=r"'model\.norm\.weight' and 'norm\.weight'"):
        StreamingModel.from_pretrained(target, device="cpu")


def test_tensors_of_no_use(llama: tuple[Path, Path]) -> None:
    target = rewrite(llama[0], lambda tensors: {**tensors, "model.layers.3.extra": torch.ones(3)})
    with pytest.warns(UserWarning, match=r"no use for 'model\.layers\.3\.extra'"):
        model = StreamingModel.from_pretrained(target, device="cpu")
    with model:
        same_outputs(model, ordinary(llama[0]))


def test_missing_shard(tmp_path: Path) -> None:
    target = compressed(save(KINDS["llama"](), tmp_path / "model", torch.bfloat16, max_shard_size="100KB"))
    shard = sorted(target.glob("*.bs"))[1]
    shard.unlink()
    with pytest.raises(errors.FileMissing, match=shard.name):
        StreamingModel.from_pretrained(target, device="cpu")


def damage(path: Path, name: str) -> None:
    """Flips a byte in the middle of a tensor's payload."""
    with Reader(path) as reader:
        span = reader.locate(reader.find(name))
    data = bytearray(path.read_bytes())
    data[span.offset + span.n_bytes // 2] ^= 0xFF
    path.write_bytes(data)


def test_corrupt_layer(llama: tuple[Path, Path]) -> None:
    directory, target = llama
    name = "model.layers.1.mlp.down_proj.weight"
    whole = (target / "model.bs").read_bytes()
    damage(target / "model.bs", name)
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        for _ in range(2):
            with pytest.raises(errors.Corrupt, match=name):
                model(TOKENS)
            assert all(p.is_meta for p in model.model.model.layers.parameters())
            assert threads() == 0
        with pytest.raises(errors.Corrupt, match=name):
            model.generate(TOKENS, max_new_tokens=2, pad_token_id=0)
        (target / "model.bs").write_bytes(whole)
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        same_outputs(model, ordinary(directory))


def test_corrupt_embedding(llama: tuple[Path, Path]) -> None:
    damage(llama[1] / "model.bs", "model.embed_tokens.weight")
    with pytest.raises(errors.Corrupt, match=r"model\.embed_tokens\.weight"):
        StreamingModel.from_pretrained(llama[1], device="cpu")
    assert threads() == 0


def test_exception_inside_a_layer(llama: tuple[Path, Path]) -> None:
    directory, target = llama
    with StreamingModel.from_pretrained(target, device="cpu") as model:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(TOKENS)
        assert all(p.is_meta for p in model.model.model.layers.parameters())
        assert threads() == 0
        handle.remove()
        same_outputs(model, ordinary(directory))


def test_the_model_itself(llama: tuple[Path, Path]) -> None:
    """`.model` is an ordinary module for whoever calls that."""
    directory, target = llama
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        got = model.model(TOKENS).logits
        assert torch.equal(got, ordinary(directory)(TOKENS).logits)
        assert threads() == 0


def test_several_threads(llama: tuple[Path, Path]) -> None:
    directory, target = llama
    expected = ordinary(directory)(TOKENS).logits
    with StreamingModel.from_pretrained(target, device="cpu") as model:
        equal = []
        callers = [
            threading.Thread(target=lambda: equal.append(torch.equal(model(TOKENS).logits, expected))) for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert equal == [True] * 4


def test_closed(llama: tuple[Path, Path]) -> None:
    model = StreamingModel.from_pretrained(llama[1], device="cpu")
    model.close()
    model.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        model(TOKENS)
    assert threads() == 0


def test_bad_arguments(llama: tuple[Path, Path], tmp_path: Path) -> None:
    for dtype in ("bfloat17", "int8", torch.int64):
        with pytest.raises(errors.InvalidArgument, match="floating-point"):
            StreamingModel.from_pretrained(llama[1], device="cpu", dtype=dtype)
    with pytest.raises(errors.FileMissing):
        StreamingModel.from_pretrained(tmp_path / "none", device="cpu")
    config = json.loads((llama[1] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (llama[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.Unsupported, match="quantised"):
        StreamingModel.from_pretrained(llama[1], device="cpu")


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import gc, re, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from bigsmall.streaming_model import StreamingModel

def kilobytes(key):
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{key}:\\s+(\\d+) kB", file.read(), re.M)[1]) << 10

# Imports, torch's threads and the library do not count.
small = LlamaForCausalLM(LlamaConfig(**eval(sys.argv[2]))).to(torch.bfloat16)
tokens = torch.arange(8)[None]
options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
small.generate(tokens, **options)
del small
before = kilobytes("VmRSS")

with StreamingModel.from_pretrained(sys.argv[1], device="cpu") as model:
    size = {tensor.name: tensor.n_bytes for tensor in model.loader.tensors}
    fixed = sum(size[name] for name in model.loader.non_layer_names)
    layer = max(sum(size[name] for name in model.loader.tensor_names(layer)) for layer in model.loader.layer_names)
    model(tokens)
    model.generate(tokens, **options)
    after = kilobytes("VmRSS")
peak = kilobytes("VmHWM")
del model
gc.collect()
print(fixed, layer, sum(size.values()), peak - before, after - before, kilobytes("VmRSS") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Non-layer tensors and two layers, and less than 64 MB more, measured as the resident set of a process of its
    own; the whole model is larger than that."""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 1000}
    config = transformers.LlamaConfig(**{**LLAMA, **shape}, tie_word_embeddings=False)
    with torch.device("meta"):
        parameters = transformers.LlamaForCausalLM(config).state_dict()
    noise = np.frombuffer(bfloat16(weights(1, 1 << 20)), "<u2")
    target = tmp_path / "model"
    config.save_pretrained(target)
    source = write_safetensors(
        tmp_path / "model.safetensors",
        {
            name: ("BF16", tuple(parameter.shape), np.resize(np.roll(noise, place * 12345), parameter.shape).tobytes())
            for place, (name, parameter) in enumerate(parameters.items())
        },
    )
    bigsmall.compress(source, target / "model.bs", "inference")
    output = run_script(MEMORY, target, repr({**LLAMA, "tie_word_embeddings": False}))
    fixed, layer, whole, peak, after, without = map(int, output.splitlines()[-1].split())
    assert fixed + layer < peak < fixed + 2 * layer + (64 << 20) < whole
    assert after < fixed + (64 << 20)
    # What those 64 MB are for outlives the model, which itself had less than three layers.
    assert peak - without < fixed + 2.75 * layer


# ---- from the Hub ----------------------------------------------------------------------------------------------------

FROM_HUB = """
import os, sys
import torch
from bigsmall.streaming_model import StreamingModel

assert "transformers" not in sys.modules and "accelerate" not in sys.modules  # before there is a model to make
tokens = torch.tensor(eval(sys.argv[2]))
expected = torch.load(sys.argv[1])
for name, options in (("owner/model", {}), ("hf://owner/model", {"revision": "main", "subfolder": "inner"})):
    with StreamingModel.from_pretrained(name, device="cpu", **options) as model:
        assert model.generation_config.pad_token_id == 0
        assert torch.equal(model(tokens).logits, expected), name
for folder, _, files in os.walk(os.environ["HF_HOME"]):
    assert not any(file.endswith(".bs") for file in files)
"""


def test_from_the_hub(tmp_path: Path) -> None:
    """By ranged reads: no `.bs` file is on disk afterwards. Importing StreamingModel imports no other library."""
    directory = save(KINDS["llama"](), tmp_path / "model", torch.bfloat16, max_shard_size="100KB")
    target = compressed(directory)
    repo = tmp_path / "repo"
    shutil.copytree(target, repo)
    shutil.copytree(target, repo / "inner")
    for folder in (repo, repo / "inner"):
        transformers.GenerationConfig(pad_token_id=0).save_pretrained(folder)
    torch.save(ordinary(directory)(TOKENS).logits.detach(), tmp_path / "logits.pt")
    with FakeHub(tmp_path) as hub:
        hub.add("owner/model", repo)
        run_script(FROM_HUB, tmp_path / "logits.pt", TOKENS.tolist(), env=hub.env(tmp_path / "home"))
        fetched = [ranges for _, path, ranges, _ in hub.log if ".bs" in path]
    assert fetched
    assert all(fetched)
