"""An open `.bs` file or directory: what is in it, and its tensors decoded into memory of the caller."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from bigsmall import _native, errors
from bigsmall._dtypes import BY_CODE, PACKED, DType


class TensorInfo(NamedTuple):
    """One tensor of a file, where it has the number `position`. `shape` counts storage elements: float4_e2m1fn_x2 has
    its last dimension halved, as torch packs it, and the float6 types are [bytes]."""

    position: int
    name: str
    dtype: DType
    shape: tuple[int, ...]
    n_bytes: int


class Destination(NamedTuple):
    """Memory for one whole tensor: `address` of at least n_bytes bytes, which the caller keeps alive."""

    tensor: TensorInfo
    address: int


class Span(NamedTuple):
    """Compressed bytes of a tensor: `n_bytes` of them at `offset` of file number `file`."""

    file: int
    offset: int
    n_bytes: int


class Parts(Protocol):
    """Files of one model of which only parts are in memory at a time."""

    @property
    def label(self) -> str:
        """What messages call the model."""

    @property
    def files(self) -> Sequence[tuple[str, Any]]:
        """Name and memory of each file; the memory is as long as the file."""

    def hold(
        self, spans: Sequence[Span], stop: threading.Event | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Brings these bytes into memory, and keeps them there until the context ends; from any thread. Where `stop` is
        set from another one meanwhile, it may give up by any exception."""


class Workspace(Protocol):
    """What a call works with on a CUDA device; bigsmall.cuda has it for torch's devices."""

    @property
    def job(self) -> Any:
        """A bs_cuda_job, as _native.cuda_job makes it."""

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Makes the device the current one of the thread that enters this, which is the one that makes the call."""


# Compressed bytes of Parts that are brought in at once; the next so many come while these are decoded.
_FETCH_BYTES = 64 << 20


class _Fetch:
    """Parts.hold on a thread of its own. Nobody waits for one that is abandoned, which may stand in a slow network."""

    def __init__(self, parts: Parts, spans: Sequence[Span]) -> None:
        self._holding = contextlib.ExitStack()
        self._failure: BaseException | None = None
        self._stop, self._done, self._lock = threading.Event(), _native.Bell(), threading.Lock()
        threading.Thread(target=self._run, args=(parts, spans), name="bigsmall-fetch", daemon=True).start()

    def _run(self, parts: Parts, spans: Sequence[Span]) -> None:
        try:
            self._holding.enter_context(parts.hold(spans, self._stop))
        except BaseException as error:  # raised again in the thread that waits
            self._failure = error
        with self._lock:
            self._done.ring()
            if self._stop.is_set():
                self._holding.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the bytes, and lets them go at the end of the context."""
        self._done.wait()
        if self._failure is not None:
            raise self._failure
        with self._holding:
            yield

    def abandon(self) -> None:
        with self._lock:
            self._stop.set()
            if self._done.rung:
                self._holding.close()


