"""What needs a GPU: loading to it, and models that stay compressed there. Skipped elsewhere; the driver's calls and the
kernels are tested without one in test_cuda_driver."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import bigsmall  # noqa: E402
from bigsmall import errors  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="needs a CUDA device"
)


def equal(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor: Any) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("gpu")
    generator = torch.Generator().manual_seed(3)
    small = torch.randn(700, 517, generator=generator) * 0.02
    spiky = small.clone()
    spiky.view(-1)[torch.randint(0, spiky.numel(), (900,), generator=generator)] *= 1e20
    spiky.view(-1)[::9973] = float("nan")
    tensors = {
        "bf16": small.bfloat16(),
        "bf16.spiky": spiky.bfloat16(),
        "f16": small.half(),
        "f32": small,
        "f32.spiky": spiky,
        "f32.of.f16": small.half().float(),
        "f32.of.bf16": small.bfloat16().float(),
        "f8": (small * 8).to(torch.float8_e4m3fn),
        "f8.e5m2": (small * 8).to(torch.float8_e5m2),
        "f64": small[:50].double(),
        "i64": torch.arange(1000),
        "ones": torch.ones(70000, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "large": (torch.randn(4096, 4096, generator=generator) * 0.02).bfloat16(),
    }
    for n in (1, 31, 33, 127, 129, 4095, 65535, 65536, 65537):
        tensors[f"n{n}"] = (torch.randn(n, generator=generator) * 0.02).bfloat16()
    save_file(tensors, folder / "zoo.safetensors")
    made = {"source": folder / "zoo.safetensors"}
    for mode in ("balanced", "inference", "storage"):
        made[mode] = folder / f"{mode}.bs"
        bigsmall.compress(made["source"], made[mode], mode=mode)
    return made


@pytest.mark.parametrize("mode", ["balanced", "inference", "storage"])
def test_load(zoo: dict[str, Path], mode: str, recwarn: pytest.WarningsRecorder) -> None:
    want = bigsmall.load(zoo[mode])
    got = bigsmall.load(zoo[mode], device="cuda")
    assert list(got) == list(want)
    assert [name for name in want if not (got[name].is_cuda and equal(got[name], want[name]))] == []
    assert [str(w.message) for w in recwarn if "bigsmall" in str(w.filename)] == []


def test_load_on_a_stream_of_its_own(zoo: dict[str, Path]) -> None:
    want = bigsmall.load(zoo["balanced"])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            junk = torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")
            del junk  # its memory is given out again while the product is on its way
            got = bigsmall.load(zoo["balanced"], device="cuda")
            assert all(equal(got[name], want[name]) for name in want)


def test_from_threads_that_never_used_the_device(zoo: dict[str, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    want = bigsmall.load(zoo["storage"])
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: bigsmall.load(zoo["storage"], device="cuda"), range(6)):
            assert all(equal(got[name], want[name]) for name in want)


def test_layers_on_a_stream_of_its_own(tmp_path: Path) -> None:
    """The memory of a layer that is dropped is given out again while the product with it is still to come."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    want = {f"layers.{k}.w": (torch.randn(2048, 2048, generator=generator) * 0.02).bfloat16() for k in range(12)}
    save_file(want, tmp_path / "layers.safetensors")
    bigsmall.compress(tmp_path / "layers.safetensors", tmp_path / "layers.bs")
    stream = torch.cuda.Stream()
    copies = {}
    with torch.cuda.stream(stream), bigsmall.StreamingLoader(tmp_path / "layers.bs", "cuda") as loader:
        junk = torch.randn(4096, 4096, device="cuda")
        for name, tensors in loader.iter_layers():
            for _ in range(3):
                junk = junk @ junk * 1e-3
            copies[f"{name}.w"] = tensors.pop(f"{name}.w").clone()
    stream.synchronize()
    assert all(equal(copies[name], want[name]) for name in want)


def test_devices_that_are_not_there(zoo: dict[str, Path]) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(errors.InvalidArgument, match=f"cuda:{count} is invalid"):
        bigsmall.load(zoo["balanced"], device=f"cuda:{count}")


