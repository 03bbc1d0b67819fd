#!/usr/bin/env python3
"""Measures BigSmall beside memcpy, safetensors and its rivals in one run: `make bench` runs this.

Every contender lives in a process of its own (worker.py), each rival in an environment of its own, made here from
scripts/requirements-bench.txt. In every round all contenders do all operations once, one after the other, so that a
slow moment of the machine hits all alike, and before each operation memcpy is measured anew. GB/s are 1e9 uncompressed
bytes (of the source file) a second. Every restored file and decoded tensor is compared with its source. On a shared
machine only ratios within one run mean anything.

A run of two or three minutes:
    --sets synthetic-llm-1gb --only balanced zipnn safetensors-clone --ops compress reuse memory load
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from report import OPERATIONS, Contender, Result, Sample, Table, machine, number_of_threads, write_csv
from rivals import Process, install, requirements
from worker import COPY_BYTES

BUILD = Path(__file__).resolve().parents[2] / "build"
SETS = {
    "synthetic-llm-1gb": "LLM, synthetic, BF16",
    "synthetic-llm-1gb-f32-fp16": "LLM, synthetic, FP16",
    "synthetic-llm-1gb-f32": "LLM, synthetic, F32",
    "synthetic-llm-1gb-f32-fp8_e4m3": "LLM, synthetic, FP8",
    "minilm-l6-v2-bf16": "MiniLM, BF16",
    "minilm-l6-v2-fp16": "MiniLM, FP16",
    "minilm-l6-v2": "MiniLM, F32",
    "minilm-l6-v2-fp8_e4m3": "MiniLM, FP8",
    "whisper-base-fp16-bf16": "Whisper base, BF16",
    "whisper-base-fp16": "Whisper base, FP16",
    "slices": "one BF16 tensor of shape [32000, 4096]",
}
LLM = "synthetic-llm-1gb"  # whose two embeddings of [32000, 2048], side by side, are the tensor of "slices"
SLICED = ("model.embed_tokens.weight", "lm_head.weight")
SLICES_PER_ROUND = 5
MIN_TMPFS_BYTES = 12 << 30
ORIGINAL_BYTES = 100_000_000


class Plan(NamedTuple):
    """What a contender can do: operations with one thread, and those with more."""

    title: str
    serial: tuple[str, ...]
    parallel: tuple[str, ...]
    package: str = ""  # of a rival, which has an environment of its own
    slices: bool = False
    most_bytes: int = 1 << 62  # a larger file would take it many minutes


ALL = tuple(OPERATIONS)
BYTES = ("compress", "memory", "fresh", "restore")
FILES = ("compress", "restore")
PLANS = {
    "memcpy": Plan("memcpy", ("copy",), ("copy",)),
    "inference": Plan("**BigSmall inference**", ALL, ALL, slices=True),
    "balanced": Plan("**BigSmall balanced**", ALL, ALL, slices=True),
    "storage": Plan("**BigSmall storage**", ALL, ALL, slices=True),
    "balanced-avx2": Plan("**BigSmall balanced**", ALL, ALL),
    "balanced-generic": Plan("**BigSmall balanced**", ALL, ALL),
    "safetensors": Plan("safetensors, mapped", ("load",), (), slices=True),
    "safetensors-clone": Plan("safetensors and clone", ("load",), ("load",)),
    "zipnn": Plan("ZipNN", BYTES, BYTES, "zipnn"),
    "lmzip": Plan("lmzip", FILES, FILES, "lmzip"),
    "zstandard-planes": Plan("zstd level 3, byte planes", BYTES, ("compress",), "zstandard"),
    "zstandard": Plan("zstd level 3", BYTES, ("compress",), "zstandard"),
    "bigsmall-1.0.0": Plan("original bigsmall", (*FILES, "fresh"), (), "bigsmall-1.0.0", most_bytes=ORIGINAL_BYTES),
    "bigsmall-4.0.0": Plan("original bigsmall", (*FILES, "fresh"), (), "bigsmall-4.0.0", most_bytes=ORIGINAL_BYTES),
}
OURS = tuple(name for name, plan in PLANS.items() if "BigSmall" in plan.title)


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


class Bench:
    """Runs the operations of one set after the other and keeps what they took."""

    def __init__(self, processes: dict[str, Process], scratch: Path, args: argparse.Namespace) -> None:
        self.processes = processes
        self.scratch = scratch
        self.rounds: int = args.rounds
        self.threads: list[int] = args.threads
        self.ops: list[str] = args.ops
        self.seconds: float = args.seconds
        self.samples: list[Sample] = []
        self.results: dict[tuple[str, str], Result] = {}
        self.spent: dict[tuple[str, str, str, int], float] = {}

    def run(self, name: str, op: str, source: Path, threads: int = 1) -> dict[str, Any] | None:
        packed, restored = self.scratch / f"{name}.packed", self.scratch / f"{name}.safetensors"
        written = {"compress": packed, "restore": restored}.get(op)
        if written is not None:
            written.unlink(missing_ok=True)
        return self.processes[name].run(
            op, source=str(source), packed=str(packed), restored=str(restored), threads=threads
        )

    def sample(self, label: str, name: str, op: str, threads: int, number: int, source: Path) -> None:
        """One measurement with memcpy just before it, unless this operation has had its time."""
        key = (label, name, op, threads)
        if self.spent.get(key, 0.0) > self.seconds:
            return
        start = time.perf_counter()
        copy = self.run("memcpy", "copy", source)
        answer = self.run(name, op, source, threads)
        self.spent[key] = self.spent.get(key, 0.0) + time.perf_counter() - start
        if answer is None or copy is None:
            return
        size = source.stat().st_size
        n_bytes = {"copy": COPY_BYTES, "row": 0, "columns": 0}.get(op, size)
        gb_s, copy_gb_s = n_bytes / answer["seconds"] / 1e9, COPY_BYTES / copy["seconds"] / 1e9
        self.samples.append(
            Sample(label, size, name, op, threads, number, answer["seconds"], answer["read"], gb_s, copy_gb_s)
        )

    def prepare(self, label: str, name: str, ops: Sequence[str], source: Path) -> None:
        """The untimed first pass: it warms up caches and compilers, makes the packed file and is what is checked."""
        packed, restored = self.scratch / f"{name}.packed", self.scratch / f"{name}.safetensors"
        restored.unlink(missing_ok=True)
        for op in dict.fromkeys(("compress", *ops) if "compress" in PLANS[name].serial else ops):
            self.run(name, op, source)
        if name in OURS:
            self.run(name, "check", source)
        percent = 100 * packed.stat().st_size / source.stat().st_size if packed.exists() else None
        told = compare(source, restored) if restored.exists() else "-"
        self.results[label, name] = Result(percent, told)
        self.run(name, "rest", source)

    def measure(self, label: str, source: Path) -> None:
        size = source.stat().st_size
        plans = {name: PLANS[name] for name in self.processes if size <= PLANS[name].most_bytes}
        for name, plan in plans.items():
            self.prepare(label, name, [op for op in plan.serial if op in self.ops], source)
        for number in range(self.rounds):
            progress(label, number, self.rounds)
            for name, plan in plans.items():
                for threads in self.threads:
                    for op in plan.serial if threads == 1 else plan.parallel:
                        if op in self.ops or op == "copy":
                            self.sample(label, name, op, threads, number, source)
                            (self.scratch / f"{name}.safetensors").unlink(missing_ok=True)
                self.run(name, "rest", source)
        self.clean()

    def measure_slices(self, label: str, source: Path) -> None:
        names = [name for name in self.processes if PLANS[name].slices]
        for name in names:
            self.prepare(label, name, ("row", "columns"), source)
        for number in range(self.rounds):
            progress(label, number, self.rounds)
            for name in names:
                for op in ("row", "columns"):
                    for threads in self.threads:
                        for _ in range(SLICES_PER_ROUND):
                            self.sample(label, name, op, threads, number, source)
        self.clean()

    def clean(self) -> None:
        for path in self.scratch.iterdir():
            path.unlink()


def progress(label: str, number: int, rounds: int) -> None:
    print(f"  {label}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)


def write_slices(llm: Path, target: Path) -> None:
    data = llm.read_bytes()
    found = tensors(data)
    halves = [np.frombuffer(found[name][2], "<u2").reshape(found[name][1]) for name in SLICED]
    whole = np.hstack(halves)
    entry = {"dtype": "BF16", "shape": whole.shape, "data_offsets": [0, whole.nbytes]}
    header = json.dumps({"weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    target.write_bytes(struct.pack("<Q", len(header)) + header + whole.tobytes())


def scratch_directory() -> str:
    """In memory where there is room, so that nobody is measured by the disk."""
    memory = "/dev/shm"
    if os.path.isdir(memory) and shutil.disk_usage(memory).free >= MIN_TMPFS_BYTES:
        return tempfile.mkdtemp(prefix="bigsmall-bench-", dir=memory)
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="scratch-", dir=BUILD / "bench")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2][: cores()], help="default: 1 2")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--only", nargs="+", default=list(PLANS), choices=PLANS, metavar="NAME", help=", ".join(PLANS))
    parser.add_argument("--ops", nargs="+", default=list(ALL), choices=ALL, metavar="OP", help=", ".join(ALL))
    parser.add_argument("--seconds", type=float, default=15, help="an operation that took so long has no more rounds")
    parser.add_argument("--weights", type=Path, default=BUILD / "weights", help="default: build/weights")
    parser.add_argument("--out", type=Path, default=BUILD / "bench", help="default: build/bench")
    return parser.parse_args()


def start(names: Sequence[str], log: Path) -> tuple[dict[str, Process], dict[str, str]]:
    """A process for each contender, and why some have none."""
    specs = requirements()
    processes, absent = {}, {}
    for name in names:
        python: str | None = sys.executable
        package = PLANS[name].package
        if package:
            python, why = install(package, specs[package], BUILD)
            if python is None:
                absent[name] = why
                continue
        processes[name] = Process(name, python, log / f"{name}.log")
    return processes, absent


def described(name: str, process: Process) -> Contender:
    about = process.run("about") or {"versions": {}, "cpu": ""}
    title, package = PLANS[name].title, PLANS[name].package
    versions: dict[str, str] = about["versions"]
    if about["cpu"]:
        title += f" ({about['cpu']})"
    elif package != "zstandard":  # whose version is not that of zstd
        title += " " + versions.get(package.partition("-")[0], "")
    return Contender(name, title.strip(), ", ".join(" ".join(pair) for pair in versions.items()), about["cpu"])


def report(bench: Bench, contenders: list[Contender], absent: dict[str, str]) -> str:
    about = machine()
    libraries = dict.fromkeys(library for contender in contenders for library in contender.versions.split(", "))
    lines = [
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "Libraries: " + ", ".join(sorted(library for library in libraries if not library.startswith("python"))) + ".",
        f"Up to {bench.rounds} interleaved rounds. Cells: the best of them over the best memcpy (and the median of",
        "each over the memcpy just before it), then the best in GB/s. memcpy is glibc's, by one thread, of 256 MiB",
        "that were used before.",
    ]
    for label, title in SETS.items():
        samples = [sample for sample in bench.samples if sample.set == label]
        if not samples:
            continue
        table = Table(samples, contenders)
        lines += ["", f"### {title} ({samples[0].set_bytes / 1e6:.1f} MB)"]
        if label == "slices":
            lines += ["", *table.slices(bench.threads)]
            continue
        results = {name: result for (where, name), result in bench.results.items() if where == label}
        for threads in bench.threads:
            lines += ["", number_of_threads(threads), "", *table.speeds(results, threads)]
        lines += ["", *table.comparisons(bench.threads)]
    lines += ["", *(f"{name}: {why}" for name, why in absent.items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch directory goes
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in PLANS if name == "memcpy" or name in args.only]
    processes, absent = start(names, args.out)
    scratch = Path(scratch_directory())
    bench = Bench(processes, scratch, args)
    try:
        for label in args.sets:
            if label == "slices":
                source = scratch / "slices.source"
                write_slices(args.weights / LLM / "model.safetensors", source)
                bench.measure_slices(label, source)
            else:
                bench.measure(label, args.weights / label / "model.safetensors")
        contenders = [described(name, process) for name, process in processes.items()]
    finally:
        for process in processes.values():
            process.close()
        shutil.rmtree(scratch, ignore_errors=True)
    absent.update({name: f"left out; {process.problem}" for name, process in processes.items() if process.problem})
    text = report(bench, contenders, absent)
    print(text)
    (args.out / "results.md").write_text(text)
    write_csv(args.out / "results.csv", bench.samples, contenders, bench.results)
    wrong = [
        name for (_, name), result in bench.results.items() if name in OURS and result.restores not in ("file", "-")
    ]
    broken = [name for name in absent if name in OURS and "this machine or build has no" not in absent[name]]
    if wrong or broken:
        print(f"FAILED: {', '.join(sorted({*wrong, *broken}))}, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
