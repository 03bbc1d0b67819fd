"""numpy arrays from and to `.bs` files."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from bigsmall import errors
from bigsmall._dtypes import DTYPES, PACKED, DType
from bigsmall.reader import Destination, Reader, TensorInfo
from bigsmall.writer import TensorSpec, Writer, in_layout_order

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    Array = np.ndarray[Any, Any]


def _numpy_dtype(dtype: DType) -> np.dtype[Any]:
    if dtype in PACKED:
        return np.dtype(np.uint8)
    if hasattr(ml_dtypes, dtype.name):
        made: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype.name))
        return made
    return np.dtype(dtype.name)


_TO_NUMPY = {dtype: _numpy_dtype(dtype) for dtype in DTYPES}
_FROM_NUMPY = {numpy_dtype: dtype for dtype, numpy_dtype in _TO_NUMPY.items() if dtype not in PACKED}

# ---- decoding --------------------------------------------------------------------------------------------------------


def empty(tensor: TensorInfo, shape: Sequence[int] | None = None) -> Array:
    """A fresh, writable array for that tensor, or for a part of it of another shape, with undefined contents.

    bfloat16 and the float8 types have the dtypes of ml_dtypes. The packed types are uint8: float4_e2m1fn_x2 with two
    values a byte and its last dimension halved, as torch packs it, the float6 types as [bytes].
    """
    return np.empty(tensor.shape if shape is None else tuple(shape), dtype=_TO_NUMPY[tensor.dtype])


def address(array: Array) -> int:
    """Address of the first element."""
    return int(array.__array_interface__["data"][0])


def stand_in(shape: Sequence[int]) -> Array:
    """An array of that shape without memory, to learn what an index does."""
    return np.broadcast_to(np.zeros((), dtype=np.uint8), tuple(shape))


def read(
    reader: Reader, tensors: Iterable[TensorInfo], *, workers: int | None = None, progress: str | None = None
) -> dict[str, Array]:
    """Decodes whole tensors into fresh arrays, which own their memory."""
    arrays = {}
    destinations = []
    for tensor in tensors:
        array = arrays[tensor.name] = empty(tensor)
        destinations.append(Destination(tensor, address(array)))
    reader.decode_many(destinations, workers=workers, progress=progress)
    return arrays


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_file(
    tensors: Mapping[str, Array | torch.Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    mode: str = "balanced",
    workers: int | None = None,
    *,
    parity: int = 0,
) -> None:
    """Compresses tensors in memory to a `.bs` file.

    tensors  : name to numpy array or torch tensor, of any shape and strides, on any device. Dtypes are those of
               safetensors, among them the bfloat16 and float8 types of ml_dtypes; big-endian arrays are converted
    path     : of the file; an existing one is replaced once the new one is complete
    metadata : for the `__metadata__` of the safetensors header, strings to strings
    mode     : "balanced", "inference" (fastest decoding) or "storage" (smallest file)
    workers  : threads, None for all available
    parity   : percent of the file, 0 to 100, that is added so that `repair` can mend as much damage

    ValueError names the tensor whose dtype safetensors cannot hold. OSError where the file cannot be written.
    """
    specs = in_layout_order([_spec(name, tensor) for name, tensor in tensors.items()])
    with Writer(path, specs, metadata, mode, parity=parity) as writer:
        for spec in specs:
            tensor = tensors[spec.name]
            # A copy, where one is needed, lives for one tensor only.
            source: Any
            if _is_torch(tensor):
                from bigsmall import torch as bigsmall_torch

                source = bigsmall_torch.contiguous(tensor)
                where = source.data_ptr()
            else:
                source = _contiguous(tensor)
                where = address(source)
            writer.put(spec.name, where, spec.n_bytes, workers=workers)
        writer.finish()


def _is_torch(tensor: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def _spec(name: str, tensor: Any) -> TensorSpec:
    if not isinstance(name, str):
        raise errors.InvalidArgument(f"a tensor's name must be a string, not {name!r}")
    if name == "__metadata__":
        raise errors.InvalidArgument("a tensor cannot be named '__metadata__': safetensors keeps its metadata there")
    if _is_torch(tensor):
        from bigsmall import torch as bigsmall_torch

        return TensorSpec(name, bigsmall_torch.storable_dtype(name, tensor), tuple(tensor.shape))
    if not isinstance(tensor, (np.ndarray, np.generic)):
        raise errors.InvalidArgument(f"tensor {name!r} is a {type(tensor).__name__}, not a numpy array or torch tensor")
    dtype = _FROM_NUMPY.get(tensor.dtype.newbyteorder("="))
    if dtype is None:
        raise errors.InvalidArgument(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
    return TensorSpec(name, dtype, tensor.shape)


def _contiguous(array: Any) -> Array:
    # Not np.ascontiguousarray, which makes a scalar one-dimensional.
    little = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    made: Array = np.asarray(array, dtype=little, order="C")
    return made
