from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import weakref
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

from bigsmall.layers import StreamingLoader, layer_of  # noqa: E402

LLM = {
    "model.embed_tokens.weight": (40, 16),
    "model.norm.weight": (16,),
    **{f"model.layers.{layer}.mlp.weight": (32, 16) for layer in range(12)},
    **{f"model.layers.{layer}.norm.weight": (16,) for layer in range(12)},
    "lm_head.weight": (40, 16),
}


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {name: ("BF16", shape, bfloat16(weights(seed, *shape))) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def llm(make) -> Path:
    return make(tensors_of(LLM))[1]


def loader_of(path: Any, **options: Any) -> StreamingLoader:
    return StreamingLoader(path, "cpu", **options)


def threads() -> int:
    return sum(thread.name == "bigsmall-layers" for thread in threading.enumerate())


def same(got: dict[str, Any], path: Path, names: set[str]) -> None:
    expected = bigsmall.load(path)
    assert got.keys() == names
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3)),
        ("layers.0.weight", ("layers", 0)),
        ("layers.10", ("layers", 10)),
        ("bert.encoder.layer.11.output.dense.bias", ("bert.encoder.layer", 11)),
        ("transformer.h.5.attn.c_attn.weight", ("transformer.h", 5)),
        ("h.5.attn.c_attn.weight", ("h", 5)),
        ("visual.blocks.0.norm1.weight", ("visual.blocks", 0)),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", ("encoder.block", 0)),
        ("decoder.block.7.layer.2.weight", ("decoder.block", 7)),
        ("model.layers.2.block_sparse_moe.experts.3.w1.weight", ("model.layers", 2)),
        ("model.layers.2.mlp.experts.layers.3.w1.weight", ("model.layers", 2)),
        ("swin.encoder.layers.1.blocks.0.norm.weight", ("swin.encoder.layers", 1)),
        ("text_model.encoder.layers.2.mlp.fc1.bias", ("text_model.encoder.layers", 2)),
        ("model.embed_tokens.weight", None),
        ("layers.weight", None),
        ("model.layers.007.weight", None),
        ("model.layers.x.1.weight", None),
        ("model.layers.-1.weight", None),
        ("model.layers.1234567890.weight", None),
        ("model.layers.١.weight", None),
        ("sublayers.1.weight", None),
        ("down_blocks.1.weight", None),
        ("model.layers.1x.weight", None),
        ("", None),
    ],
)
def test_layer_of(name: str, layer: tuple[str, int] | None) -> None:
    assert layer_of(name) == layer


def test_names_and_counts(llm: Path) -> None:
    with loader_of(llm) as loader:
        assert loader.n_layers == 12
        assert loader.stacks == {"model.layers": list(range(12))}
        assert loader.layer_names == [f"model.layers.{layer}" for layer in range(12)]
        assert set(loader.non_layer_names) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert set(loader.tensor_names(11)) == {"model.layers.11.mlp.weight", "model.layers.11.norm.weight"}
        assert loader.device == torch.device("cpu")
        assert "12 layers" in repr(loader)


def test_everything_once_and_in_order(llm: Path) -> None:
    with loader_of(llm) as loader:
        fixed = loader.load_non_layer_tensors()
        same(fixed, llm, set(loader.non_layer_names))
        everything = dict(fixed)
        order = []
        for name, tensors in loader.iter_layers():
            order.append(name)
            same(tensors, llm, {f"{name}.mlp.weight", f"{name}.norm.weight"})
            everything.update(tensors)
        assert order == [f"model.layers.{layer}" for layer in range(12)]
        assert everything.keys() == LLM.keys()


def test_single_layers_and_tensors(llm: Path) -> None:
    with loader_of(llm) as loader:
        for layer in (7, "model.layers.7"):
            same(loader.load_layer(layer), llm, {"model.layers.7.mlp.weight", "model.layers.7.norm.weight"})
        same(loader.load_layer(7, "model.layers"), llm, {"model.layers.7.mlp.weight", "model.layers.7.norm.weight"})
        same({"lm_head.weight": loader.load_tensor("lm_head.weight")}, llm, {"lm_head.weight"})
        first, again = loader.load_layer(0), loader.load_layer(0)
        first["model.layers.0.mlp.weight"].zero_()
        assert again["model.layers.0.mlp.weight"].any()
        with pytest.raises(errors.NotFound, match=r"model\.layers\.12.*0 to 11"):
            loader.load_layer(12)
        with pytest.raises(errors.NotFound, match=r"model\.layers\.-1"):
            loader.load_layer(-1)
        with pytest.raises(errors.NotFound, match=r"no stack 'decoder'.*model\.layers"):
            loader.load_layer(0, "decoder")
        with pytest.raises(errors.NotFound, match=r"no stack 'decoder'"):
            loader.iter_layers("decoder")
        with pytest.raises(errors.InvalidArgument, match=r"'model\.layers\.3'"):
            loader.load_layer("seven")
        with pytest.raises(errors.NotFound, match="none"):
            loader.load_tensor("none")


