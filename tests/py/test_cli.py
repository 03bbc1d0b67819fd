"""The command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
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
    assert err.startswith("bigsmall: model")
    assert " --force" in err
    assert not re.search("(?<!-)force", err)
    folder.rename(tmp_path / "moved")
    assert run(capsys, "decompress", "model-bs")[0] == 0
    assert tree(folder) == before
    (tmp_path / "model-bs").rename(tmp_path / "other")
    assert run(capsys, "decompress", "other")[0] == 0
    assert tree(tmp_path / "other-safetensors") == before


@pytest.mark.parametrize("spelling", [".", "./", ".//", "inner/..", "inner/../", "inner/../."])
def test_directory_without_a_name(source, tmp_path, capsys, monkeypatch, spelling: str) -> None:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    source.rename(folder / "model.safetensors")
    before = tree(folder)
    monkeypatch.chdir(folder)
    assert run(capsys, "compress", spelling)[0] == 0
    folder.rename(tmp_path / "moved")
    (tmp_path / "model-bs" / "inner").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "model-bs")
    assert run(capsys, "decompress", spelling)[0] == 0
    assert tree(folder) == before


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
    write_safetensors(tmp_path / "other.safetensors", tensors, {"format": "pt"})
    code, out, err = run(capsys, "verify", "model.bs", "--source", "other.safetensors")
    assert (code, err) == (1, "")
    assert out.splitlines()[-1] == "FAIL"
    assert ": w: " in out.splitlines()[0]
    code, out, _ = run(capsys, "verify", "model.bs", "--source", "other.safetensors", "--json")
    assert code == 1
    result = json.loads(out)
    assert (result["ok"], result["n_bad"], result["bad"][0]["tensor"]) == (False, 1, "w")
    assert run(capsys, "verify", "model.bs", "--source", "other.safetensors", "--json", "--quiet")[:2] == (1, out)
    code, out, err = run(capsys, "verify", "model.bs", "--source", "other.safetensors", "--quiet")
    assert (code, out) == (1, "")
    assert ": w: " in err.splitlines()[0]
    assert err.splitlines()[-1] == "FAIL"


def test_verify_of_a_damaged_header(source, tmp_path, capsys) -> None:
    run(capsys, "compress", "model.safetensors")
    data = bytearray((tmp_path / "model.bs").read_bytes())
    data[data.index(b'"bfloat16"') + 1] ^= 1
    (tmp_path / "model.bs").write_bytes(data)
    report = bigsmall.verify("model.bs")
    assert not report
    assert [bad.tensor for bad in report.bad] == [""]
    code, out, _ = run(capsys, "verify", "model.bs")
    assert code == 1
    assert ": : " not in out
    assert out.splitlines()[-1] == "FAIL"


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
    assert result["cpu"] == bigsmall.cpu()
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
        code, out, again = run(capsys, *args, "--json")
        assert (code, again) == (1, err)
        error = json.loads(out)["error"]
        assert error["type"] in dir(bigsmall.errors)
        assert err == f"bigsmall: {error['message']}\n"
    assert not (tmp_path / "text.bs.bs").exists()


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "", str(2**31), "99999999999", "9" * 5000])
def test_bad_number_of_threads(capsys, number: str) -> None:
    code, out, err = run(capsys, "info", "a", f"--threads={number}")
    assert (code, out) == (2, "")
    assert err.endswith("argument --threads: must be a whole number from 1 to 2147483647\n")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["explode"],
        ["compress"],
        ["compress", "a", "b"],
        ["compress", "a", "--storage", "--inference"],
        ["info", "a", "--threads", "0"],
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


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_handlers_of_others_stay(source, capsys) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN, print):
            for number in numbers:
                signal.signal(number, handler)
            run(capsys, "info", "none.bs")
            assert [signal.getsignal(number) for number in numbers] == [handler, handler]
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("compress", name) for name in ("SIGINT", "SIGTERM", "SIGHUP")),
        *(("benchmark", name) for name in ("SIGTERM", "SIGHUP")),
        ("decompress", "SIGTERM"),
    ],
)
def test_signals_leave_nothing(tmp_path, large, command: str, name: str) -> None:
    number = getattr(signal, name)
    source = large[1] if command == "decompress" else large[0]
    args = [command, str(source), "--threads", "1"]
    name_of_target = "model.bs"
    if command != "benchmark":
        name_of_target = "out"
        args += ["-o", str(tmp_path / name_of_target)]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    # The handlers are Python's own in the child, whatever this process was started with.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "from bigsmall.cli import main; sys.exit(main())"
    )
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code, *args], env=env, stderr=subprocess.PIPE, text=True)
        try:
            end = time.monotonic() + 60
            while process.poll() is None and not any(name_of_target in str(files) for *_, files in os.walk(tmp_path)):
                assert time.monotonic() < end
                time.sleep(0.002)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        if process.returncode != 0:
            break
        (tmp_path / name_of_target).unlink(missing_ok=True)  # it was done before the signal came: try again
    assert (process.returncode, err) == (128 + number, "bigsmall: interrupted\n")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file that takes long enough to be interrupted, and its compressed form."""
    folder = tmp_path_factory.mktemp("large")
    size = 100 << 20
    exponents = np.random.default_rng(0).integers(0, 1 << 14, size // 2, dtype=np.uint16) + 0x3800
    source = write_safetensors(folder / "large.safetensors", {"w": ("BF16", (size // 2,), exponents.tobytes())})
    bigsmall.compress(source, folder / "large.bs", "inference")
    yield source, folder / "large.bs"
    for path in folder.iterdir():
        path.unlink()


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
