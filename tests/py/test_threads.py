"""Many threads on one reader, closing under way, Ctrl-C, and how many threads a call takes."""

from __future__ import annotations

import os
import sys
import threading
import time

import numpy as np
import pytest

import bigsmall
from bigsmall import _native, errors
from bigsmall.numpy import address, empty, read
from bigsmall.reader import Destination, Reader
from helpers import bfloat16, every_dtype, run_script, weights


def run_all(*targets) -> None:
    failures = []

    def guarded(target) -> None:
        try:
            target()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_one_reader_many_threads(make) -> None:
    tensors = every_dtype((20, 40, 80))
    _, target = make(tensors)
    with Reader(target) as reader:

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(20):
                tensor = reader.tensors[random.integers(len(reader))]
                data = tensors[tensor.name][2]
                assert read(reader, [tensor], workers=1)[tensor.name].tobytes() == data
                count = int(np.prod(tensor.shape))
                first = int(random.integers(count))
                length = int(random.integers(count - first + 1))
                part = np.empty(length * tensor.dtype.size, np.uint8)
                reader.decode_range(tensor, first, length, address(part), workers=2)
                assert part.tobytes() == data[first * tensor.dtype.size :][: part.size]

        run_all(*(lambda seed=seed: work(seed) for seed in range(8)))


def test_many_files_at_once(make, tmp_path) -> None:
    tensors = {"w": ("BF16", (300, 300), bfloat16(weights(0, 300, 300)))}
    source, target = make(tensors)

    def work(number: int) -> None:
        other = tmp_path / f"{number}.bs"
        bigsmall.compress(source, other, workers=1)
        assert other.read_bytes() == target.read_bytes()
        bigsmall.decompress(other, tmp_path / f"{number}.safetensors")
        assert (tmp_path / f"{number}.safetensors").read_bytes() == source.read_bytes()

    run_all(*(lambda number=number: work(number) for number in range(6)))


def test_one_target_from_many_threads_is_whole(make, tmp_path) -> None:
    tensors = {"w": ("BF16", (300, 300), bfloat16(weights(0, 300, 300)))}
    source, target = make(tensors)
    whole = target.read_bytes()
    run_all(*[lambda: bigsmall.compress(source, target)] * 6)
    assert target.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["model.bs", "model.safetensors"]


def test_close_while_others_decode(make) -> None:
    tensors = {"w": ("BF16", (600, 600), bfloat16(weights(0, 600, 600)))}
    _, target = make(tensors)
    for _ in range(10):
        reader = Reader(target)
        started = threading.Barrier(4)

        def work(reader=reader, started=started) -> None:
            tensor = reader.find("w")
            array = empty(tensor)
            started.wait()
            try:
                for _ in range(5):
                    reader.decode_many([Destination(tensor, address(array))])
                    assert array.tobytes() == tensors["w"][2]
            except errors.InvalidArgument as error:
                assert "closed" in str(error)

        def close(reader=reader, started=started) -> None:
            started.wait()
            reader.close()

        run_all(work, work, work, close)


def test_readers_are_freed(make) -> None:
    import gc
    import weakref

    _, target = make(every_dtype((2, 4)))
    reader = Reader(target)
    handle = weakref.ref(reader._handle)
    part = bigsmall.safe_open(target, "np").get_slice("tensor.F32")
    assert part[0].shape == (4,)
    del reader
    gc.collect()
    assert handle() is None


# ---- long calls, with a stand-in for the library's work ----


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_control_c_cancels_a_long_call() -> None:
    code = """
import os, signal, threading, time
from bigsmall import _native, errors

state = []

def call(job, error):
    assert threading.current_thread() is not threading.main_thread()
    state.append("running")
    while job.cancel[0] == 0:
        time.sleep(0.001)
    time.sleep(0.2)  # a second Ctrl-C in here must not leave this thread behind
    state.append("stopped")
    return errors.CANCELLED

def interrupt():
    while not state:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

_native.library()
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=interrupt).start()
try:
    _native.call_long(call)
except KeyboardInterrupt:
    assert state == ["running", "stopped"], state
else:
    raise SystemExit("no KeyboardInterrupt")
"""
    run_script(code)


def test_small_calls_run_where_they_are() -> None:
    seen = []

    def call(job, error) -> int:
        seen.append(threading.current_thread())
        return 0

    _native.call_long(call, n_bytes=1000)
    assert seen == [threading.current_thread()]
    worker = threading.Thread(target=lambda: _native.call_long(call))
    worker.start()
    worker.join()
    assert seen[1] is worker


def test_errors_of_long_calls_come_back() -> None:
    def fail(job, error) -> int:
        return errors.CORRUPT

    def crash(job, error) -> int:
        raise ZeroDivisionError

    with pytest.raises(errors.Corrupt):
        _native.call_long(fail)
    with pytest.raises(ZeroDivisionError):
        _native.call_long(crash)


def test_progress_bar_on_a_terminal(monkeypatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def call(job, error) -> int:
        job.total[0] = 1 << 30
        for _ in range(4):
            job.done[0] += 1 << 28
            time.sleep(0.1)
        return 0

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        _native.call_long(call, progress="compressing")
        assert ("compressing" in stream.getvalue()) is shown
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    _native.call_long(call)
    assert stream.getvalue() == ""


def test_default_workers(monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert _native.default_workers() == 12
    for value, count in (("3", 3), ("4,2", 4), ("100", 12), ("0", 1), ("many", 12)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert _native.default_workers() == count

    class Torch:
        @staticmethod
        def get_num_threads() -> int:
            return 2

    monkeypatch.setitem(sys.modules, "torch", Torch)
    assert _native.default_workers() == 2