def test_stacks_are_kept_apart(make) -> None:
    shapes = {
        "shared.weight": (8, 4),
        "encoder.block.1.layer.0.q.weight": (4, 4),
        "encoder.block.1.layer.1.wi.weight": (4, 4),
        "decoder.block.1.layer.0.q.weight": (4, 4),
        "encoder.block.2.layer.0.q.weight": (4, 4),
        "vision.blocks.5.weight": (4, 4),
    }
    path = make(tensors_of(shapes))[1]
    with loader_of(path) as loader:
        assert loader.stacks == {"decoder.block": [1], "encoder.block": [1, 2], "vision.blocks": [5]}
        assert loader.non_layer_names == ["shared.weight"]
        got = {name: set(tensors) for name, tensors in loader.iter_layers()}
        assert got == {
            "decoder.block.1": {"decoder.block.1.layer.0.q.weight"},
            "encoder.block.1": {"encoder.block.1.layer.0.q.weight", "encoder.block.1.layer.1.wi.weight"},
            "encoder.block.2": {"encoder.block.2.layer.0.q.weight"},
            "vision.blocks.5": {"vision.blocks.5.weight"},
        }
        assert list(got) == loader.layer_names
        assert [name for name, _ in loader.iter_layers("encoder.block")] == ["encoder.block.1", "encoder.block.2"]
        assert set(loader.load_layer(1, "decoder.block")) == {"decoder.block.1.layer.0.q.weight"}
        with pytest.raises(errors.InvalidArgument, match=r"several stacks.*decoder\.block.*vision\.blocks"):
            loader.load_layer(1)


def test_holes_and_other_beginnings(make) -> None:
    numbers = [3, 4, 9, 10, 100]
    path = make(tensors_of({f"h.{number}.weight": (4, 4) for number in reversed(numbers)}))[1]
    with loader_of(path) as loader:
        assert loader.stacks == {"h": numbers}
        assert [name for name, _ in loader.iter_layers()] == [f"h.{number}" for number in numbers]
        same(loader.load_layer(100), path, {"h.100.weight"})
        with pytest.raises(errors.NotFound, match=r"h\.5.*3 to 4, 9 to 10, 100"):
            loader.load_layer(5)


def test_no_layers_empty_tensors_and_scalars(make) -> None:
    shapes: dict[str, tuple[int, ...]] = {"weight": (3, 3), "scale": (), "nothing": (0, 4)}
    path = make(tensors_of(shapes))[1]
    with loader_of(path) as loader:
        assert loader.n_layers == 0
        assert loader.stacks == {}
        assert list(loader.iter_layers()) == []
        same(loader.load_non_layer_tensors(), path, set(shapes))
        with pytest.raises(errors.NotFound, match="layer"):
            loader.load_layer(0)
    path = make(tensors_of({f"h.0.{name}": shape for name, shape in shapes.items()}))[1]
    with loader_of(path) as loader:
        assert loader.load_non_layer_tensors() == {}
        (_, tensors), *more = loader.iter_layers()
        assert not more
        same(tensors, path, {f"h.0.{name}" for name in shapes})
        assert tensors["h.0.nothing"].shape == (0, 4)
        assert tensors["h.0.scale"].shape == ()


def test_large_tensors_are_ordinary_ones(make) -> None:
    """Those of 64 KiB and more have memory of another kind."""
    path = make({"h.0.w": ("BF16", (300, 400), bfloat16(weights(1, 300, 400)))})[1]
    with loader_of(path) as loader:
        tensor = loader.load_layer(0)["h.0.w"]
    assert not tensor._is_view()
    assert tensor.is_contiguous()
    expected = bigsmall.load(path)["h.0.w"]
    tensor.add_(1)
    assert torch.equal(tensor, expected + 1)
    gone = weakref.ref(tensor.untyped_storage())
    part = tensor[3]
    del tensor
    assert torch.equal(part, expected[3] + 1)
    del part
    gc.collect()
    assert gone() is None


