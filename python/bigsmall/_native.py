"""The border to the native library: the only file that knows cffi.

The library is loaded at the first call, never at import, because its runtime does not survive fork(): a child of a
process that never called it can load it as usual. In a child of a process that did, the next call loads a private copy
of the file, which is another library to the dynamic linker and starts a runtime of its own.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigsmall import errors

# Here and not in `library()`: an import in a child of fork() waits for ever for a thread of the parent that was in the
# midst of the same one.
try:
    from bigsmall._cdef import ffi
except ImportError as missing:
    raise ImportError(
        f"bigsmall is not installed, only its source was found ({Path(__file__).parent}): pip install ./python"
    ) from missing

_ABI_VERSION = 4

_MOST_WORKERS = 2**31 - 1  # what bs_job has room for

# A call on fewer bytes than this ends so soon (well under a second) that Ctrl-C can wait for it.
_LONG_CALL_BYTES = 64 << 20

_BAR_SECONDS = 0.1


class Library(NamedTuple):
    """The loaded library: `lib.bs_*` are its functions, `ffi` makes their arguments."""

    ffi: Any
    lib: Any


_lock = threading.Lock()
_library: Library | None = None
# The same before it is known which instructions it shall use, which fails where BIGSMALL_CPU is wrong.
_loaded: Library | None = None
# What set_cpu() chose, also for the library of a child of fork(); None: what BIGSMALL_CPU says.
_cpu: str | None = None
# True from just before the first load on, and inherited by children of fork: there only a private copy may be loaded.
_tainted = False
# How many forks lie between the process that imported this module and this one. Handles of another number are dead.
_generation = 0


def _after_fork_in_child() -> None:
    global _library, _loaded, _lock, _generation
    _library = _loaded = None
    _lock = threading.Lock()  # another thread may have held the old one
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def library_path() -> str:
    """Path of the native library: the one in this package, or BIGSMALL_LIB where that is set."""
    chosen = os.environ.get("BIGSMALL_LIB")
    if chosen:
        return chosen
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return str(Path(__file__).with_name("libbigsmall" + suffix))


def library() -> Library:
    """The library, loaded now if it was not yet. Do not keep the result: after a fork another one takes its place.

    Raises ImportError where the library is missing or does not fit this package, InvalidArgument where BIGSMALL_CPU
    is wrong.
    """
    global _library, _loaded, _tainted
    ready = _library
    if ready is None:
        with _lock:
            if _loaded is None:
                again, _tainted = _tainted, True  # before the load: a fork may happen in the midst of it
                try:
                    _loaded = _load(again)
                except BaseException:
                    _tainted = again
                    raise
            if _library is None:
                if _cpu is None:
                    _use_cpu_of_environment(_loaded)
                else:
                    _use_cpu(_loaded, _cpu)
            ready = _library = _loaded
    return ready


def _load(again: bool) -> Library:
    if sys.byteorder != "little":
        raise ImportError("bigsmall runs on little-endian machines only")
    path = library_path()
    if not os.path.isfile(path):
        raise ImportError(f"the native library {path} is missing: install bigsmall again")
    if again:
        lib = _dlopen_private_copy(path)
    else:
        try:
            lib = _dlopen(path)
        except OSError as error:
            raise ImportError(f"the native library {path} cannot be loaded: {error}") from error
    abi = lib.bs_abi_version()
    if abi != _ABI_VERSION:
        raise ImportError(f"{path} has ABI version {abi}, this package needs {_ABI_VERSION}: install bigsmall again")
    return Library(ffi, lib)


def _dlopen(path: str) -> Any:
    # RTLD_LOCAL: two libraries with a Go runtime in one process must not see each other's symbols.
    flags = ffi.RTLD_NOW | ffi.RTLD_LOCAL if hasattr(ffi, "RTLD_LOCAL") else 0
    return ffi.dlopen(path, flags)


def _dlopen_private_copy(path: str) -> Any:
    failures = []
    for load in (_dlopen_from_memory, _dlopen_from_temporary_file):
        try:
            return load(path)
        except (OSError, AttributeError) as error:  # AttributeError: no os.memfd_create on this system
            failures.append(f"{load.__name__.replace('_dlopen_from_', '').replace('_', ' ')}: {error}")
    raise errors.InternalError(
        "bigsmall was used before this process was forked, and its library could not be loaded anew here "
        f"({'; '.join(failures)}): use the spawn or forkserver start method",
        status=errors.FORKED,
    )


def _dlopen_from_memory(path: str) -> Any:
    memory = os.memfd_create("libbigsmall")
    try:
        with open(path, "rb") as file, open(memory, "wb", closefd=False) as copy:
            while chunk := file.read(1 << 20):
                copy.write(chunk)
        # The linker knows libraries by name first: /proc/self/fd/N could be the name of the parent's copy.
        return _dlopen(f"/proc/{os.getpid()}/fd/{memory}")
    finally:
        os.close(memory)


def _dlopen_from_temporary_file(path: str) -> Any:
    number, name = tempfile.mkstemp(prefix="libbigsmall-", suffix=Path(path).suffix)
    try:
        with open(path, "rb") as file, open(number, "wb") as copy:
            while chunk := file.read(1 << 20):
                copy.write(chunk)
        return _dlopen(name)
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a loaded file
            os.unlink(name)


# ---- which instructions it uses --------------------------------------------------------------------------------------


def _use_cpu(loaded: Library, name: str) -> None:
    """InvalidArgument where the library knows no such name, or the machine lacks those instructions."""
    error = ffi.new("bs_error *")
    if loaded.lib.bs_set_cpu(_c_string(utf8(name, "the name"), "the name"), error) != 0:
        raise errors.InvalidArgument(ffi.string(error.text).decode("utf-8", "replace"))


def _use_cpu_of_environment(loaded: Library) -> None:
    """What BIGSMALL_CPU says now: the library itself sees only the environment that the process started with."""
    name = os.environ.get("BIGSMALL_CPU", "")
    try:
        _use_cpu(loaded, name)
    except errors.InvalidArgument as error:
        raise errors.InvalidArgument(f"the environment variable BIGSMALL_CPU={name}: {error}") from None


def cpu() -> str:
    """The instructions in use."""
    name: str = ffi.string(library().lib.bs_cpu()).decode()
    return name


def set_cpu(name: str | None) -> None:
    """Chooses them, None or "" for the best."""
    global _cpu
    _use_cpu(library(), name or "")
    _cpu = name or ""


# ---- errors ----------------------------------------------------------------------------------------------------------


def check(status: int, error: Any, paths: Sequence[str] = ()) -> None:
    """Raises the exception for `status` and the bs_error `error`; does nothing for BS_OK."""
    if status != 0:
        text = ffi.string(error.text).decode("utf-8", "replace")
        if not text:
            text = ffi.string(library().lib.bs_status_name(status)).decode()
        raise errors.from_status(status, text, error.os_error, paths)


def text_of(fill: Callable[[Any, int, Any, Any], int]) -> str:
    """The text that a function gives by (dst, dst_cap, len, error)."""
    error = ffi.new("bs_error *")
    length = ffi.new("size_t *")
    room = 256
    while True:
        dst = ffi.new("char[]", room)
        status = fill(dst, room, length, error)
        if status != errors.DST_TOO_SMALL or length[0] <= room:
            break
        room = length[0]
    check(status, error)
    return bytes(ffi.buffer(dst, length[0])).decode("utf-8")


def path_bytes(path: str | os.PathLike[str]) -> bytes:
    """A path as the library takes it. ValueError where it contains a NUL."""
    return _c_string(os.fsencode(path), "a path")


def name_bytes(name: str) -> bytes:
    """A tensor's name as the library takes it. ValueError where it contains a NUL or is no Unicode text."""
    return _c_string(utf8(name, "the tensor's name"), "a tensor's name")


