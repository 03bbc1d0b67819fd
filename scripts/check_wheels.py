"""Checks wheels and sdists: contents, size, exported functions, and for manylinux what auditwheel says.

    python scripts/check_wheels.py FILE...

Needs auditwheel, lief and twine, for manylinux wheels and all others.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import lief

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 4_000_000  # bytes
# Of Go's runtime, which zig's linker for macOS leaves visible: it takes no list of what to export.
RUNTIME_ON_MACOS = {
    "_crosscall1",
    "__cgo_panic",
    "__cgo_topofstack",
    "_crosscall2",
    "__mh_dylib_header",
    "___dso_handle",
}


def declared() -> set[str]:
    header = (ROOT / "include" / "bigsmall.h").read_text(encoding="utf-8")
    return set(re.findall(r"^BS_API\b[^;{]*?\b(bs_\w+)\s*\(", header, re.M))


def exported(library: bytes) -> set[str]:
    lief.logging.disable()
    binary = lief.parse(library)
    if isinstance(binary, lief.PE.Binary):
        return {entry.name for entry in binary.get_export().entries}
    names = {symbol.name for symbol in binary.exported_symbols}
    if isinstance(binary, lief.MachO.Binary):
        return {name.removeprefix("_") for name in names - RUNTIME_ON_MACOS}
    return names


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        version = path.name.split("-")[1]
        info = f"bigsmall-{version}.dist-info"
        for wanted in ("bigsmall/py.typed", "bigsmall/_cdef.py"):
            assert wanted in names, f"{wanted} is missing"
        for name, source in (
            ("bigsmall/bigsmall.h", "include/bigsmall.h"),
            (f"{info}/licenses/LICENSE", "LICENSE"),
            (f"{info}/licenses/THIRD_PARTY_LICENSES", "THIRD_PARTY_LICENSES"),
        ):
            assert wheel.read(name) == (ROOT / source).read_bytes(), f"{name} is not {source}"
        libraries = [name for name in names if name.endswith((".so", ".dll", ".dylib"))]
        assert len(libraries) == 1, libraries
        assert exported(wheel.read(libraries[0])) == declared(), "it exports other names than bigsmall.h declares"
        tag = re.search(r"^Tag: (.*)$", wheel.read(f"{info}/WHEEL").decode(), re.M)
        assert tag is not None
        assert tag.group(1) == path.name.removesuffix(".whl").split("-", 2)[2]
    size = path.stat().st_size
    assert size < LARGEST, f"{size} bytes are more than {LARGEST}"
    if "manylinux" in path.name:
        done = subprocess.run(
            [sys.executable, "-m", "auditwheel", "show", str(path)], capture_output=True, text=True, check=True
        )
        text = " ".join(done.stdout.split())
        promised = re.search(r"manylinux_2_(\d+)_(\w+)\.whl", path.name)
        found = re.search(r'the following platform tag: "manylinux_2_(\d+)_(\w+)"', text)
        assert promised is not None
        assert found is not None, text
        assert found.group(2) == promised.group(2)
        assert int(found.group(1)) <= int(promised.group(1)), text
    print(f"{path.name}: {size:,} bytes, {len(declared())} functions")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    for wanted in ("PKG-INFO", "build_backend.py", "hatch_build.py", "native/go.mod", "native/include/bigsmall.h",
                   "native/LICENSE", "native/THIRD_PARTY_LICENSES", "native/vendor/modules.txt"):  # fmt: skip
        assert wanted in names, f"{wanted} is missing"
    for name in names:
        assert not name.endswith((".so", ".dll", ".dylib", ".pyc", "_test.go")), f"{name} does not belong there"
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths:
        sys.exit(__doc__)
    for path in paths:
        try:
            (check_sdist if path.name.endswith(".tar.gz") else check_wheel)(path)
        except AssertionError as error:
            sys.exit(f"{path}: {error}")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, paths)], check=True)


if __name__ == "__main__":
    main()
