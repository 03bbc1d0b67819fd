"""Every example of README's section on other libraries runs as it stands there, each in a process of its own, in a
directory that has the models which it names."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigsmall
from fakehub import FakeHub
from helpers import REPOSITORY, run_script

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from tiny import tiny_pipeline  # noqa: E402

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("### With other libraries") : README.index("### Modes")]
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", SECTION, flags=re.DOTALL | re.MULTILINE)

# By a line that only that example has: what it makes itself, and what must be true at its end.
CHECKS = {
    "install_hook()\nmodel = AutoModel": (
        "my-model-bs",
        "assert model.dtype == __import__('torch').bfloat16 and model.config.vocab_size == 256",
    ),
    "huggingface.from_pretrained": (
        "",  # transformers 4 loads to float32 where no dtype is given
        "import torch, transformers\n"
        "assert model.dtype == (torch.float32 if transformers.__version__.startswith('4.') else torch.bfloat16)",
    ),
    "SentenceTransformer": ("", "assert vectors.shape == (2, 16) and abs(vectors).sum() > 0"),
    "upload_to_hub": ("", "assert len(weights) == 21 and made.left_out == ['pytorch_model.bin']"),
    "StreamingModel": (
        "",
        "assert len(fixed) == 3 and logits.shape == (1, 3, 256) and tokens.shape == (1, 8)",
    ),
    "load_pipeline": (
        "my-pipeline-bs",
        "assert pipeline.unet.dtype == torch.float32 and type(pipeline).__name__ == 'StableDiffusionPipeline'",
    ),
    "vllm": ("", "assert llm.loader.__name__ == 'BigSmallModelLoader'"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The directory, and the environment with a Hub."""
    root = tmp_path_factory.mktemp("readme") / "models"
    root.mkdir()
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root / "my-model", max_shard_size="100KB")
    torch.save({}, root / "my-model" / "pytorch_model.bin")
    bigsmall.compress(root / "my-model", root / "my-model-bs")
    _embedder(root / "my-embedder")
    bigsmall.compress(root / "my-embedder", root / "my-embedder-bs")
    tiny_pipeline(root).save_pretrained(root / "my-pipeline")
    bigsmall.compress(root / "my-pipeline", root / "my-pipeline-bs")
    shutil.copy(root / "my-pipeline-bs" / "unet" / "diffusion_pytorch_model.bs", root / "my-unet.bs")
    with FakeHub(root.with_name("hub")) as hub:
        yield root, hub.env(root.with_name("home"))


def _embedder(target: Path) -> None:
    """A model of sentence-transformers, small."""
    library = pytest.importorskip("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.models")
    target.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "sentences", "of", "text"]
    (target / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(target / "bert")
    transformers.BertTokenizerFast(str(target / "vocab.txt")).save_pretrained(target / "bert")
    transformer = modules.Transformer(str(target / "bert"))
    pooling = modules.Pooling(16)
    made = library.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    shutil.rmtree(target)
    made.save(str(target))


def test_every_integration_has_an_example() -> None:
    assert len(EXAMPLES) == len(CHECKS)
    for name in ("transformers", "The Hub", "diffusers", "vLLM", "SGLang", "ComfyUI", "Models larger than memory"):
        assert f"**{name}" in SECTION


@pytest.mark.parametrize("key", CHECKS)
def test_example(place: tuple[Path, dict[str, str]], tmp_path: Path, key: str) -> None:
    (example,) = (example for example in EXAMPLES if key in example)
    makes, check = CHECKS[key]
    models, env = place
    here = tmp_path / "here"
    shutil.copytree(models, here, ignore=lambda folder, names: [makes] if folder == str(models) else [])
    if key == "vllm":  # a stand-in, which knows formats by their entry points as vLLM does
        env = {**env, "PYTHONPATH": str(Path(__file__).parent / "stubs")}
    run_script(f"import os\nos.chdir({str(here)!r})\n{example}\n{check}\n", env=env)
