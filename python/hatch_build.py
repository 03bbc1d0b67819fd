"""Builds the native library and its declarations into the wheel, and its Go sources into the sdist.

Environment, for a build that is not for this machine (scripts/build_wheels.sh):
    GOOS, GOARCH, CC     as `go build` reads them
    BIGSMALL_PLATFORM    platform tag of the wheel, such as manylinux_2_17_x86_64
    BIGSMALL_LINK_FLAGS  what the C compiler needs besides when it links
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "bigsmall"
HERE = Path(__file__).resolve().parent
# Where the sdist has what a checkout has around python/.
SDIST_SOURCES = "native"
LIBRARY_NAMES = {"linux": "libbigsmall.so", "darwin": "libbigsmall.dylib", "windows": "libbigsmall.dll"}
LICENCES = ("LICENSE", "THIRD_PARTY_LICENSES")


def source_root() -> Path:
    """The folder with go.mod: around python/ in a checkout, inside it in an sdist."""
    for root in (HERE / SDIST_SOURCES, HERE.parent):
        if (root / "go.mod").is_file() and (root / "include" / "bigsmall.h").is_file():
            return root
    raise RuntimeError(
        f"the Go sources of bigsmall are missing beside {HERE}: build in a checkout of its whole repository "
        "(`pip install ./python` in its root) or from an sdist"
    )


def version() -> str:
    """The one version number, that of core/version.go."""
    path = source_root() / "core" / "version.go"
    found = re.search(r'const Version = "([^"]+)"', path.read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"{path} names no version")
    return found.group(1)


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


def go_environment() -> dict[str, str]:
    """The environment of `go build`. Raises RuntimeError where Go or a C compiler is missing."""
    if shutil.which("go") is None:
        raise RuntimeError(
            "bigsmall is built from Go sources and there is no `go` on PATH: install Go 1.26 or newer, or build "
            "without --no-build-isolation, which brings one"
        )
    # GOTOOLCHAIN: a build must not download another Go behind the user's back. GOFLAGS of the user may change anything.
    env = {**os.environ, "GOTOOLCHAIN": "local", "CGO_ENABLED": "1", "GOFLAGS": "", "GOWORK": "off"}
    # No name of the Go runtime's C files leaves the library either; and no debugging information, which names folders.
    env.setdefault("CGO_CFLAGS", "-O2 -g0 -fvisibility=hidden")
    compiler = env.get("CC") or go_value("CC", env)
    if shutil.which(shlex.split(compiler)[0]) is None:
        if env.get("CC"):
            raise RuntimeError(f"CC is {compiler!r}, which is not on PATH")
        found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
        env["CC"] = found or f"{shlex.quote(sys.executable)} -m ziglang cc"
    return env


def go_value(name: str, env: dict[str, str]) -> str:
    done = subprocess.run(["go", "env", name], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def link_flags(root: Path, goos: str) -> str:
    """Of what is in the library, only bs_* leave it."""
    flags = [os.environ.get("BIGSMALL_LINK_FLAGS", "")]
    if goos == "linux":
        # Two pairs of quotes, since two commands split this text at spaces.
        flags.append(f'"-Wl,--version-script={root / "capi" / "exports.map"}"')
    elif goos == "windows":
        # Keeps Go from listing its go_* for export; bigsmall.h marks the others.
        flags.append("-Wl,--export-all-symbols")
    if goos == "darwin":
        flags.append(f"-Wl,-install_name,@rpath/{LIBRARY_NAMES[goos]}")
    else:
        flags.append("-Wl,-s")  # zig's C libraries come with debugging information that names its folder
    # No build ID: it would come from this command line, and so from where the sources lie.
    return f"-s -w -buildid= -extldflags '{' '.join(flags).strip()}'"


def build_library(root: Path, goos: str, env: dict[str, str], target: Path) -> None:
    """Builds ./capi of the Go module at `root` to `target`."""
    # No names of this machine in it (-trimpath), nor of the state of its checkout, so that two builds are equal.
    command = ["go", "build", "-buildmode=c-shared", "-trimpath", "-buildvcs=false"]
    command += ["-ldflags", link_flags(root, goos), "-o", str(target), "./capi"]
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout.decode(errors='replace')}")


def platform_tag(goos: str, env: dict[str, str]) -> str:
    """Platform tag of the wheel: BIGSMALL_PLATFORM, or that of this machine, which the library must then be for."""
    chosen = os.environ.get("BIGSMALL_PLATFORM")
    if not chosen:
        here = {"win32": "windows", "darwin": "darwin"}.get(sys.platform, "linux")
        if "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")):
            raise RuntimeError(
                "bigsmall does not run with musl (Alpine): its dynamic linker cannot load a library written in Go "
                "(golang.org/issue/13492). Use an image with glibc, such as Debian's"
            )
        machines = {"x86_64": "amd64", "AMD64": "amd64", "arm64": "arm64", "aarch64": "arm64", "ARM64": "arm64"}
        machine = machines.get(platform.machine(), platform.machine())
        goarch = go_value("GOARCH", env)
        if goos != here or (machine in machines.values() and goarch != machine):
            raise RuntimeError(
                f"this builds for {goos}/{goarch} on {here}/{machine}: name the wheel's BIGSMALL_PLATFORM"
            )
        chosen = sysconfig.get_platform()
    return re.sub(r"[^0-9a-zA-Z]", "_", chosen)


def copy_sources(root: Path, target: Path) -> None:
    """Copies what `go build ./capi` needs, with the modules it imports, so that an sdist builds without network."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        # Go itself skips folders that begin with an underscore: generators with modules of their own.
        return {name for name in names if name.endswith("_test.go") or name == "testdata" or name.startswith("_")}

    target.mkdir(parents=True)
    for name in ("go.mod", "go.sum", *LICENCES):
        shutil.copyfile(root / name, target / name)
    for name in ("include", "capi", "core", "codecs"):
        shutil.copytree(root / name, target / name, ignore=left_out)
    if (root / "vendor").is_dir():  # an sdist made from an sdist
        shutil.copytree(root / "vendor", target / "vendor")
        return
    env = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}
    done = subprocess.run(
        ["go", "mod", "vendor"], cwd=target, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"go mod vendor failed:\n{done.stdout.decode(errors='replace')}")


class BuildHook(BuildHookInterface[Any]):
    """Adds the library and licences to a wheel, with a tag that fits every Python 3, and Go sources to an sdist."""

    PLUGIN_NAME = "custom"

    _scratch: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = source_root()
        editable = version == "editable"
        # An editable install imports from the source tree, so the files must lie there (git ignores them).
        if editable:
            where = HERE / PACKAGE
        else:
            where = self._scratch = Path(tempfile.mkdtemp(prefix="bigsmall-build-"))
        if self.target_name == "sdist":
            copy_sources(root, where / SDIST_SOURCES)
            build_data["force_include"][str(where / SDIST_SOURCES)] = SDIST_SOURCES
            return
        header = root / "include" / "bigsmall.h"
        env = go_environment()
        goos = go_value("GOOS", env)
        tag = platform_tag(goos, env)
        build_library(root, goos, env, where / LIBRARY_NAMES[goos])
        write_cdef(header, where / "_cdef.py")
        shutil.copyfile(header, where / "bigsmall.h")
        if not editable:
            for name in (LIBRARY_NAMES[goos], "_cdef.py", "bigsmall.h"):
                build_data["force_include"][str(where / name)] = f"{PACKAGE}/{name}"
            for name in LICENCES:
                build_data["force_include"][str(root / name)] = (
                    f"{PACKAGE}-{self.metadata.version}.dist-info/licenses/{name}"
                )
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
