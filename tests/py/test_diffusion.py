"""Diffusion pipelines: made tiny here, compressed, and loaded equal to the originals bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bigsmall
from bigsmall import errors
from fakehub import FakeHub
from helpers import run_script, tree, weights, write_safetensors

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from bigsmall.integrations import diffusion, huggingface  # noqa: E402
from bigsmall.reader import Reader  # noqa: E402
from tiny import tiny_dit, tiny_pipeline, tiny_text_encoder, tiny_transformer, tiny_unet, tiny_vae  # noqa: E402

NETWORKS = ("unet", "vae", "text_encoder")


class Saved:
    """A saved pipeline and the same compressed."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.packed = source.with_name(source.name + "-bs")
        self.before = tree(source)
        assert diffusion.compress_diffusion(source, self.packed) == str(self.packed)

    def copy(self, target: Path) -> Path:
        """A copy of the compressed one, to damage."""
        return Path(shutil.copytree(self.packed, target))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """single: one file a network; sharded: several; each with the plain weights in float32 and the variant fp16."""
    root = tmp_path_factory.mktemp("pipelines")
    saved = {}
    for name, size in (("single", "1GB"), ("sharded", "8KB")):
        pipeline = tiny_pipeline(root)
        pipeline.save_pretrained(root / name, max_shard_size=size)
        pipeline.to(torch.float16).save_pretrained(root / name, max_shard_size=size, variant="fp16")
        (root / name / "unet" / "notes.txt").write_text("kept")
        saved[name] = Saved(root / name)
    return saved


@pytest.fixture(params=["single", "sharded"])
def saved(request: pytest.FixtureRequest, made: dict[str, Saved]) -> Saved:
    chosen: Saved = made[request.param]
    return chosen


def tensors_of(model: Any) -> dict[str, Any]:
    """All parameters and buffers, those included that no file holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **model.state_dict()}


def assert_same(model: Any, expected: Any) -> None:
    assert type(model) is type(expected)
    found, wanted = tensors_of(model), tensors_of(expected)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].device == tensor.device, name
        assert found[name].requires_grad == tensor.requires_grad, name
        # torch cannot compare float8.
        bits, wanted_bits = (t.view(torch.uint8) if t.itemsize == 1 else t for t in (found[name], tensor))
        assert torch.equal(bits, wanted_bits), name
    assert not model.training


def assert_same_pipeline(pipeline: Any, expected: Any) -> None:
    assert type(pipeline) is type(expected)
    assert pipeline.components.keys() == expected.components.keys()
    for name, component in expected.components.items():
        if isinstance(component, torch.nn.Module):
            found = pipeline.components[name]
            assert_same(found, component)
            assert getattr(found, "hf_device_map", None) == getattr(component, "hf_device_map", None), name
        else:
            assert type(pipeline.components[name]) is type(component), name


def plain(saved: Saved, **options: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(saved.source, **options)


def test_import_is_light() -> None:
    code = """
import sys
from bigsmall.integrations import _diffusers_hook, diffusion
_diffusers_hook.diffusers_patches()
heavy = {"torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""
    run_script(code)


# ---- is_diffusion_model ----------------------------------------------------------------------------------------------


def saved_under_another_name(model: Any, folder: Path) -> list[Path]:
    """The weights of a model in files that neither their names nor their folder explain."""
    folder.mkdir()
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "some.safetensors")
    bigsmall.compress(folder / "some.safetensors", folder / "some.bs")
    return [folder / "some.safetensors", folder / "some.bs"]


@pytest.mark.parametrize(
    "make",
    [tiny_unet, tiny_vae, tiny_transformer, tiny_dit, lambda: diffusers.ControlNetModel.from_unet(tiny_unet())],
    ids=["unet", "vae", "flux", "dit", "controlnet"],
)
def test_networks_are_recognised(make: Any, tmp_path: Path) -> None:
    model = make()
    for file in saved_under_another_name(model, tmp_path / "files"):
        assert diffusion.is_diffusion_model(file)
    assert diffusion.is_diffusion_model(tmp_path / "files")  # a folder without any JSON
    model.save_pretrained(tmp_path / "component")
    assert diffusion.is_diffusion_model(tmp_path / "component")


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.input_blocks.0.0.weight", "double_blocks.0.img_attn.qkv.weight", "time_in.a.weight"]
)
def test_original_checkpoints_are_recognised(name: str, tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "a.safetensors", {name: ("F32", (4, 4), weights(1, 4, 4).tobytes())})
    assert diffusion.is_diffusion_model(file)


def tiny_llm() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return transformers.LlamaForCausalLM(config)


def tiny_t5() -> Any:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    return transformers.T5EncoderModel(config)


@pytest.mark.parametrize("make", [tiny_llm, tiny_t5, tiny_text_encoder], ids=["llama", "t5", "clip"])
def test_other_networks_are_not(make: Any, tmp_path: Path) -> None:
    model = make()
    for file in saved_under_another_name(model, tmp_path / "files"):
        assert not diffusion.is_diffusion_model(file)
    model.save_pretrained(tmp_path / "model")
    assert not diffusion.is_diffusion_model(tmp_path / "model")
    bigsmall.compress(tmp_path / "model", tmp_path / "model-bs")
    assert not diffusion.is_diffusion_model(tmp_path / "model-bs")


def test_directories(saved: Saved) -> None:
    for folder in (saved.source, saved.packed):
        assert diffusion.is_diffusion_model(folder)
        assert [name for name in NETWORKS if diffusion.is_diffusion_model(folder / name)] == ["unet", "vae"]
        assert not diffusion.is_diffusion_model(folder / "tokenizer")


