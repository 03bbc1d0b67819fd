"""Where the bytes of a file go, and what each mode would make of it."""

from __future__ import annotations

import builtins
import json
import struct
from pathlib import Path

import numpy as np
import pytest

import bigsmall
from bigsmall import report
from bigsmall.cli import main
from helpers import REPOSITORY, bfloat16, every_dtype, weights, write_safetensors


@pytest.fixture
def mixed(make) -> tuple[Path, Path]:
    random = np.random.default_rng(1)
    scale = np.exp(random.standard_normal((400, 1)) + random.standard_normal(300))
    tensors = {
        "bf16": ("BF16", (400, 600), bfloat16(weights(1, 400, 600))),
        "scaled": ("F32", (400, 300), (random.standard_normal((400, 300)) * scale).astype("<f4").tobytes()),
        "few": ("F32", (5000,), random.choice(np.array([0, 1, 2], "<f4"), 5000).tobytes()),
        "counting": ("I64", (5000,), np.arange(5000, dtype="<i8").tobytes()),
        "noise": ("U8", (9000,), random.bytes(9000)),
        "tied": ("BF16", (400, 600), bfloat16(weights(1, 400, 600))),
        "nothing": ("F32", (0, 3), b""),
        **every_dtype((9, 40)),
    }
    return make(tensors, mode="storage", parity=3)


def test_parts(mixed) -> None:
    _, target = mixed
    found = bigsmall.breakdown(target)
    assert found["path"] == str(target)
    assert found["file_size"] == target.stat().st_size
    assert found["modes"] == {}
    assert abs(sum(found["parts"].values()) - target.stat().st_size) <= len(found["parts"])
    parts = found["parts"]
    assert set(parts) == set(report.PARTS)
    assert parts["parity"] == bigsmall.info(target)["parity_bytes"] > 0
    assert parts["stored"] > 9000
    assert min(parts["values"], parts["tables"], parts["overhead"], parts["header"]) > 0
    assert parts["original"] == 0
    of = found["dtypes"]["bfloat16"]
    per_number = {part: 8 * of[part] / (of["n_bytes"] / 2) for part in ("sign", "exponent", "mantissa")}
    assert per_number["sign"] == pytest.approx(1, abs=0.02)  # noise
    assert per_number["mantissa"] == pytest.approx(7, abs=0.1)
    assert 2 < per_number["exponent"] < 3.2


@pytest.mark.parametrize("mode", ["inference", "balanced", "storage"])
def test_modes(mixed, tmp_path, mode: str) -> None:
    """The estimates come near what each mode makes."""
    source, target = mixed
    found = bigsmall.breakdown(target, modes=True, workers=2)
    assert list(found["modes"]) == ["balanced", "inference", "storage"]
    bigsmall.compress(source, tmp_path / "other.bs", mode, parity=3)
    assert found["modes"][mode] == pytest.approx((tmp_path / "other.bs").stat().st_size, rel=0.02)


def test_directories_deltas_and_the_original(tmp_path) -> None:
    one = write_safetensors(tmp_path / "one.safetensors", {"w": ("BF16", (200, 300), bfloat16(weights(1, 200, 300)))})
    changed = weights(1, 200, 300)
    changed[::7] *= np.float32(1.01)
    two = write_safetensors(tmp_path / "two.safetensors", {"w": ("BF16", (200, 300), bfloat16(changed))})
    bigsmall.compress_delta(two, one, tmp_path / "delta.bs")
    found = bigsmall.breakdown(tmp_path / "delta.bs")
    assert found["parts"]["values"] > 1000
    with pytest.raises(bigsmall.errors.WrongBase):
        bigsmall.breakdown(tmp_path / "delta.bs", modes=True)
    assert bigsmall.breakdown(tmp_path / "delta.bs", base=one, modes=True)["modes"]["balanced"] > found["file_size"]

    (tmp_path / "model").mkdir()
    names = ["model-00001-of-00002", "model-00002-of-00002"]
    for number, name in enumerate(names):
        data = bfloat16(weights(number, 200, 300))
        write_safetensors(tmp_path / "model" / f"{name}.safetensors", {f"w.{number}": ("BF16", (200, 300), data)})
    index = {"metadata": {}, "weight_map": {f"w.{number}": f"{name}.safetensors" for number, name in enumerate(names)}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    bigsmall.compress(tmp_path / "model", tmp_path / "packed")
    found = bigsmall.breakdown(tmp_path / "packed")
    size = sum((tmp_path / "packed" / f"{name}.bs").stat().st_size for name in names)
    assert sum(found["parts"].values()) == pytest.approx(size, abs=9)

    golden = sorted((REPOSITORY / "tests" / "go" / "testdata" / "reference").rglob("*bf16*.bs"))[0]
    found = bigsmall.breakdown(golden)
    assert found["parts"]["original"] > 0
    assert sum(found["parts"].values()) == golden.stat().st_size


def test_damage_is_an_error(mixed) -> None:
    _, target = mixed
    data = bytearray(target.read_bytes())
    start = 10 + struct.unpack("<I", data[6:10])[0]
    data[start + 60_000] ^= 1
    target.write_bytes(bytes(data))
    with pytest.raises(bigsmall.errors.ChecksumMismatch, match="checksum of block"):
        bigsmall.breakdown(target)


def test_command(mixed, tmp_path, capsys) -> None:
    _, target = mixed
    assert main(["info", str(target), "--report"]) == 0
    out = capsys.readouterr().out
    for wanted in (
        "where the bytes go",
        "exponents",
        "bits a number",
        "bfloat16",
        "what each mode would make",
        "storage",
    ):
        assert wanted in out
    assert main(["info", str(target), "--report", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["report"]) == {"parts", "dtypes", "modes"}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(mixed, tmp_path, capsys, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    _, target = mixed
    picture = tmp_path / f"report.{suffix}"
    assert main(["info", str(target), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert f"written to {picture}" in capsys.readouterr().out
    report.picture(bigsmall.breakdown(target), picture)


def test_picture_without_matplotlib(mixed, tmp_path, monkeypatch, capsys) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["info", str(mixed[1]), "--picture", str(tmp_path / "p.png")]) != 0
    assert "pip install bigsmall[report]" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()
