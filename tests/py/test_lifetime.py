"""The life of a process that uses the library, beyond what test_process.py and test_fork.py do: forks of every kind,
other programs, the first use, the end, and what many calls leave over. Each in a process of its own under a time limit.

BIGSMALL_LONG=1 in the environment repeats more often.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bigsmall
from bigsmall import _native
from helpers import bfloat16, run_script, tree, weights, write_safetensors

LONG = bool(os.environ.get("BIGSMALL_LONG"))
SECONDS = 60  # of a process, after which it hangs

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")

PRELUDE = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of Python, about fork() and threads
import numpy as np
import bigsmall
from bigsmall import errors
from bigsmall.numpy import read
from bigsmall.reader import Reader

path = sys.argv[1]

def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def in_child(work, leave=os._exit):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit:  # of a child of this one, which has this frame too
            raise
        except BaseException:
            import traceback
            traceback.print_exc()
        leave(code)
    assert exit_code(child) == 0
"""


@pytest.fixture
def model(make) -> Path:
    tensors = {f"layer.{i}": ("BF16", (60, 500 + i), bfloat16(weights(i, 60, 500 + i))) for i in range(12)}
    _, target = make(tensors)
    return target


# ---- forks ----


@needs_fork
def test_three_generations_on_one_reader(model) -> None:
    """Reader, file, slice and memory of the first process, in each after it, which goes on to use them after its own
    children ended, and ends as any process does."""
    code = """
whole = bigsmall.decompress(path)
reader, file = Reader(path), bigsmall.safe_open(path, "np")
memory = Reader.from_memory(open(path, "rb").read())
parts = {name: file.get_slice(name) for name in whole}

def use(seed):
    for i, name in enumerate(whole):
        a = (7 * i + seed) % 50
        assert parts[name][a:a + 9, 3::5].tobytes() == whole[name][a:a + 9, 3::5].tobytes()
    assert file.get_tensor("layer.5").tobytes() == whole["layer.5"].tobytes()
    for one in (reader, memory):
        assert read(one, [one.find("layer.7")])["layer.7"].tobytes() == whole["layer.7"].tobytes()
        assert len(one.info()["tensors"]) == len(one) == 12

def nest(depth):
    for seed in range(2):
        use(depth + seed)
        if depth:
            in_child(lambda: nest(depth - 1), sys.exit)
    use(depth)

nest(3)
"""
    run_script(PRELUDE + code, model, timeout=SECONDS)


@needs_fork
def test_fork_in_a_thread_while_four_others_decode(model) -> None:
    """On one reader; the thread that forked is the main one of the child."""
    code = f"""
whole = bigsmall.decompress(path)
file = bigsmall.safe_open(path, "np")
part = file.get_slice("layer.3")
stop = threading.Event()
failures = []

def use():
    for name in ("layer.1", "layer.2"):
        assert file.get_tensor(name).tobytes() == whole[name].tobytes()
    assert part[5:9].tobytes() == whole["layer.3"][5:9].tobytes()

def guarded(work):
    try:
        work()
    except BaseException as error:
        failures.append(error)
        stop.set()

def busy():
    while not stop.is_set():
        use()

def forking():
    for _ in range({60 if LONG else 15}):
        in_child(use)
        in_child(lambda: bigsmall.decompress(path))
    stop.set()

use()
threads = [threading.Thread(target=guarded, args=(work,)) for work in [busy] * 4 + [forking]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
use()
"""
    run_script(PRELUDE + code, model, timeout=SECONDS)


@needs_fork
def test_fork_while_another_thread_loads_the_library(model) -> None:
    """The first use of all, at every moment of which the process forks."""
    code = f"""
def first_use(delay):
    thread = threading.Thread(target=bigsmall.info, args=(path,))
    thread.start()
    time.sleep(delay)
    in_child(lambda: bigsmall.info(path))
    thread.join()
    bigsmall.info(path)

import bigsmall.api  # not an import, which Python itself does not survive, but the load
for i in range({100 if LONG else 25}):
    in_child(lambda: first_use(0.0004 * i))
"""
    run_script(PRELUDE + code, model, timeout=SECONDS)


def test_first_use_in_many_threads_at_once(model) -> None:
    """Loads the library once."""
    code = """
barrier = threading.Barrier(32)
found = []

def use():
    barrier.wait()
    found.append(bigsmall.info(path)["tensor_count"])

threads = [threading.Thread(target=use) for _ in range(32)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert found == [12] * 32
if os.path.exists("/proc/self/maps"):
    with open("/proc/self/maps") as maps:
        code = [line for line in maps if "libbigsmall" in line and " r-xp " in line]
    assert len(code) == 1, code
"""
    run_script(PRELUDE + code, model, timeout=SECONDS)