def test_memory_comes_back(zoo: dict[str, Path]) -> None:
    bigsmall.load(zoo["balanced"], device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(5):
        bigsmall.load(zoo["balanced"], device="cuda")
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert free - torch.cuda.mem_get_info()[0] < 64 << 20


def test_verify_and_safe_open_and_layers(zoo: dict[str, Path]) -> None:
    want = bigsmall.load(zoo["balanced"])
    got = bigsmall.load(zoo["balanced"], device="cuda", verify=True)
    assert all(equal(got[name], want[name]) for name in want)
    with bigsmall.safe_open(zoo["balanced"], framework="pt", device="cuda") as file:
        assert equal(file.get_tensor("bf16.spiky"), want["bf16.spiky"])
    with bigsmall.StreamingLoader(zoo["balanced"], "cuda") as loader:
        got = loader.load_non_layer_tensors()
    assert all(equal(got[name], want[name]) for name in want)


def test_damage_is_the_same_error(zoo: dict[str, Path], tmp_path: Path) -> None:
    whole = zoo["balanced"].read_bytes()
    for k in range(2000, len(whole) - 2000, len(whole) // 23):
        (tmp_path / "bad.bs").write_bytes(whole[:k] + bytes([whole[k] ^ 4]) + whole[k + 1 :])
        texts = []
        for device in ("cpu", "cuda"):
            with pytest.raises(errors.BigSmallError) as error:
                bigsmall.load(tmp_path / "bad.bs", device=device)
            texts.append((type(error.value), str(error.value)))
        assert texts[0] == texts[1]
    assert torch.ones(3, device="cuda").sum().item() == 3  # the device is well


def test_compressed_linear_and_embedding(zoo: dict[str, Path]) -> None:
    from bigsmall.compressed import CompressedEmbedding, CompressedLinear, CompressedWeight, Scratch
    from bigsmall.reader import Reader

    device = torch.device("cuda", torch.cuda.current_device())
    want = bigsmall.load(zoo["balanced"], device="cuda")
    for name in ("bf16", "bf16.spiky", "f16", "f32.of.f16", "f32.of.bf16", "large"):
        with Reader(zoo["balanced"]) as reader:
            weight = CompressedWeight(reader, name, device)
        plain = want[name]
        assert equal(weight.decoded(), plain), name
        for bias in (None, torch.randn(plain.shape[0], device=device, dtype=plain.dtype)):
            x = torch.randn(3, 5, plain.shape[1], device=device, dtype=plain.dtype)
            expected = torch.nn.functional.linear(x, plain, bias)
            assert equal(CompressedLinear(weight, bias)(x), expected), name
            # The product of a slice may add in another order.
            sliced = CompressedLinear(weight, bias, Scratch(device, max_bytes=1))(x)
            if "spiky" not in name:
                torch.testing.assert_close(sliced, expected, msg=name)
        ids = torch.randint(0, plain.shape[0], (4, 70), device=device)
        layer = CompressedEmbedding(weight)
        assert equal(layer(ids), torch.nn.functional.embedding(ids, plain)), name
        assert equal(layer(ids.int()), torch.nn.functional.embedding(ids, plain)), name
        with pytest.raises(errors.InvalidArgument):
            layer.to(torch.float64)
        with pytest.raises(errors.InvalidArgument):
            layer.cpu()


def llama(folder: Path, **changed: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    options = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4000,
        "max_position_embeddings": 256,
        **changed,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).bfloat16()
    model.save_pretrained(folder / "source")
    bigsmall.compress(folder / "source", folder / "bs")
    return folder / "bs"


@pytest.mark.parametrize("tied", [False, True])
def test_resident(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    from bigsmall.compressed import CompressedLinear
    from bigsmall.integrations import huggingface

    path = llama(tmp_path, tie_word_embeddings=tied, attention_bias=True)
    kind = transformers.AutoModelForCausalLM
    plain = huggingface.from_pretrained(path, kind, dtype="auto", device="cuda")
    ids = torch.randint(0, 4000, (2, 33), device="cuda")
    with torch.inference_mode():
        want = plain(ids).logits
        tokens = plain.generate(ids, max_new_tokens=20, do_sample=False)
        model = huggingface.from_pretrained(path, kind, resident="compressed")
        assert sum(isinstance(m, CompressedLinear) for m in model.modules()) == 4 * 7 + 1
        for _ in range(3):
            assert equal(model(ids).logits, want)
        assert model.model.layers[0].mlp.up_proj.scratch._batches
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), tokens)
        # In another order, and parts of a pass.
        for layer in (3, 0, 0, 2):
            x = torch.randn(2, 5, 512, device="cuda", dtype=torch.bfloat16)
            assert equal(model.model.layers[layer].mlp(x), plain.model.layers[layer].mlp(x))
        assert equal(model(ids).logits, want)
    with pytest.raises(errors.InvalidArgument, match="dtype"):
        huggingface.from_pretrained(path, kind, resident="compressed", dtype=torch.float16)


def test_resident_in_threads_and_streams(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    transformers = pytest.importorskip("transformers")
    from bigsmall.integrations import huggingface

    path = llama(tmp_path)
    kind = transformers.AutoModelForCausalLM
    plain = huggingface.from_pretrained(path, kind, dtype="auto", device="cuda")
    model = huggingface.from_pretrained(path, kind, resident="compressed")

    def run(seed: int) -> bool:
        ids = torch.randint(0, 4000, (1, 40), generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            same = all(equal(model(ids).logits, plain(ids).logits) for _ in range(5))
            torch.cuda.current_stream().synchronize()
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8)))


def test_resident_in_a_graph(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from bigsmall.integrations import huggingface

    path = llama(tmp_path)
    ids = torch.randint(0, 4000, (1, 8), device="cuda")
    model = huggingface.from_pretrained(path, transformers.AutoModelForCausalLM, resident="compressed")
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                want = model(ids, use_cache=False).logits.clone()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(ids, use_cache=False).logits
        for _ in range(3):
            got.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert equal(got, want)
            assert equal(model(ids, use_cache=False).logits, want)
