"""Who needs which bytes of a file that is read by ranges: threads that share them, give up, fail or are interrupted.
The requests are made up; test_hub.py has real ones."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

from bigsmall import _ranges, errors
from bigsmall.reader import Span

SIZE = 8 << 20
TRUTH = random.Random(1).randbytes(1 << 16) * (SIZE >> 16)


class Served(_ranges.Ranges):
    """One file, whose requests `before` may hold up or fail."""

    def __init__(self, before: Callable[[int, int], None] = lambda first, end: None) -> None:
        self.before = lambda first, end: None
        self.requests: list[tuple[int, int]] = []
        super().__init__("model/", "me/model", [("file.bs", "http://x")], {})
        self._opening = [(0, SIZE)]
        self.memory: mmap.mmap = self.files[0][1]
        self.memory[:] = bytes(SIZE)
        self.memory.madvise(mmap.MADV_DONTNEED)
        self.requests.clear()
        self.before = before

    def _get(self, url: str, name: str, first: int, end: int, write: Any, stopped: Any) -> int:
        self.requests.append((first, end))
        self.before(first, end)
        for at in range(first, min(end, SIZE), 1 << 16):
            write(at, TRUTH[at : min(end, SIZE, at + (1 << 16))])
        return SIZE

    def right(self, span: Span) -> bool:
        return self.memory[span.offset : span.offset + span.n_bytes] == TRUTH[span.offset : span.offset + span.n_bytes]


def resident(memory: mmap.mmap) -> int:
    """Bytes of the mapping that are in memory."""
    pages = len(memory) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    first = ctypes.c_char.from_buffer(memory)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(memory)), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def test_threads_that_share_give_up_and_fail() -> None:
    dice = random.Random(3)

    def before(first: int, end: int) -> None:
        if dice.random() < 0.05:
            raise errors.IOFailure(5, "made up")
        threading.Event().wait(dice.random() * 0.003)

    served = Served(before)
    spans = [Span(0, i * 10_048, 10_048) for i in range(800)]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        random_of = random.Random(seed)
        for _ in range(150):
            chosen = random_of.sample(spans, random_of.randint(1, 12))
            stop = threading.Event()
            if random_of.random() < 0.4:
                threading.Timer(random_of.random() * 0.01, stop.set).start()
            try:
                with served.hold(chosen, stop):
                    wrong.extend(span for span in chosen if not served.right(span))
                    threading.Event().wait(random_of.random() * 0.002)
            except (_ranges._Abandoned, errors.IOFailure):
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not served._wanted
    assert served._idle_bytes == sum(span.n_bytes for span in served._idle) <= _ranges._KEPT_BYTES


def test_who_waits_for_one_that_gave_up_begins_anew() -> None:
    """And so does not wait for the others of the one that it waited with."""
    first, second = Span(0, 0, 4096), Span(0, 1 << 20, 4096)
    gates = {0: threading.Event(), 1 << 20: threading.Event()}
    asked = threading.Semaphore(0)

    def before(offset: int, end: int) -> None:
        asked.release()
        gates[offset].wait(20)

    served = Served(before)
    stop = threading.Event()
    ended: list[str] = []

    def hold(name: str, spans: list[Span], stop: threading.Event | None = None) -> threading.Thread:
        def run() -> None:
            with contextlib.suppress(_ranges._Abandoned), served.hold(spans, stop):
                ended.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    giver = hold("giver", [first], stop)
    asked.acquire()
    both = hold("both", [first, second])  # waits for the giver's bytes, fetches its own
    asked.acquire()
    stop.set()
    gates[0].set()
    giver.join(20)
    third = hold("third", [first])  # must not wait for `second`
    third.join(20)
    assert ended == ["third"]
    gates[1 << 20].set()
    both.join(20)
    assert ended == ["third", "both"]
    assert not served._wanted


def test_an_interrupted_one_leaves_no_memory_behind() -> None:
    gate = threading.Event()
    asked = threading.Semaphore(0)

    def before(first: int, end: int) -> None:
        asked.release()
        gate.wait(20)

    served = Served(before)
    everything = Span(0, 0, SIZE)

    def interrupt() -> None:
        asked.acquire()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), served.hold([everything]):
        pass
    gate.set()  # the answer comes late
    for thread in threading.enumerate():
        if thread.name == "bigsmall-range":
            thread.join(20)
    assert not served._wanted
    assert resident(served.memory) < 1 << 20
    with served.hold([everything]):
        assert served.right(everything)


def test_memory_goes_when_it_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ranges, "_KEPT_BYTES", 1 << 20)
    served = Served()
    half = 1 << 19
    for _ in range(3):
        for offset in range(0, SIZE, half):
            with served.hold([Span(0, offset, half)]):
                assert served.right(Span(0, offset, half))
        assert resident(served.memory) <= 2 << 20
    requests = len(served.requests)
    with served.hold([Span(0, SIZE - half, half)]):  # the last one is there still
        assert served.right(Span(0, SIZE - half, half))
    assert len(served.requests) == requests


def test_neighbours_come_together() -> None:
    served = Served()
    spans = [Span(0, i * 64, 64) for i in range(20_000)]
    with served.hold(spans):
        assert all(served.right(span) for span in spans[::997])
    assert len(served.requests) == 1
    assert not served._wanted