def test_what_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        diffusion.is_diffusion_model(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        diffusion.is_diffusion_model(tmp_path / "nothing.bs")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(errors.InvalidArgument, match=r"a\.bin"):
        diffusion.is_diffusion_model(tmp_path / "a.bin")
    (tmp_path / "a.safetensors").write_bytes(b"no weights")
    with pytest.raises(errors.InvalidArgument, match=r"a\.safetensors"):
        diffusion.is_diffusion_model(tmp_path / "a.safetensors")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(errors.InvalidArgument, match=r"model_index\.json"):
        diffusion.is_diffusion_model(tmp_path)


# ---- compress and decompress -----------------------------------------------------------------------------------------


def test_pipeline_comes_back(saved: Saved, tmp_path: Path) -> None:
    assert tree(saved.source) == saved.before
    packed = set(tree(saved.packed))
    weight_files = {name for name in saved.before if name.endswith(".safetensors")}
    indexes = {name for name in saved.before if ".safetensors.index." in name}
    assert {name[: -len(".safetensors")] + ".bs" for name in weight_files} == {n for n in packed if n.endswith(".bs")}
    assert {os.path.dirname(name) + "/bigsmall.index.json" for name in indexes} == {
        name for name in packed if name.endswith("bigsmall.index.json")
    }
    assert not {name for name in packed if name.endswith(".safetensors")}
    assert saved.before.keys() - weight_files - indexes <= packed
    restored = tmp_path / "restored"
    assert diffusion.decompress_diffusion(saved.packed, restored) == str(restored)
    assert tree(restored) == saved.before


def test_shards_are_there(made: dict[str, Saved]) -> None:
    """That the sharded pipeline is one, variants included: all else would be shown by single files only."""
    for network in NETWORKS:
        names = os.listdir(made["sharded"].packed / network)
        assert sum(name.endswith(".bs") and "-of-" in name and ".fp16-" not in name for name in names) > 1
        assert sum(name.endswith(".bs") and ".fp16-" in name for name in names) > 1
        assert "bigsmall.index.json" in names
        assert len([name for name in names if ".index." in name]) == 1


def test_component_and_file(made: dict[str, Saved], tmp_path: Path) -> None:
    unet = made["single"].source / "unet"
    diffusion.compress_diffusion(unet, tmp_path / "unet")
    assert diffusion.decompress_diffusion(tmp_path / "unet", tmp_path / "back") == str(tmp_path / "back")
    assert tree(tmp_path / "back") == tree(unet)
    file = unet / "diffusion_pytorch_model.safetensors"
    assert diffusion.compress_diffusion(file, tmp_path / "unet.bs", "storage", 1) == str(tmp_path / "unet.bs")
    diffusion.decompress_diffusion(tmp_path / "unet.bs", tmp_path / "unet.safetensors")
    assert (tmp_path / "unet.safetensors").read_bytes() == file.read_bytes()


def test_compress_refuses(made: dict[str, Saved], tmp_path: Path) -> None:
    tiny_llm().save_pretrained(tmp_path / "llm")
    with pytest.raises(errors.InvalidArgument, match=r"model_index\.json"):
        diffusion.compress_diffusion(tmp_path / "llm", tmp_path / "llm-bs")
    source = tmp_path / "broken"
    shutil.copytree(made["single"].source, source)
    (source / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(errors.InvalidArgument, match="vae"):
        diffusion.compress_diffusion(source, tmp_path / "broken-bs")
    assert sorted(os.listdir(tmp_path)) == ["broken", "llm"]


# ---- load_pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"torch_dtype": "float16"}, {"variant": "fp16"}, {"variant": "fp16", "torch_dtype": "float16"}],
    ids=["plain", "cast", "variant", "variant-float16"],
)
def test_load(saved: Saved, options: dict[str, Any]) -> None:
    options = {name: getattr(torch, value) if name == "torch_dtype" else value for name, value in options.items()}
    before = tree(saved.packed)
    pipeline = diffusion.load_pipeline(saved.packed, **options)
    assert_same_pipeline(pipeline, plain(saved, **options))
    assert tree(saved.packed) == before
    assert pipeline.unet.config._name_or_path == str(saved.packed / "unet")
    assert torch.get_default_dtype() == torch.float32


def test_class_and_dtypes(made: dict[str, Saved]) -> None:
    chosen = {"unet": torch.bfloat16, "default": torch.float16}
    options: dict[str, Any] = {"safety_checker": None, "device_map": "cpu"}
    saved = made["single"]
    pipeline = diffusion.load_pipeline(
        str(saved.packed), diffusers.StableDiffusionImg2ImgPipeline, dtype=chosen, workers=1, verify=True, **options
    )
    expected = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(saved.source, torch_dtype=chosen, **options)
    assert pipeline.unet.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float16
    assert pipeline.unet.hf_device_map == {"": torch.device("cpu")}
    assert_same_pipeline(pipeline, expected)


def test_auto_class(made: dict[str, Saved]) -> None:
    auto = diffusers.AutoPipelineForImage2Image
    pipeline = diffusion.load_pipeline(made["single"].packed, auto)
    assert_same_pipeline(pipeline, auto.from_pretrained(made["single"].source))


@pytest.mark.parametrize(
    ("class_name", "dtype"),
    [
        ("DiTTransformer2DModel", "bfloat16"),
        ("Transformer2DModel", "bfloat16"),
        ("DiTTransformer2DModel", "float8_e4m3fn"),
    ],
)
def test_transformer_pipeline(class_name: str, dtype: str, tmp_path: Path) -> None:
    """A transformer under its class, and under the name that diffusers gave several of them before. It has a buffer
    that no file holds, which gets the dtype in another way where that is float8."""
    pipeline = diffusers.DiTPipeline(transformer=tiny_dit(), vae=tiny_vae(), scheduler=diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "dit")
    for file in (tmp_path / "dit" / "model_index.json", tmp_path / "dit" / "transformer" / "config.json"):
        file.write_text(file.read_text().replace("DiTTransformer2DModel", class_name))
    diffusion.compress_diffusion(tmp_path / "dit", tmp_path / "dit-bs")
    dtypes = {"transformer": getattr(torch, dtype), "default": torch.float16}
    loaded = diffusion.load_pipeline(tmp_path / "dit-bs", dtype=dtypes)
    expected = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "dit", torch_dtype=dtypes)
    assert "pos_embed.pos_embed" not in expected.transformer.state_dict()
    assert type(loaded.transformer) is diffusers.DiTTransformer2DModel
    assert_same(loaded.transformer, expected.transformer)
    assert_same(loaded.vae, expected.vae)


