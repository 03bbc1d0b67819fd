"""The command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

import bigsmall
from bigsmall.cli import main
from helpers import bfloat16, every_dtype, run_script, tree, weights, write_safetensors


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {"w": ("BF16", (300, 300), bfloat16(weights(0, 300, 300))), **every_dtype((4, 8))}
    return write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})


def run(capsys, *args: object) -> tuple[int, str, str]:
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_there_and_back(source, tmp_path, capsys) -> None:
    original = source.read_bytes()
    code, out, err = run(capsys, "compress", "model.safetensors")
    assert (code, err) == (0, "")
    size = (tmp_path / "model.bs").stat().st_size
    lines = out.splitlines()
    assert lines[0] == "compressed model.safetensors -> model.bs"
    assert lines[1] == f"  source:     {len(original):,} bytes"
    assert lines[2] == f"  compressed: {size:,} bytes ({100 * size / len(original):.2f}%)"
    assert lines[3] == f"  saved:      {len(original) - size:,} bytes"
    assert lines[4].startswith("  elapsed:    ")
    assert lines[4].endswith("s")
    source.unlink()
    code, out, err = run(capsys, "decompress", "model.bs")
    assert (code, err) == (0, "")
    assert out.startswith("decompressed model.bs -> model.safetensors  (")
    assert source.read_bytes() == original


@pytest.mark.parametrize("mode", ["storage", "balanced", "inference"])
def test_modes(source, capsys, mode: str) -> None:
    code, out, _ = run(capsys, "compress", "model.safetensors", f"--{mode}", "--sha256", "--json", "--threads", "2")
    assert code == 0
    result = json.loads(out)
    assert result["mode"] == mode
    assert result["output"] == "model.bs"
    info = bigsmall.info("model.bs")
    assert info["mode"] == mode
    assert len(info["sha256"]) == 64
    assert result["source_bytes"] == source.stat().st_size


def test_default_output_never_replaces(source, tmp_path, capsys) -> None:
    (tmp_path / "model.bs").write_bytes(b"precious")
    code, out, err = run(capsys, "compress", "model.safetensors")
    assert (code, out) == (1, "")
    assert err == "bigsmall: model.bs exists; pass -o to replace it\n"
    assert (tmp_path / "model.bs").read_bytes() == b"precious"
    assert run(capsys, "compress", "model.safetensors", "-o", "model.bs")[0] == 0
    code, _, err = run(capsys, "decompress", "model.bs")
    assert code == 1
    assert err == "bigsmall: model.safetensors exists; pass -o to replace it\n"
    assert run(capsys, "decompress", "model.bs", "-o", "model.safetensors")[0] == 0


def test_directory(source, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    source.rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    before = tree(folder)
    code, out, _ = run(capsys, "compress", "model/")
    assert code == 0
    assert out.startswith("compressed model/ -> model-bs\n")
    assert run(capsys, "compress", "model")[0] == 1  # there is one already
    assert run(capsys, "compress", "model", "--force")[0] == 0
    code, _, err = run(capsys, "decompress", "model-bs")
    assert code == 1  # model is still there
    assert err.startswith("bigsmall: ")
    folder.rename(tmp_path / "moved")
    assert run(capsys, "decompress", "model-bs")[0] == 0
    assert tree(folder) == before
    (tmp_path / "model-bs").rename(tmp_path / "other")
    assert run(capsys, "decompress", "other")[0] == 0
    assert tree(tmp_path / "other-safetensors") == before


def test_delta(source, tmp_path, capsys) -> None:
    tensors = {"w": ("BF16", (300, 300), bfloat16(weights(0, 300, 300) * 1.001)), **every_dtype((4, 8), 1)}
    write_safetensors(tmp_path / "fine.safetensors", tensors)
    assert run(capsys, "compress", "fine.safetensors", "--base", "model.safetensors")[0] == 0
    assert run(capsys, "decompress", "fine.bs", "-o", "x.safetensors")[0] == 1
    assert run(capsys, "decompress", "fine.bs", "-o", "x.safetensors", "--base", "model.safetensors")[0] == 0
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "fine.safetensors").read_bytes()
    args = ["verify", "fine.bs", "--base", "model.safetensors", "--source", "fine.safetensors"]
    assert run(capsys, *args)[:2] == (0, "OK\n")


def test_info(source, capsys) -> None:
    run(capsys, "compress", "model.safetensors")
    code, out, _ = run(capsys, "info", "model.bs")
    assert code == 0
    expected = bigsmall.info("model.bs")
    tensors = expected.pop("tensors")
    assert out.splitlines() == [f"  {key:<24} {value}" for key, value in expected.items()]
    code, out, _ = run(capsys, "info", "--json", "model.bs")
    assert json.loads(out) == {**expected, "tensors": tensors}
    code, out, _ = run(capsys, "info", "--tensors", "model.bs")
    assert len(out.splitlines()) == len(expected) + len(tensors)
    assert "  w  bfloat16 300x300  180,000 -> " in out


def test_verify(source, tmp_path, capsys) -> None:
    run(capsys, "compress", "model.safetensors")
    assert run(capsys, "verify", "model.bs") == (0, "OK\n", "")
    assert run(capsys, "verify", "model.bs", "--source", "model.safetensors") == (0, "OK\n", "")
    tensors = {"w": ("BF16", (300, 300), bfloat16(weights(1, 300, 300))), **every_dtype((4, 8))}
    write_safetensors(tmp_path / "other.safetensors", tensors)
    code, out, err = run(capsys, "verify", "model.bs", "--source", "other.safetensors")
    assert (code, err) == (1, "")
    assert out.splitlines()[-1] == "FAIL"
    assert ": w: " in out.splitlines()[0]
    code, out, _ = run(capsys, "verify", "model.bs", "--source", "other.safetensors", "--json")
    assert code == 1
    result = json.loads(out)
    assert (result["ok"], result["n_bad"], result["bad"][0]["tensor"]) == (False, 1, "w")


def test_quiet(source, capsys) -> None:
    assert run(capsys, "--quiet", "compress", "model.safetensors") == (0, "", "")
    assert run(capsys, "verify", "model.bs", "--quiet") == (0, "", "")


def test_benchmark_leaves_nothing(source, tmp_path, capsys, monkeypatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = sorted(os.listdir(tmp_path))
    code, out, _ = run(capsys, "benchmark", "model.safetensors", "--inference")
    assert code == 0
    assert [line.split(":")[0].strip() for line in out.splitlines()[1:]] == [
        "source",
        "compressed",
        "compress",
        "decompress",
        "memcpy",
    ]
    code, out, _ = run(capsys, "benchmark", "model.safetensors", "--json")
    result = json.loads(out)
    assert min(result[f"{key}_gb_s"] for key in ("compress", "decompress", "memcpy")) > 0
    assert run(capsys, "benchmark", "none.safetensors")[0] == 1
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(scratch) == []


def test_errors_are_one_line(source, tmp_path, capsys) -> None:
    (tmp_path / "text.bs").write_text("hello\nworld\n" * 20)
    for args in (
        ["info", "none.bs"],
        ["info", "text.bs"],
        ["verify", "text.bs"],
        ["decompress", "none.bs"],
        ["compress", "text.bs"],
    ):
        code, out, err = run(capsys, *args)
        assert (code, out) == (1, "")
        assert err.startswith("bigsmall: ")
        assert err.count("\n") == 1
        assert args[1] in err
    assert not (tmp_path / "text.bs.bs").exists()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["explode"],
        ["compress"],
        ["compress", "a", "b"],
        ["compress", "a", "--storage", "--inference"],
        ["info", "a", "--threads", "0"],
        ["info", "a", "--threads", "x"],
        ["verify", "a", "--what"],
    ],
)
def test_usage(capsys, args: list[str]) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert "usage:" in err


@pytest.mark.parametrize("args", [["--version"], ["info", "--version"]])
def test_version(capsys, args: list[str]) -> None:
    code, out, _ = run(capsys, *args)
    assert (code or 0, out) == (0, f"bigsmall {bigsmall.__version__}\n")


def test_interrupted(source, capsys, monkeypatch) -> None:
    from bigsmall import api

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "_compress", interrupt)
    code, out, err = run(capsys, "compress", "model.safetensors")
    assert (code, out, err) == (130, "", "bigsmall: interrupted\n")


def test_as_a_module_and_closed_pipe(source, tmp_path) -> None:
    bigsmall.compress(source, tmp_path / "model.bs")
    done = subprocess.run([sys.executable, "-m", "bigsmall", "verify", "model.bs"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"OK\n".replace(b"\n", os.linesep.encode()), b"")
    done = subprocess.run([sys.executable, "-m", "bigsmall", "verify", "none.bs"], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe of POSIX")
def test_closed_pipe(source, tmp_path) -> None:
    bigsmall.compress(source, tmp_path / "model.bs")
    code = """
import os, subprocess, sys
read, write = os.pipe()
os.close(read)
done = subprocess.run([sys.executable, "-m", "bigsmall", "info", "model.bs"], stdout=write, stderr=subprocess.PIPE)
assert done.returncode == 1 and not done.stderr, (done.returncode, done.stderr)
"""
    run_script(code)