@needs_fork
def test_forks_that_python_does_not_see(model) -> None:
    """Of a C library: every call says what is wrong and what to do, and none hangs. The parent goes on."""
    code = """
import ctypes, signal
file = bigsmall.safe_open(path, "np")
part = file.get_slice("layer.1")
libc = ctypes.PyDLL(None)
child = libc.fork()
if child == 0:
    signal.alarm(20)  # a hang
    code = 0
    for work in (
        lambda: bigsmall.info(path),
        lambda: file.get_tensor("layer.1"),
        lambda: part[2],
        lambda: bigsmall.verify(path),
        lambda: bigsmall.compress(path, path + ".new"),
        lambda: Reader(path),
        lambda: bigsmall.set_cpu("generic"),
    ):
        try:
            work()
        except (errors.InternalError, errors.InvalidArgument) as error:  # set_cpu has no other
            if "fork()" not in str(error) or "spawn" not in str(error):
                os.write(2, f"{error}\\n".encode())
                code = 1
        else:
            code = 2
    file.__exit__(None, None, None)
    os._exit(code)
assert exit_code(child) == 0
assert bigsmall.verify(path)
assert not os.path.exists(path + ".new")
"""
    run_script(PRELUDE + code, model, timeout=SECONDS)


@needs_fork
def test_starting_other_programs_is_no_fork(model) -> None:
    """However they are started, this process goes on, and they inherit no open file of the library's."""
    code = """
import pty, shutil, subprocess
true = shutil.which("true")
reader = Reader(path)

def use():
    assert read(reader, [reader.find("layer.1")])
    assert bigsmall.verify(path)

use()
assert subprocess.run([true]).returncode == 0
use()
assert subprocess.run([true], preexec_fn=lambda: None, start_new_session=True).returncode == 0
use()
assert exit_code(os.posix_spawn(true, [true], {})) == 0
use()
assert os.system(true) == 0
use()
assert os.popen("echo a").read() == "a\\n"
use()
child, terminal = pty.fork()
if child == 0:
    code = 1
    try:
        use()
        code = 0
    finally:
        os._exit(code)
assert exit_code(child) == 0
use()
if os.path.exists("/proc/self/fd"):
    assert any(os.path.realpath(f"/proc/self/fd/{name}") == path for name in os.listdir("/proc/self/fd"))
    ask = "import os; print(*(os.path.realpath(f'/proc/self/fd/{name}') for name in os.listdir('/proc/self/fd')))"

    def show():
        listed = subprocess.check_output([sys.executable, "-c", ask], close_fds=False, text=True)
        assert ".bs" not in listed and "libbigsmall" not in listed, listed

    from bigsmall._dtypes import BY_NAME
    from bigsmall.writer import TensorSpec, Writer
    with Writer(path + ".new", [TensorSpec("w", BY_NAME["uint8"], (0,))]):
        show()
        in_child(lambda: use() or show())
"""
    run_script(PRELUDE + code, model, timeout=SECONDS)


@needs_fork
def test_a_writer_goes_on_whatever_its_children_do(model, tmp_path) -> None:
    """They end like any process, compress to the same target, and drop the writer: what is being written stays."""
    code = """
import gc
from bigsmall._dtypes import BY_NAME
from bigsmall.numpy import address
from bigsmall.writer import TensorSpec, Writer

source, target = sys.argv[2:]
array = np.arange(100_000, dtype=np.uint16)
writer = Writer(target, [TensorSpec(name, BY_NAME["uint16"], array.shape) for name in ("a", "b")])
writer.put("a", address(array), array.nbytes)

def drop():
    global writer
    writer = None
    gc.collect()

def close():
    writer.close()

def compress():
    bigsmall.compress(source, target)
    assert bigsmall.verify(target, source)

for work in (drop, close, compress):
    for leave in (sys.exit, os._exit):
        in_child(work, leave)
writer.put("b", address(array), array.nbytes)
writer.finish()
writer.close()
whole = bigsmall.decompress(target)
assert whole["a"].tobytes() == whole["b"].tobytes() == array.tobytes()
assert os.listdir(os.path.dirname(target)) == ["out.bs"]
"""
    folder = tmp_path / "out"
    folder.mkdir()
    run_script(PRELUDE + code, model, model.with_suffix(".safetensors"), folder / "out.bs", timeout=SECONDS)