def test_parts_that_load_by_themselves(made: dict[str, Saved], tmp_path: Path) -> None:
    """Several control nets as one component have their weights in several folders."""
    nets = diffusers.MultiControlNetModel([diffusers.ControlNetModel.from_unet(tiny_unet()) for _ in range(2)])
    plain_one = plain(made["single"]).components
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **{name: part for name, part in plain_one.items() if name != "image_encoder"}, controlnet=nets
    )
    pipeline.save_pretrained(tmp_path / "multi")
    diffusion.compress_diffusion(tmp_path / "multi", tmp_path / "multi-bs")
    with pytest.raises(errors.Unsupported, match=r"controlnet.*install_hook"):
        diffusion.load_pipeline(tmp_path / "multi-bs")
    given = diffusion.load_pipeline(tmp_path / "multi-bs", controlnet=nets)
    assert given.controlnet is nets


@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_language_model_as_text_encoder(size: str, made: dict[str, Saved], tmp_path: Path) -> None:
    """It has a generation configuration beside its weights, whether they are one file or shards."""
    source = Path(shutil.copytree(made["single"].source, tmp_path / "llm"))
    shutil.rmtree(source / "text_encoder")
    model = tiny_llm()
    model.generation_config = transformers.GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3)
    model.save_pretrained(source / "text_encoder", max_shard_size=size)
    assert (len(list((source / "text_encoder").glob("*.safetensors"))) > 1) == (size == "8KB")
    change_index(source, text_encoder=["transformers", "LlamaForCausalLM"])
    diffusion.compress_diffusion(source, tmp_path / "llm-bs")
    pipeline = diffusion.load_pipeline(tmp_path / "llm-bs")
    expected = diffusers.DiffusionPipeline.from_pretrained(source)
    assert_same_pipeline(pipeline, expected)
    found = pipeline.text_encoder.generation_config
    assert found.to_dict() == expected.text_encoder.generation_config.to_dict()
    assert (found.max_new_tokens, found.top_k) == (7, 3)
    assert pipeline.text_encoder.name_or_path == str(tmp_path / "llm-bs" / "text_encoder")


def test_optional_component(made: dict[str, Saved], tmp_path: Path) -> None:
    """One that the pipeline's class has None for, unless it is there."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    source = Path(shutil.copytree(made["single"].source, tmp_path / "more"))
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(source / "image_encoder")
    change_index(source, image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    diffusion.compress_diffusion(source, tmp_path / "more-bs")
    expected = diffusers.DiffusionPipeline.from_pretrained(source)
    assert expected.image_encoder is not None
    assert_same_pipeline(diffusion.load_pipeline(tmp_path / "more-bs"), expected)


def test_component_of_the_caller(made: dict[str, Saved], tmp_path: Path) -> None:
    folder = made["single"].copy(tmp_path / "packed")
    unet = tiny_unet(7)
    (folder / "unet" / "diffusion_pytorch_model.bs").unlink()  # never needed
    pipeline = diffusion.load_pipeline(folder, unet=unet, vae=None, scheduler=diffusers.PNDMScheduler())
    assert pipeline.unet is unet
    assert pipeline.vae is None
    assert isinstance(pipeline.scheduler, diffusers.PNDMScheduler)


def one_step(pipeline: Any) -> Any:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    done = pipeline("abc", num_inference_steps=1, latents=noise, output_type="latent", guidance_scale=2.0)
    return pipeline.vae.decode(done.images).sample


@torch.no_grad()
def test_same_image(saved: Saved) -> None:
    options = {"torch_dtype": torch.float32}
    assert torch.equal(one_step(diffusion.load_pipeline(saved.packed, **options)), one_step(plain(saved, **options)))


def test_save_again(saved: Saved, tmp_path: Path) -> None:
    pipeline = diffusion.load_pipeline(saved.packed)
    pipeline.save_pretrained(tmp_path / "again")
    assert_same_pipeline(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again"), plain(saved))
    with torch.no_grad():
        pipeline.unet.conv_in.weight.zero_()  # memory of its own, not of a file
    assert not (tmp_path / "again" / "unet" / "diffusion_pytorch_model.bs").exists()


def test_bs_beside_safetensors(made: dict[str, Saved], tmp_path: Path) -> None:
    """Components of one pipeline may come as either; in one folder `.bs` is preferred."""
    saved = made["single"]
    folder = saved.copy(tmp_path / "mixed")
    shutil.rmtree(folder / "vae")
    shutil.copytree(saved.source / "vae", folder / "vae")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    assert_same_pipeline(diffusion.load_pipeline(folder), plain(saved))
    assert_same_pipeline(diffusion.load_pipeline(saved.source), plain(saved))  # and none at all


def test_two_threads(made: dict[str, Saved]) -> None:
    """Both change the default dtype while they load."""
    dtypes = [torch.float16, torch.bfloat16] * 2
    with ThreadPoolExecutor(len(dtypes)) as pool:
        loaded = list(pool.map(lambda dtype: diffusion.load_pipeline(made["single"].packed, dtype=dtype), dtypes))
    for dtype, pipeline in zip(dtypes, loaded):
        assert_same_pipeline(pipeline, plain(made["single"], torch_dtype=dtype))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_another_thread_loads(made: dict[str, Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    load, packed = diffusion._load_components, made["single"].packed
    loading, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        loading.set()
        assert go_on.wait(60)
        return load(*args)

    monkeypatch.setattr(diffusion, "_load_components", slow)
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(diffusion.load_pipeline, packed)
        assert loading.wait(60)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                diffusion._load_components = load
                diffusion.load_pipeline(packed)
                code = 0
            finally:
                os._exit(code)
        go_on.set()
        loaded.result()
    until = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hung")
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(done[1]) == 0


def test_one_bar_for_each_model(made: dict[str, Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several shards, decoded in several groups."""
    bars: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def bar(label: str | None, total: int | None = None) -> Iterator[Any]:
        if label is None:
            yield None
        else:
            assert label not in bars
            bars[label] = []
            yield type("Bar", (), {"update": lambda self, n: bars[label].append(n)})()
            assert sum(bars[label]) == total

    monkeypatch.setattr(bigsmall._native, "bar", bar)
    monkeypatch.setattr(diffusion, "_CAST_BYTES", 4096)
    diffusion.load_pipeline(made["sharded"].packed, progress=True, dtype={"unet": torch.float16})
    assert bars.keys() == {"loading unet", "loading vae"}
    assert all(len(updates) > 1 for updates in bars.values())


