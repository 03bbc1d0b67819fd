"""Decoding by a CUDA device of torch: the memory and the stream that the library works with there.

Everything that this asks of torch.cuda stands in the first few functions. Devices of ROCm are not for this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bigsmall import _native, errors
from bigsmall.reader import Destination, Reader, TensorInfo

# Bytes to stage through, in either memory: enough that reading, copying and decoding go on at once, and the least that
# is worth it.
_MOST_STAGED_BYTES = 128 << 20
_LEAST_STAGED_BYTES = 4 << 20


# ---- torch.cuda ------------------------------------------------------------------------------------------------------


def side_stream(device: torch.device) -> Any:
    """A stream that begins when what is queued on torch's current one has ended: torch gives out memory again that this
    still uses. What is queued there later goes on beside it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def current_stream(device: torch.device) -> Any:
    """Torch's current stream on a device; None on one that is no GPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def current_stream_number(device: torch.device) -> int:
    """Torch's current stream on a GPU, as the library takes it."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def is_capturing() -> bool:
    """Whether the current stream of the current GPU is being captured in a CUDA graph."""
    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes that the current one of this thread."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def page_locked(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Host memory that the device copies from the fastest. RuntimeError where the system grants none."""
    with torch.cuda.device(device):
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def device_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory of the device."""
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


@contextlib.contextmanager
def _current(stream: Any, device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device):
        # That may leave the thread without a context until the first call that needs one.
        stream.record_event()
        yield


# ---- what the library works with -------------------------------------------------------------------------------------


def unavailable(device: torch.device) -> str | None:
    """Why a CUDA device of torch does not decode, in words; None where it does, as far as can be told before."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm"
    return _native.why_no_cuda()


class Workspace:
    """A stream on a device and memory to stage through, page-locked and of the device, for calls of the library that do
    not run at the same time. The memory is of torch's allocators, which have it again when this is dropped.

    n_bytes : of the work, decoded: a small one gets less memory

    NoDevice where the device has no memory for it.
    """

    def __init__(self, device: torch.device, n_bytes: int) -> None:
        size = _LEAST_STAGED_BYTES
        while size < n_bytes and size < _MOST_STAGED_BYTES:
            size *= 2
        self._device = device
        self._there = _staged_on_device(size, device)
        self._here = _staged_on_host(size, device)
        self._stream = side_stream(device)  # after the memory was given out: until then others may queue work on it
        self.job = _native.cuda_job(self._stream.cuda_stream, _memory_of(self._here), _memory_of(self._there))

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Makes the device and its context the current ones of the thread that enters this."""
        return _current(self._stream, self._device)


def _staged_on_device(size: int, device: torch.device) -> torch.Tensor:
    while True:
        try:
            return device_memory(size, device)
        except torch.cuda.OutOfMemoryError as error:
            if size <= _LEAST_STAGED_BYTES:
                raise errors.NoDevice(f"device {device} has no {size >> 20} MiB left to stage through") from error
            size //= 2


def _staged_on_host(size: int, device: torch.device) -> torch.Tensor:
    try:
        return page_locked(size, device)
    except RuntimeError:  # the limit on locked memory of a user or a container, say; any memory does, only slower
        return torch.empty(size, dtype=torch.uint8, device="cpu")


def _memory_of(tensor: torch.Tensor) -> _native.Memory:
    return _native.Memory(tensor.data_ptr(), tensor.numel())


def decode(
    reader: Reader,
    tensors: Sequence[TensorInfo],
    into: Mapping[str, torch.Tensor],
    device: torch.device,
    *,
    workers: int | None = None,
    progress: str | None = None,
) -> None:
    """Decodes whole tensors to where `into`, name to tensor, has them: contiguous, on that device. All are complete
    when this returns, for use on any stream. Raises what Reader.decode_cuda raises."""
    workspace = Workspace(device, sum(tensor.n_bytes for tensor in tensors))
    places = [Destination(tensor, into[tensor.name].data_ptr()) for tensor in tensors]
    reader.decode_cuda(places, workspace, workers=workers, progress=progress)
