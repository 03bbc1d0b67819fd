#!/usr/bin/env python3
"""Damages files, kills writers and ends processes, far more often than the ordinary tests do, and writes a table of it:
`make test-long` runs this. It takes about half an hour on two cores.

    --quick    a tenth of all, to see whether this program works
    --only     experiments whose name has this in it; in a table that is there already the other rows stay as they are
    --out      where the table goes; standard output without it
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))
sys.path.insert(0, str(ROOT / "tests" / "py"))

from rivals import install, requirements  # noqa: E402

from helpers import bfloat16, weights, write_safetensors  # noqa: E402

WORKER = Path(__file__).with_name("damage.py")
SEED = 20260101
HANGS_AFTER = 120  # seconds, for a batch that takes some ten


class Row(NamedTuple):
    """What an experiment gave. None: it does not apply."""

    experiment: str
    count: int
    wrong: int | None = None
    crashes: int = 0
    hangs: int = 0
    lost: int | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.wrong or self.crashes or self.hangs or self.lost)


# ---- damage ----


class Damaging:
    """damage.py of one contender and file; begun again after a crash."""

    def __init__(self, python: str, contender: str, source: Path, packed: Path) -> None:
        self.command = [python, str(WORKER), contender, str(source), str(packed)]
        self.process: subprocess.Popen[str] | None = None
        self.size = 0

    def _answer(self) -> dict[str, object] | None:
        """A line; None where the process ended. TimeoutError where it is silent."""
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], HANGS_AFTER)[0]:
            raise TimeoutError
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def begin(self) -> None:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )
        answer = self._answer()
        if answer is None:
            _, err = self.process.communicate()
            raise RuntimeError(f"{self.command[2]}: {err.strip().splitlines()[-1:]}")
        self.size = int(str(answer["bytes"]))

    def ask(self, kind: str, seed: int, count: int) -> dict[str, object] | str:
        """The counts, or "crash" or "hang"."""
        if self.process is None:
            self.begin()
        assert self.process is not None
        assert self.process.stdin is not None
        print(kind, seed, count, file=self.process.stdin, flush=True)
        try:
            answer = self._answer()
        except TimeoutError:
            self.end()
            return "hang"
        if answer is None:
            self.end()
            return "crash"
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def damage(
    name: str, python: str, contender: str, source: Path, packed: Path, kind: str, count: int, batch: int
) -> Row:
    """Runs `count` damages in batches; one in which a process crashed or hung is run again, one by one."""
    worker = Damaging(python, contender, source, packed)
    total = {"refused": 0, "right": 0, "wrong": 0, "other": 0}
    crashes = hangs = done = 0
    examples: list[str] = []
    try:
        worker.begin()
        seed = SEED
        while done < count:
            n = min(batch, count - done)
            answer = worker.ask(kind, seed, n)
            if isinstance(answer, str) and n > 1:
                batch = 1
                continue
            if answer == "crash":
                crashes += 1
            elif answer == "hang":
                hangs += 1
            elif isinstance(answer, dict):
                for key in total:
                    total[key] += int(str(answer[key]))
                examples += list(answer["examples"])  # type: ignore[call-overload]
            done += n
            seed += 1
    finally:
        worker.end()
    note = f"{total['refused']:,} refused, {total['right']:,} right"
    if total["other"]:
        note += f"; {total['other']} errors of another kind, such as {examples[0]}"
        crashes += total["other"] if contender in OURS else 0
    return Row(name, done, total["wrong"], crashes, hangs, None, note)


OURS = ("balanced", "inference", "storage", "parity", "repair")


def sources(folder: Path, size: int) -> dict[str, Path]:
    """Files of about so many bytes: real weights where they are, each as another kind."""
    made = {}
    n = size // 2
    plain = {"model.layers.0.w": ("BF16", (n // 256, 256), bfloat16(weights(1, n // 256, 256)))}
    made["BF16"] = write_safetensors(folder / "bf16.safetensors", plain)
    half = (weights(2, n) * 4).astype("<f2").tobytes()
    made["F16"] = write_safetensors(folder / "f16.safetensors", {"w": ("F16", (n,), half)})
    made["F32"] = write_safetensors(folder / "f32.safetensors", {"w": ("F32", (n // 2,), weights(3, n // 2).tobytes())})
    small = {
        f"blocks.{i}.{dtype}": (dtype, (4000,), np.random.default_rng(i).integers(0, 40, 4000 * width, "u1").tobytes())
        for i, (dtype, width) in enumerate((("U8", 1), ("I16", 2), ("I32", 4), ("F64", 8), ("F8_E4M3", 1)))
    }
    small["text"] = ("U8", (50_000,), (b"What zstd makes little of. " * 2000)[:50_000])
    small["constant"] = ("I64", (30_000,), bytes(240_000))
    small["scalar"] = ("F32", (), b"abcd")
    small["empty"] = ("F16", (0, 3), b"")
    made["many dtypes"] = write_safetensors(folder / "dtypes.safetensors", small)
    real = ROOT / "build" / "weights" / "minilm-l6-v2-bf16" / "model.safetensors"
    if real.exists():
        from safetensors import safe_open as original

        cut = {}
        with original(real, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if "layer.0." in key:
                    import torch

                    tensor = file.get_tensor(key)
                    if tensor.dtype == torch.bfloat16:
                        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                        cut[key] = ("BF16", tuple(tensor.shape), data)
        made["MiniLM, a layer, BF16"] = write_safetensors(folder / "minilm.safetensors", cut)
    return made


def random_damage(scale: float) -> Iterator[Row]:
    plan = [
        ("BF16", "balanced"), ("BF16", "inference"), ("BF16", "storage"), ("F16", "balanced"), ("F32", "balanced"),
        ("many dtypes", "balanced"), ("many dtypes", "storage"), ("BF16", "parity"),
        ("MiniLM, a layer, BF16", "balanced"),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=shared_memory()) as name:
        folder = Path(name)
        files = sources(folder, 3 << 20)
        plan = [(kind, mode) for kind, mode in plan if kind in files]
        for kind, mode in plan:
            yield damage(
                f"random damage, {kind}, {mode}", sys.executable, mode, files[kind], folder / f"{mode}-{kind}.bs",
                "mixed", int(100_000 * scale) // len(plan) + 1, 200,
            )  # fmt: skip
        row = damage(
            "random damage, repaired by 5 % of parity", sys.executable, "repair", files["BF16"], folder / "repair.bs",
            "mixed", int(2000 * scale) + 1, 50,
        )  # fmt: skip
        yield row._replace(note=row.note.replace("refused", "beyond repair").replace("right", "repaired"))


def rivals(scale: float) -> Iterator[Row]:
    """The same flips and cuts of the same small source, each in its own file."""
    count = int(1000 * scale) + 1
    with tempfile.TemporaryDirectory(dir=shared_memory()) as name:
        folder = Path(name)
        shape = (64, 1024)
        source = write_safetensors(
            folder / "model.safetensors", {"model.layers.0.w": ("BF16", shape, bfloat16(weights(7, *shape)))}
        )
        specs = requirements()
        for contender in ("balanced", "bigsmall-1.0.0", "bigsmall-4.0.0", "zipnn"):
            python: str | None = sys.executable
            title = {"balanced": "BigSmall"}.get(contender, specs.get(contender, contender).replace("==", " "))
            if contender != "balanced":
                python, why = install(contender, specs[contender], ROOT / "build")
                if python is None:
                    yield Row(f"{title}: single-bit flips", 0, note=why)
                    continue
            for kind, plural in (("flip", "single-bit flips"), ("cut", "cuts")):
                # The original is slow, and a process that has to begin anew after every cut is slower.
                n = count if contender == "balanced" else count // (5 if kind == "flip" else 20) + 1
                try:
                    yield damage(
                        f"{title}: {plural}", python, contender, source, folder / f"{contender}.packed", kind, n, 20
                    )
                except RuntimeError as error:
                    yield Row(f"{title}: {plural}", 0, note=str(error))


def shared_memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


# ---- what the other tests have ----


def exhaustive(scale: float) -> Iterator[Row]:
    done = subprocess.run(
        ["go", "test", "-count=1", "-v", "-run", "^TestDamage$", "./tests/go"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    said = re.search(r"exhaustive: (\d+) single-bit flips and (\d+) cuts of (\d+) files", done.stdout)
    failed = int(done.returncode != 0)
    flips, cuts, files = map(int, said.groups()) if said else (0, 0, 0)
    note = f"small files of {files} kinds; whole tensors and parts" if said else done.stdout[-200:]
    yield Row("every single-bit flip", flips, failed, note=note)
    yield Row("every cut", cuts, failed, note=note)


def pytest_rows(file: str, groups: dict[str, str], lost: bool) -> Callable[[float], Iterator[Row]]:
    """A row for the tests whose name begins with each key."""

    def run(scale: float) -> Iterator[Row]:
        with tempfile.TemporaryDirectory() as name:
            report = Path(name) / "report.xml"
            environment = {**os.environ, "BIGSMALL_LONG": "1" if scale >= 1 else ""}
            # A test that takes too long ends the whole run, by conftest.py.
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            command.append(f"tests/py/{file}")
            subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False, timeout=3600)
            if not report.exists():
                yield Row(file, 0, crashes=1, note="the run ended early: a test hung or crashed")
                return
            cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
        for prefix, title in groups.items():
            mine = [case for case in cases if case.attrib["name"].startswith(prefix)]
            failed = [case for case in mine if case.find("failure") is not None or case.find("error") is not None]
            skips = [found for case in mine if (found := case.find("skipped")) is not None]
            ran, bad = len(mine) - len(skips), len(failed)
            note = f"{ran} tests"
            if skips:
                note += f"; {len(skips)} skipped: {skips[0].attrib['message']}"
            if failed:
                note += "; failed: " + ", ".join(case.attrib["name"] for case in failed)
            count = repetitions(prefix, ran, scale)
            yield Row(title, count, None if lost else bad, 0, 0, bad if lost else None, note)

    return run


def repetitions(prefix: str, tests: int, scale: float) -> int:
    """How often a test that repeats does so; see test_faults.py, test_process.py and test_corruption.py."""
    long = scale >= 1
    often = {
        "test_killed": 33 if long else 3,
        "test_source_changes": 10 if long else 3,
        "test_writers": 10 if long else 2,
        "test_control_c": 20 if long else 4,
        "test_nothing_grows": 10_000 if long else 1000,
        "test_damage": 3000 if long else 250,
    }
    return tests * often.get(prefix, 1)


FAULTS = {
    "test_killed": "SIGKILL while writing",
    "test_file_size": "file size limit reached",
    "test_full": "disk full",
    "test_read_only": "read-only directory",
    "test_impossible": "target is a directory, FIFO, device or nowhere",
    "test_source_changes": "source cut, grown, rewritten or replaced while it is read",
    "test_open_reader": "file changed under an open reader",
    "test_writers": "four writers of one target",
    "test_no_": "target is the source, or within it",
    "test_links": "target is a link",
}
PROCESS = {
    "test_workers": "spawn and forkserver",
    "test_data_loader": "DataLoader of four workers",
    "test_threads": "64 threads on one reader",
    "test_every_function": "every C function in a forked child",
    "test_control_c": "Ctrl-C in a long call",
    "test_signal": "signal handlers during long calls",
    "test_exit": "exit during a call",
    "test_sub_interpreter": "sub-interpreter",
    "test_nothing_grows": "opens, with nothing left over",
}
FORK = {"test_": "fork, nested, with pools and threads"}
READERS = {
    "test_damage": "random damage, every reader of Python",
    "test_shards": "damaged shards, index and base",
    "test_the": "the tensor is named",
}


def fuzzing(scale: float) -> Iterator[Row]:
    each = "60s" if scale >= 1 else "3s"
    done = subprocess.run(
        [str(ROOT / "scripts" / "fuzz.sh"), each], cwd=ROOT, capture_output=True, text=True, check=False, timeout=7200
    )
    targets = re.findall(r"^(Fuzz\w+): execs: (\d+)", done.stdout, re.M)
    note = f"{len(targets)} targets, {each} each" if done.returncode == 0 else done.stdout[-300:]
    yield Row("fuzzing", sum(int(n) for _, n in targets), int(done.returncode != 0), note=note)


EXPERIMENTS: dict[str, Callable[[float], Iterable[Row]]] = {
    "exhaustive": exhaustive,
    "damage": random_damage,
    "readers": pytest_rows("test_corruption.py", READERS, lost=False),
    "fuzzing": fuzzing,
    "faults": pytest_rows("test_faults.py", FAULTS, lost=True),
    "process": pytest_rows("test_process.py", PROCESS, lost=False),
    "fork": pytest_rows("test_fork.py", FORK, lost=False),
}


# ---- the table ----

INTRODUCTION = """# Reliability