def test_no_second_copy(made: dict[str, Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decoded is what the model holds, and where it is cast little is in memory in both dtypes."""
    read, decoded = bigsmall.torch.read, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        decoded.append(dict(read(*args, **kwargs)))
        return dict(decoded[-1])

    monkeypatch.setattr(bigsmall.torch, "read", recorded)
    unet = diffusion.load_pipeline(made["single"].packed, vae=None, text_encoder=None).unet
    where = {tensor.data_ptr() for part in decoded for tensor in part.values()}
    assert all(tensor.data_ptr() in where for tensor in unet.state_dict().values())
    decoded.clear()
    monkeypatch.setattr(diffusion, "_CAST_BYTES", 4096)
    diffusion.load_pipeline(made["single"].packed, dtype=torch.float16, vae=None, text_encoder=None)
    assert len(decoded) > 10
    for part in decoded:
        assert len(part) <= 1 or sum(tensor.nbytes for tensor in part.values()) <= 4096


def test_modules_kept_in_float32(made: dict[str, Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "_keep_in_fp32_modules", ["time_embedding", "conv_out"])
    for options in ({"torch_dtype": torch.float16}, {"torch_dtype": torch.bfloat16, "variant": "fp16"}):
        pipeline = diffusion.load_pipeline(made["single"].packed, **options)
        assert pipeline.unet.time_embedding.linear_1.weight.dtype == torch.float32
        assert pipeline.unet.conv_in.weight.dtype == options["torch_dtype"]
        assert_same_pipeline(pipeline, plain(made["single"], **options))


def test_old_names_and_ignored_tensors(made: dict[str, Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention layers of old VAE files have other names, and some classes ignore tensors by design."""
    from safetensors.torch import load_file, save_file

    saved = made["single"]
    source, packed = tmp_path / "old", tmp_path / "old-bs"
    shutil.copytree(saved.source, source)
    file = source / "vae" / "diffusion_pytorch_model.safetensors"
    today = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {
        re.sub("|".join(map(re.escape, today)), lambda found: today[found[0]], name): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(".query." in name for name in old)
    save_file({**old, "ignored.weight": torch.ones(3)}, file)
    diffusion.compress_diffusion(source, packed)
    with pytest.raises(errors.InvalidArgument, match=r"ignored\.weight"):
        diffusion.load_pipeline(packed)
    monkeypatch.setattr(diffusers.AutoencoderKL, "_keys_to_ignore_on_load_unexpected", ["ignored"])
    assert_same_pipeline(diffusion.load_pipeline(packed), plain(saved))


# ---- damage and misuse -----------------------------------------------------------------------------------------------


def shard(folder: Path, network: str = "unet") -> Path:
    return sorted(file for file in (folder / network).glob("*.bs") if "fp16" not in file.name)[-1]


def change_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


@pytest.fixture
def evil(tmp_path: Path) -> tuple[str, Path]:
    """Code, and the file that it makes where it runs."""
    ran = tmp_path / "ran"
    return f"open({str(ran)!r}, 'w')\nfrom diffusers import UNet2DConditionModel as X\n", ran


def test_entries_that_the_pipeline_does_not_have(
    made: dict[str, Saved], evil: tuple[str, Path], tmp_path: Path
) -> None:
    """They are left alone: nothing is imported, read or decoded."""
    folder = made["single"].copy(tmp_path / "packed")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "evil.py").write_text(evil[0])
    shutil.copytree(folder / "unet", folder / "unet_2")
    (folder / "unet_2" / "diffusion_pytorch_model.bs").write_bytes(b"not read")
    unet = ["diffusers", "UNet2DConditionModel"]
    strange = {
        "a": ["this", "X"], "b": ["diffusers", "Nope"], "c": [3, "X"], str(tmp_path / "elsewhere"): ["evil", "X"],
        "../packed/vae": unet, "unet_2": unet,
    }  # fmt: skip
    change_index(folder, **strange)
    assert_same_pipeline(diffusion.load_pipeline(folder), plain(made["single"]))
    assert "this" not in sys.modules
    assert not evil[1].exists()


@pytest.mark.parametrize(
    ("code", "entries", "said"),
    [
        ("unet/evil.py", {"unet": ["evil", "X"]}, "evil.*trust_remote_code"),
        ("scheduler/evil.py", {"scheduler": ["evil", "X"]}, "evil.*trust_remote_code"),
        ("evil.py", {"_class_name": ["evil", "X"]}, "evil.*trust_remote_code"),
        ("None.py", {}, "None.*trust_remote_code"),
        ("evil.py", {"unet": ["../evil", "X"]}, "unet.*evil.*no name of a library"),
        ("evil.py", {"unet": ["this", "X"]}, "unet.*'this'"),
        ("evil.py", {"unet": ["diffusers", "Nope"]}, "unet.*Nope"),
        ("evil.py", {"unet": [3, "X"]}, "unet.*3"),
        ("evil.py", {"unet": "diffusers"}, "unet.*diffusers"),
        ("evil.py", {"_class_name": "Nope"}, "Nope"),
        ("evil.py", {"_class_name": "utils"}, "utils"),
        ("evil.py", {"_class_name": ["nowhere", "X"]}, "nowhere"),
        ("evil.py", {"_class_name": None}, "_class_name"),
    ],
)
def test_what_a_pipeline_names(
    code: str, entries: dict[str, Any], said: str, made: dict[str, Saved], evil: tuple[str, Path], tmp_path: Path
) -> None:
    """No code of it runs, and no library is imported, unless the caller says so."""
    folder = made["single"].copy(tmp_path / "packed")
    (folder / code).write_text(evil[0])
    change_index(folder, **entries)
    with pytest.raises((errors.Unsupported, errors.InvalidArgument), match=said):
        diffusion.load_pipeline(folder)
    if "unet" in entries:  # diffusers 0.35 imports the library of what it is given
        with contextlib.suppress(errors.Unsupported, errors.InvalidArgument):
            diffusion.load_pipeline(folder, unet=tiny_unet())
    assert "this" not in sys.modules
    assert not evil[1].exists()


def test_trusted_code(made: dict[str, Saved], evil: tuple[str, Path], tmp_path: Path) -> None:
    """A pipeline and a scheduler of its own; the former loads another pipeline while it is loaded."""
    saved = made["single"]
    folder = saved.copy(tmp_path / "packed")
    (folder / "mine.py").write_text(
        "from diffusers import StableDiffusionPipeline\nfrom bigsmall.integrations import diffusion\n"
        "class Mine(StableDiffusionPipeline):\n"
        f"    inner = diffusion.load_pipeline({str(saved.packed)!r})\n"
    )
    steps = "from diffusers import DDIMScheduler\nclass Steps(DDIMScheduler): pass\n"
    (folder / "scheduler" / "mine.py").write_text(steps)
    change_index(folder, _class_name=["mine", "Mine"], scheduler=["mine", "Steps"])
    pipeline = diffusion.load_pipeline(folder, trust_remote_code=True)
    assert (type(pipeline).__name__, type(pipeline.scheduler).__name__) == ("Mine", "Steps")
    expected = plain(saved)
    for network in NETWORKS:
        assert_same(getattr(pipeline, network), getattr(expected, network))
        assert_same(getattr(pipeline.inner, network), getattr(expected, network))
    # diffusers takes no component of another's code from its caller.
    (folder / "unet" / "mine.py").write_text(evil[0])
    change_index(folder, unet=["mine", "X"])
    with pytest.raises(errors.Unsupported, match=r"unet.*install_hook"):
        diffusion.load_pipeline(folder, trust_remote_code=True)


def test_missing_shard(made: dict[str, Saved], tmp_path: Path) -> None:
    folder = made["sharded"].copy(tmp_path / "packed")
    lost = shard(folder)
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(lost.name)):
        diffusion.load_pipeline(folder)
    lost_variant = sorted((folder / "vae").glob("*.fp16-*.bs"))[0]
    lost_variant.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(lost_variant.name)):
        diffusion.load_pipeline(folder, variant="fp16", unet=None)


