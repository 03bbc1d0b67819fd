"""The library, its header and the declarations that Python uses say the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from bigsmall import _dtypes, _native, errors
from helpers import DTYPES, HEADER, REPOSITORY


def header_text() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)


def header_functions() -> dict[str, int]:
    """Name to number of parameters."""
    found = re.findall(r"BS_API\s+[^;{]*?\b(bs_\w+)\s*\(([^;]*?)\)\s*;", header_text())
    assert len(found) > 20
    return {name: 0 if args.strip() == "void" else len(args.split(",")) for name, args in found}


def header_enum(name: str) -> dict[str, int]:
    body = re.search(rf"typedef enum {name} \{{(.*?)\}}", header_text(), re.DOTALL)
    assert body is not None
    return {key: int(value) for key, value in re.findall(r"(\w+)\s*=\s*(\d+)", body.group(1))}


@pytest.mark.parametrize(("name", "arity"), header_functions().items())
def test_function_is_exported_and_declared(name: str, arity: int) -> None:
    ffi, lib = _native.library()
    function = getattr(lib, name)  # looks the symbol up in the library
    assert len(ffi.typeof(function).args) == arity


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm")
def test_nothing_else_is_exported() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _native.library_path()], capture_output=True, text=True, check=True
    )
    symbols = [line.split() for line in listing.stdout.splitlines()]
    code = {name.split("@")[0] for *_, kind, name in symbols if kind in "TtWwi"}
    assert code == set(header_functions())


def test_versions() -> None:
    import bigsmall

    ffi, lib = _native.library()
    defined = re.search(r"#define BS_ABI_VERSION (\d+)", header_text())
    assert defined is not None
    assert lib.bs_abi_version() == int(defined.group(1)) == _native._ABI_VERSION
    assert ffi.string(lib.bs_version()).decode() == bigsmall.__version__


def test_status_numbers() -> None:
    ffi, lib = _native.library()
    statuses = header_enum("bs_status")
    for name, number in statuses.items():
        short = name[len("BS_") :]
        assert ffi.string(lib.bs_status_name(number)).decode() == short.lower()
        if number:
            assert getattr(errors, short) == number
            assert errors.from_status(number, "text").status == number
    assert ffi.string(lib.bs_status_name(12345)) == b"unknown"


def test_dtype_numbers() -> None:
    ffi, lib = _native.library()
    in_header = {name[len("BS_") :]: number for name, number in header_enum("bs_dtype").items()}
    assert {dtype.safetensors: dtype.code for dtype in _dtypes.DTYPES} == in_header
    for dtype in _dtypes.DTYPES:
        assert DTYPES[dtype.safetensors][1] == dtype.name
        assert ffi.string(lib.bs_dtype_name(dtype.code)).decode() == dtype.name
    assert ffi.string(lib.bs_dtype_name(0)) == b"unknown"


def test_modes_and_flags() -> None:
    from bigsmall import writer

    assert {f"BS_MODE_{name.upper()}": number for name, number in writer.MODES.items()} == header_enum("bs_mode")
    flags = dict(re.findall(r"#define (BS_FLAG_\w+) (\d+)", header_text()))
    assert {name: int(number) for name, number in flags.items()} == {
        "BS_FLAG_SHA256": writer.FLAG_SHA256,
        "BS_FLAG_NO_REPLACE": writer.FLAG_NO_REPLACE,
        "BS_FLAG_FORCE": writer.FLAG_FORCE,
        "BS_FLAG_COMPAT_1_0": writer.FLAG_COMPAT_1_0,
    }


def test_workers() -> None:
    _, lib = _native.library()
    before = lib.bs_workers()
    assert before >= 1
    assert lib.bs_set_workers(3) == 0
    assert lib.bs_workers() == 3
    assert lib.bs_set_workers(-1) == errors.INVALID_ARGUMENT
    assert lib.bs_workers() == 3
    assert lib.bs_set_workers(0) == 0
    assert lib.bs_workers() == before


def test_bound_holds(make) -> None:
    import numpy as np

    _, lib = _native.library()
    noise = np.random.default_rng(0).bytes(300_001)
    _, target = make({"noise": ("U8", (300_001,), noise)})
    assert target.stat().st_size <= lib.bs_compress_bound(len(noise), 1, len("noise"))


@pytest.mark.parametrize(
    ("compiler", "options"), [("cc", ["-x", "c", "-std=c99"]), ("c++", ["-x", "c++", "-std=c++17"])]
)
def test_header_compiles(compiler: str, options: list[str]) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    done = subprocess.run(
        [compiler, *options, *flags, "-"],
        input=f'#include "{HEADER}"\n',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


ABI = REPOSITORY / "capi" / "abi.txt"


def abi() -> str:
    """Functions, constants and structs of the library, as the header declares and this machine lays them out."""
    ffi, lib = _native.library()
    text = header_text()
    lines = [f"define {name} {value}" for name, value in re.findall(r"#define (BS_\w+) (\d+)", text)]
    for enum in re.findall(r"typedef enum (bs_\w+)", text):
        lines.append(f"enum {enum} {ffi.sizeof(enum)} bytes")
        lines += [f"    {name} = {value}" for name, value in header_enum(enum).items()]
    for struct in re.findall(r"typedef struct (bs_\w+) \{", text):
        lines.append(f"struct {struct} {ffi.sizeof(struct)} bytes")
        for name, member in ffi.typeof(struct).fields:
            lines.append(f"    {member.offset} {member.type.cname} {name}")
    lines += [f"opaque {name}" for name in re.findall(r"typedef struct (bs_\w+) bs_\w+;", text)]
    for name in sorted(header_functions()):
        function = ffi.typeof(getattr(lib, name))
        arguments = ", ".join(argument.cname for argument in function.args) or "void"
        lines.append(f"function {function.result.cname} {name}({arguments})")
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(sys.maxsize < 2**32, reason="the list is that of 64 bits")
def test_abi_is_the_committed_one() -> None:
    """capi/ABI.md says what may change. BIGSMALL_UPDATE_ABI=1 writes the list."""
    if os.environ.get("BIGSMALL_UPDATE_ABI"):
        ABI.write_text(abi(), encoding="utf-8")
    assert abi() == ABI.read_text(encoding="utf-8"), (
        "the ABI is not the one of capi/abi.txt: see capi/ABI.md for whether BS_ABI_VERSION has to be raised, then run "
        "BIGSMALL_UPDATE_ABI=1 python -m pytest tests/py/test_abi.py"
    )
