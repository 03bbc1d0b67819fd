"""`.bs` files behind URLs, of which a Reader has only the parts in memory that it needs."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from bigsmall import errors
from bigsmall.hub import hub_errors, is_network_failure, library
from bigsmall.reader import Span

# Of one request.
_PIECE_BYTES = 16 << 20
_CONNECTIONS = 8
_CHUNK_BYTES = 256 << 10
# What is read of a file to begin with: most headers fit, and the trailer with the section before it.
_FIRST_BYTES = 256 << 10
_LAST_BYTES = 64 << 10
# Compressed bytes that stay when no call needs them, for slices of one tensor that follow each other.
_KEPT_BYTES = 32 << 20
_TIMEOUT_SECONDS = 30
_TRIES = 5
_RETRIED = (408, 429, 500, 502, 503, 504)

_PREAMBLE_BYTES = 10
_TRAILER_BYTES = 48
_MOST_HEADER_BYTES = 100_000_000

_Stopped = Callable[[], bool]


class _Abandoned(Exception):
    """Nobody waits for these bytes any more."""


class _Wanted:
    """Bytes that at least one call needs. Once `ready` they are there, or `failure` says why not."""

    def __init__(self) -> None:
        self.users = 0
        self.ready = threading.Event()
        self.failure: BaseException | None = None


_all: weakref.WeakSet[Ranges] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for ranges in _all:
        ranges._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Ranges:
    """Parts of a Reader. The memory of each file is a private mapping as long as the file, of which only pages that are
    written to exist; those of payloads that nobody needs are given back.

    label   : what messages call the model, a prefix of file names
    repo    : its "owner/name"
    urls    : file name and URL of each file
    headers : of the requests
    """

    def __init__(self, label: str, repo: str, urls: Sequence[tuple[str, str]], headers: dict[str, str]) -> None:
        self.label = label
        self._repo = repo
        self._headers = headers
        self._urls = [url for _, url in urls]
        self._begin()
        memories: list[Any] = [None] * len(urls)
        self._opening = [(0, 0)] * len(urls)  # of each file, where what was read first ends, and what was last begins

        def open_one(number: int, stopped: _Stopped) -> None:
            memories[number], begin, end = self._open(label + urls[number][0], urls[number][1], stopped)
            self._opening[number] = (begin, end)

        _in_parallel(open_one, range(len(urls)), None)
        self.files = [(label + name, memory) for (name, _), memory in zip(urls, memories)]
        _all.add(self)

    def _begin(self) -> None:
        """With no bytes wanted; also in a child of fork(), where threads are gone and locks may be taken for ever."""
        self._lock = threading.Lock()
        self._wanted: dict[Span, _Wanted] = {}
        self._idle: OrderedDict[Span, None] = OrderedDict()
        self._idle_bytes = 0

    def _open(self, name: str, url: str, stopped: _Stopped) -> tuple[mmap.mmap, int, int]:
        """The memory of one file with all but its payloads in it, and perhaps some of them: all before one offset and
        from another one on. What is wrong with the file the library says."""
        first = bytearray()
        size = self._get(url, name, 0, _FIRST_BYTES, lambda at, data: first.extend(data), stopped)
        memory = _reserve(max(size, 1), name)
        memory[: len(first)] = bytes(first)

        def bring(begin: int, end: int) -> None:
            if begin < end:
                self._bring(url, name, memory, begin, end, stopped)

        header_end = len(first)
        if size >= _PREAMBLE_BYTES:
            length = int.from_bytes(first[6:_PREAMBLE_BYTES], "little")
            header_end = min(size, _PREAMBLE_BYTES + min(length, _MOST_HEADER_BYTES))
        bring(len(first), header_end)
        try:
            header = json.loads(bytes(memory[_PREAMBLE_BYTES:header_end]))
            offsets = {section["kind"]: header_end + int(section["offset"]) for section in header["sections"]}
            sections, parity = min(offsets.values()), offsets.get("parity", size)
        except (ValueError, LookupError, TypeError, RecursionError):
            sections = parity = size
        begin = max(header_end, len(first))
        # Readers have no use for the parity. It is the last section, and may be as large as all before it.
        trailer = max(begin, size - _TRAILER_BYTES)
        last = size if parity >= trailer else max(begin, parity)
        tail = max(begin, min(sections, last - _LAST_BYTES), last - _MOST_HEADER_BYTES)
        bring(tail, last)
        bring(max(last, trailer), size)
        return memory, begin, tail

    # ---- who needs what ----

    @contextlib.contextmanager
    def hold(self, spans: Sequence[Span], stop: threading.Event | None = None) -> Iterator[None]:
        """Parts.hold."""
        held: list[tuple[Span, _Wanted]] = []
        mine: list[tuple[Span, _Wanted]] = []
        try:
            todo = [span for span in dict.fromkeys(spans) if span.n_bytes and not self._came_with_opening(span)]
            while todo:
                others: list[tuple[Span, _Wanted]] = []
                mine = []
                with self._lock:
                    for span in todo:
                        wanted = self._wanted.get(span)
                        if wanted is None:
                            wanted = self._wanted[span] = _Wanted()
                            if span in self._idle:
                                del self._idle[span]
                                self._idle_bytes -= span.n_bytes
                                wanted.ready.set()
                            else:
                                mine.append((span, wanted))
                        else:
                            others.append((span, wanted))
                        wanted.users += 1
                        held.append((span, wanted))
                if mine:
                    self._fetch([span for span, _ in mine], stop)
                    self._settle(mine, None)
                todo = []
                for span, wanted in others:
                    while not wanted.ready.wait(0.1):
                        if stop is not None and stop.is_set():
                            raise _Abandoned
                    if isinstance(wanted.failure, Exception) and not isinstance(wanted.failure, _Abandoned):
                        raise wanted.failure
                    if wanted.failure is not None:  # another thread gave up: this one does not
                        todo.append(span)
            yield
        except BaseException as error:
            self._settle(mine, error)
            raise
        finally:
            self._release(held)

    def _came_with_opening(self, span: Span) -> bool:
        begin, end = self._opening[span.file]
        return span.offset + span.n_bytes <= begin or span.offset >= end

    def _settle(self, mine: list[tuple[Span, _Wanted]], failure: BaseException | None) -> None:
        """Tells who waits how it ended. After a failure the next one to want these bytes begins anew."""
        with self._lock:
            for span, wanted in mine:
                if wanted.ready.is_set():
                    continue
                wanted.failure = failure
                wanted.ready.set()
                if failure is not None and self._wanted.get(span) is wanted:
                    del self._wanted[span]

    def _release(self, held: list[tuple[Span, _Wanted]]) -> None:
        with self._lock:
            for span, wanted in held:
                wanted.users -= 1
                if wanted.users:
                    continue
                if wanted.failure is not None:
                    if span not in self._wanted and span not in self._idle:
                        self._drop(span)
                elif self._wanted.get(span) is wanted:
                    del self._wanted[span]
                    self._idle[span] = None
                    self._idle_bytes += span.n_bytes
            while self._idle_bytes > _KEPT_BYTES:
                span, _ = self._idle.popitem(last=False)
                self._idle_bytes -= span.n_bytes
                self._drop(span)

    def _drop(self, span: Span) -> None:
        """Gives memory back: whole pages only, since neighbours may be needed."""
        first = -(-span.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (span.offset + span.n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first and hasattr(mmap, "MADV_DONTNEED"):
            self.files[span.file][1].madvise(mmap.MADV_DONTNEED, first, end - first)

    # ---- requests ----

    def _fetch(self, spans: Sequence[Span], stop: threading.Event | None) -> None:
        runs: list[list[int]] = []  # file, offset, end: neighbours come together
        for span in sorted(spans):
            if runs and runs[-1][0] == span.file and runs[-1][2] == span.offset:
                runs[-1][2] += span.n_bytes
            else:
                runs.append([span.file, span.offset, span.offset + span.n_bytes])
        pieces = [
            (file, at, min(at + _PIECE_BYTES, end))
            for file, offset, end in runs
            for at in range(offset, end, _PIECE_BYTES)
        ]

        def bring(piece: tuple[int, int, int], stopped: _Stopped) -> None:
            file, first, end = piece
            name, memory = self.files[file]
            self._bring(self._urls[file], name, memory, first, end, stopped)

        _in_parallel(bring, pieces, stop)

    def _bring(self, url: str, name: str, memory: mmap.mmap, first: int, end: int, stopped: _Stopped) -> None:
        def write(at: int, data: bytes) -> None:
            with self._lock:  # so that nothing is written to pages that were given back
                if stopped():
                    raise _Abandoned
                memory[at : at + len(data)] = data

        size = self._get(url, name, first, end, write, stopped)
        if size != len(memory):
            raise errors.Corrupt(f"{name}: the file had {len(memory)} bytes when it was opened and has {size} now")

    def _get(
        self, url: str, name: str, first: int, end: int, write: Callable[[int, bytes], None], stopped: _Stopped
    ) -> int:
        """Writes bytes first .. end-1, fewer where the file ends before; returns the size of the file."""
        problem: object = "no answer"
        done = 0
        for turn in range(_TRIES):
            if turn:
                time.sleep(min(3.0, 0.2 * 2**turn))
            if stopped():
                raise _Abandoned
            begin = first + done
            headers = {**self._headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
            try:
                with hub_errors(self._repo, None, file=name), _streamed(url, headers) as (response, chunks):
                    if response.status_code == 416:  # a file of 0 bytes has no first one
                        raise errors.Truncated(f"{name}: the file ends before byte {begin}")
                    size = _size_of(response, name, begin)
                    wanted = min(end, size) - first
                    for chunk in chunks:
                        if done + len(chunk) > wanted:
                            raise _no_parts(name)
                        write(first + done, chunk)
                        done += len(chunk)
                    if done == wanted:
                        return size
                    problem = f"{done} of {wanted} bytes came"
            except errors.IOFailure as error:
                if not is_network_failure(error.__cause__):
                    raise
                problem = error.__cause__
        raise errors.IOFailure(
            errno.EIO, f"{name}: bytes {first} to {end} cannot be read, after {_TRIES} tries: {problem}"
        )


def _size_of(response: Any, name: str, begin: int) -> int:
    """The size of the file, as an answer from byte `begin` on tells it."""
    said = re.fullmatch(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19})", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or said is None or int(said.group(1)) != begin or int(said.group(2)) > sys.maxsize:
        raise _no_parts(name)
    return int(said.group(2))


def _no_parts(name: str) -> errors.IOFailure:
    return errors.IOFailure(
        errno.EPROTO,
        f"{name}: the server does not serve parts of files as it should; download the model first "
        "(bigsmall.from_pretrained without stream=True)",
    )


@contextlib.contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer, whose body is read only as it is iterated."""
    utils = library().utils
    # An exception of whoever reads the body must not count as one of the connection, which would begin again here.
    options = {
        "headers": headers,
        "timeout": _TIMEOUT_SECONDS,
        "retry_on_status_codes": _RETRIED,
        "retry_on_exceptions": (),
    }
    if hasattr(utils, "http_stream_backoff"):  # since 1.0, where httpx takes the place of requests
        with utils.http_stream_backoff("GET", url, **options) as response:
            if response.status_code >= 400 and response.status_code != 416:
                response.read()
                utils.hf_raise_for_status(response)
            yield response, response.iter_bytes(_CHUNK_BYTES)
    else:
        with utils.http_backoff("GET", url, stream=True, **options) as response:
            if response.status_code != 416:
                utils.hf_raise_for_status(response)
            yield response, response.iter_content(_CHUNK_BYTES)


