"""all-MiniLM-L6-v2, a real model with everything that belongs to it, through the libraries that people use it with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import bigsmall
from helpers import REPOSITORY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SOURCE = REPOSITORY / "build" / "weights" / "minilm-l6-v2"
SENTENCES = ["BigSmall gives back every bit.", "", "Ein Satz auf Deutsch, mit Umlauten: äöü.", "x " * 300]

pytestmark = pytest.mark.skipif(
    not (SOURCE / "config.json").exists(), reason="needs the model: make build/weights/minilm-l6-v2.done"
)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("minilm") / "bs"
    bigsmall.compress(SOURCE, target)
    assert not list(target.rglob("*.safetensors"))
    return target


@pytest.fixture(autouse=True)
def _hook() -> Iterator[None]:
    bigsmall.install_hook()
    yield
    bigsmall.uninstall_hook()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_transformers(compressed: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(compressed)
    tokens = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    outputs = []
    for directory in (SOURCE, compressed):
        model, info = transformers.AutoModel.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            outputs.append(model(**tokens).last_hidden_state)
    assert outputs[0].abs().sum() > 0
    assert torch.equal(*map(bits, outputs))


def test_sentence_transformers(compressed: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    plain, ours = (
        library.SentenceTransformer(str(directory), device="cpu").encode(SENTENCES, convert_to_tensor=True)
        for directory in (SOURCE, compressed)
    )
    assert plain.shape == (len(SENTENCES), 384)
    assert torch.equal(bits(plain), bits(ours))


def test_modules_beside_the_transformer(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(1)
    model = library.SentenceTransformer(str(SOURCE), device="cpu")
    model.append(library.models.Dense(384, 16))
    model.save(str(tmp_path / "source"))
    bigsmall.compress(tmp_path / "source", tmp_path / "bs")
    assert len(list((tmp_path / "bs").rglob("*.bs"))) == 2
    again = library.SentenceTransformer(str(tmp_path / "bs"), device="cpu")
    want, got = (m.encode(SENTENCES, convert_to_tensor=True) for m in (model, again))
    assert want.shape == (len(SENTENCES), 16)
    assert torch.equal(bits(want), bits(got))
    next((tmp_path / "bs").glob("*_Dense/*.bs")).write_bytes(b"BGSM")
    with pytest.raises(bigsmall.errors.Truncated, match="Dense"):
        library.SentenceTransformer(str(tmp_path / "bs"), device="cpu")
