"""Writing a `.bs` file from tensors in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from bigsmall import _native, errors
from bigsmall._dtypes import LAYOUT_RANK, DType

MODES = {"balanced": 0, "inference": 1, "storage": 2}

FLAG_SHA256 = 1
FLAG_NO_REPLACE = 2
FLAG_FORCE = 4
FLAG_COMPAT_1_0 = 8

MOST_PARITY = 100


class TensorSpec(NamedTuple):
    """A tensor to be written. `shape` counts storage elements, as torch packs them."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        size = self.dtype.size
        for dimension in self.shape:
            size *= dimension
        return size


def mode_number(mode: str) -> int:
    """The bs_mode of "balanced", "inference" or "storage"; InvalidArgument for anything else."""
    number = MODES.get(mode)
    if number is None:
        raise errors.InvalidArgument(f"mode must be one of {', '.join(sorted(MODES))}, not {mode!r}")
    return number


def compress_options(mode: str, flags: int, parity: int = 0) -> Any:
    """A bs_compress_options. InvalidArgument for an unknown mode, or a parity that is no percentage from 0 to 100."""
    number = mode_number(mode)
    if not isinstance(parity, int) or not 0 <= parity <= MOST_PARITY:
        raise errors.InvalidArgument(
            f"parity must be a whole number of percent from 0 to {MOST_PARITY}, not {parity!r}"
        )
    ffi, _ = _native.library()
    options = ffi.new("bs_compress_options *")
    options.size = ffi.sizeof("bs_compress_options")
    options.mode = number
    options.flags = flags
    options.parity = parity
    return options


def compat_flag(compat: str | None) -> int:
    """The flag of a `compat`; InvalidArgument for anything but None and "1.0"."""
    if compat not in (None, "1.0"):
        raise errors.InvalidArgument(f'compat must be None or "1.0", not {compat!r}')
    return FLAG_COMPAT_1_0 if compat else 0


def in_layout_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The order in which safetensors lays tensors out: by dtype, the widest first, then by name."""
    return sorted(specs, key=lambda spec: (LAYOUT_RANK[spec.dtype], spec.name.encode("utf-8", "surrogatepass")))


class Writer:
    """A `.bs` file in the making, of exactly the tensors of `specs`; for one thread at a time.

    path     : of the file; it appears, whole, at `finish()`
    specs    : in the order of the file
    metadata : for the `__metadata__` of the safetensors header, strings to strings, or None
    mode     : "balanced", "inference" or "storage"
    parity   : percent, as in `compress`

    Use it in a `with` block: where it ends without `finish()`, nothing of the file remains.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        mode: str = "balanced",
        *,
        overwrite: bool = True,
        parity: int = 0,
    ) -> None:
        self.path = os.fsdecode(path)
        self.specs = list(specs)
        self._index = {spec.name: index for index, spec in enumerate(self.specs)}
        if len(self._index) != len(self.specs):
            raise errors.InvalidArgument("two tensors have the same name")
        options = compress_options(mode, 0 if overwrite else FLAG_NO_REPLACE, parity)
        ffi, lib = _native.library()
        alive = []  # what the structs point to, until the call is over
        structs = ffi.new("bs_tensor_spec[]", len(self.specs))
        for struct, spec in zip(structs, self.specs):
            name = ffi.new("char[]", _native.name_bytes(spec.name))
            shape = ffi.new("uint64_t[]", list(spec.shape))
            alive.append((name, shape))
            struct.size = ffi.sizeof("bs_tensor_spec")
            struct.name = name
            struct.dtype = spec.dtype.code
            struct.n_dims = len(spec.shape)
            struct.shape = shape
        raw = ffi.new("bs_writer **")
        error = ffi.new("bs_error *")
        status = lib.bs_writer_open(
            _native.path_bytes(self.path), structs, len(structs), _metadata_bytes(metadata), options, raw, error
        )
        _native.check(status, error, [self.path])
        self._handle: _native.Handle | None = _native.Handle(raw[0], lib.bs_writer_close)

    def _live(self) -> _native.Handle:
        if self._handle is None:
            raise errors.InvalidArgument(f"{self.path}: the writer is closed")
        if not self._handle.alive:
            raise errors.InternalError(
                f"{self.path}: a writer cannot be used in a child of the process that opened it", status=errors.FORKED
            )
        return self._handle

    def put(self, name: str, address: int, n_bytes: int, *, workers: int | None = None) -> None:
        """Compresses one tensor from memory, little-endian and in C order. Each is put once, in any order.

        InvalidArgument where n_bytes is not its size or it was put before, NotFound where no spec has that name.
        """
        index = self._index.get(name)
        if index is None:
            raise errors.NotFound(f"{self.path}: no tensor to be written is named {name!r}")
        handle = self._live()
        ffi, lib = _native.library()
        src = ffi.cast("void *", address) if n_bytes else ffi.NULL
        _native.call_long(
            lambda job, error: lib.bs_writer_put(handle.raw, index, src, n_bytes, job, error),
            workers=workers,
            n_bytes=n_bytes,
            paths=[self.path],
        )

    def finish(self) -> int:
        """Completes and publishes the file; returns its size in bytes. InvalidArgument where a tensor is missing."""
        handle = self._live()
        ffi, lib = _native.library()
        result = ffi.new("bs_result *")
        result.size = ffi.sizeof("bs_result")
        error = ffi.new("bs_error *")
        _native.check(lib.bs_writer_finish(handle.raw, result, error), error, [self.path])
        return int(result.output_bytes)

    def close(self) -> None:
        """Ends the writing. Closing twice is allowed."""
        self._handle = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _metadata_bytes(metadata: Mapping[str, str] | None) -> Any:
    if metadata is None:
        return _native.library().ffi.NULL
    if not isinstance(metadata, Mapping):
        raise errors.InvalidArgument(f"metadata must be a dict of strings to strings, not a {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise errors.InvalidArgument(f"metadata must map strings to strings, but {key!r} is {value!r}")
        _native.utf8(key, "the metadata key")
        _native.utf8(value, f"the metadata value of {key!r},")
    # NUL becomes \u0000 here, so the text can end with one.
    return json.dumps(dict(metadata), ensure_ascii=False).encode("utf-8")
