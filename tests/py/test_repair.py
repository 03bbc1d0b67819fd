"""Parity and repair, and what verify says of damage, from Python and the command line. Tests in Go try the code."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from bigsmall.cli import main
from helpers import bfloat16, weights, write_safetensors

BLOCK = 65_536


@pytest.fixture
def source(tmp_path):
    tensors = {
        "large": ("BF16", (7 * BLOCK + 100,), bfloat16(weights(1, 7 * BLOCK + 100))),
        "tied": ("BF16", (7 * BLOCK + 100,), bfloat16(weights(1, 7 * BLOCK + 100))),
        "small": ("F32", (30,), weights(2, 30).astype(np.float32).tobytes()),
    }
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors)
    return path


def damage(path, at: int, n: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for i in range(at, at + n):
        data[i] ^= 0x55
    path.write_bytes(data)


def payload(path, name: str) -> tuple[int, int]:
    """Where a tensor's payload is, and its length."""
    with bigsmall.reader.Reader(path) as reader:
        span = reader.locate(reader.find(name))
        return span.offset, span.n_bytes


def test_damage_is_repaired(source, tmp_path) -> None:
    path, plain = tmp_path / "model.bs", tmp_path / "plain.bs"
    bigsmall.compress(source, path, parity=5)
    bigsmall.compress(source, plain)
    whole = path.read_bytes()
    said = bigsmall.info(path)
    assert said["parity_bytes"] == len(whole) - plain.stat().st_size
    assert 0.05 < said["parity_bytes"] / plain.stat().st_size < 0.062
    assert bigsmall.info(plain)["parity_bytes"] == 0
    random_of = random.Random(1)
    for n in (1, 4000, len(whole) // 30):
        damage(path, random_of.randrange(len(whole) - n), n)
        assert not bigsmall.verify(path)
        result = bigsmall.repair(path)
        assert (result.n_files, result.n_repaired) == (1, 1)
        assert result.n_pieces >= n // 4096
        assert path.read_bytes() == whole
        assert bigsmall.verify(path, source)
    assert bigsmall.repair(path) == bigsmall.api.RepairResult(1, 0, 0)


def test_of_a_delta_and_of_a_writer(source, tmp_path) -> None:
    tune = tmp_path / "tune.safetensors"
    tune.write_bytes(source.read_bytes()[:-300] + bytes(300))
    delta, saved = tmp_path / "delta.bs", tmp_path / "saved.bs"
    bigsmall.compress_delta(tune, source, delta, parity=10)
    bigsmall.save_file({"w": weights(3, 400, 500).astype(np.float32)}, saved, parity=10)
    for path in (delta, saved):
        whole = path.read_bytes()
        damage(path, 4200, 100)
        bigsmall.repair(path)  # without the base
        assert path.read_bytes() == whole


def test_verify_names_the_blocks(source, tmp_path, capsys) -> None:
    path = tmp_path / "model.bs"
    bigsmall.compress(source, path)
    offset, n_bytes = payload(path, "large")
    block = n_bytes // 7
    for number in (1, 4, 5):  # within them, wherever exactly a block begins
        damage(path, offset + number * block + block // 2)
    report = bigsmall.verify(path)
    assert not report
    assert [(bad.tensor, bad.blocks) for bad in report.bad] == [("large", (1, 4, 5))]
    assert report.n_bad == 1
    assert report.bad[0].problem == "checksums of blocks 1, 4-5 differ, of 8 in all"
    assert main(["verify", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["bad"][0]["blocks"] == [1, 4, 5]


def test_parity_that_is_damaged_itself(source, tmp_path) -> None:
    path = tmp_path / "model.bs"
    bigsmall.compress(source, path, parity=5)
    whole = path.read_bytes()
    damage(path, len(whole) - 20_000, 50)
    assert bigsmall.decompress(path).keys() == {"large", "tied", "small"}  # which do not need it
    report = bigsmall.verify(path)
    assert [bad.tensor for bad in report.bad] == [""]
    assert "parity" in report.bad[0].problem
    bigsmall.repair(path)
    assert path.read_bytes() == whole


def test_errors(source, tmp_path) -> None:
    path = tmp_path / "model.bs"
    bigsmall.compress(source, path, parity=1)
    damage(path, 8192, path.stat().st_size // 10)
    before = path.read_bytes()
    with pytest.raises(errors.Corrupt, match="beyond repair"):
        bigsmall.repair(path)
    assert path.read_bytes() == before
    bigsmall.compress(source, path)
    assert bigsmall.repair(path).n_repaired == 0  # whole, if without parity
    damage(path, payload(path, "large")[0] + 20_000)
    with pytest.raises(errors.ChecksumMismatch, match=r"model\.bs.*large.*no parity"):
        bigsmall.repair(path)
    with pytest.raises(errors.FileMissing):
        bigsmall.repair(tmp_path / "none.bs")
    with pytest.raises(errors.Corrupt, match=r"not a \.bs file"):
        bigsmall.repair(source)
    for parity in (-1, 101, 2.5, "2"):
        with pytest.raises(errors.InvalidArgument, match="parity must be"):
            bigsmall.compress(source, path, parity=parity)


def test_command(source, tmp_path, capsys) -> None:
    path, out = tmp_path / "model.bs", tmp_path / "out.bs"
    assert main(["--quiet", "compress", str(source), "-o", str(path), "--parity", "2"]) == 0
    whole = path.read_bytes()
    assert main(["repair", str(path)]) == 0
    assert capsys.readouterr().out == f"{path} is whole\n"
    damage(path, 9000)
    assert main(["repair", str(path), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"repaired {path}: 1 damaged pieces of 4096 bytes, written to {out}\n"
    assert out.read_bytes() == whole != path.read_bytes()
    assert main(["--json", "repair", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(tmp_path), "output": None, "n_files": 2, "n_repaired": 1, "n_pieces": 1
    }  # fmt: skip
    assert path.read_bytes() == whole
    with pytest.raises(SystemExit):
        main(["compress", str(source), "--parity", "200"])
    assert "0 to 100" in capsys.readouterr().err