@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
@pytest.mark.parametrize("network", NETWORKS)
def test_damaged(saved: Saved, network: str, damage: str, tmp_path: Path) -> None:
    folder = saved.copy(tmp_path / "packed")
    damaged = shard(folder, network)
    data = bytearray(damaged.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        with Reader(damaged) as reader:
            tensor = max(reader.tensors, key=lambda tensor: tensor.n_bytes)
            span = reader.locate(tensor)
        data[span.offset + span.n_bytes // 2] ^= 0x40
    damaged.write_bytes(data)
    with pytest.raises(errors.Corrupt) as raised:
        diffusion.load_pipeline(folder)
    assert damaged.name in str(raised.value)
    if damage == "corrupt":
        assert tensor.name in str(raised.value)


def test_shard_of_another_model(made: dict[str, Saved], tmp_path: Path) -> None:
    """A shard of the right name but with other tensors, of the plain weights and of a variant."""
    folder = made["sharded"].copy(tmp_path / "packed")
    for pattern, options in (("*model-*.bs", {}), ("*.fp16-*.bs", {"variant": "fp16"})):
        first, second = sorted((folder / "vae").glob(pattern))[:2]
        kept = second.read_bytes()
        second.unlink()
        bigsmall.save_file({"strange": torch.ones(4)}, second)
        with pytest.raises(errors.Corrupt, match=re.escape(second.name)):
            diffusion.load_pipeline(folder, unet=None, **options)
        second.write_bytes(kept)
        assert first.exists()
    diffusion.load_pipeline(folder)


def test_tensors_that_do_not_fit(made: dict[str, Saved], tmp_path: Path) -> None:
    folder = made["single"].copy(tmp_path / "packed")
    file = folder / "unet" / "diffusion_pytorch_model.bs"
    whole = bigsmall.load(file)
    cases = {
        "conv_in.bias": {name: tensor for name, tensor in whole.items() if name != "conv_in.bias"},
        "more.weight": {**whole, "more.weight": torch.ones(2)},
        "conv_in.weight": {**whole, "conv_in.weight": torch.ones(2, 2)},
    }
    for named, tensors in cases.items():
        file.unlink()
        bigsmall.save_file(tensors, file)
        with pytest.raises(errors.InvalidArgument) as raised:
            diffusion.load_pipeline(folder)
        assert named in str(raised.value)
        assert "unet" in str(raised.value)


def test_text_encoder_that_lacks_a_tensor(made: dict[str, Saved], tmp_path: Path) -> None:
    folder = made["single"].copy(tmp_path / "packed")
    file = folder / "text_encoder" / "model.bs"
    tensors = bigsmall.load(file)
    lost = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    del tensors[lost]
    file.unlink()
    bigsmall.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(errors.InvalidArgument, match=r"text_encoder.*final_layer_norm\.weight"):
        diffusion.load_pipeline(folder)


def test_shards_of_a_variant_without_index(made: dict[str, Saved], tmp_path: Path) -> None:
    """As old versions of diffusers wrote them; the plain weights must not take their place in silence."""
    folder = made["single"].copy(tmp_path / "packed")
    file = folder / "unet" / "diffusion_pytorch_model.fp16.bs"
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00001.fp16.bs"))
    (folder / "unet" / "LICENSE").write_text("a name without a dot")
    with pytest.raises(errors.Unsupported, match=r"00001\.fp16\.bs"):
        diffusion.load_pipeline(folder, variant="fp16")


def test_only_another_variant(made: dict[str, Saved], tmp_path: Path) -> None:
    folder = made["single"].copy(tmp_path / "packed")
    (folder / "unet" / "diffusion_pytorch_model.bs").unlink()
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.fp16\.bs.*variant"):
        diffusion.load_pipeline(folder)
    diffusion.load_pipeline(folder, variant="fp16")


def test_refusals(made: dict[str, Saved], tmp_path: Path) -> None:
    packed = made["single"].packed
    for device_map in ("balanced", "auto", {"unet": 0}):
        with pytest.raises(errors.Unsupported, match="device_map"):
            diffusion.load_pipeline(packed, device_map=device_map)
    if not torch.cuda.is_available():
        with pytest.raises(errors.Unsupported, match="CUDA"):
            diffusion.load_pipeline(packed, device_map="cuda")
    with pytest.raises(errors.InvalidArgument, match="float16"):
        diffusion.load_pipeline(packed, torch_dtype="float16")
    with pytest.raises(errors.InvalidArgument, match="torch_dtype"):
        diffusion.load_pipeline(packed, torch_dtype=torch.float16, dtype=torch.float16)
    with pytest.raises(errors.Unsupported, match="quantise"):
        diffusion.load_pipeline(packed, quantization_config=object())
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        diffusion.load_pipeline("no/such/folder")
    with pytest.raises(errors.InvalidArgument, match=r"model_index\.json"):
        diffusion.load_pipeline(packed / "unet")
    with pytest.raises(errors.InvalidArgument, match="config_dir"):
        diffusion.load_pipeline(packed / "unet" / "diffusion_pytorch_model.bs")
    quantised = made["single"].copy(tmp_path / "quantised")
    config = json.loads((quantised / "unet" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (quantised / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.Unsupported, match="bitsandbytes"):
        diffusion.load_pipeline(quantised)


# ---- one component into a pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["source", "packed"])
@pytest.mark.parametrize("network", NETWORKS)
def test_component_from_a_file(made: dict[str, Saved], network: str, target: str, tmp_path: Path) -> None:
    make = {"unet": tiny_unet, "vae": tiny_vae, "text_encoder": tiny_text_encoder}[network]
    trained = make(77).eval()
    trained.save_pretrained(tmp_path / "trained")
    source = next((tmp_path / "trained").glob("*.safetensors"))
    diffusion.compress_diffusion(source, tmp_path / "trained.bs")
    saved = made["single"]
    pipeline = diffusion.load_pipeline(tmp_path / "trained.bs", config_dir=getattr(saved, target))
    expected = plain(saved)
    assert not torch.equal(next(iter(expected.components[network].parameters())), next(iter(trained.parameters())))
    setattr(expected, network, trained.to(expected.components[network].dtype))
    assert_same_pipeline(pipeline, expected)


def test_component_from_shards(made: dict[str, Saved]) -> None:
    """A directory of shards, into a pipeline that lacks these weights."""
    pipeline = diffusion.load_pipeline(made["sharded"].packed / "unet", config_dir=made["single"].source)
    assert_same_pipeline(pipeline, plain(made["single"]))


def test_component_into_a_pipeline_without_its_weights(made: dict[str, Saved], tmp_path: Path) -> None:
    folder = made["single"].copy(tmp_path / "packed")
    for file in (folder / "unet").glob("*.bs"):
        file.rename(tmp_path / file.name)
    pipeline = diffusion.load_pipeline(tmp_path / "diffusion_pytorch_model.bs", config_dir=folder)
    assert_same_pipeline(pipeline, plain(made["single"]))


def test_component_that_fits_nothing(made: dict[str, Saved], tmp_path: Path) -> None:
    tiny_unet(1, in_channels=9).save_pretrained(tmp_path / "inpaint")
    diffusion.compress_diffusion(tmp_path / "inpaint" / "diffusion_pytorch_model.safetensors", tmp_path / "unet.bs")
    with pytest.raises(errors.InvalidArgument) as raised:
        diffusion.load_pipeline(tmp_path / "unet.bs", config_dir=made["single"].packed)
    text = str(raised.value)
    assert all(name in text for name in NETWORKS)
    assert "'conv_in.weight' is [8, 9, 3, 3] in the file and [8, 4, 3, 3] in the model" in text
    with pytest.raises(errors.InvalidArgument, match="component"):
        diffusion.load_pipeline(tmp_path / "unet.bs", component="unet")
    with pytest.raises(errors.InvalidArgument, match="no network 'scheduler'"):
        diffusion.load_pipeline(tmp_path / "unet.bs", config_dir=made["single"].packed, component="scheduler")


def test_component_that_fits_two(tmp_path: Path) -> None:
    """Two text encoders of one architecture, as a custom pipeline may have them."""
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=tiny_unet(),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(3),
        text_encoder_2=tiny_text_encoder(4),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=diffusers.DDIMScheduler(),
    )
    pipeline.save_pretrained(tmp_path / "xl")
    diffusion.compress_diffusion(tmp_path / "xl", tmp_path / "xl-bs")
    file = tmp_path / "xl-bs" / "text_encoder" / "model.bs"
    with pytest.raises(errors.InvalidArgument, match="text_encoder, text_encoder_2"):
        diffusion.load_pipeline(file, config_dir=tmp_path / "xl-bs")
    loaded = diffusion.load_pipeline(file, config_dir=tmp_path / "xl", component="text_encoder_2")
    expected = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "xl")
    assert_same(loaded.text_encoder, expected.text_encoder)
    assert_same(loaded.text_encoder_2, expected.text_encoder)
    assert_same(loaded.vae, expected.vae)


# ---- diffusers' own from_pretrained ----------------------------------------------------------------------------------


@pytest.fixture
def hooked() -> Iterator[None]:
    huggingface.install_hook()
    yield
    huggingface.uninstall_hook()


@pytest.mark.parametrize(
    "options",
    [{}, {"torch_dtype": "bfloat16", "device_map": "cpu"}, {"variant": "fp16", "torch_dtype": "float16"}],
    ids=["plain", "cast", "variant"],
)
@pytest.mark.usefixtures("hooked")
def test_hook_pipeline(saved: Saved, options: dict[str, Any]) -> None:
    options = {name: getattr(torch, value) if name == "torch_dtype" else value for name, value in options.items()}
    expected = plain(saved, **options)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved.packed, **options)
    assert_same_pipeline(pipeline, expected)


@pytest.mark.usefixtures("hooked")
def test_hook_models(saved: Saved, tmp_path: Path) -> None:
    expected = plain(saved)
    load = diffusers.UNet2DConditionModel.from_pretrained
    for options in ({}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}, {"disable_mmap": True}):
        assert_same(load(saved.packed, subfolder="unet", **options), expected.unet)
    model, report = diffusers.AutoencoderKL.from_pretrained(str(saved.packed / "vae"), output_loading_info=True)
    assert_same(model, expected.vae)
    assert not any(report.values())
    assert_same(diffusers.AutoModel.from_pretrained(str(saved.packed), subfolder="vae"), expected.vae)
    # Where both are there, the safetensors are read.
    both = saved.copy(tmp_path / "both")
    shutil.copytree(saved.source / "unet", both / "unet", dirs_exist_ok=True)
    for file in (both / "unet").glob("*.bs"):
        file.write_bytes(b"not read")
    assert_same(load(both, subfolder="unet"), expected.unet)