def utf8(text: str, what: str) -> bytes:
    """The text's bytes. ValueError, with the words `what`, where it has a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise errors.InvalidArgument(f"{what} {text!r} is no Unicode text: it has a lone surrogate") from None


def _c_string(encoded: bytes, what: str) -> bytes:
    if b"\0" in encoded:
        raise errors.InvalidArgument(f"{what} contains a NUL character: {encoded!r}")
    return encoded


# ---- memory ----------------------------------------------------------------------------------------------------------


def buffer_at(address: int, n_bytes: int) -> Any:
    """A writable buffer over memory that the caller keeps alive for as long as the buffer is used."""
    return ffi.buffer(ffi.cast("char *", address), n_bytes)


class Memory(NamedTuple):
    """Memory that somebody else keeps alive: of the process, or of a device."""

    address: int
    n_bytes: int


class Handle:
    """Owner of one object of the library. It is closed with the last reference to this, and so never during a call
    that another thread makes on it. In a child of fork() it is dead: `alive` says so, and closing does nothing.
    `memory` is what the object reads from, kept alive until it is closed."""

    def __init__(self, raw: Any, close: Callable[[Any], None], memory: Any = None) -> None:
        self.raw = raw
        self._generation = _generation
        finalizer = weakref.finalize(self, _close, raw, close, _generation, memory)
        finalizer.atexit = False  # a daemon thread may still be in a call then; the process's end frees all

    @property
    def alive(self) -> bool:
        return self._generation == _generation


def _close(raw: Any, close: Callable[[Any], None], opened_in: int, memory: Any) -> None:
    if opened_in == _generation:
        close(raw)


# ---- CUDA devices ----------------------------------------------------------------------------------------------------


def why_no_cuda() -> str | None:
    """Why the library decodes on no CUDA device of this machine; None where it can."""
    ffi, lib = library()
    error = ffi.new("bs_error *")
    try:
        check(lib.bs_cuda_available(error), error)
    except errors.NoDevice as reason:
        return str(reason)
    return None


def cuda_job(stream: int, host: Memory, device: Memory) -> Any:
    """A bs_cuda_job: a CUstream as a number, and memory of both kinds, which the caller keeps alive as long as this."""
    job = ffi.new("bs_cuda_job *")
    job.size = ffi.sizeof("bs_cuda_job")
    job.stream = ffi.cast("void *", stream)
    job.host, job.host_bytes = ffi.cast("void *", host.address), host.n_bytes
    job.device, job.device_bytes = device
    return job


# ---- long calls ------------------------------------------------------------------------------------------------------


def default_workers() -> int:
    """Threads of a call that names none: the CPUs this process may run on, and no more than OMP_NUM_THREADS or torch
    (where it is imported) say, so that the workers of a DataLoader do not each take the whole machine."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:
        count = os.cpu_count() or 1
    with contextlib.suppress(ValueError):  # unset, or a list with odd members
        count = min(count, max(1, int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])))
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        count = min(count, torch.get_num_threads())
    return max(1, count)


