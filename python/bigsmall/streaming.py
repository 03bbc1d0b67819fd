"""`safe_open` for `.bs` files: the interface of safetensors.safe_open, decoding only what is asked for.

This file is not called safe_open.py, since a module `bigsmall.safe_open` would take the place of the class
`bigsmall.safe_open` as soon as anything imported it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from bigsmall import _native, _slices, errors
from bigsmall._dtypes import F4, PACKED
from bigsmall.reader import Reader, TensorInfo

_FRAMEWORKS = {"pt": "torch", "torch": "torch", "pytorch": "torch", "np": "numpy", "numpy": "numpy"}


@contextlib.contextmanager
def _safetensors_errors(*more: type[Exception]) -> Iterator[None]:
    """Lets our errors, and those of the classes `more`, out as ones that code written for safetensors catches."""
    caught: tuple[type[Exception], ...] = (errors.BigSmallError, *more)
    try:
        yield
    except caught as error:
        raise errors.as_safetensors(error) from error


class safe_open:
    """Opens a `.bs` file, or a directory of them as one model, and gives its tensors one by one.

    filename  : `.bs` file or directory
    framework : "pt" for torch tensors, "np" for numpy arrays (bfloat16 and float8 as dtypes of ml_dtypes)
    device    : of torch tensors, as a string or a CUDA index; None for the CPU
    backend   : accepted as by safetensors.safe_open, without effect
    base      : the base model where the file is a delta
    workers   : threads of a decode, None for all available

    Works as a context manager and without; may be used from many threads at once, in children of fork(), and, pickled,
    in other processes, such as the workers of a DataLoader.

    All errors are safetensors.SafetensorError too, where safetensors is installed, but those of an index that torch
    refuses (IndexError, ValueError, TypeError). A missing file is a FileNotFoundError.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: Any = "cpu",
        *,
        backend: str | None = None,
        base: str | os.PathLike[str] | None = None,
        workers: int | None = None,
    ) -> None:
        self._reader: Reader | None = None
        with _safetensors_errors():
            kind = _FRAMEWORKS.get(framework)
            if kind is None:
                raise errors.InvalidArgument(f"framework {framework} is invalid: use pt (torch) or np (numpy)")
            self._framework = _Framework(kind, device, workers)
            self._reader = Reader(filename, base)

    def _opened(self) -> Reader:
        if self._reader is None:
            raise errors.InvalidArgument("File is closed")
        return self._reader

    def _find(self, reader: Reader, name: str) -> TensorInfo:
        try:
            return reader.find(name)
        except errors.NotFound:
            raise errors.NotFound(f"File does not contain tensor {name}") from None

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.offset_keys())

    def offset_keys(self) -> list[str]:
        """Names of the tensors in the order of the file, the fastest to read them in."""
        with _safetensors_errors():
            return [tensor.name for tensor in self._opened().tensors]

    def metadata(self) -> dict[str, str] | None:
        """The `__metadata__` of the source, or None."""
        with _safetensors_errors():
            return self._opened().metadata()

    def get_tensor(self, name: str) -> Any:
        """The whole tensor, in fresh memory. float4_e2m1fn_x2 has its last dimension halved, as torch packs it; numpy
        has it as uint8, and the float6 types as uint8 of shape [bytes]."""
        with _safetensors_errors():
            reader = self._opened()
            tensor = self._find(reader, name)
            return self._framework.read(reader, [tensor])[name]

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """All tensors, or those of these names, decoded at once over all workers."""
        with _safetensors_errors():
            reader = self._opened()
            tensors = reader.tensors if names is None else [self._find(reader, name) for name in names]
            return self._framework.read(reader, tensors)

    def get_slice(self, name: str) -> TensorSlice:
        """A stand-in for the tensor that decodes what it is indexed with. It may be used after the file is closed."""
        with _safetensors_errors():
            reader = self._opened()
            return TensorSlice(reader, self._find(reader, name), self._framework)

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Slices may go on using the reader, which closes with its last user.
        self._reader = None