class Reader:
    """An open `.bs` file, or a directory of them as one model.

    path : `.bs` file or directory
    base : the base model (`.safetensors`, `.bs` or directory) where the file is a delta
    check_md5 : False leaves out the comparison of MD5s where files of the original bigsmall package are decoded, which
                have no other checksum

    All methods may be called from many threads at once. After a fork() the child opens the file again by itself at the
    next call, and other processes do when they are sent the reader by pickle. Opening raises OSError
    (FileNotFoundError, ...), Corrupt, Truncated, Unsupported or WrongBase.
    """

    _check_md5 = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        *,
        check_md5: bool = True,
    ) -> None:
        self._check_md5 = check_md5
        self.path = os.fsdecode(path)
        self.base = None if base is None else os.fsdecode(base)
        self._files: Sequence[tuple[str, Any]] | None = None  # name and memory of each file, where they lie there
        self._parts: Parts | None = None
        self._open()

    # ---- opening, and opening again in a child of fork() ----

    @classmethod
    def from_memory(cls, data: Any) -> Reader:
        """Opens a whole `.bs` file that lies in memory: bytes, or any object with a contiguous buffer, which must not
        change while the reader is open."""
        reader = cls.__new__(cls)
        reader.path, reader.base = "<memory>", None
        reader._files, reader._parts = [("", data)], None
        reader._open()
        return reader

    @classmethod
    def from_parts(cls, parts: Parts, base: str | os.PathLike[str] | None = None) -> Reader:
        """Opens files of which all but the payloads lies in memory, and those as they are needed."""
        reader = cls.__new__(cls)
        reader.path = parts.label
        reader.base = None if base is None else os.fsdecode(base)
        reader._files, reader._parts = parts.files, parts
        reader._open()
        return reader

    def _open(self) -> None:
        self._tensors: list[TensorInfo] | None = None
        self._by_name: dict[str, TensorInfo] | None = None
        self._info: dict[str, Any] | None = None
        self._handle: _native.Handle | None = self._opened(self.path, self.base)
        # A child may have changed its working directory.
        self._path_again = os.path.abspath(self.path)
        self._base_again = None if self.base is None else os.path.abspath(self.base)
        self._identity = self._stat()

    def _opened(self, path: str, base: str | None) -> _native.Handle:
        ffi, lib = _native.library()
        raw = ffi.new("bs_reader **")
        error = ffi.new("bs_error *")
        c_base = ffi.NULL if base is None else ffi.new("char[]", _native.path_bytes(base))
        sources = []
        if self._files is not None:
            names = [ffi.new("char[]", _native.name_bytes(name)) for name, _ in self._files]
            sources = [ffi.from_buffer(data) for _, data in self._files]
            structs = ffi.new("bs_memory_file[]", len(sources))
            for struct, name, source in zip(structs, names, sources):
                struct.size = ffi.sizeof("bs_memory_file")
                struct.name, struct.src, struct.src_len = name, source, len(source)
            status = lib.bs_reader_open_memory(structs, len(structs), c_base, raw, error)
        else:
            status = lib.bs_reader_open(_native.path_bytes(path), c_base, raw, error)
        _native.check(status, error, [path] if base is None else [path, base])
        handle = _native.Handle(raw[0], lib.bs_reader_close, sources)
        if not self._check_md5:
            _native.check(lib.bs_reader_skip_md5(handle.raw, 1, error), error)
        return handle

    def _stat(self) -> tuple[int, ...]:
        if self._files is not None:
            return ()
        stat = os.stat(self._path_again)
        return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _live(self) -> _native.Handle:
        """The handle. The caller keeps it in a local variable during its call, so that a close elsewhere waits."""
        handle = self._handle
        if handle is None:
            raise errors.InvalidArgument(f"{self.path}: the reader is closed")
        if not handle.alive:
            # What is known of the tensors came from the parent's handle, and must fit the file that is opened here.
            if self._stat() != self._identity:
                raise errors.InvalidArgument(f"{self.path} has changed since it was opened, before this process forked")
            handle = self._handle = self._opened(self._path_again, self._base_again)
        return handle

    def __getstate__(self) -> tuple[str, str | None, tuple[int, ...], bool]:
        """For worker processes that do not fork: the path, which they open again."""
        if self._files is not None:
            raise TypeError(f"{self.path}: a reader of memory or of a Hub cannot be pickled: open it in each process")
        self._live()
        return self._path_again, self._base_again, self._identity, self._check_md5

    def __setstate__(self, state: tuple[str, str | None, tuple[int, ...], bool]) -> None:
        self.path, self.base, identity, self._check_md5 = state
        self._files = self._parts = None
        self._open()
        if self._identity != identity:
            raise errors.InvalidArgument(f"{self.path} has changed since the reader was pickled")

    # ---- what is in it ----

    def _count(self) -> int:
        handle = self._live()
        ffi, lib = _native.library()
        count = ffi.new("uint64_t *")
        error = ffi.new("bs_error *")
        _native.check(lib.bs_reader_count(handle.raw, count, error), error)
        return int(count[0])

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors, in the order of the file."""
        if self._tensors is None:
            self._tensors = self._list_tensors()
        return self._tensors

    def _list_tensors(self) -> list[TensorInfo]:
        handle = self._live()
        ffi, lib = _native.library()
        error = ffi.new("bs_error *")
        described = ffi.new("bs_tensor *")
        length = ffi.new("size_t *")
        room = 256
        name = ffi.new("char[]", room)
        tensors = []
        for index in range(self._count()):
            described.size = ffi.sizeof("bs_tensor")
            _native.check(lib.bs_reader_describe(handle.raw, index, described, error), error)
            status = lib.bs_reader_name(handle.raw, index, name, room, length, error)
            if status == errors.DST_TOO_SMALL:
                room = length[0]
                name = ffi.new("char[]", room)
                status = lib.bs_reader_name(handle.raw, index, name, room, length, error)
            _native.check(status, error)
            dtype = BY_CODE.get(described.dtype)
            text = bytes(ffi.buffer(name, length[0])).decode("utf-8")
            if dtype is None:
                raise errors.Unsupported(f"{self.path}: tensor {text!r} has dtype number {described.dtype}")
            shape = tuple(ffi.unpack(described.shape, described.n_dims)) if described.n_dims else ()
            # Memory is allocated by shape and filled by n_bytes.
            if described.n_bytes != math.prod(shape) * dtype.size:
                raise errors.Corrupt(
                    f"{self.path}: tensor {text!r} has {described.n_bytes} bytes, which {dtype.name} {shape} has not"
                )
            tensors.append(TensorInfo(index, text, dtype, shape, described.n_bytes))
        return tensors

    def find(self, name: str) -> TensorInfo:
        """The tensor of that name. NotFound (a KeyError) where there is none."""
        if self._by_name is None:
            self._by_name = {tensor.name: tensor for tensor in self.tensors}
        tensor = self._by_name.get(name)
        if tensor is None:
            raise errors.NotFound(f"{self.path}: no tensor is named {name!r}")
        return tensor

    def metadata(self) -> dict[str, str] | None:
        """The source's `__metadata__`, or None where it had none."""
        handle = self._live()
        read = _native.library().lib.bs_reader_metadata
        parsed: dict[str, str] | None = json.loads(_native.text_of(lambda *where: read(handle.raw, *where)))
        return parsed

    def info(self) -> dict[str, Any]:
        """Everything the headers say, as bs_reader_info gives it. The dict is the reader's own: do not change it."""
        if self._info is None:
            handle = self._live()
            read = _native.library().lib.bs_reader_info
            self._info = json.loads(_native.text_of(lambda *where: read(handle.raw, *where)))
        return self._info

    def breakdown(
        self, modes: bool = False, *, workers: int | None = None, progress: str | None = None
    ) -> dict[str, Any]:
        """Where the bytes of the files go, as bs_reader_breakdown gives it. Reads all payloads, or, with modes, decodes
        every tensor."""
        handle = self._live()
        ffi, lib = _native.library()
        room = 1 << 16
        dst, length = ffi.new("char[]", room), ffi.new("size_t *")
        _native.call_long(
            lambda job, error: lib.bs_reader_breakdown(handle.raw, modes, dst, room, length, job, error),
            workers=workers,
            n_bytes=sum(tensor.n_bytes for tensor in self.tensors),
            progress=progress,
            paths=[self.path],
        )
        found: dict[str, Any] = json.loads(ffi.buffer(dst, length[0])[:])
        return found

    def logical_shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        """The shape that the safetensors header gives: it counts values, also where several share a byte."""
        if tensor.dtype in PACKED:
            return tuple(self.info()["tensors"][tensor.position]["source_shape"])
        return tensor.shape

    # ---- decoding ----

    def decode_many(
        self, destinations: Iterable[Destination], *, workers: int | None = None, progress: str | None = None
    ) -> None:
        """Decodes whole tensors, all at once over all workers. On failure the contents of the memory are undefined."""

        def decode(todo: Sequence[Destination], label: str | None) -> None:
            self._decode(todo, workers, label)

        self._decode_fetched(decode, destinations, progress)

    def decode_cuda(
        self,
        destinations: Iterable[Destination],
        workspace: Workspace,
        *,
        workers: int | None = None,
        progress: str | None = None,
    ) -> None:
        """The same in the memory of a CUDA device, where the addresses are. All is in place when this returns, and when
        it raises nothing is written any more. NoDevice where that device cannot, DeviceError where it fails."""

        def decode(todo: Sequence[Destination], label: str | None) -> None:
            self._decode_cuda(todo, workspace, workers, label)

        self._decode_fetched(decode, destinations, progress)

    def _decode_fetched(
        self,
        decode: Callable[[Sequence[Destination], str | None], None],
        destinations: Iterable[Destination],
        progress: str | None,
    ) -> None:
        """Has them decoded at once; where compressed bytes have to come first, group by group as these come."""
        todo = [destination for destination in destinations if destination.tensor.n_bytes]
        self._live()
        if self._parts is not None:
            self._fetch_and_decode(self._parts, todo, decode, progress)
        elif todo:
            decode(todo, progress)

    def _decode(self, todo: Sequence[Destination], workers: int | None, progress: str | None) -> None:
        handle = self._live()
        ffi, lib = _native.library()
        items = ffi.new("bs_decode_item[]", len(todo))
        for item, (tensor, address) in zip(items, todo):
            item.index = tensor.position
            item.dst = ffi.cast("void *", address)
            item.dst_cap = tensor.n_bytes
        _native.call_long(
            lambda job, error: lib.bs_reader_decode_many(handle.raw, items, len(items), job, error),
            workers=workers,
            n_bytes=sum(destination.tensor.n_bytes for destination in todo),
            progress=progress,
            paths=[self.path],
        )

    def _decode_cuda(
        self, todo: Sequence[Destination], workspace: Workspace, workers: int | None, progress: str | None
    ) -> None:
        handle = self._live()
        ffi, lib = _native.library()
        items = ffi.new("bs_cuda_item[]", len(todo))
        for item, (tensor, address) in zip(items, todo):
            item.index, item.dst, item.dst_cap = tensor.position, address, tensor.n_bytes

        def call(job: Any, error: Any) -> int:
            with workspace.current():
                return int(lib.bs_reader_decode_cuda(handle.raw, items, len(items), workspace.job, job, error))

        _native.call_long(
            call,
            workers=workers,
            n_bytes=sum(destination.tensor.n_bytes for destination in todo),
            progress=progress,
            paths=[self.path],
        )

    def weight_bytes(self, tensor: TensorInfo) -> int:
        """Memory of a CUDA device that `open_weight` needs for a tensor. Unsupported where its form is none that a
        device decodes."""
        ffi, lib = _native.library()
        n_bytes, error = ffi.new("size_t *"), ffi.new("bs_error *")
        _native.check(lib.bs_reader_weight_bytes(self._live().raw, tensor.position, n_bytes, error), error, [self.path])
        return int(n_bytes[0])

    def open_weight(
        self, tensor: TensorInfo, memory: _native.Memory, workspace: Workspace, owner: Any
    ) -> _native.Handle:
        """A bs_weight: the tensor, compressed, in memory of a CUDA device that `owner` keeps alive. Raises what
        `decode_cuda` raises, and Unsupported where some block is none that a device decodes."""
        ffi, lib = _native.library()
        handle = self._live()
        out = ffi.new("bs_weight **")

        def call(job: Any, error: Any) -> int:
            with workspace.current():
                return int(lib.bs_weight_open(handle.raw, tensor.position, *memory, workspace.job, job, out, error))

        with self.holding(tensor):
            _native.call_long(call, workers=None, n_bytes=tensor.n_bytes, progress=None, paths=[self.path])
        return _native.Handle(out[0], lib.bs_weight_close, owner)

    def plan(
        self, tensor: TensorInfo, payload: _native.Memory | None = None, program: _native.Memory | None = None
    ) -> tuple[int, int]:
        """Bytes of a tensor's payload and of the program by which a device decodes it. With memory for both, of at
        least these sizes, they are put there, the payload verified. Unsupported where it is for the CPU."""
        ffi, lib = _native.library()
        nothing = _native.Memory(0, 0)
        (a, n), (b, m) = payload or nothing, program or nothing
        lengths, error = ffi.new("size_t[2]"), ffi.new("bs_error *")
        status = lib.bs_reader_plan(
            self._live().raw,
            tensor.position,
            ffi.cast("void *", a),
            n,
            ffi.cast("void *", b),
            m,
            lengths,
            lengths + 1,
            ffi.NULL,
            error,
        )
        _native.check(status, error, [self.path])
        return int(lengths[0]), int(lengths[1])

    def _fetch_and_decode(
        self,
        parts: Parts,
        todo: Sequence[Destination],
        decode: Callable[[Sequence[Destination], str | None], None],
        progress: str | None,
    ) -> None:
        groups: list[tuple[list[Destination], list[Span]]] = []
        room = 0
        for destination in todo:
            span = self.locate(destination.tensor)
            if span.n_bytes > room or not groups:
                groups.append(([], []))
                room = _FETCH_BYTES
            room -= span.n_bytes
            groups[-1][0].append(destination)
            groups[-1][1].append(span)

        coming = _Fetch(parts, groups[0][1]) if groups else None
        with _native.bar(progress, sum(span.n_bytes for _, spans in groups for span in spans)) as shown:
            for number, (destinations, spans) in enumerate(groups):
                present, coming = coming, None
                assert present is not None
                try:
                    with present.held():
                        if number + 1 < len(groups):
                            coming = _Fetch(parts, groups[number + 1][1])
                        decode(destinations, None)
                except BaseException:
                    for fetch in (present, coming):
                        if fetch is not None:
                            fetch.abandon()
                    raise
                if shown is not None:
                    shown.update(sum(span.n_bytes for span in spans))

    def locate(self, tensor: TensorInfo) -> Span:
        """Where the compressed bytes of a tensor stand; files are counted in the order of info()["files"]. NotFound
        where that is a shard which is not open here."""
        handle = self._live()
        ffi, lib = _native.library()
        file, offset, n_bytes = (ffi.new("uint64_t *") for _ in range(3))
        error = ffi.new("bs_error *")
        _native.check(lib.bs_reader_locate(handle.raw, tensor.position, file, offset, n_bytes, error), error)
        return Span(int(file[0]), int(offset[0]), int(n_bytes[0]))

    @contextlib.contextmanager
    def holding(self, tensor: TensorInfo) -> Iterator[None]:
        """Has the tensor's compressed bytes in memory, where they are not always there."""
        if self._parts is None:
            yield
        else:
            with self._parts.hold([self.locate(tensor)]):
                yield

    def decode_verified(self, destination: Destination, *, workers: int | None = None) -> None:
        """Decodes one whole tensor and compares its MD5 with the file's. ChecksumMismatch where they differ."""
        tensor, address = destination
        handle = self._live()
        ffi, lib = _native.library()
        dst = ffi.cast("void *", address) if tensor.n_bytes else ffi.NULL
        with self.holding(tensor):
            _native.call_long(
                lambda job, error: lib.bs_reader_decode_verified(
                    handle.raw, tensor.position, dst, tensor.n_bytes, job, error
                ),
                workers=workers,
                n_bytes=tensor.n_bytes,
                paths=[self.path],
            )

    def decode_range(
        self, tensor: TensorInfo, first: int, count: int, address: int, *, workers: int | None = None
    ) -> None:
        """Decodes storage elements first .. first+count-1 of the flattened tensor; only the blocks that hold them are
        read. `address` has room for count * dtype.size bytes."""
        if count == 0:
            self._live()
            return
        handle = self._live()
        ffi, lib = _native.library()
        dst = ffi.cast("void *", address)
        n_bytes = count * tensor.dtype.size
        with self.holding(tensor):
            _native.call_long(
                lambda job, error: lib.bs_reader_decode_range(
                    handle.raw, tensor.position, first, count, dst, n_bytes, job, error
                ),
                workers=workers,
                n_bytes=n_bytes,
                paths=[self.path],
            )

    # ---- lifetime ----

    @property
    def closed(self) -> bool:
        return self._handle is None

    def close(self) -> None:
        """Closes the file as soon as no call of another thread uses it. Closing twice is allowed."""
        self._handle = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<bigsmall.Reader {self.path!r}{' closed' if self.closed else ''}>"


def split_by_bytes(tensors: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """The tensors in groups of at most `limit` bytes; a larger tensor makes a group of its own."""
    groups: list[list[TensorInfo]] = []
    size = limit
    for tensor in tensors:
        if not groups or size + tensor.n_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    return groups
