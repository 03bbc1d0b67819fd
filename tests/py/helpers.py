"""Plain tools of the tests: `.safetensors` files written by hand, and scripts run under a hard time limit."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
HEADER = REPOSITORY / "include" / "bigsmall.h"

MODES = ("balanced", "inference", "storage")

# safetensors' spelling: bits of a value, torch's name.
DTYPES = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, "float6_e2m3fn"),
    "F6_E3M2": (6, "float6_e3m2fn"),
}

# Name to (dtype as safetensors spells it, shape in its header, bytes).
Tensors = "dict[str, tuple[str, tuple[int, ...], bytes]]"


def n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = DTYPES[dtype][0] * math.prod(shape)
    assert bits % 8 == 0
    return bits // 8


def storage_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under which bigsmall gives a tensor."""
    if dtype == "F4":
        return (*shape[:-1], shape[-1] // 2)
    if dtype.startswith("F6_"):
        return (n_bytes(dtype, shape),)
    return shape


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Writes the file with the tensors in the order of the dict."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        assert len(data) == n_bytes(dtype, shape), name
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return path


def bfloat16(values: Any) -> bytes:
    """float32 values, cut to bfloat16."""
    return (np.ascontiguousarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()


def weights(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    """float32 values spread like those of a trained layer."""
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype("<f4")


def every_dtype(shape: tuple[int, ...] = (6, 40, 8), seed: int = 0) -> Tensors:
    """One tensor of each dtype, of random bits (0 and 1 for booleans)."""
    random = np.random.default_rng(seed)
    tensors = {}
    for dtype in DTYPES:
        data = random.integers(0, 2 if dtype == "BOOL" else 256, n_bytes(dtype, shape), dtype=np.uint8).tobytes()
        tensors[f"tensor.{dtype}"] = (dtype, shape, data)
    return tensors


def array_bytes(array: Any) -> bytes:
    """The bytes of a numpy array or torch tensor in C order."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    import torch

    if "float4" in str(array.dtype):  # which torch 2.8 cannot copy
        array = array.view(torch.uint8)
    # A copy, since one element may have any stride and still count as contiguous.
    flat = array.flatten().clone(memory_format=torch.contiguous_format)
    return bytes(flat.view(torch.uint8).numpy()) if array.numel() else b""


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` and its bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def v1_file(
    tensors: list[dict[str, Any]], data: bytes = b"", *, version: int = 1, header: bytes | None = None
) -> bytes:
    """A container as the first release of the original package wrote them, which is simple enough to write by hand."""
    if header is None:
        fields = {
            "format": "bf16",
            "mode": "balanced",
            "model_type": "llm",
            "base_model": None,
            "tensor_count": len(tensors),
            "tensors": tensors,
            "safetensors_metadata": None,
        }
        header = json.dumps(fields, separators=(",", ":")).encode()
    return b"BGSM" + struct.pack("<HI", version, len(header)) + header + data


def v1_tensor(name: str, **fields: Any) -> dict[str, Any]:
    """The entry of a tensor without elements, but for the fields given."""
    return {
        "name": name,
        "shape": [0],
        "dtype": "bfloat16",
        "codec": "bf16_se_ac",
        "special": None,
        "compressed_bytes": 0,
        "offset": 0,
        "md5": "d41d8cd98f00b204e9800998ecf8427e",
        "extra": None,
        **fields,
    }


def run_script(code: str, *args: object, timeout: float = 90, env: dict[str, str] | None = None) -> str:
    """Runs Python code in a process of its own, which is killed with its children at the time limit. Returns what it
    printed; fails where its exit code is not 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"the script hung; it printed:\n{output}") from None
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output}"
    return output
