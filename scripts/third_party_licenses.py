"""Writes THIRD_PARTY_LICENSES: the licence texts of what is linked into the library, on any platform it is built for.

python3 scripts/third_party_licenses.py [--check]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "THIRD_PARTY_LICENSES"
PLATFORMS = (("linux", "amd64"), ("linux", "arm64"), ("windows", "amd64"), ("darwin", "arm64"))
IS_LICENCE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|PATENTS)", re.IGNORECASE)
RULE = "=" * 100

HEAD = """\
libbigsmall is licensed under Apache-2.0 (LICENSE). These are the licences of the Go modules that are linked into it,
and of Go itself. Made by scripts/third_party_licenses.py.
"""


def go(*arguments: str, **environment: str) -> str:
    env = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "", "CGO_ENABLED": "1", **environment}
    return subprocess.run(["go", *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


def linked() -> dict[str, tuple[Path, set[Path]]]:
    """Name and version of each linked module -> its folder and the folders of the packages that are linked."""
    modules: dict[str, tuple[Path, set[Path]]] = {}
    decoder = json.JSONDecoder()
    for goos, goarch in PLATFORMS:
        text = go("list", "-deps", "-json=Dir,Module", "./capi", GOOS=goos, GOARCH=goarch).strip()
        while text:
            package, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
            module = package.get("Module")
            if module and not module.get("Main"):
                name = f"{module['Path']} {module['Version']}"
                modules.setdefault(name, (Path(module["Dir"]), set()))[1].add(Path(package["Dir"]))
    return modules


def licences(module: Path, packages: set[Path]) -> list[Path]:
    """The licence files of the module, and those of single folders on the way to a package that is linked."""
    folders = {module}
    for package in packages:
        folders.update(folder for folder in (package, *package.parents) if folder.is_relative_to(module))
    return sorted(
        file for folder in folders for file in folder.iterdir() if file.is_file() and IS_LICENCE.match(file.name)
    )


def text() -> str:
    parts = [HEAD]

    def add(title: str, files: list[tuple[str, Path]]) -> None:
        if not files:
            sys.exit(f"{title} has no licence file: it cannot be shipped")
        for name, file in files:
            body = file.read_text(encoding="utf-8").replace("\r\n", "\n").strip("\n")
            parts.append(f"\n{RULE}\n{title}: {name}\n{RULE}\n\n{body}\n")

    # Go's own licence text is the same in all of its releases, and of the module of the same authors.
    modules = linked()
    system = next(folder for name, (folder, _) in modules.items() if name.startswith("golang.org/x/sys "))
    add("Go, runtime and standard library", [("LICENSE", system / "LICENSE"), ("PATENTS", system / "PATENTS")])
    for name, (folder, packages) in sorted(modules.items()):
        add(name, [(str(file.relative_to(folder)), file) for file in licences(folder, packages)])
    return "".join(parts)


def main() -> None:
    wanted = text()
    if sys.argv[1:] == ["--check"]:
        if TARGET.read_text(encoding="utf-8") != wanted:
            sys.exit(f"{TARGET.name} is not what is linked: run {Path(__file__).relative_to(ROOT)}")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        TARGET.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
