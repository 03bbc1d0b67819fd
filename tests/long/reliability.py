#!/usr/bin/env python3
"""Damages files, kills writers and ends processes, far more often than the ordinary tests do, and writes a table of it:
`make test-long` runs this. It takes about half an hour on two cores.

    --quick    a twentieth of what is random, to see whether this program works
    --only     experiments whose name has this in it; in a table that is there already the other rows stay as they are
    --out      where the table goes; standard output without it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))
sys.path.insert(0, str(ROOT / "tests" / "py"))

from rivals import install, requirements  # noqa: E402

from helpers import bfloat16, weights, write_safetensors  # noqa: E402

WORKER = Path(__file__).with_name("damage.py")
SEED = 20260101
HANGS_AFTER = 120  # seconds, for a batch that takes some ten
ONE_HANGS_AFTER = 40  # for a single damage


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
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would stop it when full
        self.size = 0
        self.ends: set[str] = set()  # what processes ended by

    def _answer(self, within: float = HANGS_AFTER) -> dict[str, object] | None:
        """A line; None where the process ended. TimeoutError where it is silent."""
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], within)[0]:
            raise TimeoutError
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def begin(self) -> None:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if self.command[2] not in OURS:
            environment.pop("PYTHONPATH", None)  # by which a rival of the same name would be ours
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )
        answer = self._answer()
        if answer is None:
            self.end()
            self.said.seek(0)
            raise RuntimeError(f"{self.command[2]}: {self.said.read().strip().splitlines()[-1:]}")
        self.size = int(str(answer["bytes"]))

    def ask(self, kind: str, first: int, count: int) -> dict[str, object] | str:
        """The counts, or "crash" or "hang"."""
        if self.process is None:
            self.begin()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            print(kind, first, count, file=self.process.stdin, flush=True)
            answer = self._answer(HANGS_AFTER if count > 1 else ONE_HANGS_AFTER)
        except BrokenPipeError:
            answer = None
        except TimeoutError:
            self.end()
            return "hang"
        if answer is None:
            code = self.process.wait()
            self.ends.add(signal.Signals(-code).name if code < 0 else f"exit code {code}")
            self.end()
            return "crash"
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


def damage(
    name: str, python: str, contender: str, source: Path, packed: Path, kind: str, count: int, batch: int
) -> Row:
    """Runs the damages number SEED and so on in batches. One in which the process ended or hung is run again, damage by
    damage; where none does so alone, the batch still counts as one that did."""
    worker = Damaging(python, contender, source, packed)
    total = {"refused": 0, "right": 0, "wrong": 0, "other": 0}
    ended: dict[str, list[int]] = {"crash": [], "hang": []}
    wrong: list[int] = []
    examples: list[str] = []

    def add(answer: dict[str, object]) -> None:
        for key in total:
            total[key] += int(str(answer[key]))
        examples.extend(answer["examples"])  # type: ignore[arg-type]
        wrong.extend(answer["wrong_ones"])  # type: ignore[arg-type]

    notes = []
    try:
        worker.begin()
        for first in range(SEED, SEED + count, batch):
            n = min(batch, SEED + count - first)
            answer = worker.ask(kind, first, n)
            if not isinstance(answer, str):
                add(answer)
                continue
            before = sum(map(len, ended.values()))
            for number in range(first, first + n):
                alone = worker.ask(kind, number, 1)
                if isinstance(alone, str):
                    ended[alone].append(number)
                else:
                    add(alone)
            if before == sum(map(len, ended.values())):
                ended[answer].append(first)
                notes.append(f"one {answer} in the {n} from number {first}, by none of them alone")
    finally:
        worker.end()
    crashes, hangs = len(ended["crash"]), len(ended["hang"])
    notes.insert(0, f"{total['refused']:,} refused, {total['right']:,} right")
    if total["other"]:
        notes.append(f"{total['other']} errors of another kind, such as of number {examples[0]}")
        crashes += total["other"] if contender in OURS else 0
    if worker.ends:
        notes.append(f"ended by {', '.join(sorted(worker.ends))}")
    if contender in OURS:
        for what, numbers in (("wrong", wrong), *ended.items()):
            if numbers:
                notes.append(f"{what}: numbers {', '.join(map(str, numbers[:5]))}")
    return Row(name, count, total["wrong"], crashes, hangs, None, "; ".join(notes))


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
        # Two at a time: each waits for a process that has one thread.
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(
                lambda one: damage(
                    f"random damage, {one[0]}, {one[1]}", sys.executable, one[1], files[one[0]],
                    folder / f"{one[1]}-{one[0]}.bs", "mixed", int(100_000 * scale) // len(plan) + 1, 200,
                ),
                plan,
            )  # fmt: skip
        row = damage(
            "random damage, repaired by 5 % of parity", sys.executable, "repair", files["BF16"], folder / "repair.bs",
            "mixed", int(2000 * scale) + 1, 50,
        )  # fmt: skip
        yield row._replace(note=row.note.replace("refused", "beyond repair").replace("right", "repaired"))


def rivals(scale: float) -> Iterator[Row]:
    """The same flips and cuts of the same small source, each in its own file."""
    # A process that has to begin anew after every cut is slow.
    counts = {"flip": max(1, int(200 * scale)), "cut": max(1, int(50 * scale))}
    with tempfile.TemporaryDirectory(dir=shared_memory()) as name:
        folder = Path(name)
        shape = (64, 1024)
        source = write_safetensors(
            folder / "model.safetensors", {"model.layers.0.w": ("BF16", shape, bfloat16(weights(7, *shape)))}
        )
        specs = requirements()
        for contender in (
            "balanced", "bigsmall-1.0.0", "bigsmall-1.0.0 verify", "bigsmall-4.0.0", "bigsmall-4.0.0 verify", "zipnn"
        ):  # fmt: skip
            python: str | None = sys.executable
            package, _, verify = contender.partition(" ")
            title = {"balanced": "BigSmall"}.get(contender, specs.get(package, package).replace("==", " "))
            title += " after its verify" if verify else ""
            if contender != "balanced":
                try:
                    python, why = install(package, specs[package], ROOT / "build")
                except (OSError, subprocess.SubprocessError) as error:
                    python, why = None, str(error)
                if python is None:
                    yield Row(f"{title}: single-bit flips", 0, note=f"not installed: {why}")
                    continue
            for kind, plural in (("flip", "single-bit flips"), ("cut", "cuts")):
                try:
                    yield damage(
                        f"{title}: {plural}",
                        python,
                        contender,
                        source,
                        folder / f"{package}.packed",
                        kind,
                        counts[kind],
                        20,
                    )
                except (RuntimeError, TimeoutError) as error:
                    yield Row(f"{title}: {plural}", 0, note=f"did not run: {error!r}")


def shared_memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


# ---- what the other tests have ----


def limited(command: list[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run in a process group of its own, of which nothing is left behind at the time limit."""
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **options) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output or "")