@pytest.mark.usefixtures("hooked")
def test_hook_single_file(made: dict[str, Saved]) -> None:
    saved = made["single"]
    model = diffusers.UNet2DConditionModel.from_single_file(
        str(saved.packed / "unet" / "diffusion_pytorch_model.bs"), config=str(saved.source), subfolder="unet"
    )
    assert_same(model, plain(saved).unet)


@pytest.mark.usefixtures("hooked")
def test_hook_damage(made: dict[str, Saved], tmp_path: Path) -> None:
    single, sharded = (made[name].copy(tmp_path / name) for name in ("single", "sharded"))
    load = diffusers.UNet2DConditionModel.from_pretrained
    damaged = shard(single)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(errors.Corrupt, match=re.escape(damaged.name)):
        load(single, subfolder="unet")
    lost = shard(sharded)
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(lost.name)):
        load(sharded, subfolder="unet")
    bigsmall.save_file({"strange": torch.ones(4)}, lost)
    with pytest.raises(errors.Corrupt, match=re.escape(lost.name)):
        load(sharded, subfolder="unet")
    lost.write_bytes(kept)
    lost = sorted((sharded / "unet").glob("*.fp16-*.bs"))[0]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(lost.name)):
        load(sharded, subfolder="unet", variant="fp16")
    with pytest.raises(OSError, match="no file named"):
        load(tmp_path, subfolder="unet", config=None)


