"""The life of a process that uses the library: workers of every kind, threads, Ctrl-C, signals, exit in the midst of a
call, and ten thousand opens. Each runs in a process of its own under a time limit; see test_fork.py for more of fork().

BIGSMALL_LONG=1 in the environment repeats more often.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bigsmall
from bigsmall import _native, errors
from bigsmall.reader import Reader
from helpers import HEADER, bfloat16, run_script, tree, weights, write_safetensors

LONG = bool(os.environ.get("BIGSMALL_LONG"))

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals of POSIX")

PRELUDE = """
import os, sys, threading, time
import numpy as np
import bigsmall
from bigsmall import errors
from bigsmall.reader import Reader

path = sys.argv[1]
"""


@pytest.fixture
def model(make) -> Path:
    tensors = {f"layer.{i}": ("BF16", (60, 500 + i), bfloat16(weights(i, 60, 500 + i))) for i in range(12)}
    _, target = make(tensors)
    return target


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory):
    """A source that takes long, and its compressed form."""
    folder = tmp_path_factory.mktemp("large")
    size = 160 << 20
    exponents = np.random.default_rng(0).integers(0, 1 << 14, size // 2, dtype=np.uint16) + 0x3800
    source = write_safetensors(folder / "large.safetensors", {"w": ("BF16", (size // 2,), exponents.tobytes())})
    bigsmall.compress(source, folder / "large.bs", "inference")
    yield source, folder / "large.bs"
    for path in folder.iterdir():
        path.unlink()


# ---- workers ----


def run_file(folder: Path, code: str, *args: object) -> None:
    """Runs a script that spawned workers can import."""
    script = folder / "script.py"
    script.write_text(PRELUDE + code)
    run_script(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", *args)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_do_not_fork(model, tmp_path, method: str) -> None:
    """A reader, a file and a slice opened in the parent are opened again there; in memory they cannot be."""
    if method == "forkserver" and sys.platform == "win32":
        pytest.skip("needs forkserver")
    code = """
import multiprocessing, pickle

def work(sent):
    reader, file, part, name, want = sent
    assert file.get_tensor(name).tobytes() == want
    assert part[3:5].tobytes() == np.frombuffer(want, np.uint8).reshape(60, -1)[3:5].tobytes()
    from bigsmall.numpy import read
    assert read(reader, [reader.find(name)])[name].tobytes() == want
    return name

if __name__ == "__main__":
    reader, file = Reader(path), bigsmall.safe_open(path, "np")
    whole = bigsmall.decompress(path)
    jobs = [(reader, file, file.get_slice(name), name, array.tobytes()) for name, array in whole.items()]
    with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
        assert sorted(pool.map(work, jobs)) == sorted(whole)
    os.chdir("/")
    assert pickle.loads(pickle.dumps(reader)).path == os.path.abspath(path)
    for bad, kind in (
        (Reader.from_memory(open(path, "rb").read()), TypeError),
        (lambda: reader.close() or reader, errors.InvalidArgument),
    ):
        try:
            pickle.dumps(bad() if callable(bad) else bad)
        except kind as error:
            print(error)
        else:
            raise AssertionError("no error")
    sent = pickle.dumps(file)
    os.utime(path, (1, 1))
    try:
        pickle.loads(sent)
    except errors.InvalidArgument as error:
        assert "has changed" in str(error)
    else:
        raise AssertionError("no error")
"""
    run_file(tmp_path, code, model, method)


@needs_posix
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_of_four_workers(model, tmp_path, method: str) -> None:
    pytest.importorskip("torch")
    code = """
import torch

class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.file = bigsmall.safe_open(path, "pt")
        self.part = self.file.get_slice("layer.0")

    def __len__(self):
        return 32

    def __getitem__(self, row):
        return self.part[row].float()

if __name__ == "__main__":
    whole = bigsmall.load(path)["layer.0"].float()
    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=4, num_workers=4, multiprocessing_context=sys.argv[2], timeout=100
    )
    for _ in range(2 if sys.argv[2] == "fork" else 1):
        assert torch.equal(torch.cat(list(loader)), whole[:32])
"""
    run_file(tmp_path, code, model, method)


def test_threads(model) -> None:
    """64 threads, whole tensors and slices in random order."""
    code = """