def exhaustive(scale: float) -> Iterator[Row]:
    command = ["go", "test", "-count=1", "-v", "-run", "^TestDamage", "./tests/go"]
    done = limited(command, 1200, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = re.findall(r"exhaustive: (\d+) single-bit flips and (\d+) cuts of (\d+) files", done.stdout)
    failed = int(done.returncode != 0 or not said)
    flips, cuts, files = (sum(int(one[i]) for one in said) for i in range(3))
    note = f"{files} small files: each codec, two shards; whole tensors and parts" if not failed else done.stdout[-200:]
    yield Row("every single-bit flip", flips, failed, note=note)
    yield Row("every cut", cuts, failed, note=note)


def pytest_rows(file: str, groups: dict[str, str], lost: bool) -> Callable[[float], Iterator[Row]]:
    """A row for the tests whose name begins with each key, the longest that does, and one for all the others."""

    def run(scale: float) -> Iterator[Row]:
        with tempfile.TemporaryDirectory() as name:
            report = Path(name) / "report.xml"
            environment = {**os.environ, "BIGSMALL_LONG": "1" if scale >= 1 else ""}
            # A test that takes too long ends the whole run, by conftest.py.
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            done = limited([*command, f"tests/py/{file}"], 3600, env=environment, stdout=sys.stderr)
            if not report.exists():
                yield Row(file, 0, crashes=1, note="the run ended early: a test hung or crashed")
                return
            cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
        of: dict[str, list[xml.etree.ElementTree.Element]] = {prefix: [] for prefix in (*groups, "")}
        for case in cases:
            test = case.attrib["name"]
            of[max((prefix for prefix in of if test.startswith(prefix)), key=len)].append(case)
        found_failures = 0
        for prefix, mine in of.items():
            title = groups.get(prefix, f"{file}, the others")
            if not mine:
                if prefix:
                    yield Row(title, 0, crashes=1, note=f"no test is named {prefix}...")
                continue
            failed = [case for case in mine if case.find("failure") is not None or case.find("error") is not None]
            skips = [found for case in mine if (found := case.find("skipped")) is not None]
            ran, bad = len(mine) - len(skips), len(failed)
            found_failures += bad
            note = f"{ran} test{'s' if ran != 1 else ''}"
            if skips:
                note += f"; {len(skips)} skipped: {skips[0].attrib['message']}"
            if failed:
                note += "; failed: " + ", ".join(case.attrib["name"] for case in failed)
            count = repetitions(prefix, ran, scale)
            yield Row(title, count, None if lost else bad, 0, 0, bad if lost else None, note)
        if done.returncode and not found_failures:
            yield Row(file, 0, crashes=1, note=f"pytest ended with {done.returncode}")

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
        "test_damage[": 2000 if long else 250,
        "test_damage_of_a_delta": 2 * (1000 if long else 125),
        "test_damage_of_a_directory": 3 * (500 if long else 62),
        "test_the_tensor": 8 * (100 if long else 6),
        "test_slices": 60,
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
SIGNALS = {"test_": "signals: every call and command, handlers that raise, terminals, pipes"}
LIFETIME = {"test_": "forks, workers, exit and growth, further cases"}
READERS = {
    "test_damage[": "random damage, every reader of Python, and of C",
    "test_damage_of_a_delta": "random damage of deltas and their bases, every reader",
    "test_damage_of_a_directory": "random damage of shards and their index, every reader",
    "test_the_tensor": "flips of one payload, every reader: the tensor is named",
    "test_slices": "flips of one block: slices of the others are right",
}


def fuzzing(scale: float) -> Iterator[Row]:
    each = "60s" if scale >= 1 else "3s"
    command = [str(ROOT / "scripts" / "fuzz.sh"), each]
    done = limited(command, 7200, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    targets = re.findall(r"^(Fuzz\w+):(?: execs: (\d+))?", done.stdout, re.M)
    note = f"{len(targets)} targets, {each} each" if done.returncode == 0 else done.stdout[-300:]
    yield Row("fuzzing", sum(int(n or 0) for _, n in targets), int(done.returncode != 0), note=note)


EXPERIMENTS: dict[str, Callable[[float], Iterable[Row]]] = {
    "exhaustive": exhaustive,
    "damage": random_damage,
    "readers": pytest_rows("test_corruption.py", READERS, lost=False),
    "fuzzing": fuzzing,
    "faults": pytest_rows("test_faults.py", FAULTS, lost=True),
    "process": pytest_rows("test_process.py", PROCESS, lost=False),
    "fork": pytest_rows("test_fork.py", FORK, lost=False),
    "signals": pytest_rows("test_signals.py", SIGNALS, lost=False),
    "lifetime": pytest_rows("test_lifetime.py", LIFETIME, lost=False),
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
its defaults; BigSmall too, without its MD5s. The original package's files hold MD5s, at which its `decompress` does not
look, and has no option to; its `verify` does, in a pass of its own that decodes everything: there are rows with and
without it. ZipNN's files have no checksum, and its `decompress` no option to verify. An error of any kind counts as
refused; a process that ended is a crash.

"""


def cell(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def table(rows: Iterable[Row]) -> str:
    lines = ["| experiment | count | wrong | crashes | hangs | lost | |", "|---|---:|---:|---:|---:|---:|---|"]
    for row in rows:
        numbers = " | ".join(map(cell, (row.wrong, row.crashes, row.hangs, row.lost)))
        note = " ".join(row.note.replace("|", "\\|").split())
        lines.append(f"| {row.experiment} | {row.count:,} | {numbers} | {note} |")
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
    versions = [f"bigsmall {bigsmall.__version__}", f"numpy {np.__version__}"]
    with contextlib.suppress(ImportError):
        import torch

        versions.append(f"torch {torch.__version__}")
    with contextlib.suppress(OSError):
        go = subprocess.run(["go", "env", "GOVERSION"], cwd=ROOT, capture_output=True, text=True, check=False)
        versions += [go.stdout.strip()] if go.stdout.strip() else []
    return (
        f"{name}, {os.cpu_count()} cores, {bigsmall.cpu()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def kept_going(name: str, run: Callable[[float], Iterable[Row]], scale: float) -> Iterator[Row]:
    """The rows of an experiment; where it breaks off, one that says so."""
    try:
        yield from run(scale)
    except subprocess.TimeoutExpired as error:
        yield Row(name, 0, hangs=1, note=f"took longer than {error.timeout:.0f} s")
    except Exception as error:
        traceback.print_exc()
        yield Row(name, 0, crashes=1, note=f"broke off: {error!r}"[:300])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not any(args.only in name for name in (*EXPERIMENTS, "rivals")):
        parser.error(f"--only {args.only}: the experiments are {', '.join((*EXPERIMENTS, 'rivals'))}")
    scale = 0.05 if args.quick else 1.0
    begin = time.monotonic()
    ours: list[Row] = []
    for name, run in EXPERIMENTS.items():
        if args.only in name:
            for row in kept_going(name, run, scale):
                print(row, file=sys.stderr, flush=True)
                ours.append(row)
    others: list[Row] = []
    if args.only in "rivals":
        for row in kept_going("rivals", rivals, scale):
            print(row, file=sys.stderr, flush=True)
            others.append(row)
    text = INTRODUCTION + table(ours)
    if others:
        text += RIVALS + table(others)
    minutes = (time.monotonic() - begin) / 60
    command = shlex.join(["python", "tests/long/reliability.py", *sys.argv[1:]])
    text += (
        f"\nMade by `{command}` in {minutes:.0f} minutes, on {machine()}; the damages are numbers {SEED} and so on.\n"
    )
    if args.out is None:
        print(text)
    elif args.only and args.out.exists():
        args.out.write_text(with_rows(args.out.read_text(), table(ours + others)))
    else:
        args.out.write_text(text)
    return int(any(row.failed for row in ours))


if __name__ == "__main__":
    sys.exit(main())
