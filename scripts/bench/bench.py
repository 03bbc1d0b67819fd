#!/usr/bin/env python3
"""Measures BigSmall beside memcpy and its rivals in one run: `make bench` runs this.

Every contender lives in a process of its own (worker.py), each rival in an environment of its own, made here from
scripts/requirements-bench.txt. In every round all contenders do all operations once, one after the other, so that a
slow moment of the machine hits all alike. GB/s are 1e9 uncompressed bytes (of the source file) a second. Every
restored file is compared with its source. On a shared machine only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
REQUIREMENTS = ROOT / "scripts" / "requirements-bench.txt"
WORKER = Path(__file__).with_name("worker.py")
SETS = {
    "MiniLM F32": "minilm-l6-v2",
    "MiniLM BF16": "minilm-l6-v2-bf16",
    "MiniLM FP16": "minilm-l6-v2-fp16",
    "MiniLM FP8": "minilm-l6-v2-fp8_e4m3",
    "whisper-base FP16": "whisper-base-fp16",
    "whisper-base BF16": "whisper-base-fp16-bf16",
}
MIN_TMPFS_BYTES = 4 << 30


class Plan(NamedTuple):
    """What a contender can do: operations with one thread, and those with all."""

    title: str
    serial: tuple[str, ...]
    parallel: tuple[str, ...]


OPERATIONS = {
    "compress": "compress",
    "decode": "decode",
    "reuse": "decode, reused memory",
    "restore": "file to file",
}
ALL = tuple(OPERATIONS)
PLANS = {
    "memcpy": Plan("memcpy", ("reuse",), ("reuse",)),
    "inference": Plan("**BigSmall inference**", ALL, ALL),
    "balanced": Plan("**BigSmall balanced**", ALL, ALL),
    "storage": Plan("**BigSmall storage**", ALL, ALL),
    "zstandard": Plan("zstd level 3", ("compress", "decode", "restore"), ("compress",)),
    "zipnn": Plan("ZipNN", ("compress", "decode", "restore"), ("compress", "decode", "restore")),
    "lmzip": Plan("lmzip", ("compress", "restore"), ("compress", "restore")),
    "bigsmall-1.0.0": Plan("original bigsmall", ("compress", "decode", "restore"), ()),
    "bigsmall-4.0.0": Plan("original bigsmall", ("compress", "decode", "restore"), ()),
}


# ---- rivals ----------------------------------------------------------------------------------------------------------


def requirements() -> dict[str, str]:
    """Contender to pinned requirement."""
    found = {}
    for line in REQUIREMENTS.read_text().splitlines():
        spec = line.partition("#")[0].strip()
        if spec:
            name, _, version = spec.partition("==")
            name = name.partition("[")[0]
            found[f"{name}-{version}" if name == "bigsmall" else name] = spec
    return found


def install(contender: str, spec: str) -> tuple[str | None, str]:
    """The Python that has this rival, or None and why not."""
    home = BUILD / f"venv-rival-{contender}"
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


class Contender:
    """A worker process. After its first failure it is left out, with the reason."""

    def __init__(self, name: str, python: str, log: Path) -> None:
        self.name = name
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

    def run(self, **task: Any) -> float | None:
        if self.problem:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(task), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            self.problem = f"{task['op']}: {answer['error']}"
            return None
        return float(answer["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


# ---- checks ----------------------------------------------------------------------------------------------------------


def tensors(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    (length,) = struct.unpack_from("<Q", data)
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], data[8 + length + begin : 8 + length + end])
    return found


def compare(source: Path, restored: Path) -> str:
    before, after = source.read_bytes(), restored.read_bytes()
    if before == after:
        return "file"
    return "tensors" if tensors(before) == tensors(after) else "NOT RESTORED"


# ---- measuring -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    percent: float | None
    restored: str
    gb_s: dict[str, list[float]]  # "op/threads" to one value a round


def measure(source: Path, contenders: dict[str, Contender], scratch: Path, rounds: int, cores: int) -> list[Row]:
    size = source.stat().st_size
    rows = {}
    for name, contender in contenders.items():
        packed, restored = scratch / f"{name}.packed", scratch / f"{name}.safetensors"
        for path in (packed, restored):
            path.unlink(missing_ok=True)
        task = {"source": str(source), "packed": str(packed), "restored": str(restored), "threads": 1}
        # The untimed first pass warms up caches and compilers, and is the one that is checked.
        for op in PLANS[name].serial:
            contender.run(op=op, **task)
        percent = 100 * packed.stat().st_size / size if packed.exists() else None
        result = ""
        if restored.exists() and not contender.problem:
            result = compare(source, restored)
        rows[name] = Row(name, percent, result, {})
    for i in range(rounds):
        print(f"  {source.parent.name}: round {i + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, contender in contenders.items():
            plan = PLANS[name]
            jobs = [(op, 1) for op in plan.serial]
            if cores > 1:
                jobs += [(op, cores) for op in plan.parallel]
            for op, threads in jobs:
                packed, restored = scratch / f"{name}.packed", scratch / f"{name}.safetensors"
                seconds = contender.run(
                    op=op, source=str(source), packed=str(packed), restored=str(restored), threads=threads
                )
                if seconds is not None:
                    rows[name].gb_s.setdefault(f"{op}/{threads}", []).append(size / seconds / 1e9)
    return list(rows.values())


def cell(values: list[float] | None) -> str:
    return f"{max(values):.2f} ({statistics.median(values):.2f})" if values else "-"


def table(label: str, size: int, rows: list[Row], cores: int, titles: dict[str, str]) -> list[str]:
    columns = [(f"{op}/1", text) for op, text in OPERATIONS.items()]
    if cores > 1:
        columns += [(f"{op}/{cores}", f"{text}, {cores} threads") for op, text in OPERATIONS.items()]
    yardstick = next((row.gb_s.get("reuse/1") for row in rows if row.name == "memcpy"), None)
    head = ["size", *[text for _, text in columns], "best decode, 1 thread / memcpy", "restores"]
    lines = ["", f"### {label} ({size / 1e6:.1f} MB)", "", "| | " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * (len(head) - 1) + "---|")
    for row in rows:
        decoded = row.gb_s.get("reuse/1", []) + row.gb_s.get("decode/1", [])
        ratio = f"{max(decoded) / max(yardstick):.2f}" if decoded and yardstick else "-"
        size_text = "-" if row.percent is None else f"{row.percent:.2f} %"
        cells = [size_text, *[cell(row.gb_s.get(key)) for key, _ in columns], ratio, row.restored or "-"]
        lines.append(f"| {titles[row.name]} | " + " | ".join(cells) + " |")
    return lines


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def scratch_directory() -> str:
    """In memory where there is room, so that nobody is measured by the disk."""
    memory = "/dev/shm"
    if os.path.isdir(memory) and shutil.disk_usage(memory).free >= MIN_TMPFS_BYTES:
        return tempfile.mkdtemp(prefix="bigsmall-bench-", dir=memory)
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="scratch-", dir=BUILD / "bench")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", type=Path, default=BUILD / "weights", help="default: build/weights")
    parser.add_argument("--only", nargs="*", choices=PLANS, help="contenders to measure; memcpy is always among them")
    parser.add_argument("--sets", nargs="*", default=list(SETS.values()), choices=SETS.values(), metavar="SET")
    parser.add_argument("--out", type=Path, default=BUILD / "bench", help="default: build/bench")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = [name for name in PLANS if not args.only or name == "memcpy" or name in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    specs = requirements()
    absent, contenders, titles = {}, {}, {}
    for name in wanted:
        python: str | None = sys.executable
        titles[name] = PLANS[name].title
        if name in specs:
            if name != "zstandard":  # whose version is not that of zstd
                titles[name] += " " + specs[name].partition("==")[2]
            python, why = install(name, specs[name])
            if python is None:
                absent[name] = why
                continue
        contenders[name] = Contender(name, python, args.out / f"{name}.log")
    lines = [
        f"Machine: {cpu_model()}, {cores} CPUs, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}. {time.strftime('%Y-%m-%d')}.",
        f"GB/s, best of {args.rounds} interleaved rounds (median in brackets); files in memory or the page cache.",
    ]
    results = {}
    scratch = Path(scratch_directory())
    failed = False
    try:
        for label, directory in SETS.items():
            if directory not in args.sets:
                continue
            source = args.weights / directory / "model.safetensors"
            rows = measure(source, contenders, scratch, args.rounds, cores)
            lines += table(label, source.stat().st_size, rows, cores, titles)
            results[directory] = [row._asdict() for row in rows]
            ours = [row for row in rows if row.name in ("inference", "balanced", "storage")]
            failed = failed or any(row.restored != "file" for row in ours)
    finally:
        for contender in contenders.values():
            contender.close()
        shutil.rmtree(scratch, ignore_errors=True)
    for name, contender in contenders.items():
        if contender.problem:
            absent[name] = f"left out after a failure; {contender.problem}"
    lines += [f"\n{titles[name]} ({specs.get(name, 'this checkout')}): {why}" for name, why in absent.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    (args.out / "results.md").write_text(text)
    (args.out / "results.json").write_text(json.dumps({"machine": lines[0], "sets": results, "absent": absent}))
    if failed or any(name in ("inference", "balanced", "storage") for name in absent):
        print("FAILED: BigSmall did not restore every file, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