@pytest.mark.usefixtures("hooked")
def test_index_that_was_cut(made: dict[str, Saved], tmp_path: Path) -> None:
    """A source's index, as bigsmall.index.json keeps it, that lists one shard of several."""
    folder = made["sharded"].copy(tmp_path / "packed")
    path = folder / "unet" / "bigsmall.index.json"
    index = json.loads(path.read_text())
    for source in index["metadata"]["source_indexes"]:
        text = json.loads(source["text"])
        kept = min(text["weight_map"].values())
        text["weight_map"] = {name: file for name, file in text["weight_map"].items() if file == kept}
        source["text"] = json.dumps(text)
    path.write_text(json.dumps(index))
    for load in (
        lambda: diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        lambda: diffusers.DiffusionPipeline.from_pretrained(folder),
        lambda: diffusion.load_pipeline(folder),
    ):
        with pytest.raises(errors.Corrupt, match=r"unet.bigsmall\.index\.json.*different shards"):
            load()


@pytest.mark.usefixtures("hooked")
def test_hook_leaves_others_alone(saved: Saved, tmp_path: Path) -> None:
    pipeline = plain(saved, variant="fp16")
    pipeline.unet.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert_same(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "bin"), pipeline.unet)
    from diffusers.models.modeling_utils import load_state_dict

    with pytest.raises(TypeError):
        load_state_dict()
    assert load_state_dict({"already": 1}) == {"already": 1}