def _checked_workers(workers: int | None) -> int:
    """The threads to use. TypeError where that is no whole number, ValueError where it is out of bounds."""
    if workers is None:
        return default_workers()
    try:
        count = operator.index(workers)
    except TypeError:
        raise TypeError(f"workers must be a whole number or None, not {workers!r}") from None
    if not 0 <= count <= _MOST_WORKERS:
        raise errors.InvalidArgument(
            f"workers must be from 1 to {_MOST_WORKERS}, or 0 or None for the default, not {count}"
        )
    return count or default_workers()


class _Job:
    """A bs_job and the counters that it points to."""

    def __init__(self, workers: int | None) -> None:
        self.cancel = ffi.new("int32_t *")
        self.done = ffi.new("int64_t *")
        self.total = ffi.new("int64_t *")
        self.struct = ffi.new("bs_job *")
        self.struct.size = ffi.sizeof("bs_job")
        self.struct.workers = _checked_workers(workers)
        self.struct.cancel = self.cancel
        self.struct.done = self.done
        self.struct.total = self.total


def call_long(
    call: Callable[[Any, Any], int],
    *,
    workers: int | None = None,
    n_bytes: int | None = None,
    progress: str | None = None,
    paths: Sequence[str] = (),
) -> None:
    """Runs `call(job, error)`, which returns a bs_status, and raises what it reports.

    call      : must hold references to all memory that it hands to the library
    workers   : threads, None or 0 for `default_workers()`
    n_bytes   : uncompressed size of the work; None where it is not known, which counts as large
    progress  : label of a progress bar on standard error, shown only where that is a terminal; None for no bar
    paths     : of the call, for the `filename` of an OSError

    Large work runs on a helper thread when this is the main one, since Python runs signal handlers between its own
    instructions only: so Ctrl-C stops the work within one block. KeyboardInterrupt is raised once it has stopped.
    """
    job = _Job(workers)
    error = ffi.new("bs_error *")
    large = n_bytes is None or n_bytes > _LONG_CALL_BYTES
    if large and threading.current_thread() is threading.main_thread():
        with bar(progress) as shown:

            def refresh() -> None:
                total = job.total[0]
                if total and shown.total != total:
                    shown.total = total
                shown.update(job.done[0] - shown.n)

            status = _on_helper_thread(lambda: call(job.struct, error), job, None if shown is None else refresh)
    else:
        status = call(job.struct, error)
    check(status, error, paths)


def _on_helper_thread(call: Callable[[], int], job: _Job, refresh: Callable[[], None] | None) -> int:
    outcome: list[int] = []
    failure: list[BaseException] = []
    # Not Thread.join(): until Python 3.12 an interrupted join takes the thread for finished while it still runs.
    started, finished = Bell(), Bell()

    def target() -> None:
        started.ring()
        try:
            outcome.append(call())
        except BaseException as error:  # raised again below, in the thread that asked
            failure.append(error)
        finally:
            finished.ring()

    try:
        threading.Thread(target=target, name="bigsmall", daemon=True).start()
        while not finished.wait(_BAR_SECONDS):
            if refresh is not None:
                refresh()
    except BaseException:
        while True:
            try:
                job.cancel[0] = 1
                _wait_out(started, finished)
                break
            except BaseException:  # as there
                continue
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def _wait_out(started: Bell, finished: Bell) -> None:
    """Returns when the thread is done. A second Ctrl-C, or whatever else a signal handler raises, must not leave it
    behind, writing into memory about to be freed. One that never started (there was no room for it, or Ctrl-C came in
    between) is not waited for."""
    while True:
        try:
            if not started.wait(1) or finished.wait():
                return
        except BaseException:
            continue


class Bell:
    """Rings once, for one thread that waits for it. A threading.Event stays locked, and its set() waits for ever, where
    a signal handler raises at the wrong moment of a wait; here every moment will do."""

    def __init__(self) -> None:
        self.rung = False
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        self.rung = True  # before the lock, which the wait may take and be interrupted
        self._silence.release()

    def wait(self, timeout: float = -1) -> bool:
        """Whether it has rung, in so many seconds."""
        if not self.rung:
            self._silence.acquire(timeout=timeout)
        return self.rung


@contextlib.contextmanager
def bar(label: str | None, total: int | None = None) -> Iterator[Any]:
    """A progress bar (tqdm) that counts bytes on standard error; None without a label, or where that is no terminal."""
    if label is None or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        desc=label, total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr
    ) as shown:
        yield shown