class TensorSlice:
    """One tensor of a file; indexing it decodes only the blocks that hold the selected elements.

    Integers, slices with a positive step, `...` and None are planned; any other index (lists, masks, tensors) is
    applied to the whole tensor. Two types cannot be cut everywhere: the last dimension of float4_e2m1fn_x2 only by
    slices without step at even positions, counted in values, and the float6 types not at all.
    """

    def __init__(self, reader: Reader, tensor: TensorInfo, framework: _Framework) -> None:
        self._reader = reader
        self._tensor = tensor
        self._framework = framework

    def get_shape(self) -> list[int]:
        """The shape in the safetensors header, which counts values also where several share a byte."""
        with _safetensors_errors():
            return list(self._reader.logical_shape(self._tensor))

    def get_dtype(self) -> str:
        """The dtype as safetensors spells it, such as "BF16"."""
        return self._tensor.dtype.safetensors

    @property
    def shape(self) -> tuple[int, ...]:
        """`get_shape()` as a tuple."""
        return tuple(self.get_shape())

    @property
    def dtype(self) -> Any:
        """The dtype that `[...]` has: a torch.dtype or a numpy.dtype."""
        with _safetensors_errors():
            return self._framework.module.empty(self._tensor, (0,)).dtype

    def __getitem__(self, index: Any) -> Any:
        with _safetensors_errors(*self._framework.index_errors):
            packed = self._tensor.dtype in PACKED
            shape = self._reader.logical_shape(self._tensor)
            if _slices.is_basic(index):
                # The framework raises here what it raises for that index, before anything is decoded.
                self._framework.module.stand_in(shape)[index]
            selection = _slices.select(index, shape)
            if packed:
                selection = self._in_storage(index, shape, selection)
            if selection is None:
                return self._framework.read(self._reader, [self._tensor])[self._tensor.name][index]
            if _is_whole(selection, self._tensor.shape):  # which a GPU decodes by itself
                return self._framework.read(self._reader, [self._tensor])[self._tensor.name]
            return self._framework.read_part(self._reader, self._tensor, selection)

    def _in_storage(self, index: Any, shape: tuple[int, ...], selection: _slices.Selection | None) -> _slices.Selection:
        """The storage elements for a selection of the values of a packed tensor."""
        stored = self._tensor.shape
        if selection is not None:
            if _is_whole(selection, shape):
                return _slices.Selection(tuple(range(size) for size in stored), stored, tuple(range(len(stored))))
            # The last dimension must be the last of the result too: it is the one that is halved.
            if self._tensor.dtype == F4 and len(stored) == len(shape) and selection.sources[-1:] == (len(shape) - 1,):
                last = selection.ranges[-1]
                if last.step == 1 and last.start % 2 == 0 and len(last) % 2 == 0:
                    halved = range(last.start // 2, last.start // 2 + len(last) // 2)
                    return selection._replace(
                        ranges=(*selection.ranges[:-1], halved), shape=(*selection.shape[:-1], len(halved))
                    )
        raise errors.InvalidArgument(
            f"tensor {self._tensor.name!r} is {self.get_dtype()}, whose values share bytes: "
            f"it cannot be cut by {index!r}"
        )


def _is_whole(selection: _slices.Selection, shape: tuple[int, ...]) -> bool:
    return selection.shape == shape and selection.ranges == tuple(range(size) for size in shape)


_Slice = TypeVar("_Slice", bound=TensorSlice)


def torch_slices(reader: Reader, kind: type[_Slice], device: Any = "cpu") -> dict[str, _Slice]:
    """A slice of that class for each tensor, in the order of the file, that gives tensors on a device. They share the
    reader, which closes with the last of them. Their errors are as those of safe_open."""
    framework = _Framework("torch", device, None)
    return {tensor.name: kind(reader, tensor, framework) for tensor in reader.tensors}


class _Framework:
    """numpy or torch, behind the few functions that both modules have."""

    def __init__(self, kind: str, device: Any, workers: int | None) -> None:
        self.kind = kind
        self.workers = workers
        self.module: Any
        self.device: Any = None
        # What is a SafetensorError too where an index raises it: safetensors slices for numpy by itself, and leaves it
        # to torch otherwise.
        self.index_errors: tuple[type[Exception], ...] = ()
        if kind == "numpy":
            self.index_errors = (IndexError, ValueError)
            self.module = importlib.import_module("bigsmall.numpy")
            return
        try:
            self.module = importlib.import_module("bigsmall.torch")
        except ModuleNotFoundError as error:
            raise errors.Unsupported(f"framework pt: {error}") from error
        self.device = self.module.open_device(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Framework, (self.kind, self.device, self.workers)  # a module cannot be pickled

    def read(self, reader: Reader, tensors: Sequence[TensorInfo]) -> dict[str, Any]:
        """Whole tensors, on the device."""
        if self.kind == "numpy":
            arrays: dict[str, Any] = self.module.read(reader, tensors, workers=self.workers)
            return arrays
        loaded: dict[str, Any] = self.module.read(reader, tensors, self.device, workers=self.workers)
        return loaded

    def read_part(self, reader: Reader, tensor: TensorInfo, selection: _slices.Selection) -> Any:
        """The selected elements of one tensor, in fresh memory on the device."""
        made = self.module.empty(tensor, selection.shape)
        size = tensor.dtype.size
        count = math.prod(selection.shape)
        if count:
            plain = np.dtype(f"u{size}")
            memory = np.frombuffer(_native.buffer_at(self.module.address(made), count * size), dtype=plain)
            out = memory.reshape([len(positions) for positions in selection.ranges])

            def fetch(first: int, part: np.ndarray[Any, Any]) -> None:
                where = part.__array_interface__["data"][0]
                reader.decode_range(tensor, first, part.size, where, workers=self.workers)

            _slices.gather(fetch, tensor.shape, selection.ranges, out)
        return made if self.device is None else made.to(self.device)
