"""What was measured, as Markdown tables and as CSV."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

OPERATIONS = {
    "compress": "compress",
    "reuse": "decode from C",
    "memory": "the same, file in memory",
    "fresh": "decompress to arrays",
    "load": "load to torch",
    "restore": "file to file",
}


class Sample(NamedTuple):
    """One measurement. `gb_s` is 0 for a slice, `copy_gb_s` what memcpy made just before."""

    set: str
    set_bytes: int
    contender: str
    op: str
    threads: int
    round: int
    seconds: float
    read_bytes: int
    gb_s: float
    copy_gb_s: float


class Contender(NamedTuple):
    name: str
    title: str
    versions: str  # of its libraries
    cpu: str  # the instructions it used, for ours


class Result(NamedTuple):
    """Of one contender on one set."""

    percent: float | None
    restores: str


def machine() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    go = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit or "unknown",
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "go": go,
        "python": platform.python_version(),
    }


# ---- tables ----------------------------------------------------------------------------------------------------------


class Cell:
    """All samples of one operation of one contender."""

    def __init__(self, samples: Sequence[Sample], best_copy: float) -> None:
        self.best = max((sample.gb_s for sample in samples), default=0.0)
        self.ratio = self.best / best_copy if best_copy else 0.0
        self.median = statistics.median(sample.gb_s / sample.copy_gb_s for sample in samples) if samples else 0.0

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.median:.3f}), {self.best:.2f}" if self.best else "-"


def times(speeds: Sequence[float], others: Sequence[float]) -> str:
    found = [f"{a / b:.2f}" if a and b else "-" for a, b in zip(speeds, others)]
    return ", ".join(found) if set(found) != {"-"} else "-"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


class Table:
    """The samples of one set, by contender, operation and threads."""

    def __init__(self, samples: Sequence[Sample], contenders: Sequence[Contender]) -> None:
        self.samples = samples
        self.contenders = contenders
        self.best_copy = max((sample.copy_gb_s for sample in samples), default=0.0)

    def cell(self, contender: str, op: str, threads: int) -> Cell:
        wanted = (contender, op, threads)
        return Cell([s for s in self.samples if (s.contender, s.op, s.threads) == wanted], self.best_copy)

    def speeds(self, results: dict[str, Result], threads: int) -> list[str]:
        lines = [
            row(["", "size", *OPERATIONS.values(), "restores"]),
            "|---|" + "---:|" * (len(OPERATIONS) + 1) + "---|",
        ]
        for contender in self.contenders:
            if contender.name == "memcpy":
                copy = str(self.cell("memcpy", "copy", threads))
                lines.append(row([contender.title, "", "", copy, *[""] * (len(OPERATIONS) - 2), ""]))
                continue
            cells = [str(self.cell(contender.name, op, threads)) for op in OPERATIONS]
            if contender.name in results and any(cell != "-" for cell in cells):
                percent, restores = results[contender.name]
                lines.append(row([contender.title, "-" if percent is None else f"{percent:.2f} %", *cells, restores]))
        return lines

    def comparisons(self, threads: Sequence[int]) -> list[str]:
        """How many times as fast as another ours is, by the best of each, for each number of threads."""
        ours = [contender for contender in self.contenders if contender.cpu]
        against = {
            "decode from C / ZipNN from memory": ("reuse", "zipnn", "memory"),
            "decompress to arrays / ZipNN": ("fresh", "zipnn", "fresh"),
            "compress / ZipNN": ("compress", "zipnn", "compress"),
            "load / safetensors and clone": ("load", "safetensors-clone", "load"),
            "decode from C / memcpy by as many threads": ("reuse", "memcpy", "copy"),
        }
        lines = []
        for title, (op, other, its) in against.items():
            theirs = [self.cell(other, its, n).best for n in threads]
            found = [[self.cell(contender.name, op, n).best for n in threads] for contender in ours]
            lines.append([title, *(times(speeds, theirs) for speeds in found)])
        found = [[self.cell(contender.name, "reuse", n).best for n in threads] for contender in ours]
        lines.append(
            ["decode from C / with one thread", *(times(speeds, speeds[:1] * len(speeds)) for speeds in found)]
        )
        told = [row(line) for line in lines if any(cell != "-" for cell in line[1:])]
        if not told:
            return []
        head = row([f"times as fast, with {' and '.join(map(str, threads))} threads", *(c.title for c in ours)])
        return [head, "|---|" + "---:|" * len(ours), *told]

    def slices(self, threads: Sequence[int]) -> list[str]:
        """Of slices the time counts, and the bytes read."""
        lines = [
            row(["", *(f"{what}, {number_of_threads(n)}" for what in ("one row", "64 columns") for n in threads)]),
            "|---|" + "---:|" * 2 * len(threads),
        ]
        for contender in self.contenders:
            cells = []
            for op in ("row", "columns"):
                for n in threads:
                    wanted = (contender.name, op, n)
                    samples = [s for s in self.samples if (s.contender, s.op, s.threads) == wanted]
                    if not samples:
                        continue
                    times = [1000 * s.seconds for s in samples]
                    read = max(s.read_bytes for s in samples) / 1000
                    cells.append(f"{min(times):.2f} ms ({statistics.median(times):.2f}), {read:,.0f} kB")
            if cells:
                lines.append(row([contender.title, *cells]))
        return lines


def number_of_threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


# ---- CSV -------------------------------------------------------------------------------------------------------------


def write_csv(
    path: Path,
    samples: Sequence[Sample],
    contenders: Sequence[Contender],
    results: dict[tuple[str, str], Result],
) -> None:
    """One line a sample, each with all that is needed to understand it."""
    about = machine()
    by_name = {contender.name: contender for contender in contenders}
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*about, *Sample._fields, "ratio", "percent", "instructions", "versions"])
        for sample in samples:
            contender = by_name[sample.contender]
            result = results.get((sample.set, sample.contender))
            ratio = sample.gb_s / sample.copy_gb_s if sample.copy_gb_s else ""
            percent: Any = "" if result is None or result.percent is None else round(result.percent, 4)
            lines.writerow([*about.values(), *sample, ratio, percent, contender.cpu, contender.versions])
