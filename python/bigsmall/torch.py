"""torch tensors from `.bs` files. Needs torch 2.0 or newer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from bigsmall import _native, errors
from bigsmall._dtypes import BY_NAME, F6_E2M3, F6_E3M2, DType
from bigsmall.reader import Destination, Reader, TensorInfo

try:
    import torch
except ModuleNotFoundError as missing:
    if missing.name != "torch":  # it is there but lacks something itself
        raise
    raise ModuleNotFoundError(
        "this needs torch, which is not installed: pip install bigsmall[torch]", name="torch"
    ) from missing

from bigsmall import placement  # it needs torch, whose absence is explained above

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


def empty(tensor: TensorInfo, shape: Sequence[int] | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
    """A fresh tensor for that tensor, or for a part of it of another shape, with undefined contents. Unsupported where
    this torch lacks the dtype, or has it on other devices only."""
    dtype = _torch_dtype(tensor)
    try:
        # Without a device it would go to the one that torch.set_default_device or a context manager says.
        return torch.empty(tuple(tensor.shape if shape is None else shape), dtype=dtype, device=device)
    except (TypeError, NotImplementedError) as error:
        raise errors.Unsupported(
            f"tensor {tensor.name!r} is {tensor.dtype.name}, which device {device} does not take "
            f'(device="cpu" does): {error}'
        ) from error


def address(tensor: torch.Tensor) -> int:
    """Address of the first element; 0 for a tensor without elements."""
    return int(tensor.data_ptr())


def stand_in(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of that shape without memory, to learn what an index does."""
    return torch.zeros((), dtype=torch.uint8, device="cpu").expand(tuple(shape))


def as_device(device: str | int | torch.device | None) -> torch.device:
    """The device of that name, None for the CPU, which is there and takes tensors; "cuda" is the current one of them.

    InvalidArgument where torch knows none of that name, or the machine has fewer of them; Unsupported where there is
    none at all, or this torch is not built for it.
    """
    try:
        target = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise errors.InvalidArgument(f"device {device} is invalid: {error}") from error
    if target.type == "cuda":
        _check_cuda(target)
        if target.index is None:  # now, since another thread may have another current device
            target = torch.device("cuda", torch.cuda.current_device())
    elif target.type not in ("cpu", "meta"):
        try:
            torch.empty(0, device=target)
        except (RuntimeError, AssertionError, ImportError) as error:  # so different are torch's backends
            raise errors.Unsupported(f'device {target} cannot be used; device="cpu" can: {error}') from error
    return target


def _check_cuda(device: torch.device) -> None:
    if torch.version.cuda is None and torch.version.hip is None:
        raise errors.Unsupported(
            f"device {device} cannot be used: this torch ({torch.__version__}) is built without CUDA. "
            'Install a CUDA build of torch and the driver of the GPU, or use device="cpu"'
        )
    if torch.cuda._is_in_bad_fork():
        raise errors.Unsupported(
            f"device {device} cannot be used: this process was forked from one that had used CUDA. "
            'Start it by spawn or forkserver, or use device="cpu"'
        )
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise errors.Unsupported(
            f"device {device} cannot be used: torch finds no CUDA device, or no driver that fits torch "
            f"{torch.__version__}{'' if hidden is None else f' (and CUDA_VISIBLE_DEVICES is {hidden!r})'}. "
            'Install the driver of the GPU and a CUDA build of torch, or use device="cpu"'
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise errors.InvalidArgument(
            f"device {device} is invalid: there {'is 1 CUDA device' if count == 1 else f'are {count} CUDA devices'} "
            "here, counted from cuda:0"
        )


def open_device(device: str | int | torch.device | None) -> torch.device:
    """`as_device` for safe_open, whose tensors have data: InvalidArgument for "meta"."""
    target = as_device(device)
    if target.type == "meta":
        raise errors.InvalidArgument(f"device {device} is invalid: bigsmall.load and get_shape() need no data")
    return target


def load(
    path: str | os.PathLike[str],
    device: str | int | torch.device = "cpu",
    *,
    base: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    verify: bool | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Decodes a `.bs` file, or a directory of them, to torch tensors: name to tensor, like safetensors' load_file.

    path    : `.bs` file or directory
    device  : where the tensors are to be; "meta" gives shapes and dtypes without data
    base    : the base model (`.safetensors`, `.bs` or directory) where the file is a delta
    workers : threads, None for all available
    verify  : True compares every tensor's MD5 too. The checksum of every block is always verified. Files of the
              original bigsmall package have none: there the MD5 is compared unless this is False

    Each tensor is fresh, writable memory of its own, also where the file stores two names once. Shapes are those of the
    source but for float4_e2m1fn_x2, whose last dimension is halved.

    A GPU decodes the tensors itself: their compressed bytes go there, by way of 4 to 128 MiB of page-locked and as much
    of its own memory, which torch keeps for the next time; `verify` copies the tensors back. Where the GPU cannot do so
    (one older than compute capability 7.5, one of ROCm without Triton) a warning says why, and tensors are decoded on
    the CPU and copied, as for every other device: by way of three buffers of 64 to 256 MiB, or less where less is
    needed.

    Raises OSError (FileNotFoundError, ...), Corrupt, Truncated, ChecksumMismatch, WrongBase, InvalidArgument where
    there is no such device, Unsupported where this torch lacks a dtype or this machine CUDA, or DeviceError where the
    GPU fails.
    """
    target = as_device(device)
    with Reader(path, base, check_md5=verify is not False) as reader:
        return read(reader, reader.tensors, target, workers=workers, verify=bool(verify), progress=progress)


def read(
    reader: Reader,
    tensors: Sequence[TensorInfo],
    device: torch.device,
    *,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Decodes whole tensors to a device, as `load` does. They are complete when this returns, for use on any stream.
    May be called from many threads at once."""
    target = as_device(device)
    tensors = list({tensor.name: tensor for tensor in tensors}.values())
    for tensor in tensors:
        _torch_dtype(tensor)  # before any work is done
    loaded = {tensor.name: empty(tensor, device=target) for tensor in tensors}
    if target.type == "cpu":
        _decode(reader, tensors, loaded, workers=workers, verify=verify, progress=progress)
    elif target.type != "meta":
        placement.decode(reader, tensors, loaded, target, workers=workers, verify=verify, progress=progress)
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
    label = "loading" if progress else None
    if not verify:
        reader.decode_many(destinations, workers=workers, progress=label)
        return
    with _native.bar(label, sum(destination.tensor.n_bytes for destination in destinations)) as bar:
        for destination in destinations:
            reader.decode_verified(destination, workers=workers)
            if bar is not None:
                bar.update(destination.tensor.n_bytes)


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
