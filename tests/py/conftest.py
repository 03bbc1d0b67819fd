from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigsmall
from helpers import REPOSITORY, every_dtype, weights, write_safetensors

# A shell starts what it runs in the background with SIGINT ignored, which every child would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    faulthandler.dump_traceback_later(170, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def make(tmp_path: Path):
    """make(tensors, metadata=None, mode="balanced") gives the paths of a .safetensors file and its .bs file."""

    def write(tensors, metadata=None, mode="balanced", stem="model", **options) -> tuple[Path, Path]:
        source = write_safetensors(tmp_path / f"{stem}.safetensors", tensors, metadata)
        target = tmp_path / f"{stem}.bs"
        assert bigsmall.compress(source, target, mode, **options) == str(target)
        return source, target

    return write


@pytest.fixture
def mixed(make) -> tuple[Path, Path]:
    """A small file with every dtype and some weights."""
    tensors = every_dtype()
    tensors["weight"] = ("F32", (96, 64), weights(1, 96, 64).tobytes())
    return make(tensors, {"format": "pt"})


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library built so that decoding a tensor named __panic__ is a fault inside it."""
    if shutil.which("go") is None:
        pytest.skip("needs go")
    target = tmp_path_factory.mktemp("fault") / "libbigsmall.so"
    command = ["go", "build", "-tags", "bsfault", "-buildmode=c-shared", "-o", str(target), "./capi"]
    env = {**os.environ, "GOTOOLCHAIN": "local", "CGO_ENABLED": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target
