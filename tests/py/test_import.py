"""Importing bigsmall is cheap, and every name it promises is there."""

from __future__ import annotations

import importlib.metadata

import pytest

import bigsmall
from helpers import run_script


def test_import_loads_nothing_heavy() -> None:
    run_script("""
import sys
import bigsmall
import bigsmall.cli
dir(bigsmall)
bigsmall.errors.Corrupt
heavy = {"numpy", "torch", "safetensors", "ml_dtypes", "tqdm", "cffi", "_cffi_backend"}
heavy |= {"accelerate", "diffusers", "huggingface_hub", "transformers", "vllm"}
loaded = heavy & set(sys.modules)
assert not loaded, loaded
assert "bigsmall._native" not in sys.modules
if sys.platform == "linux":
    assert "bigsmall" not in open("/proc/self/maps").read()
""")


def test_functions_on_files_need_no_torch() -> None:
    run_script("""
import sys
sys.modules["torch"] = None
import bigsmall
for name in bigsmall.__all__:
    if name not in ("CompressedEmbedding", "CompressedLinear", "StreamingLoader", "StreamingModel", "load"):
        getattr(bigsmall, name)
""")


def test_without_torch_the_error_is_clear(make) -> None:
    _, target = make({"w": ("U8", (1,), b"a")})
    code = """
import sys
sys.modules["torch"] = None
import bigsmall
try:
    bigsmall.safe_open(sys.argv[1], "pt")
except bigsmall.errors.Unsupported as error:
    assert "needs torch" in str(error)
else:
    raise SystemExit("no error")
for name in ("CompressedEmbedding", "CompressedLinear", "StreamingLoader", "StreamingModel", "load"):
    try:
        getattr(bigsmall, name)
    except ModuleNotFoundError as error:
        assert "pip install bigsmall[torch]" in str(error) and error.name == "torch"
    else:
        raise SystemExit("no error")
assert bigsmall.safe_open(sys.argv[1], "np").get_tensor("w").tobytes() == b"a"
"""
    run_script(code, target)


def test_names() -> None:
    pytest.importorskip("torch")
    for name in bigsmall.__all__:
        assert name in dir(bigsmall)
        assert getattr(bigsmall, name) is getattr(bigsmall, name)
    assert bigsmall.__version__ == importlib.metadata.version("bigsmall")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bigsmall.nothing  # noqa: B018


def test_classes_stay_after_their_modules_are_imported() -> None:
    run_script("""
import bigsmall
import bigsmall.streaming, bigsmall.api, bigsmall.numpy, bigsmall.reader
assert isinstance(bigsmall.safe_open, type)
assert callable(bigsmall.info) and callable(bigsmall.verify) and callable(bigsmall.compress)
""")


def test_missing_or_foreign_library(tmp_path) -> None:
    code = """
import sys
from bigsmall import _native
try:
    _native.library()
except ImportError as error:
    assert sys.argv[1] in str(error), error
else:
    raise SystemExit("no error")
"""
    run_script(code, "is missing", env={"BIGSMALL_LIB": str(tmp_path / "none.so")})
    (tmp_path / "text.so").write_text("not a library")
    run_script(code, "cannot be loaded", env={"BIGSMALL_LIB": str(tmp_path / "text.so")})
