"""torch tensors from `.bs` files. Needs torch 2.0 or newer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from bigsmall import errors
from bigsmall._dtypes import BY_NAME, F6_E2M3, F6_E3M2, DType
from bigsmall.reader import Destination, Reader, TensorInfo, split_by_bytes

try:
    import torch
except ModuleNotFoundError as missing:
    if missing.name != "torch":  # it is there but lacks something itself
        raise
    raise ModuleNotFoundError(
        "this needs torch, which is not installed: pip install bigsmall[torch]", name="torch"
    ) from missing

# First torch release with each dtype that 2.0 lacks.
_SINCE = {
    "float8_e4m3fn": "2.1",
    "float8_e5m2": "2.1",
    "float8_e4m3fnuz": "2.2",
    "float8_e5m2fnuz": "2.2",
    "uint16": "2.3",
    "uint32": "2.3",
    "uint64": "2.3",
    "float8_e8m0fnu": "2.7",
    "float4_e2m1fn_x2": "2.8",
}

# Bytes on their way to another device; enough for all workers to be busy, little beside a model.
_IN_FLIGHT_BYTES = 512 << 20


def _torch_dtype(tensor: TensorInfo) -> torch.dtype:
    name = tensor.dtype.name
    dtype = getattr(torch, name, None)
    if isinstance(dtype, torch.dtype):
        return dtype
    if tensor.dtype in (F6_E2M3, F6_E3M2):
        raise errors.Unsupported(
            f"tensor {tensor.name!r} is {tensor.dtype.safetensors}, which torch does not have; "
            "bigsmall.decompress gives its bytes"
        )
    raise errors.Unsupported(
        f"tensor {tensor.name!r} is {name}, which torch {torch.__version__} lacks: torch {_SINCE[name]} has it"
    )


# ---- decoding --------------------------------------------------------------------------------------------------------


def empty(tensor: TensorInfo, shape: Sequence[int] | None = None, *, pinned: bool = False) -> torch.Tensor:
    """A fresh tensor in main memory for that tensor, or for a part of it of another shape, with undefined contents.
    Unsupported where this torch lacks the dtype."""
    dtype = _torch_dtype(tensor)
    return torch.empty(tuple(tensor.shape if shape is None else shape), dtype=dtype, pin_memory=pinned)


def address(tensor: torch.Tensor) -> int:
    """Address of the first element; 0 for a tensor without elements."""
    return int(tensor.data_ptr())


def stand_in(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of that shape without memory, to learn what an index does."""
    return torch.zeros((), dtype=torch.uint8).expand(tuple(shape))


def open_device(device: str | int | torch.device | None) -> torch.device:
    """The device that safe_open is given, None for the CPU; InvalidArgument where torch knows none of that name."""
    try:
        target = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise errors.InvalidArgument(f"device {device} is invalid: {error}") from error
    if target.type == "meta":
        raise errors.InvalidArgument(f"device {device} is invalid: bigsmall.load and get_shape() need no data")
    return target


def load(
    path: str | os.PathLike[str],
    device: str | int | torch.device = "cpu",
    *,
    base: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Decodes a `.bs` file, or a directory of them, to torch tensors: name to tensor, like safetensors' load_file.

    path    : `.bs` file or directory
    device  : where the tensors are to be; "meta" gives shapes and dtypes without data
    base    : the base model (`.safetensors`, `.bs` or directory) where the file is a delta
    workers : threads, None for all available
    verify  : compare every tensor's MD5 too. The checksum of every block is always verified

    Each tensor is fresh, writable memory of its own, also where the file stores two names once. Shapes are those of the
    source but for float4_e2m1fn_x2, whose last dimension is halved.

    Raises OSError (FileNotFoundError, ...), Corrupt, Truncated, ChecksumMismatch, WrongBase, or Unsupported where this
    torch lacks a dtype.
    """
    target = torch.device(device)
    with Reader(path, base) as reader:
        return read(reader, reader.tensors, target, workers=workers, verify=verify, progress=progress)


def read(
    reader: Reader,
    tensors: Sequence[TensorInfo],
    device: torch.device,
    *,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Decodes whole tensors to a device."""
    if device.type == "meta":
        return {tensor.name: torch.empty(tensor.shape, dtype=_torch_dtype(tensor), device=device) for tensor in tensors}
    for tensor in tensors:
        _torch_dtype(tensor)  # before any work is done
    if device.type == "cpu":
        loaded = {tensor.name: empty(tensor) for tensor in tensors}
        _decode(reader, tensors, loaded, workers=workers, verify=verify, progress=progress)
        return loaded
    loaded = {}
    for group in split_by_bytes(tensors, _IN_FLIGHT_BYTES):
        staged = {tensor.name: empty(tensor, pinned=device.type == "cuda") for tensor in group}
        _decode(reader, group, staged, workers=workers, verify=verify, progress=progress)
        loaded.update({name: tensor.to(device) for name, tensor in staged.items()})
    return loaded


def _decode(
    reader: Reader,
    tensors: Iterable[TensorInfo],
    into: dict[str, torch.Tensor],
    *,
    workers: int | None,
    verify: bool,
    progress: bool,
) -> None:
    destinations = [Destination(tensor, address(into[tensor.name])) for tensor in tensors]
    if verify:
        for destination in destinations:
            reader.decode_verified(destination, workers=workers)
    else:
        reader.decode_many(destinations, workers=workers, progress="loading" if progress else None)


# ---- writing ---------------------------------------------------------------------------------------------------------


def storable_dtype(name: str, tensor: torch.Tensor) -> DType:
    """The dtype as which save_file stores a tensor; InvalidArgument where safetensors cannot hold it."""
    dtype = BY_NAME.get(str(tensor.dtype).replace("torch.", ""))
    if dtype is None:
        raise errors.InvalidArgument(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
    if tensor.layout != torch.strided:
        raise errors.InvalidArgument(f"tensor {name!r} has layout {tensor.layout}: make it dense first")
    if tensor.device.type == "meta":
        raise errors.InvalidArgument(f"tensor {name!r} is on the meta device and has no data")
    return dtype


def contiguous(tensor: Any) -> Any:
    """The tensor's values in main memory in C order; itself where they are there already."""
    # A conjugated or negated view keeps the plain values in memory and a flag beside them.
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
