"""The processes that are measured, and the environments of the rivals among them."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "scripts" / "requirements-bench.txt"
WORKER = Path(__file__).with_name("worker.py")


def requirements() -> dict[str, str]:
    """Package, with the version where there are several of one, to pinned requirement."""
    found = {}
    for line in REQUIREMENTS.read_text().splitlines():
        spec = line.partition("#")[0].strip()
        if spec:
            name, _, version = spec.partition("==")
            name = name.partition("[")[0]
            found[f"{name}-{version}" if name == "bigsmall" else name] = spec
    return found


def install(package: str, spec: str, build: Path) -> tuple[str | None, str]:
    """The Python that has this rival, or None and why not."""
    home = build / f"venv-rival-{package}"
    python = home / "bin" / "python"
    stamp = home / "installed.txt"
    if stamp.exists() and stamp.read_text() == spec:
        return str(python), ""
    print(f"installing {spec} ...", file=sys.stderr, flush=True)
    venv.create(home, clear=True, with_pip=True)
    # Behind its own packages it sees those of this environment, so that nobody needs a second copy of torch.
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(site) / "zz_bench.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", spec]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["pip failed"])[-1]
        return None, f"does not install: {last}"
    stamp.write_text(spec)
    return str(python), ""


class Process:
    """A worker. After its first failure it is left out, with the reason."""

    def __init__(self, name: str, python: str, log: Path) -> None:
        self.problem = ""
        self._log = open(log, "w")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [python, str(WORKER), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=log.parent,
        )

    def run(self, op: str, **task: Any) -> dict[str, Any] | None:
        if self.problem:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"op": op, **task}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            self.problem = f"{op}: {answer['error']}"
            return None
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()