def test_every_dtype(mixed: tuple[Path, Path]) -> None:
    expected = {}
    with loader_of(mixed[1]) as loader:
        for name in loader.non_layer_names:
            if "F6_" in name:
                with pytest.raises(errors.Unsupported, match="F6_"):
                    loader.load_tensor(name)
            else:
                expected[name] = loader.load_tensor(name)
    with bigsmall.safe_open(mixed[1], "pt") as file:
        for name, tensor in expected.items():
            other = file.get_tensor(name)
            assert tensor.dtype == other.dtype
            assert tensor.shape == other.shape
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))


def test_shards(tmp_path: Path, make) -> None:
    source = tmp_path / "model"
    source.mkdir()
    tensors = tensors_of(LLM)
    names = list(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(source / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    import json

    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    target = tmp_path / "model-bs"
    bigsmall.compress(source, target)
    for options in ({}, {"subfolder": "model-bs"}):
        with loader_of(tmp_path if options else target, **options) as loader:
            assert loader.n_layers == 12
            for name, got in loader.iter_layers():
                same(got, target, {f"{name}.mlp.weight", f"{name}.norm.weight"})
    (target / "model-00002-of-00002.bs").unlink()
    with pytest.raises(errors.FileMissing, match="model-00002-of-00002"):
        loader_of(target)


def test_delta(tmp_path: Path) -> None:
    values = weights(1, 300, 256)
    base = write_safetensors(tmp_path / "base.safetensors", {"h.0.w": ("BF16", (300, 256), bfloat16(values))})
    values[7] *= 2
    source = write_safetensors(tmp_path / "tuned.safetensors", {"h.0.w": ("BF16", (300, 256), bfloat16(values))})
    bigsmall.compress_delta(source, base, tmp_path / "tuned.bs")
    with loader_of(tmp_path / "tuned.bs", base=base) as loader:
        assert loader.load_layer(0)["h.0.w"].view(torch.int16).numpy().tobytes() == bfloat16(values)
    with pytest.raises(errors.WrongBase), loader_of(tmp_path / "tuned.bs") as loader:
        loader.load_layer(0)


# ---- the other thread ------------------------------------------------------------------------------------------------


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The layers that are decoded, as decoding begins."""
    calls: list[set[str]] = []
    original = Reader.decode_many

    def recorded(self: Reader, destinations: Any, **options: Any) -> None:
        calls.append({str(layer_of(destination.tensor.name)) for destination in destinations})
        original(self, destinations, **options)

    monkeypatch.setattr(Reader, "decode_many", recorded)
    return calls


def wait_for(condition: Any) -> None:
    """Returns when the condition holds; the test's own limit ends a vain wait."""
    ticks = threading.Event()
    while not condition():
        ticks.wait(0.01)


def test_exactly_the_next_layer_is_prefetched(llm: Path, decodes: list[set[str]]) -> None:
    with loader_of(llm) as loader:
        layers = loader.iter_layers()
        assert decodes == []
        assert threads() == 0
        next(layers)
        wait_for(lambda: len(decodes) == 2)
        # The thread is idle, although nobody has taken that layer.
        threading.Event().wait(0.1)
        assert decodes == [{"model.layers.0"}, {"model.layers.1"}]
        assert [name for name, _ in layers] == [f"model.layers.{layer}" for layer in range(1, 12)]
        assert len(decodes) == 12
        assert threads() == 0


def test_the_thread_ends_with_the_last_layer(llm: Path) -> None:
    with loader_of(llm) as loader:
        layers = loader.iter_layers()
        for _ in range(12):
            next(layers)
        assert threads() == 0


def test_leaving_the_loop(llm: Path) -> None:
    with loader_of(llm) as loader:
        kept = []
        for name, tensors in loader.iter_layers():
            kept += [weakref.ref(tensor) for tensor in tensors.values()]
            if name == "model.layers.3":
                break
        assert threads() == 0
        del tensors
        assert not any(reference() is not None for reference in kept)
        abandoned = loader.iter_layers()
        next(abandoned)
        assert threads() == 1
        del abandoned
        assert threads() == 0


def test_the_loader_keeps_no_layer(llm: Path) -> None:
    with loader_of(llm) as loader:
        for _, tensors in loader.iter_layers():
            references = [weakref.ref(tensor) for tensor in tensors.values()]
            del tensors
            assert not any(reference() is not None for reference in references)


def test_two_iterations_at_once(llm: Path) -> None:
    with loader_of(llm) as loader:
        pairs = list(zip(loader.iter_layers(), loader.iter_layers()))
        assert len(pairs) == 12
        for (name, tensors), (other, others) in pairs:
            assert name == other
            same(tensors, llm, set(others))
            assert all(tensors[name].data_ptr() != others[name].data_ptr() for name in tensors)
        assert threads() == 0


def test_many_threads(llm: Path) -> None:
    expected = bigsmall.load(llm)
    failures: list[BaseException] = []
    with loader_of(llm) as loader:

        def work(number: int) -> None:
            try:
                for layer in range(12):
                    got = loader.load_layer((layer + number) % 12)
                    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
                for _, got in loader.iter_layers():
                    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert failures == []
        assert threads() == 0


def test_an_error_comes_up_at_its_layer(llm: Path) -> None:
    name = "model.layers.2.mlp.weight"
    with Reader(llm) as reader:
        span = reader.locate(reader.find(name))
    data = bytearray(llm.read_bytes())
    data[span.offset + span.n_bytes // 2] ^= 0xFF
    llm.write_bytes(data)
    with loader_of(llm) as loader:
        seen = []
        with pytest.raises(errors.Corrupt, match=name) as caught:
            for layer, _ in loader.iter_layers():
                seen.append(layer)
        assert seen == ["model.layers.0", "model.layers.1"]
        assert threads() == 0
        del caught
        with pytest.raises(errors.Corrupt, match=name):
            loader.load_layer(2)
        assert loader.load_layer(3).keys() == set(loader.tensor_names(3))


def test_closing_in_the_middle(llm: Path) -> None:
    loader = loader_of(llm)
    layers = loader.iter_layers()
    _, tensors = next(layers)
    loader.close()
    loader.close()
    assert threads() == 0
    with pytest.raises(errors.InvalidArgument, match="closed"):
        next(layers)
    assert tensors["model.layers.0.mlp.weight"].shape == (32, 16)
    for use in (
        loader.load_non_layer_tensors,
        lambda: loader.load_layer(0),
        lambda: loader.load_tensor("lm_head.weight"),
        loader.iter_layers,
    ):
        with pytest.raises(errors.InvalidArgument, match="closed"):
            use()
    assert "closed" in repr(loader)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Decoding of layer 1 begins (first event) and goes on only after the second event."""
    begun, go_on = threading.Event(), threading.Event()
    original = Reader.decode_many

    def waiting(self: Reader, destinations: Any, **options: Any) -> None:
        if any(".layers.1." in destination.tensor.name for destination in destinations):
            begun.set()
            go_on.wait()
        original(self, destinations, **options)

    monkeypatch.setattr(Reader, "decode_many", waiting)
    return begun, go_on


def test_closing_while_another_thread_waits(llm: Path, held: tuple[threading.Event, threading.Event]) -> None:
    begun, go_on = held
    loader = loader_of(llm)
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.extend(name for name, _ in loader.iter_layers())
        except errors.InvalidArgument as error:
            outcome.append(str(error))

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait()
    closer = threading.Thread(target=loader.close)
    closer.start()
    wait_for(lambda: loader._reader is None)
    go_on.set()
    closer.join()
    worker.join()
    assert outcome[0] == "model.layers.0"
    assert "closed" in outcome[-1]
    assert threads() == 0


def test_ctrl_c(llm: Path, held: tuple[threading.Event, threading.Event]) -> None:
    begun, go_on = held

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)
        go_on.set()

    seen = []
    with loader_of(llm) as loader:
        helper = threading.Thread(target=interrupt)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            for name, _ in loader.iter_layers():
                seen.append(name)
        helper.join()
        assert seen in ([], ["model.layers.0"])
        assert threads() == 0
        assert len(list(loader.iter_layers())) == 12


def test_python_ends_in_the_middle(llm: Path) -> None:
    code = """
import sys
from bigsmall.layers import StreamingLoader
loader = StreamingLoader(sys.argv[1], "cpu")
layers = loader.iter_layers()
print(next(layers)[0])
"""
    assert run_script(code, llm) == "model.layers.0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork(llm: Path) -> None:
    code = """
import os, sys
from bigsmall.layers import StreamingLoader
loader = StreamingLoader(sys.argv[1], "cpu")
layers = loader.iter_layers()
expected = [f"model.layers.{layer}" for layer in range(12)]
assert next(layers)[0] == expected[0]
child = os.fork()
if child == 0:
    code = 1
    try:
        assert [name for name, _ in loader.iter_layers()] == expected
        assert [name for name, _ in layers] == expected[1:]
        assert len(loader.load_layer(3)) == 2
        another = loader.iter_layers()
        next(another)
        loader.close()
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert [name for name, _ in layers] == expected[1:]
child = os.fork()
if child == 0:
    del layers
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    run_script("import warnings; warnings.simplefilter('ignore')\n" + code, llm)


# ---- from the Hub ----------------------------------------------------------------------------------------------------

FROM_HUB = """
import os, sys
import torch
import bigsmall
from bigsmall.layers import StreamingLoader

expected = bigsmall.load(sys.argv[1])
with StreamingLoader("owner/model", "cpu") as loader:
    got = loader.load_non_layer_tensors()
    for _, tensors in loader.iter_layers():
        got.update(tensors)
    next(loader.iter_layers())
    layers = loader.iter_layers()
    next(layers)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert len(list(layers)) == 11
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
assert got.keys() == expected.keys()
assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
for folder, _, files in os.walk(os.environ["HF_HOME"]):
    assert not any(file.endswith(".bs") for file in files)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_from_the_hub(llm: Path, tmp_path: Path) -> None:
    """By ranged reads: no `.bs` file is on disk afterwards."""
    pytest.importorskip("huggingface_hub")
    repo = tmp_path / "repo"
    repo.mkdir()
    shutil.copy(llm, repo / "model.bs")
    with FakeHub(tmp_path) as hub:
        hub.add("owner/model", repo)
        run_script(FROM_HUB, llm, env={**hub.env(tmp_path / "home"), "PYTHONWARNINGS": "ignore"})
        fetched = [ranges for _, path, ranges, _ in hub.log if ".bs" in path]
    assert fetched
    assert all(fetched)


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import re, sys
import torch
from bigsmall.layers import StreamingLoader

def kilobytes(key):
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{key}:\\s+(\\d+) kB", file.read(), re.M)[1]) << 10

path, rounds = sys.argv[1], int(sys.argv[2])
with StreamingLoader(path, "cpu") as loader:  # loads the library, and makes torch start its threads
    loader.load_tensor("model.norm.weight")
    size = {tensor.name: tensor.n_bytes for tensor in loader.tensors}
    fixed_bytes = sum(size[name] for name in loader.non_layer_names)
    layer_bytes = max(sum(size[name] for name in loader.tensor_names(layer)) for layer in loader.layer_names)
before = kilobytes("VmRSS")

with StreamingLoader(path, "cpu") as loader:
    fixed = loader.load_non_layer_tensors()
    total = 0
    for _ in range(rounds):
        for name, tensors in loader.iter_layers():
            for tensor in tensors.values():
                total += tensor.view(-1)[-1].item()
        del tensors, tensor
    after = kilobytes("VmRSS")
peak = kilobytes("VmHWM")
print(fixed_bytes, layer_bytes, len(loader.layer_names), peak - before, after - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize(("hidden", "inner", "layers", "vocabulary"), [(768, 2048, 12, 4000), (2048, 4096, 3, 2000)])
def test_peak_memory(tmp_path: Path, hidden: int, inner: int, layers: int, vocabulary: int) -> None:
    """Non-layer tensors and two layers, and less than 64 MB more, measured as the resident set of a process of its
    own. The shapes are those of an LLM with many small layers and of one with few large ones."""
    noise = np.frombuffer(bfloat16(weights(1, 1 << 22)), "<u2")
    start = 0

    def random(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
        nonlocal start
        start += 12345
        return "BF16", shape, np.resize(np.roll(noise, start), shape).tobytes()

    tensors = {
        "model.embed_tokens.weight": random(vocabulary, hidden),
        "lm_head.weight": random(vocabulary, hidden),
        "model.norm.weight": random(hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors.update(
            {
                prefix + "input_layernorm.weight": random(hidden),
                prefix + "post_attention_layernorm.weight": random(hidden),
                prefix + "self_attn.q_proj.weight": random(hidden, hidden),
                prefix + "self_attn.k_proj.weight": random(hidden // 4, hidden),
                prefix + "self_attn.v_proj.weight": random(hidden // 4, hidden),
                prefix + "self_attn.o_proj.weight": random(hidden, hidden),
                prefix + "mlp.gate_proj.weight": random(inner, hidden),
                prefix + "mlp.up_proj.weight": random(inner, hidden),
                prefix + "mlp.down_proj.weight": random(hidden, inner),
            }
        )
    source = write_safetensors(tmp_path / "model.safetensors", tensors)
    del tensors
    bigsmall.compress(source, tmp_path / "model.bs", "inference")
    source.unlink()
    fixed, layer, count, peak, after = map(int, run_script(MEMORY, tmp_path / "model.bs", 3).split())
    assert count == layers
    # More than a layer is there for sure: else this measures nothing.
    assert fixed + layer < peak < fixed + 2 * layer + (64 << 20)
    assert after < fixed + (64 << 20)