What `make test-long` found. *Wrong*: weights, or a file, that were not the source's bytes, without an error. *Crashes*:
the process ended, or an error was none that the documentation names. *Hangs*: no answer within a time that is many
times what it takes. *Lost*: a target that was neither the old nor the whole new one, a source that was touched, or
something left over. A damage is a flipped bit, a cut, a part from elsewhere, a zeroed page, bytes behind the end or two
parts exchanged, at random; what it did not change, or a reader does not need, is right.

"""

RIVALS = """
## Beside others

The same script, the same source of 131 kB of BF16 weights, each tool's own file of it, decoded by its own function with
its defaults; BigSmall too, without its MD5s. The original package's decompress does not look at the MD5s that its files
hold; its `verify`, another pass, was not called. ZipNN's files have no checksum. A process that ended is a crash.

"""


def cell(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def table(rows: Iterable[Row]) -> str:
    lines = ["| experiment | count | wrong | crashes | hangs | lost | |", "|---|---:|---:|---:|---:|---:|---|"]
    for row in rows:
        numbers = " | ".join(map(cell, (row.wrong, row.crashes, row.hangs, row.lost)))
        lines.append(f"| {row.experiment} | {row.count:,} | {numbers} | {row.note} |")
    return "\n".join(lines) + "\n"


def with_rows(text: str, rows: str) -> str:
    """A table with those of its rows replaced that are in another one."""
    fresh = {line.split(" | ")[0]: line for line in rows.splitlines()[2:]}
    return "".join(fresh.get(line.split(" | ")[0], line) + "\n" for line in text.splitlines())


def machine() -> str:
    import bigsmall

    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return (
        f"{name}, {os.cpu_count()} cores, {bigsmall.cpu()}, {platform.system()}, Python {platform.python_version()}, "
        f"bigsmall {bigsmall.__version__}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scale = 0.05 if args.quick else 1.0
    begin = time.monotonic()
    ours: list[Row] = []
    for name, run in EXPERIMENTS.items():
        if args.only in name:
            for row in run(scale):
                print(row, file=sys.stderr, flush=True)
                ours.append(row)
    others: list[Row] = []
    if args.only in "rivals":
        for row in rivals(scale):
            print(row, file=sys.stderr, flush=True)
            others.append(row)
    text = INTRODUCTION + table(ours)
    if others:
        text += RIVALS + table(others)
    minutes = (time.monotonic() - begin) / 60
    text += f"\nMeasured on {machine()}; seed {SEED}, {minutes:.0f} minutes.\n"
    if args.out is None:
        print(text)
    elif args.only and args.out.exists():
        args.out.write_text(with_rows(args.out.read_text(), table(ours + others)))
    else:
        args.out.write_text(text)
    return int(any(row.failed for row in ours))


if __name__ == "__main__":
    sys.exit(main())
