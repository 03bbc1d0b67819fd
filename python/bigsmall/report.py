"""What `bigsmall.breakdown` found, as lines of text and as a picture."""

from __future__ import annotations

import os
from typing import Any, Union

Path = Union[str, "os.PathLike[str]"]

# Part -> what it is called in a report, in the order of one.
PARTS = {
    "exponent": "exponents",
    "sign": "signs",
    "mantissa": "mantissas",
    "values": "numbers of other types",
    "stored": "stored as they are, or by zstd",
    "tables": "tables",
    "overhead": "checksums, lengths, padding",
    "header": "headers of the files",
    "parity": "parity",
    "original": "payloads of the original package",
}


def _bits(dtype: str) -> int:
    from bigsmall._dtypes import BY_NAME

    return 8 * BY_NAME[dtype].size


def lines(found: dict[str, Any]) -> list[str]:
    """The report as text."""
    size, source = found["file_size"], found["source_bytes"]
    out = ["  where the bytes go"]
    for part, name in PARTS.items():
        if found["parts"][part]:
            out.append(f"    {name:<34} {found['parts'][part]:>16,}  {100 * found['parts'][part] / size:6.2f} %")
    out.append(f"    {'all':<34} {size:>16,}  100.00 %")
    floats = {
        dtype: x
        for dtype, x in found["dtypes"].items()
        if x["sign"] + x["exponent"] + x["mantissa"] > 0 and x["n_bytes"]
    }
    if floats:
        out.append("  bits a number                              exponent   sign  mantissa     all      of")
        for dtype, x in floats.items():
            bits = _bits(dtype)
            count = x["n_bytes"] * 8 / bits
            each = [8 * x[part] / count for part in ("exponent", "sign", "mantissa")]
            total = 8 * x["compressed_bytes"] / count
            out.append(f"    {dtype:<38} {each[0]:>8.2f} {each[1]:>6.2f} {each[2]:>9.2f} {total:>7.2f} {bits:>7}")
    if found["modes"]:
        out.append("  what each mode would make of it, about")
        for mode, n in found["modes"].items():
            percent = f"  {100 * n / source:6.2f} % of the source" if source else ""
            out.append(f"    {mode:<34} {n:>16,}{percent}")
    return out


def picture(found: dict[str, Any], path: Path) -> None:
    """Writes the report as a picture, of the kind that the suffix of `path` names. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install bigsmall[report]") from error

    source = found["source_bytes"] or found["file_size"]
    parts = {name: found["parts"][part] for part, name in PARTS.items() if found["parts"][part]}
    figure = Figure(figsize=(9, 2.2 + 0.35 * len(parts) + 0.4 * len(found["modes"])), layout="constrained")
    tops = figure.subplots(2 if found["modes"] else 1, 1, squeeze=False, height_ratios=_heights(parts, found["modes"]))
    axes = tops[0][0]
    axes.barh(list(parts), [100 * size / source for size in parts.values()], color="#3b6ea5")
    axes.invert_yaxis()
    axes.set_xlabel("percent of the uncompressed size")
    axes.set_title(f"{os.path.basename(found['path'].rstrip(os.sep))}: {100 * found['file_size'] / source:.2f} %")
    for place, size in enumerate(parts.values()):
        axes.text(100 * size / source, place, f" {size:,}", va="center", fontsize=8)
    axes.margins(x=0.15)
    if found["modes"]:
        axes = tops[1][0]
        sizes = {"this file": found["file_size"], **found["modes"]}
        axes.barh(
            list(sizes),
            [100 * size / source for size in sizes.values()],
            color=["#3b6ea5"] + ["#9dbbd8"] * len(found["modes"]),
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent, about, in each mode")
        for place, size in enumerate(sizes.values()):
            axes.text(100 * size / source, place, f" {100 * size / source:.2f} %", va="center", fontsize=8)
    figure.savefig(os.fspath(path), dpi=150)


def _heights(parts: dict[str, int], modes: dict[str, int]) -> list[int]:
    return [len(parts) + 1] + [len(modes) + 2] * bool(modes)