import random
from concurrent.futures import ThreadPoolExecutor
file = bigsmall.safe_open(path, "np")
whole = bigsmall.decompress(path)
names = sorted(whole)

def work(seed):
    dice = random.Random(seed)
    for _ in range(30):
        name = dice.choice(names)
        if dice.random() < 0.5:
            assert file.get_tensor(name).tobytes() == whole[name].tobytes()
        else:
            a, b = sorted(dice.sample(range(61), 2))
            assert file.get_slice(name)[a:b, ::7].tobytes() == whole[name][a:b, ::7].tobytes()
    return seed

barrier = threading.Barrier(64)
with ThreadPoolExecutor(64, initializer=barrier.wait) as pool:
    assert list(pool.map(work, range(64))) == list(range(64))
"""
    run_script(PRELUDE + code, model)


# ---- fork and the C library alone ----


@needs_posix
def test_every_function_refuses_in_a_child(model) -> None:
    """Of the C library, loaded without the package: BS_FORKED, and no hang, whatever the arguments."""
    names = re.findall(r"^BS_API bs_status (bs_\w+)\(", HEADER.read_text(), re.M)
    assert len(names) > 25
    code = """
import ctypes, signal
lib = ctypes.CDLL(sys.argv[2])
reader = ctypes.c_void_p()
assert lib.bs_reader_open(os.fsencode(path), None, ctypes.byref(reader), None) == 0
names = sys.argv[3:]
child = os.fork()
if child == 0:
    signal.alarm(20)  # a hang
    wrong = [name for name in names if getattr(lib, name)(*[None] * 10) != errors.FORKED]
    for name in ("bs_reader_close", "bs_writer_close", "bs_weight_close", "bs_weight_batch_close"):
        getattr(lib, name)(reader)
    lib.bs_version(), lib.bs_workers(), lib.bs_cpu(), lib.bs_compress_bound(1, 1, 1), lib.bs_status_name(1)
    os.write(2, repr(wrong).encode() if wrong else b"")
    os._exit(bool(wrong))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
count = ctypes.c_uint64()
assert lib.bs_reader_count(reader, ctypes.byref(count), None) == 0
assert count.value == 12
"""
    library = next(Path(_native.__file__).parent.glob("libbigsmall.*[!h]"))
    run_script(PRELUDE + code, model, library, *names)


# ---- Ctrl-C and other signals ----

LONG_CALLS = {
    "compress": "bigsmall.compress(source, target)",
    "compress with parity": "bigsmall.compress(source, target, parity=40)",
    "decompress": "bigsmall.decompress(path, target)",
    "decompress to memory": "bigsmall.decompress(path)",
    "load": "bigsmall.load(path)",
    "verify": "bigsmall.verify(path)",
}


@needs_posix
@pytest.mark.parametrize("case", LONG_CALLS)
def test_control_c(large, tmp_path, case: str) -> None:
    """Arrives at once, leaves nothing half-written, and the library goes on working."""
    if case == "load":
        pytest.importorskip("torch")
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
source, target = sys.argv[2], os.path.join(sys.argv[3], "target")
if "load" in {case!r}:
    import torch
bigsmall.info(path)
print("begin", flush=True)
try:
    {LONG_CALLS[case]}
    print("done", flush=True)
    while True:  # an interpreter that exits has no handler any more: the signal would kill it
        time.sleep(0.01)
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
assert os.listdir(sys.argv[3]) in ([], ["target"])
assert bigsmall.info(path)["tensor_count"] == 1
"""
    took = []
    for attempt in range(20 if LONG else 4):
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(large[1]), str(large[0]), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begin\n"
            time.sleep(0.005 + 0.02 * (attempt % 4))
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, err
        if "done" not in out:
            took.append(float(out) - sent)
            assert os.listdir(tmp_path) == []
        else:
            for path in tmp_path.iterdir():
                path.unlink()
    assert took, "it was always done before the signal came"
    print(f"{case}: {1000 * statistics.median(took):.0f} ms, at most {1000 * max(took):.0f}")
    assert max(took) < 5  # a tenth of a second on a machine that does nothing else


