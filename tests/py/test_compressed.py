"""Modules and models with compressed weights, as far as no GPU is needed: a weight in the CPU's memory stands in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import bigsmall
from bigsmall import errors
from bigsmall.reader import Reader, TensorInfo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bigsmall import compressed, cuda  # noqa: E402
from bigsmall.compressed import CompressedEmbedding, CompressedLinear, Scratch  # noqa: E402
from bigsmall.integrations import huggingface  # noqa: E402


class OnCPU(compressed.CompressedWeight):
    """Decodes as the device does, blocks only, from a decoded copy."""

    def __init__(self, reader: Reader, tensor: str | TensorInfo, device: torch.device) -> None:
        tensor = reader.find(tensor) if isinstance(tensor, str) else tensor
        self.dtype = getattr(torch, tensor.dtype.name)
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32) or len(tensor.shape) != 2:
            raise errors.Unsupported(tensor.name)
        self.rows, self.columns = tensor.shape
        self.device = torch.device("cpu")
        self.all = bigsmall.load(reader.path, "cpu")[tensor.name]
        self.buffer = torch.empty(self.n_bytes * 2 // 3, dtype=torch.uint8)
        self.decodes: list[tuple[int, int]] = []

    def decode(self, out: torch.Tensor, first_row: int = 0) -> None:
        assert out.is_contiguous()
        assert out.shape[1] == self.columns
        first, count = first_row * self.columns, out.numel()
        assert first % 65536 == 0
        assert count % 65536 == 0 or first + count == self.rows * self.columns
        out.copy_(self.all[first_row : first_row + out.shape[0]])
        self.decodes.append((first_row, out.shape[0]))

    def gather(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        assert ids.dtype == torch.int64
        assert ids.is_contiguous()
        assert out.is_contiguous()
        out.copy_(self.all[ids])


class BatchOnCPU(compressed._Batch):
    def __init__(self, weights: Sequence[Any], memory: torch.Tensor) -> None:
        self.views = {}
        at = 0
        for weight in weights:
            self.views[weight] = compressed._matrix(memory[at:], weight.rows, weight)
            at += compressed._aligned(weight.n_bytes)
        assert at <= memory.numel()
        self.decodes = 0

    def decode(self) -> None:
        self.decodes += 1
        for weight, view in self.views.items():
            view.copy_(weight.all)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "CompressedWeight", OnCPU)
    monkeypatch.setattr(compressed, "_Batch", BatchOnCPU)
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "device_memory", lambda n, device: torch.full((n,), 0x55, dtype=torch.uint8))


def llama(folder: Path, **changed: Any) -> Path:
    torch.manual_seed(1)
    options = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 3000,
        **changed,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).bfloat16()
    model.save_pretrained(folder / "source")
    bigsmall.compress(folder / "source", folder / "bs")
    return folder / "bs"


def resident(path: Path, **options: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(path)
    return compressed.resident_model(path, config, str(path), torch.device("cpu"), **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_scratch_bytes", [1 << 30, 200_000])
def test_a_model(tmp_path: Path, tied: bool, max_scratch_bytes: int) -> None:
    path = llama(tmp_path, tie_word_embeddings=tied, attention_bias=True)
    plain = huggingface.from_pretrained(path, transformers.LlamaForCausalLM, dtype="auto").eval()
    model = resident(path, max_scratch_bytes=max_scratch_bytes)
    modules = [m for m in model.modules() if isinstance(m, (CompressedLinear, CompressedEmbedding))]
    assert len(modules) == 2 * 7 + 2
    assert (model.lm_head.compressed is model.model.embed_tokens.compressed) == tied
    ids = torch.randint(0, 3000, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
        for prompt in (ids, ids.int()):
            assert torch.equal(
                model.generate(prompt, max_new_tokens=5, do_sample=False),
                plain.generate(prompt, max_new_tokens=5, do_sample=False),
            )
    # From the second pass on they are decoded in batches, each once a pass, and in another order still right.
    scratch = model.lm_head.scratch
    batches = list(scratch._batches.values())
    assert sum(len(batch.views) for batch in batches) >= 6
    before = [batch.decodes for batch in batches]
    x = torch.randn(2, 5, 64).bfloat16()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert [batch.decodes for batch in batches] == [n + 1 for n in before]
        for layer in (1, 0, 0, 1):
            assert torch.equal(model.model.layers[layer].mlp(x), plain.model.layers[layer].mlp(x))
        assert torch.equal(model(ids).logits, plain(ids).logits)
    head = model.lm_head.compressed
    # 1,024 rows of 64 elements are a block; of 384,000 bytes 200,000 are one slice of two.
    assert (head.decodes[0] == (0, 3000)) == (max_scratch_bytes > 200_000)
    if max_scratch_bytes == 200_000:
        assert head.decodes[:3] == [(0, 1024), (1024, 1024), (2048, 952)]
    state, want = model.state_dict(), plain.state_dict()
    assert all(torch.equal(state[name], want[name]) for name in want if "lm_head" not in name or not tied)
    with pytest.raises(errors.InvalidArgument, match="stays there"):
        model.half()


def test_dtype_must_be_the_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="keeps its dtype"):
        resident(llama(tmp_path), dtype=torch.float32)


def test_what_is_no_matrix_stays_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(OnCPU):
        def __init__(self, reader: Reader, tensor: str | TensorInfo, device: torch.device) -> None:
            raise errors.Unsupported("none")

    monkeypatch.setattr(compressed, "CompressedWeight", Never)
    path = llama(tmp_path)
    plain = huggingface.from_pretrained(path, transformers.LlamaForCausalLM, dtype="auto").eval()
    ids = torch.randint(0, 3000, (1, 7))
    with torch.inference_mode():
        assert torch.equal(resident(path)(ids).logits, plain(ids).logits)


def test_slices_are_whole_blocks() -> None:
    class Shape:
        dtype = torch.bfloat16

        def __init__(self, rows: int, columns: int) -> None:
            self.rows, self.columns = rows, columns
            self.n_bytes = 2 * rows * columns

    for rows, columns, most in ((128256, 4096, 288 << 20), (151936, 3584, 256 << 20), (1000, 517, 1 << 18), (5, 3, 1)):
        scratch = Scratch(torch.device("cpu"), max_bytes=most)
        n = scratch.rows_at_a_time(Shape(rows, columns))  # type: ignore[arg-type]
        assert n == rows or n * columns % 65536 == 0
        assert n == rows or n * columns * 2 <= most
    assert Scratch(torch.device("cpu")).rows_at_a_time(Shape(128256, 4096)) == 128256  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"resident": "decoded"}, {"stream": True}, {"variant": "fp16"}, {"device": "cpu"}, {"device_map": "auto"}],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        huggingface.from_pretrained(tmp_path, transformers.LlamaForCausalLM, **{"resident": "compressed", **options})


def test_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda device: "there is none")
    path = llama(tmp_path)
    with pytest.raises(errors.NoDevice, match="there is none"):
        huggingface.from_pretrained(path, transformers.LlamaForCausalLM, resident="compressed")
