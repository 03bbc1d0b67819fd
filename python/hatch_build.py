"""Builds the native library and its declarations into the wheel.

Environment:
    BIGSMALL_PREBUILT  path of a library built elsewhere (a cross build), used instead of `go build`
    BIGSMALL_PLATFORM  platform tag of the wheel, such as manylinux_2_17_x86_64; default: this machine's
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "bigsmall"


def library_name() -> str:
    """File name of the library inside the package; bigsmall/_native.py looks for the same one."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return "libbigsmall" + suffix


def declarations(header: str) -> str:
    """What cffi's parser takes of the header: no preprocessor but `#define NAME integer`, no C++, no BS_API."""
    header = re.sub(r"#ifdef __cplusplus.*?#endif", "", header, flags=re.DOTALL)
    lines = []
    for line in header.splitlines():
        define = re.match(r"\s*#\s*define\s+(\w+)\s+(\d+)\b", line)
        if define:
            lines.append(f"#define {define.group(1)} {define.group(2)}")
        elif not line.lstrip().startswith("#"):
            lines.append(re.sub(r"\bBS_API\b\s*", "", line))
    return "\n".join(lines)


def write_cdef(header: Path, target: Path) -> None:
    """Writes the Python module of cffi's out-of-line ABI mode, so that nothing parses C at run time."""
    from cffi import FFI

    ffi = FFI()
    ffi.set_source(f"{PACKAGE}._cdef", None)
    ffi.cdef(declarations(header.read_text(encoding="utf-8")))
    ffi.emit_python_code(str(target))


def build_library(root: Path, target: Path) -> None:
    """Builds ./capi of the Go module at `root`, or copies BIGSMALL_PREBUILT, to `target`."""
    prebuilt = os.environ.get("BIGSMALL_PREBUILT")
    if prebuilt:
        shutil.copyfile(prebuilt, target)
        return
    if shutil.which("go") is None:
        raise RuntimeError("bigsmall is built from Go sources and there is no `go` on PATH: install Go 1.26 or newer")
    flags = "-s -w"
    if sys.platform.startswith("linux"):  # only bs_* leave the library; cgo does not let a source file say so
        # Two pairs of quotes, since two commands split this text at spaces.
        flags += f""" -extldflags '"-Wl,--version-script={root / "capi" / "exports.map"}"'"""
    command = ["go", "build", "-buildmode=c-shared", "-trimpath", "-ldflags", flags, "-o", str(target), "./capi"]
    # GOTOOLCHAIN: a build must not download another Go behind the user's back.
    env = {**os.environ, "GOTOOLCHAIN": "local", "CGO_ENABLED": "1"}
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout.decode(errors='replace')}")


class BuildHook(BuildHookInterface[Any]):
    """Adds libbigsmall, _cdef.py and bigsmall.h to the wheel and gives it a platform tag that fits every Python 3."""

    PLUGIN_NAME = "custom"

    _scratch: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        python_dir = Path(self.root)
        root = python_dir.parent
        header = root / "include" / "bigsmall.h"
        if not header.is_file() or not (root / "go.mod").is_file():
            raise RuntimeError(
                f"{header} is missing: bigsmall can only be built inside a checkout of its whole repository, "
                "by `pip install ./python` in its root"
            )
        editable = version == "editable"
        # An editable install imports from the source tree, so the files must lie there (git ignores them).
        if editable:
            where = python_dir / PACKAGE
        else:
            where = self._scratch = Path(tempfile.mkdtemp(prefix="bigsmall-build-"))
        build_library(root, where / library_name())
        write_cdef(header, where / "_cdef.py")
        shutil.copyfile(header, where / "bigsmall.h")
        if not editable:
            for name in (library_name(), "_cdef.py", "bigsmall.h"):
                build_data["force_include"][str(where / name)] = f"{PACKAGE}/{name}"
        platform = os.environ.get("BIGSMALL_PLATFORM") or sysconfig.get_platform()
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + re.sub(r"[^0-9a-zA-Z]", "_", platform)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