@needs_posix
def test_signal_handlers_go_on(large) -> None:
    """Timers and other signals are handled while a long call runs, and the call does not notice."""
    code = """
import signal
ticks, users = [], []
signal.signal(signal.SIGALRM, lambda *_: ticks.append(time.monotonic()))
signal.signal(signal.SIGUSR1, lambda *_: users.append(1))
bigsmall.info(path)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
begin = time.monotonic()
while len(ticks) < 10 and time.monotonic() < begin + 60:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert bigsmall.verify(path)
    arrays = bigsmall.decompress(path)
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(ticks) >= 10 and users
"""
    run_script(PRELUDE + code, large[1])


@needs_posix
def test_faulthandler_still_works(model) -> None:
    code = """
import ctypes, faulthandler
faulthandler.enable()
assert bigsmall.decompress(path)
ctypes.string_at(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(model)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "most recent call first" in done.stderr


# ---- the end of a process ----


@pytest.mark.parametrize(
    "work", ["bigsmall.verify(path)", "bigsmall.decompress(path)", "bigsmall.compress(source, out)"]
)
@pytest.mark.parametrize("daemon", [True, False])
def test_exit_during_a_call(large, tmp_path, work: str, daemon: bool) -> None:
    """A daemon thread is left alone, another one is waited for; neither hangs, crashes or changes the exit code."""
    code = f"""
source, out = sys.argv[2:]
bigsmall.info(path)
begun = threading.Event()

def run():
    while True:
        begun.set()
        {work}
        if not {daemon}:
            return

threading.Thread(target=run, daemon={daemon}).start()
begun.wait()
time.sleep(0.05)
sys.exit(7)
"""
    out = tmp_path / "out.bs"
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(large[1]), str(large[0]), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (7, "")
    if "compress(source" in work and not daemon:
        assert list(tree(tmp_path)) == ["out.bs"]


def test_sub_interpreter(model) -> None:
    """Works, or cffi refuses to be imported there; the process goes on."""
    code = """
try:
    import _interpreters as interpreters
except ImportError:
    try:
        import _xxsubinterpreters as interpreters
    except ImportError:
        sys.exit(0)
number = interpreters.create()
script = f'''
import sys
sys.path[:] = {sys.path!r}
try:
    import bigsmall
    bigsmall.decompress({path!r})
except ImportError as error:
    print("refused:", error)
'''
failed = None
try:
    failed = interpreters.run_string(number, script)
except Exception as error:  # of another type in every version
    failed = error
assert failed is None or "ImportError" in str(failed) or "subinterpreters" in str(failed), failed
interpreters.destroy(number)
assert bigsmall.decompress(path)
"""
    run_script(PRELUDE + code, model)


# ---- ten thousand times ----


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_nothing_grows(model, tmp_path) -> None:
    """No thread, descriptor or memory is left of readers that are closed, dropped or never opened."""
    damaged = tmp_path / "damaged.bs"
    data = bytearray(model.read_bytes())
    data[-10] ^= 1
    damaged.write_bytes(data)
    code = """
import gc
damaged, rounds = sys.argv[2], int(sys.argv[3])
memory = open(path, "rb").read()

def figures():
    gc.collect()
    text = open("/proc/self/status").read()
    figure = lambda key: int(text.split(key)[1].split()[0])
    return figure("VmRSS:"), figure("Threads:"), len(os.listdir("/proc/self/fd"))

def once(i):
    with Reader(path) as reader:
        if i % 10 == 0:
            bigsmall.numpy.read(reader, [reader.find("layer.3")])
    dropped = bigsmall.safe_open(path, "np")
    if i % 10 == 0:
        dropped.get_slice("layer.2")[3:5]
    Reader.from_memory(memory)
    for open_ in (Reader, lambda path: bigsmall.safe_open(path, "np")):
        try:
            open_(damaged)
        except errors.Truncated:
            pass
        else:
            raise AssertionError("no error")

import bigsmall.numpy
for i in range(rounds // 4):
    once(i)
before = figures()
for i in range(rounds):
    once(i)
after = figures()
print(before, after)
assert after[0] - before[0] < 6 << 10, (before, after)
assert after[1] <= before[1] + 2, (before, after)
assert after[2] <= before[2], (before, after)
"""
    run_script(PRELUDE + code, model, damaged, 10_000 if LONG else 1_000)


def test_a_reader_that_is_closed_says_so(model) -> None:
    reader = Reader(model)
    reader.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        reader.info()