def _reserve(size: int, name: str) -> mmap.mmap:
    """Memory of that size, of which nothing is used until it is written to."""
    try:
        if hasattr(mmap, "MAP_ANONYMOUS"):
            no_reserve = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        return mmap.mmap(-1, size)
    except OSError as error:
        raise errors.IOFailure(
            error.errno or errno.ENOMEM,
            f"{name}: no address space for its {size} bytes ({error.strerror}): download the model first",
        ) from error


def _in_parallel(
    work: Callable[[Any, _Stopped], None], items: Sequence[Any] | range, stop: threading.Event | None
) -> None:
    """work(item, stopped) for every item, several at a time; the first failure ends it, and `stopped` is true from then
    on. The threads are daemons: an interrupted program does not wait for the network."""
    lock, rest, failures = threading.Lock(), iter(items), list[BaseException]()
    idle = threading.Semaphore(0)
    ended = threading.Event()

    def stopped() -> bool:
        return ended.is_set() or (stop is not None and stop.is_set())

    def run() -> None:
        try:
            while not stopped():
                with lock:
                    item = next(rest, rest)
                if item is rest:
                    break
                work(item, stopped)
        except BaseException as error:
            failures.append(error)
            ended.set()
        finally:
            idle.release()

    count = min(_CONNECTIONS, len(items))
    try:
        for _ in range(count):
            threading.Thread(target=run, name="bigsmall-range", daemon=True).start()
        for _ in range(count):
            idle.acquire()
    finally:
        ended.set()
    if failures:
        raise failures[0]
    if stop is not None and stop.is_set():
        raise _Abandoned