@needs_fork
def test_every_function_says_that_it_was_forked(model) -> None:
    """Of the C library, with good arguments and without the package's loader: the text says what to do, nothing else is
    written, in a child, in its threads and in its child; and loading a copy of the library helps, as the text says."""
    code = """
import shutil, signal, tempfile
from bigsmall._cdef import ffi

def load(file):
    return ffi.dlopen(file, ffi.RTLD_NOW | ffi.RTLD_LOCAL)

def open_reader(lib):
    out = ffi.new("bs_reader **")
    assert lib.bs_reader_open(os.fsencode(path), ffi.NULL, out, ffi.NULL) == 0
    return out[0]

def count(lib, reader):
    n = ffi.new("uint64_t *")
    assert lib.bs_reader_count(reader, n, ffi.NULL) == 0
    return n[0]

lib = load(sys.argv[2])
reader = open_reader(lib)
names = sys.argv[3:]

def check():
    seen = 0
    for name in names:
        function = getattr(lib, name)
        kind = ffi.typeof(function)
        memory, args, error = [], [], None
        for arg in kind.args:
            if arg.kind != "pointer":
                args.append(ffi.cast(arg, 1))
            elif arg.cname == "struct bs_reader *":
                args.append(reader)
            elif arg.cname == "struct bs_error *":
                error = ffi.new("bs_error *")
                args.append(error)
            else:
                memory.append(ffi.new("char[8192]"))
                ffi.memmove(memory[-1], b"\\1" * 8192, 8192)
                args.append(ffi.cast(arg, memory[-1]))
        got = function(*args)
        if kind.result.cname == "enum bs_status":
            assert int(got) == errors.FORKED, (name, got)
            seen += 1
            if error is not None:
                text = ffi.string(error.text).decode()
                assert error.status == errors.FORKED and error.os_error == 0, name
                assert "fork()" in text and "spawn" in text, (name, text)
        else:
            assert kind.result.kind != "pointer" or got != ffi.NULL, name
        assert all(bytes(ffi.buffer(m)) == b"\\1" * 8192 for m in memory), name
    assert seen > 25, seen

def child():
    signal.alarm(40)  # a hang
    check()
    failures = []

    def in_thread():
        try:
            check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert not failures, failures
    in_child(check)
    with tempfile.TemporaryDirectory() as folder:
        again = load(shutil.copy(sys.argv[2], folder))
    assert count(again, open_reader(again)) == 12
    check()

in_child(child)
assert count(lib, reader) == 12
lib.bs_reader_close(reader)
"""
    names = [name for name in dir(_native.library().lib) if name.startswith("bs_")]
    assert len(names) > 40
    run_script(PRELUDE + code, model, _native.library_path(), *names, timeout=SECONDS)


