#!/usr/bin/env python3
"""Derived weight sets: derive.py cast MODEL... | ft MODEL... | lora MODEL...

The models are directories under build/weights, or under $WEIGHTS.

cast: MODEL-bf16, MODEL-fp16 (torch round to nearest even, float tensors only) and MODEL-fp8_e4m3: every float tensor
      with >= 2 dims and >= 4096 elements, other than embeddings, becomes F8_E4M3 with a per-tensor F32 scale
      NAME_scale = amax/448 (w ~= fp8 * scale); the others become BF16, as published FP8 checkpoints have them.
ft:   MODEL-ft: a simulated full fine-tune: per 2-D+ tensor a rank-16 update (rel. Frobenius norm 0.3 %), a dense drift
      like Adam's (each weight +- lr-like step, 0.1 % of the tensor's std), and 1 % of the weights moved by 1 % of std
      more; embeddings: only 25 % of the rows move; 1-D tensors: 0.1 % relative noise.
lora: MODEL-lora: rank-8 update of the attention q and v projections only, the rest bit-identical.
Each written tensor keeps its dtype, and the order of names; shards and index are kept too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Callable

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS = Path(os.environ.get("WEIGHTS") or Path(__file__).resolve().parents[2] / "build" / "weights")
EMBEDDINGS = ("embed", "wte", "wpe", "shared", "emb_g", "emb.")
ADAPTED = ("q_proj.weight", "v_proj.weight", "self.query.weight", "self.value.weight")
FP8_MAX = 448.0
MIN_FP8_ELEMENTS = 4096

Tensors = dict[str, torch.Tensor]
# Puts into the first argument what becomes of the tensor of that name.
Change = Callable[[Tensors, str, torch.Tensor], None]


def is_embedding(name: str) -> bool:
    return any(part in name.lower() for part in EMBEDDINGS)


def weight_files(model: str) -> list[Path]:
    return sorted((WEIGHTS / model).glob("*.safetensors"))


def copy_side_files(model: str, derived: str, dtype: str | None) -> None:
    for path in (WEIGHTS / model).glob("*"):
        if path.name.startswith(".") or path.name.endswith((".safetensors", ".index.json")):
            continue
        target = WEIGHTS / derived / path.name
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)
    config = WEIGHTS / derived / "config.json"
    if dtype and config.exists():
        values = json.loads(config.read_text())
        if "architectures" in values:
            values["torch_dtype"] = dtype
            config.write_text(json.dumps(values, indent=2))


def derive(model: str, derived: str, change: Change, dtype: str | None = None) -> None:
    (WEIGHTS / derived).mkdir(parents=True, exist_ok=True)
    copy_side_files(model, derived, dtype)
    weight_map = {}
    total = 0
    files = weight_files(model)
    for path in files:
        tensors: Tensors = {}
        with safe_open(path, "pt") as source:
            metadata = source.metadata() or {"format": "pt"}
            for name in source.keys():  # noqa: SIM118 - a safe_open is no dict
                change(tensors, name, source.get_tensor(name))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, str(WEIGHTS / derived / path.name), metadata=metadata)
        for name, tensor in tensors.items():
            weight_map[name] = path.name
            total += tensor.numel() * tensor.element_size()
            if tensor.dtype == torch.float16 and not torch.isfinite(tensor).all():
                print("  NOT FINITE after the cast:", derived, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (WEIGHTS / derived / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    print(derived, len(weight_map), "tensors", total, "bytes", flush=True)


def cast(model: str) -> None:
    def to(dtype: torch.dtype) -> Change:
        def change(out: Tensors, name: str, tensor: torch.Tensor) -> None:
            out[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor

        return change

    def to_fp8(out: Tensors, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_floating_point():
            out[name] = tensor
            return
        large = tensor.dim() >= 2 and tensor.numel() >= MIN_FP8_ELEMENTS
        if large and not is_embedding(name) and tensor.abs().max() > 0:
            values = tensor.float()
            scale = (values.abs().max() / FP8_MAX).float()
            out[name] = (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            out[name + "_scale"] = scale.reshape(1)
        else:
            out[name] = tensor.to(torch.bfloat16)

    with safe_open(weight_files(model)[0], "pt") as source:
        native = {source.get_slice(name).get_dtype() for name in source.keys()}  # noqa: SIM118
    if "BF16" not in native:
        derive(model, model + "-bf16", to(torch.bfloat16), "bfloat16")
    if "F16" not in native:
        derive(model, model + "-fp16", to(torch.float16), "float16")
    derive(model, model + "-fp8_e4m3", to_fp8)


def fine_tune(model: str) -> None:
    generator = torch.Generator().manual_seed(7)

    def change(out: Tensors, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_floating_point() or tensor.numel() < 2:
            out[name] = tensor
            return
        x = tensor.float()
        if tensor.dim() < 2:
            out[name] = (x * (1 + 1e-3 * torch.randn(x.shape, generator=generator))).to(tensor.dtype)
            return
        matrix = x.reshape(x.shape[0], -1)
        std = matrix.std()
        drift = torch.zeros_like(matrix)
        rows, columns = matrix.shape
        rank = min(16, rows, columns)
        # The draws below must stay in this order: the bytes of the sets depend on it.
        low_rank = torch.randn((rows, rank), generator=generator) @ torch.randn((rank, columns), generator=generator)
        drift += low_rank * (3e-3 * matrix.norm() / low_rank.norm().clamp_min(1e-30))
        drift += 1e-3 * std * torch.randn(matrix.shape, generator=generator)
        moved = torch.rand(matrix.shape, generator=generator) < 0.01
        drift[moved] += 1e-2 * std * torch.randn(int(moved.sum()), generator=generator)
        if is_embedding(name):
            drift[torch.rand(rows, generator=generator) > 0.25] = 0
        out[name] = (matrix + drift).reshape(x.shape).to(tensor.dtype)

    derive(model, model + "-ft", change)


def lora(model: str) -> None:
    generator = torch.Generator().manual_seed(8)

    def change(out: Tensors, name: str, tensor: torch.Tensor) -> None:
        if not any(part in name for part in ADAPTED):
            out[name] = tensor
            return
        x = tensor.float()
        left = torch.randn((x.shape[0], 8), generator=generator)
        low_rank = left @ torch.randn((8, x.shape[1]), generator=generator)
        out[name] = (x + low_rank * (1e-2 * x.norm() / low_rank.norm())).to(tensor.dtype)

    derive(model, model + "-lora", change)


def main() -> None:
    kinds = {"cast": cast, "ft": fine_tune, "lora": lora}
    if len(sys.argv) < 3 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    torch.set_num_threads(1)  # sums in one order, so the same bytes on every machine
    for model in sys.argv[2:]:
        kinds[sys.argv[1]](model)


if __name__ == "__main__":
    main()