# ---- from the Hub ----------------------------------------------------------------------------------------------------

# For a process of its own, since huggingface_hub reads its settings when it is imported.
PRELUDE = """
import functools, os, sys, urllib.error, urllib.request
import torch, diffusers
from bigsmall import errors
from bigsmall.integrations import diffusion, huggingface

@functools.lru_cache(None)
def plain(folder, **options):
    return diffusers.DiffusionPipeline.from_pretrained(folder, **options)

def same(pipeline, folder, **options):
    expected = plain(folder, **options)
    assert pipeline.components.keys() == expected.components.keys()
    for name in ("unet", "vae", "text_encoder"):
        found, wanted = (p.components[name].state_dict() for p in (pipeline, expected))
        assert list(found) == list(wanted), name
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items()), name

def mark(what):
    # Leaves a line in the server's log.
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + what)
    except urllib.error.HTTPError:
        pass

def cached(repo):
    root = os.path.join(os.environ["HF_HUB_CACHE"], "models--" + repo.replace("/", "--"), "snapshots")
    return {
        os.path.relpath(os.path.join(at, name), os.path.join(root, os.listdir(root)[0]))
        for at, _, names in os.walk(root) for name in names
    }
"""


def test_repos(made: dict[str, Saved], tmp_path: Path) -> None:
    """By load_pipeline: plain and variant weights of a repo of `.bs`, and of one that has `.bs` in some folders; the
    cache offline. Then by the hook, with which other repos see the requests that they see without it."""
    single, sharded = made["single"], made["sharded"]
    mixed = sharded.copy(tmp_path / "mixed")
    shutil.rmtree(mixed / "vae")
    shutil.copytree(sharded.source / "vae", mixed / "vae")
    shutil.copy(sharded.source / "unet" / "diffusion_pytorch_model.safetensors.index.json", mixed / "unet")
    with FakeHub(tmp_path / "hub") as hub:
        hub.add("me/single", single.packed)
        hub.add("me/sharded", sharded.packed, private=True)
        hub.add("me/mixed", mixed)
        hub.add("me/plain", single.source)
        hub.add("me/plain-sharded", sharded.source)
        code = (
            PRELUDE
            + """
single, sharded = sys.argv[1:]
same(diffusion.load_pipeline("me/single"), single)
bs = {name for name in cached("me/single") if name.endswith(".bs")}
assert len(bs) == 3 and not any("fp16" in name for name in bs), bs
same(diffusion.load_pipeline("me/single", local_files_only=True), single)
same(diffusion.load_pipeline("hf://me/sharded", variant="fp16", token="x"), sharded, variant="fp16")
bs = {name for name in cached("me/sharded") if name.endswith(".bs")}
assert bs and all("fp16" in name for name in bs), bs
options = {"variant": "fp16", "torch_dtype": torch.float16}
same(diffusion.load_pipeline("me/mixed", **options), sharded, **options)
names = cached("me/mixed")
assert {name for name in names if name.startswith("vae/")} and all(
    "fp16" in name or name.endswith("json") for name in names if name.startswith("vae/")), names
file = os.path.join(single + "-bs", "vae", "diffusion_pytorch_model.bs")
same(diffusion.load_pipeline(file, config_dir="me/single"), single)
for wrong, kind in (("me/absent", OSError), ("me/single/unet", FileNotFoundError)):
    try:
        diffusion.load_pipeline(wrong)
    except kind as error:
        assert wrong in str(error), error
    else:
        raise AssertionError(wrong)

def others(cache_dir):
    mark(cache_dir)
    diffusers.UNet2DConditionModel.from_pretrained("me/plain", subfolder="unet", cache_dir=cache_dir)
    diffusers.AutoencoderKL.from_pretrained("me/plain-sharded", subfolder="vae", variant="fp16", cache_dir=cache_dir)
    diffusers.DiffusionPipeline.from_pretrained("me/plain", cache_dir=cache_dir)
    mark("end")

others("without")
huggingface.install_hook()
others("with")
load = diffusers.DiffusionPipeline.from_pretrained
same(load("me/single", cache_dir="hook"), single)
same(load("me/single", cache_dir="hook-variant", variant="fp16"), single, variant="fp16")
for folder, variant in ((single, None), (sharded, None), (sharded, "fp16")):
    options = {"subfolder": "unet", "variant": variant}
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        "me/" + os.path.basename(folder), cache_dir="hook-unet", **options)
    wanted = diffusers.UNet2DConditionModel.from_pretrained(folder, **options).state_dict()
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in wanted.items())
"""
        )
        code = f"import os; os.chdir({str(tmp_path)!r})" + code
        run_script(code, single.source, sharded.source, env=hub.env(tmp_path / "home"))
        log = [entry[:3] for entry in hub.log]
    assert all(token == "Bearer x" for _, path, _, token in hub.log if "me/sharded" in path)
    marks = [number for number, (_, path, _) in enumerate(log) if path.startswith("/mark/")]
    without, _, hooked, end = marks
    seen = sorted(log[without + 1 : marks[1]])
    assert [log[number][1] for number in (without, hooked)] == ["/mark/without", "/mark/with"]
    assert any("/plain-sharded/" in path for _, path, _ in seen)
    assert sorted(log[hooked + 1 : end]) == seen
