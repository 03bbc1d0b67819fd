"""The element types of bigsmall.h under their three names: bs_dtype number, torch's name, safetensors' spelling."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One element type. `size` is the bytes of one element as stored, 1 for the packed types."""

    code: int
    name: str
    safetensors: str
    size: int


F4 = DType(20, "float4_e2m1fn_x2", "F4", 1)
F6_E2M3 = DType(21, "float6_e2m3fn", "F6_E2M3", 1)
F6_E3M2 = DType(22, "float6_e3m2fn", "F6_E3M2", 1)

DTYPES = (
    DType(1, "bool", "BOOL", 1),
    DType(2, "uint8", "U8", 1),
    DType(3, "int8", "I8", 1),
    DType(4, "uint16", "U16", 2),
    DType(5, "int16", "I16", 2),
    DType(6, "uint32", "U32", 4),
    DType(7, "int32", "I32", 4),
    DType(8, "uint64", "U64", 8),
    DType(9, "int64", "I64", 8),
    DType(10, "float16", "F16", 2),
    DType(11, "bfloat16", "BF16", 2),
    DType(12, "float32", "F32", 4),
    DType(13, "float64", "F64", 8),
    DType(14, "complex64", "C64", 8),
    DType(15, "float8_e4m3fn", "F8_E4M3", 1),
    DType(16, "float8_e5m2", "F8_E5M2", 1),
    DType(17, "float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    DType(18, "float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
    DType(19, "float8_e8m0fnu", "F8_E8M0", 1),
    F4,
    F6_E2M3,
    F6_E3M2,
)

BY_CODE = {dtype.code: dtype for dtype in DTYPES}
BY_NAME = {dtype.name: dtype for dtype in DTYPES}

# Types that numpy and torch see as bytes, more than one value in each or one value over several.
PACKED = frozenset((F4, F6_E2M3, F6_E3M2))

# The order in which safetensors lays tensors out: by this rank, widest first, then by name.
# fmt: off
_LAYOUT = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)
# fmt: on
LAYOUT_RANK = {dtype: _LAYOUT.index(dtype.safetensors) for dtype in DTYPES}
