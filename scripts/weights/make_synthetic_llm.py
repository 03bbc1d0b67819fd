#!/usr/bin/env python3
"""Makes a synthetic but realistic BF16 LLM-shaped checkpoint (Llama-like names and shapes).

    make_synthetic_llm.py [OUT] [--preset tiny|0.5b|1b|3b|8b] [--target-gb G] [--tie] [--shard-gb S]
                          [--dtype bf16|fp16|fp32] [--seed N]

Needs numpy and torch only; safetensors headers are written by hand (no safetensors import).

Weight model (per 2-D tensor): w[i,j] = r[i] * c[j] * s * x,  with
  x   a scale mixture: with prob 1-p Gaussian, with prob p Student-t(nu) (heavier tail, outliers),
  r   log-normal per output row (sigma_r), c log-normal per input column (sigma_c) with a few outlier columns,
  s   a per-tensor std, by kind and depth (residual-output projections shrink as 1/sqrt(2L)).
Embeddings have row scales with a wider spread (token frequency).  Norm weights are near 1 (growing with depth).
These give an order-0 exponent entropy of about 2.6 bits a weight, and sign and mantissa near-uniform,
so BF16 codes to about 66 % with an order-0 coder of the exponents, like published LLM figures
(Llama-3.1-8B about 65.7 %; DFloat11 about 68-70 %).
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch


class Config(NamedTuple):
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


class Spec(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: str
    layer: int


PRESETS = {
    "tiny": Config(512, 1408, 8, 8, 4, 32000),
    "0.5b": Config(1024, 3584, 24, 16, 8, 65536),
    "1b": Config(2048, 8192, 16, 32, 8, 128256),
    "3b": Config(3072, 8192, 28, 24, 8, 128256),
    "8b": Config(4096, 14336, 32, 32, 8, 128256),
}
STD = {
    "q_proj": 0.019,
    "k_proj": 0.022,
    "v_proj": 0.014,
    "o_proj": 0.0145,
    "gate_proj": 0.0175,
    "up_proj": 0.0165,
    "down_proj": 0.0165,
    "embed": 0.0150,
    "lm_head": 0.0155,
}
DTYPES = {
    "bf16": (torch.bfloat16, "BF16", 2, "bfloat16"),
    "fp16": (torch.float16, "F16", 2, "float16"),
    "fp32": (torch.float32, "F32", 4, "float32"),
}


def shapes(config: Config, layers: int, vocab: int, tie: bool) -> Iterator[Spec]:
    h, inter, _, heads, kv, _ = config
    head_dim = h // heads
    yield Spec("model.embed_tokens.weight", (vocab, h), "embed", 0)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        yield Spec(p + "input_layernorm.weight", (h,), "norm", layer)
        yield Spec(p + "mlp.down_proj.weight", (h, inter), "down_proj", layer)
        yield Spec(p + "mlp.gate_proj.weight", (inter, h), "gate_proj", layer)
        yield Spec(p + "mlp.up_proj.weight", (inter, h), "up_proj", layer)
        yield Spec(p + "post_attention_layernorm.weight", (h,), "norm", layer)
        yield Spec(p + "self_attn.k_proj.weight", (kv * head_dim, h), "k_proj", layer)
        yield Spec(p + "self_attn.o_proj.weight", (h, h), "o_proj", layer)
        yield Spec(p + "self_attn.q_proj.weight", (h, h), "q_proj", layer)
        yield Spec(p + "self_attn.v_proj.weight", (kv * head_dim, h), "v_proj", layer)
    yield Spec("model.norm.weight", (h,), "norm", layers)
    if not tie:
        yield Spec("lm_head.weight", (vocab, h), "lm_head", layers)


def draw(spec: Spec, layers: int, g: torch.Generator, args: argparse.Namespace) -> torch.Tensor:
    """The weights of one tensor. The draws must stay in this order: the bytes depend on it."""
    kind = spec.kind
    if kind == "norm":
        depth = spec.layer / max(1, layers)
        w = (0.35 + 0.6 * depth) + 0.06 * torch.randn(spec.shape, generator=g)
        massive = max(1, spec.shape[0] // 400)
        w[torch.randperm(spec.shape[0], generator=g)[:massive]] *= 1.8
        return w
    rows, columns = spec.shape
    base = STD[kind] * (2048 / (columns if kind not in ("embed", "lm_head") else 2048)) ** 0.25
    base *= math.exp(0.08 * float(torch.randn((), generator=g)))  # tensor-to-tensor spread
    if kind in ("o_proj", "down_proj"):
        base *= 1.15 - 0.25 * (1 - spec.layer / max(1, layers))
    sigma_row = args.sigma_row * (1.5 if kind in ("embed", "lm_head", "k_proj", "q_proj") else 1.0)
    r = torch.exp(sigma_row * torch.randn((rows, 1), generator=g))
    c = torch.exp(args.sigma_col * torch.randn((1, columns), generator=g))
    outliers = max(1, columns // 700)
    c[0, torch.randperm(columns, generator=g)[:outliers]] *= 2.5
    w = torch.empty(spec.shape)
    step = max(1, (1 << 23) // columns)
    for i in range(0, rows, step):
        n = min(step, rows - i)
        x = torch.randn((n, columns), generator=g)
        tail = torch.rand((n, columns), generator=g) < args.p_tail
        n_tail = int(tail.sum())
        if n_tail:  # Student-t(nu) = N / sqrt(chi2/nu), chi2 from nu squared normals
            chi2 = torch.randn((n_tail, args.nu), generator=g).square_().sum(1)
            x[tail] *= torch.rsqrt(chi2 / args.nu)
        w[i : i + n] = x
    return w.mul_(r).mul_(c).mul_(base)


def in_shards(specs: list[Spec], width: int, limit: float) -> list[list[Spec]]:
    """As Hugging Face cuts a model: filled greedily, in model order."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        n = math.prod(spec.shape) * width
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += n
    return shards


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "build" / "weights" / "synthetic-llm"
    parser.add_argument("out", nargs="?", type=Path, default=default, help="default: build/weights/synthetic-llm")
    parser.add_argument("--preset", default="1b", choices=PRESETS)
    parser.add_argument("--target-gb", type=float, help="cut layers (and vocabulary) to about this size (1e9 bytes)")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--tie", action="store_true")
    parser.add_argument("--shard-gb", type=float, default=0.3)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sigma-row", type=float, default=0.12)
    parser.add_argument("--sigma-col", type=float, default=0.07)
    parser.add_argument("--p-tail", type=float, default=0.05)
    parser.add_argument("--nu", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    config = PRESETS[args.preset]
    if args.vocab:
        config = config._replace(vocab=args.vocab)
    layers, vocab = config.layers, config.vocab
    dtype, dtype_name, width, torch_name = DTYPES[args.dtype]

    def total(n_layers: int, n_vocab: int) -> int:
        return sum(math.prod(spec.shape) * width for spec in shapes(config, n_layers, n_vocab, args.tie))

    if args.target_gb:
        target = args.target_gb * 1e9
        if total(4, vocab) > target:
            vocab = 32000
        layers = max(2, round((target - total(0, vocab)) / (total(2, vocab) - total(1, vocab))))
    args.out.mkdir(parents=True, exist_ok=True)
    specs = list(shapes(config, layers, vocab, args.tie))
    shards = in_shards(specs, width, args.shard_gb * 1e9)
    g = torch.Generator().manual_seed(args.seed)
    weight_map = {}
    written = 0
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in shard:
            n = math.prod(spec.shape) * width
            header[spec.name] = {"dtype": dtype_name, "shape": list(spec.shape), "data_offsets": [offset, offset + n]}
            offset += n
            weight_map[spec.name] = name
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        with open(args.out / name, "wb") as f:
            f.write(struct.pack("<Q", len(packed)))
            f.write(packed)
            for spec in shard:
                w = draw(spec, layers, g, args).to(dtype).contiguous()
                f.write(w.view(torch.int32 if width == 4 else torch.int16).numpy().tobytes())
        written += offset
        print(name, len(shard), "tensors", offset, flush=True)
    if len(shards) > 1:
        index = {"metadata": {"total_size": written}, "weight_map": weight_map}
        (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    settings = {**vars(args), "out": str(args.out)}
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden,
        "intermediate_size": config.inter,
        "num_hidden_layers": layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.hidden // config.heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": args.tie,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": torch_name,
        "_synthetic": settings,
    }
    (args.out / "config.json").write_text(json.dumps(llama, indent=2))
    print("total", written, "bytes", len(specs), "tensors", len(shards), "shards")


if __name__ == "__main__":
    main()