# ---- workers ----


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_open_their_own(model, tmp_path, method: str) -> None:
    """Each a reader of its own. One in memory is refused when it is sent, and the pool goes on. A server that has used
    the library itself forks workers that can use it too."""
    if method == "forkserver" and not hasattr(os, "fork"):
        pytest.skip("needs forkserver")
    (tmp_path / "job.py").write_text("""
import os
import bigsmall
from bigsmall.numpy import read
from bigsmall.reader import Reader

PATH = os.environ["MODEL"]
bigsmall.verify(PATH)
whole = bigsmall.decompress(PATH)
inherited = Reader(PATH)

def work(name):
    with Reader(PATH) as reader, bigsmall.safe_open(PATH, "np") as file:
        for one in (reader, inherited):
            assert read(one, [one.find(name)])[name].tobytes() == whole[name].tobytes()
        assert file.get_slice(name)[1:3].tobytes() == whole[name][1:3].tobytes()
    return name

def tensors(reader):
    return len(reader)
""")
    code = """
import multiprocessing
import job

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    if sys.argv[2] == "forkserver":
        context.set_forkserver_preload(["job"])
    with context.Pool(2) as pool:
        assert pool.map(job.work, job.whole, chunksize=1) == list(job.whole)
        try:
            pool.apply(job.tensors, (Reader.from_memory(open(path, "rb").read()),))
        except TypeError as error:
            assert "cannot be pickled: open it in each process" in str(error), error
        else:
            raise AssertionError("no error")
        assert pool.apply(job.tensors, (Reader(path),)) == 12
"""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + code)
    start = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    env = {"MODEL": str(model), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run_script(start, model, method, timeout=SECONDS, env=env)


# ---- the end of a process ----


@pytest.mark.parametrize("threads", [0, 4])
def test_use_at_exit(model, threads: int) -> None:
    """In exit handlers, also with threads still at work, and in finalizers, which come when much of Python is gone."""
    code = f"""
import atexit
bigsmall.info(path)
reader, file = Reader(path), bigsmall.safe_open(path, "np")

class Last:
    def __init__(self):
        self.part, self.reader, self.write = file.get_slice("layer.1"), reader, os.write

    def __del__(self):
        self.part[3]
        self.reader.close()
        self.write(1, b"finalizer\\n")

@atexit.register
def at_exit():
    assert bigsmall.verify(path)
    assert read(reader, [reader.find("layer.2")])["layer.2"].shape == (60, 502)
    os.write(1, b"exit handler\\n")

def busy():
    while True:
        file.get_tensor("layer.3")
        bigsmall.decompress(path)

for _ in range({threads}):
    threading.Thread(target=busy, daemon=True).start()
last = Last()
time.sleep(0.1)
raise ValueError("the end")
"""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(model)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1, done
    # Such threads keep what they can see alive.
    assert done.stdout == "exit handler\n" + "finalizer\n" * (threads == 0), done
    assert done.stderr.endswith("ValueError: the end\n"), done


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_an_unfinished_writer_at_exit(tmp_path, end: str) -> None:
    """Nothing has the name of the target, and whoever writes it next takes away what may be left beside it."""
    code = f"""
from bigsmall._dtypes import BY_NAME
from bigsmall.writer import TensorSpec, Writer
from bigsmall.numpy import address
array = np.zeros(1000, np.uint8)
writer = Writer(path, [TensorSpec("a", BY_NAME["uint8"], (1000,)), TensorSpec("b", BY_NAME["uint8"], (1,))])
writer.put("a", address(array), 1000)
{end}
"""
    target = tmp_path / "out.bs"
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(target)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (-9 if "kill" in end else 0, "")
    assert not target.exists()
    source = write_safetensors(tmp_path / "source.safetensors", {"w": ("U8", (3,), b"abc")})
    bigsmall.compress(source, target)
    assert list(tree(tmp_path)) == ["out.bs", "source.safetensors"]


def test_sub_interpreters_come_and_go(model) -> None:
    """Beside threads of the main one. Each works, or is refused: by ImportError, or, where it has no threads, by
    RuntimeError, both of them Python's own."""
    code = """
try:
    import _interpreters as interpreters
except ImportError:
    try:
        import _xxsubinterpreters as interpreters
    except ImportError:
        sys.exit(0)
script = f'''
import sys
sys.path[:] = {sys.path!r}
try:
    import bigsmall
    assert bigsmall.info({path!r})["tensor_count"] == 12
    assert bigsmall.verify({path!r})
except ImportError:
    pass
except RuntimeError as error:
    assert "subinterpreters" in str(error), error
'''
whole = bigsmall.decompress(path)
file = bigsmall.safe_open(path, "np")
stop = threading.Event()

def busy():
    while not stop.is_set():
        assert file.get_tensor("layer.2").tobytes() == whole["layer.2"].tobytes()

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for _ in range(3):
        number = interpreters.create()
        failed = interpreters.run_string(number, script)
        assert failed is None, failed
        interpreters.destroy(number)
finally:
    stop.set()
    for thread in threads:
        thread.join()
assert file.get_tensor("layer.2").tobytes() == whole["layer.2"].tobytes()
"""
    run_script(PRELUDE + code, model, timeout=SECONDS)


# ---- many times ----

FIGURES = """
import gc

def figures():
    gc.collect()
    text = open("/proc/self/status").read()
    figure = lambda key: int(text.split(key)[1].split()[0])
    return figure("VmRSS:"), figure("Threads:"), len(os.listdir("/proc/self/fd"))

def grows(once, rounds, megabytes):
    for i in range(rounds):
        once(i)
    before = figures()
    for i in range(rounds):
        once(i)
    after = figures()
    print(before, after)
    assert after[0] - before[0] < megabytes << 10, (before, after)
    assert after[1] <= before[1] + 3, (before, after)
    assert after[2] <= before[2], (before, after)
"""


@needs_proc
def test_failures_leave_nothing(model, tmp_path) -> None:
    """Files of every kind that do not open or do not decode, from disk and from memory."""
    data = model.read_bytes()
    header = bytearray(data)
    header[data.index(b'"bfloat16"') + 1] ^= 1
    payload = bytearray(data)
    payload[len(data) // 2] ^= 1
    bad = {"empty": b"", "text": b"no such thing" * 9, "header": header, "payload": payload, "cut": data[:-1000]}
    for name, content in bad.items():
        (tmp_path / f"{name}.bad").write_bytes(bytes(content))
    (tmp_path / "folder.bad").mkdir()
    code = f"""
import glob
files = sorted(glob.glob(sys.argv[2] + "/*.bad")) + [path + ".none"]
memories = [open(name, "rb").read() for name in files if os.path.isfile(name)]
assert len(memories) == 5 and len(files) == 7
array = np.empty(60 * 512, np.uint16)
failed = [0, 0]

def attempt(open_, source):
    try:
        with open_(source) as reader:
            failed[0] += 1
            read(reader, reader.tensors)
    except (errors.BigSmallError, OSError):
        failed[1] += 1
    else:
        raise AssertionError(source)

def once(i):
    attempt(Reader, files[i % len(files)])
    attempt(Reader.from_memory, memories[i % len(memories)])
    try:
        with bigsmall.safe_open(files[i % len(files)], "np") as file:
            for name in file.keys():
                file.get_tensor(name)
    except (errors.BigSmallError, OSError):
        pass
    else:
        raise AssertionError(files[i % len(files)])

grows(once, {10_000 if LONG else 1_000}, 6)
assert failed[0] < failed[1]
"""
    run_script(PRELUDE + FIGURES + code, model, tmp_path, timeout=150 if LONG else SECONDS)


@needs_proc
def test_threads_and_cycles_leave_nothing(model) -> None:
    """Short-lived threads, each with a first call of its own, and readers that only the garbage collector finds."""
    code = f"""
memory = open(path, "rb").read()

def once(i):
    def work():
        holder = {{"reader": Reader(path), "memory": Reader.from_memory(memory)}}
        holder["holder"], holder["file"] = holder, bigsmall.safe_open(path, "np")
        holder["part"] = holder["file"].get_slice("layer.1")
        assert holder["part"][3].shape == (501,)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if i % 20 == 0:
        gc.collect()

grows(once, {2_000 if LONG else 100}, 10)
"""
    run_script(PRELUDE + FIGURES + code, model, timeout=150 if LONG else SECONDS)


@needs_proc
@needs_fork
def test_forks_leave_nothing(model) -> None:
    """In the parent; and a child that opens and drops readers of both generations does not grow either."""
    code = f"""
reader = Reader(path)

def use():
    assert read(reader, [reader.find("layer.1")])

use()
grows(lambda i: in_child(use), {300 if LONG else 20}, 6)

def child():
    def once(i):
        with Reader(path) as own:
            own.info()
        use()
    grows(once, 150, 6)

in_child(child)
"""
    run_script(PRELUDE + FIGURES + code, model, timeout=150 if LONG else SECONDS)


@needs_proc
def test_cancelled_and_failed_writing_leaves_nothing(model, tmp_path) -> None:
    """Calls that are cancelled at once, writers that are dropped, sources that are none."""
    code = f"""
import itertools
from bigsmall import _native
from bigsmall._dtypes import BY_NAME
from bigsmall.numpy import address
from bigsmall.writer import TensorSpec, Writer

source, folder = sys.argv[2:]
target = os.path.join(folder, "out.bs")
array = np.zeros(10_000, np.uint8)
ffi = _native.ffi

def once(i):
    writer = Writer(target, [TensorSpec("a", BY_NAME["uint8"], (10_000,)), TensorSpec("b", BY_NAME["uint8"], (1,))])
    writer.put("a", address(array), array.nbytes)
    del writer
    for bad in (path, folder, source + ".none"):
        try:
            bigsmall.compress(bad, target)
        except (errors.BigSmallError, OSError):
            pass
        else:
            raise AssertionError(bad)
    job, cancel, error = ffi.new("bs_job *"), ffi.new("int32_t *", 1), ffi.new("bs_error *")
    job.size, job.cancel, job.workers = ffi.sizeof("bs_job"), cancel, 2
    lib = _native.library().lib
    for status in (
        lib.bs_compress(os.fsencode(source), os.fsencode(target), ffi.NULL, job, ffi.NULL, error),
        lib.bs_decompress(os.fsencode(path), os.fsencode(target), ffi.NULL, job, ffi.NULL, error),
    ):
        assert status == errors.CANCELLED, ffi.string(error.text)
    assert os.listdir(folder) == []

grows(once, {2_000 if LONG else 150}, 10)
"""
    folder = tmp_path / "out"
    folder.mkdir()
    source = model.with_suffix(".safetensors")
    run_script(PRELUDE + FIGURES + code, model, source, folder, timeout=150 if LONG else SECONDS)
