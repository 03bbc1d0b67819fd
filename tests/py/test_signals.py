"""Signals while the library works, beyond what test_process.py and test_cli.py do: every long call, handlers that
raise, the key of a terminal, broken pipes, crash reports. Each runs in a process of its own under a time limit.

BIGSMALL_LONG=1 in the environment repeats more often.
"""

from __future__ import annotations

import os
import re
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bigsmall
from helpers import bfloat16, run_script, tree, weights, write_safetensors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")

LONG = bool(os.environ.get("BIGSMALL_LONG"))
ROUNDS = 20 if LONG else 3
SECONDS = 60  # of a process, after which it hangs
BOUND = 2  # seconds from Ctrl-C to KeyboardInterrupt; a tenth of one on a machine that does nothing else

PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
import bigsmall
from bigsmall import _native, errors

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was started with

def helpers():
    return [thread for thread in threading.enumerate() if thread.name == "bigsmall"]
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sources of 70 MB, which makes a call a long one, and what they compress to."""
    folder = tmp_path_factory.mktemp("large")
    size = 70 << 20
    exponents = np.random.default_rng(0).integers(0, 1 << 14, size // 2, dtype=np.uint16) + 0x3800
    half = size // 4
    tensors = {"w": ("BF16", (half,), exponents[:half].tobytes()), "v": ("BF16", (half,), exponents[half:].tobytes())}
    write_safetensors(folder / "w.safetensors", {"w": ("BF16", (2 * half,), exponents.tobytes())})
    exponents[::100] ^= 1
    write_safetensors(folder / "fine.safetensors", {"w": ("BF16", (2 * half,), exponents.tobytes())})
    (folder / "model").mkdir()
    for name, tensor in tensors.items():
        write_safetensors(folder / "model" / f"{name}.safetensors", {name: tensor})
    bigsmall.compress(folder / "w.safetensors", folder / "w.bs", "inference", parity=2)
    bigsmall.compress(folder / "model", folder / "model-bs", "inference")
    data = bytearray((folder / "w.bs").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "damaged.bs").write_bytes(data)
    yield folder
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of so many tensors that their list fills more than a pipe."""
    folder = tmp_path_factory.mktemp("small")
    tensors = {f"layer.{i}": ("BF16", (2, 10), bfloat16(weights(i, 2, 10))) for i in range(3000)}
    bigsmall.compress(write_safetensors(folder / "small.safetensors", tensors), folder / "small.bs", "inference")
    return folder / "small.bs"


def start(code: str, *args: object, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, args)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and outputs; a process that takes too long fails the test."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"still running after {SECONDS} s; it printed:\n{out}{err}")
    return process.returncode, out, err


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], SECONDS)[0]:
        process.kill()
        pytest.fail(f"nothing printed for {SECONDS} s; standard error: {process.communicate()[1]}")
    return process.stdout.readline()


# ---- Ctrl-C ----

CALLS = {
    "compress a directory": "bigsmall.compress(source / 'model', target)",
    "compress_delta": "bigsmall.compress_delta(source / 'fine.safetensors', source / 'w.safetensors', target)",
    "decompress a directory": "bigsmall.decompress(source / 'model-bs', target)",
    "verify with the source": "bigsmall.verify(source / 'w.bs', source / 'w.safetensors')",
    "repair": "bigsmall.repair(source / 'damaged.bs', target)",
    "save_file": "bigsmall.save_file(arrays, target)",
    "one tensor": "file.get_tensor('w')",
    "a slice": "file.get_slice('w')[5:-5]",
}


@pytest.mark.parametrize("case", CALLS)
def test_control_c(large: Path, tmp_path: Path, case: str) -> None:
    """Arrives at once, leaves no file and no thread, and the same process does the same call, to the end, after it."""
    code = f"""
import shutil
from pathlib import Path

source, target, rounds = Path(sys.argv[1]), Path(sys.argv[2], "target"), int(sys.argv[3])
arrays = {{"w": np.arange(18 << 20, dtype=np.uint32)}} if {case!r} == "save_file" else None
file = bigsmall.safe_open(source / "w.bs", "np")
whole = file.get_tensor("w")

def call():
    return {CALLS[case]}

def handler(*_):  # one that comes too late is nothing
    if inside:
        raise KeyboardInterrupt

def watch():
    while inside and not helpers():
        time.sleep(0.0005)
    print("begin", flush=True)

signal.signal(signal.SIGINT, handler)
for _ in range(rounds):
    inside = True
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        inside = False
    except KeyboardInterrupt:
        inside = False
        said = time.monotonic()
    else:
        said = "done"
    watcher.join()
    print(said, flush=True)
    assert not helpers()
    left = os.listdir(target.parent)
    assert left in ([], ["target"]), left
    if left:
        (shutil.rmtree if target.is_dir() else os.unlink)(target)
    sys.stdin.readline()  # the signal has been sent, and may still have to arrive

result = call()
if isinstance(result, np.ndarray):
    assert result.tobytes() == (whole if len(result) == len(whole) else whole[5:-5]).tobytes()
elif {case!r} == "verify with the source":
    assert result
elif {case!r} == "repair":
    assert target.read_bytes() == (source / "w.bs").read_bytes()
elif "decompress" in {case!r}:
    for path in (source / "model").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
elif target.is_dir():
    assert bigsmall.verify(target, source / "model")
else:
    with bigsmall.safe_open(target, "np") if arrays else file as check:
        assert list(check.keys()) == ["w"]
    base = source / "w.safetensors"
    assert bigsmall.verify(target, base=base) if "delta" in {case!r} else bigsmall.verify(target)
"""
    took = []
    process = start(code, large, tmp_path, ROUNDS, stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        for attempt in range(ROUNDS):
            assert line(process) == "begin\n", process.communicate()
            time.sleep(0.02 * (attempt % 4))
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = line(process)
            if said != "done\n":
                took.append(float(said) - sent)
            process.stdin.write("\n")
            process.stdin.flush()
        code_, _, err = ended(process)
    finally:
        process.kill()
    assert code_ == 0, err
    assert took, "it was always done before the signal came"
    print(f"{case}: {1000 * statistics.median(took):.0f} ms, at most {1000 * max(took):.0f}")
    assert max(took) < BOUND


def test_control_c_at_any_moment_of_a_wait() -> None:
    """One Ctrl-C, wherever in the package or in what it waits with, is one KeyboardInterrupt, and the work has ended
    when it comes. Most of these moments are too short to be met by sending signals. Those of Thread.start(), where
    Python itself may make a RuntimeError of it, are left out."""
    code = """
import faulthandler
faulthandler.dump_traceback_later(20, exit=True)
_native.library()

def starting(frame):
    while frame is not None and frame.f_code is not threading.Thread.start.__code__:
        frame = frame.f_back
    return frame is not None

def attempt(moment):
    begun, ended, passed = [], [], []

    def call(job, error):
        begun.append(True)
        end = time.monotonic() + 0.15
        while not job.cancel[0] and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.005)
        ended.append(True)
        return errors.CANCELLED if job.cancel[0] else 0

    def profile(frame, event, _):
        # The events at which Python looks for signals too.
        if begun and not ended and event in ("call", "c_return") and not starting(frame):
            passed.append(event)
            if len(passed) == moment:
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        _native.call_long(call)
    except BaseException as error:
        assert ended, (moment, "it still runs", error)
        assert type(error) is KeyboardInterrupt, (moment, error)
        return True
    finally:
        sys.setprofile(None)
    assert len(passed) < moment
    return False

moment = 1
while attempt(moment):
    moment += 1
assert moment > 1
print(moment - 1, "moments")
"""
    print(run_script(PRELUDE + code, timeout=SECONDS))


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="a profiler may interrupt a generator there before it is inside its own try"
)
def test_control_c_at_any_moment_of_a_fetch(small: Path) -> None:
    """The same where compressed bytes have to come first: the thread that brings them ends, and lets them go."""
    code = """
import contextlib, faulthandler, gc
from bigsmall.numpy import address, empty
from bigsmall.reader import Destination, Reader

faulthandler.dump_traceback_later(30, exit=True)
with open(sys.argv[1], "rb") as file:
    data = file.read()
held = []

class Parts:
    label, files = "parts", [("", data)]

    @contextlib.contextmanager
    def hold(self, spans, stop=None):
        time.sleep(0.01)
        held.append(True)
        try:
            yield
        finally:
            held.pop()

def starting(frame):
    while frame is not None and frame.f_code is not threading.Thread.start.__code__:
        frame = frame.f_back
    return frame is not None

def busy():
    return held or any(thread.name == "bigsmall-fetch" for thread in threading.enumerate())

def attempt(moment):
    passed = []

    def profile(frame, event, _):
        if event in ("call", "c_return") and not starting(frame):
            passed.append(event)
            if len(passed) == moment:
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        reader.decode_many([Destination(tensor, address(array))])
    except BaseException as error:
        sys.setprofile(None)
        assert type(error) is KeyboardInterrupt, (moment, error)
    else:
        sys.setprofile(None)
        assert len(passed) < moment
        return False
    end = time.monotonic() + 5
    while busy():
        assert time.monotonic() < end, (moment, "it still runs")
        time.sleep(0.0005)
        gc.collect()  # what contextlib held, where it was interrupted itself
    return True

reader = Reader.from_parts(Parts())
tensor = reader.tensors[0]
array = empty(tensor)
moment = 1
while attempt(moment):
    moment += 1
assert moment > 20
print(moment - 1, "moments")
"""
    print(run_script(PRELUDE + code, small, timeout=SECONDS))


# A thread of the command says when the work has begun, and the command line of the package runs after it.
WATCHED = """
def watch():
    while not helpers():
        time.sleep(0.001)
    os.write(1, b"begin\\n")

threading.Thread(target=watch, daemon=True).start()
from bigsmall.cli import main
sys.exit(main())
"""

COMMANDS = {
    "compress a directory": ["compress", "model"],
    "decompress": ["decompress", "w.bs"],
    "decompress a directory": ["decompress", "model-bs"],
    "verify": ["verify", "w.bs"],
    "verify as JSON": ["verify", "w.bs", "--json"],
    "repair": ["repair", "damaged.bs"],
    "benchmark": ["benchmark", "w.safetensors"],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_control_c_of_the_command(large: Path, tmp_path: Path, case: str) -> None:
    """Exit code 130, one line, and nothing left of what was begun; or all of it, where the signal came at its end."""
    name, source, *options = COMMANDS[case]
    args = [name, large / source, "--threads", "1", *options]
    if name not in ("verify", "benchmark"):
        args += ["-o", tmp_path / "out"]
    before = tree(large) if name == "repair" else None
    for _ in range(5):
        process = start(WATCHED, *args, env={**os.environ, "TMPDIR": str(tmp_path)})
        try:
            assert line(process) == "begin\n"
            process.send_signal(signal.SIGINT)
            code, out, err = ended(process)
        finally:
            process.kill()
        if code == 130:
            break
        assert code == 0, err  # it was done before the signal came: try again
        for path in tmp_path.iterdir():
            path.unlink()
    assert (code, out, err) == (130, "", "bigsmall: interrupted\n")
    left = os.listdir(tmp_path)
    assert left in ([], ["out"])
    if left and name == "decompress":
        whole = large / source.replace(".bs", ".safetensors").replace("-bs", "")
        assert (
            tree(tmp_path / "out") == tree(whole)
            if whole.is_dir()
            else (tmp_path / "out").read_bytes() == whole.read_bytes()
        )
    elif left:
        assert bigsmall.verify(tmp_path / "out")
    assert before is None or tree(large) == before


def test_control_c_at_a_terminal(large: Path, tmp_path: Path) -> None:
    """The key itself, with the progress bar on the screen, to all processes of the terminal."""
    import fcntl
    import pty
    import struct
    import termios

    code = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from bigsmall.cli import main
sys.exit(main())
"""
    for _ in range(5):
        keyboard, terminal = pty.openpty()
        fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        args = ["compress", large / "w.safetensors", "--storage", "--threads", "1", "-o", tmp_path / "out.bs"]
        process = start(code, *args, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
        os.close(terminal)
        shown = b""
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                if select.select([keyboard], [], [], 0.1)[0]:
                    try:
                        data = os.read(keyboard, 4096)
                    except OSError:  # the other side is closed
                        break
                    if b"compressing" in data and b"compressing" not in shown:
                        os.write(keyboard, b"\x03")
                    shown += data
            assert process.wait(SECONDS) is not None
        finally:
            process.kill()
            os.close(keyboard)
        assert b"compressing" in shown
        if process.returncode == 130:
            break
        assert process.returncode == 0
        (tmp_path / "out.bs").unlink()
    assert process.returncode == 130
    assert b"bigsmall: interrupted" in shown
    assert b"Traceback" not in shown
    assert os.listdir(tmp_path) == []


def test_ignored_signals_stay_ignored(large: Path, tmp_path: Path) -> None:
    """As of nohup, or of a job that a shell without job control put into the background."""
    signals = ("SIGINT", "SIGHUP", "SIGTERM", "SIGQUIT")
    code = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN)\n" for name in signals)
    code += f"os.execv(sys.executable, [sys.executable, '-c', {PRELUDE.replace('signal.signal(', '# ')!r} + sys.argv[1]"
    code += ", *sys.argv[2:]])"
    process = start(code, WATCHED, "compress", large / "w.safetensors", "--quiet", "-o", tmp_path / "out.bs")
    try:
        assert line(process) == "begin\n"
        for name in signals:
            process.send_signal(getattr(signal, name))
        assert ended(process) == (0, "", "")
    finally:
        process.kill()
    assert bigsmall.verify(tmp_path / "out.bs", large / "w.safetensors")


# ---- handlers ----


@pytest.mark.parametrize("raised", ["TimeoutError", "SystemExit(3)"])
def test_a_handler_that_raises_stops_the_call(large: Path, tmp_path: Path, raised: str) -> None:
    code = f"""
def stop(*_):
    raise {raised}

signal.signal(signal.SIGALRM, stop)
source, target = sys.argv[1:]
bigsmall.cpu()
for delay in (0.05, 0.02):
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, delay)
    try:
        bigsmall.compress(source, target, "storage", workers=1)
    except (TimeoutError, SystemExit) as error:
        assert type(error).__name__ in {raised!r}
    else:
        raise AssertionError("the call did not stop")
    assert time.monotonic() < begin + {BOUND}
    assert not helpers()
    assert os.listdir(os.path.dirname(target)) == []
stop()
"""
    process = start(code, large / "w.safetensors", tmp_path / "target")
    got, _, err = ended(process)
    assert got == (3 if "3" in raised else 1), err
    assert "Exit" in raised or err.rstrip().endswith("TimeoutError")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("second", ["KeyboardInterrupt", "TimeoutError", "SystemExit"])
def test_a_second_exception_does_not_leave_the_thread_behind(second: str) -> None:
    """It writes into memory that the caller may free. The first of the exceptions is the one that is raised."""
    code = f"""
state = []

def call(job, error):
    while job.cancel[0] == 0:
        time.sleep(0.001)
    state.append("cancelled")
    time.sleep(0.3)
    state.append("stopped")
    return errors.CANCELLED

def handler(*_):
    if state:
        raise {second}
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, handler)
_native.library()
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
try:
    _native.call_long(call)
except BaseException as error:
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert state == ["cancelled", "stopped"], (state, error)
    assert type(error) is KeyboardInterrupt, error
else:
    raise AssertionError("no exception")
"""
    code_, out, err = ended(start(code))
    assert code_ == 0, out + err


@pytest.mark.parametrize("timer", ["ITIMER_REAL/SIGALRM", "ITIMER_VIRTUAL/SIGVTALRM", "ITIMER_PROF/SIGPROF"])
def test_timers_go_on_within_one_call(large: Path, tmp_path: Path, timer: str) -> None:
    """Handlers run while the call does, not after it."""
    which, name = timer.split("/")
    code = f"""
ticks = []
signal.signal(signal.{name}, lambda *_: ticks.append(len(helpers())))
bigsmall.cpu()
signal.setitimer(signal.{which}, 0.01, 0.01)
end = time.monotonic() + {SECONDS - 20}
most = 0
while most < 5 and time.monotonic() < end:
    ticks.clear()
    bigsmall.compress(*sys.argv[1:], "storage", workers=1)
    most = max(most, sum(ticks))
signal.setitimer(signal.{which}, 0)
assert most >= 5, most
"""
    run_script(PRELUDE + code, large / "w.safetensors", tmp_path / "out.bs", timeout=SECONDS)


def test_other_signals_reach_their_handlers_within_a_call(large: Path) -> None:
    """Also SIGCHLD of a child that ends, and SIGURG, which the library's runtime sends to itself."""
    code = f"""
import subprocess
names = ["SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGURG", "SIGWINCH", "SIGIO", "SIGXFSZ", "SIGTERM"]
seen = set()

def handler(number, _):
    if helpers():
        seen.add(signal.Signals(number).name)

bigsmall.cpu()
for name in names:
    signal.signal(getattr(signal, name), handler)
done = threading.Event()

def send():
    while not done.is_set():
        for name in names:
            if name == "SIGCHLD":
                assert subprocess.run(["true"]).returncode == 0
            else:
                os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.005)

sender = threading.Thread(target=send)
sender.start()
end = time.monotonic() + {SECONDS - 20}
while len(seen) < len(names) and time.monotonic() < end:
    assert bigsmall.verify(sys.argv[1], workers=1)
done.set()
sender.join()
assert seen == set(names), set(names) - seen
"""
    run_script(PRELUDE + code, large / "w.bs", timeout=SECONDS)


def test_stopped_and_continued(large: Path, tmp_path: Path) -> None:
    """As by Ctrl-Z and fg."""
    process = start(WATCHED, "compress", large / "w.safetensors", "--quiet", "-o", tmp_path / "out.bs")
    try:
        assert line(process) == "begin\n"
        for _ in range(3):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        assert ended(process) == (0, "", "")
    finally:
        process.kill()
    assert bigsmall.verify(tmp_path / "out.bs", large / "w.safetensors")


# ---- broken pipes ----


@pytest.mark.parametrize("options", [["--tensors"], ["--json"], ["--tensors", "--json"]])
def test_output_into_head(small: Path, options: list[str]) -> None:
    """More than a pipe holds: the command ends quietly when its reader goes away after the beginning."""
    process = start("from bigsmall.cli import main\nsys.exit(main())", "info", small, *options)
    assert process.stdout is not None
    try:
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        code, _, err = ended(process)
    finally:
        process.kill()
    assert (code, err) == (1, "")


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_broken_pipes_are_pythons_business(small: Path, loaded: str) -> None:
    """BrokenPipeError as ever; the end of the process where it asked for that, before or after the library was used."""
    code = """
import socket
if sys.argv[3] == "default" and sys.argv[2] == "after":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
bigsmall.info(sys.argv[1])
if sys.argv[3] == "default":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
read, write = os.pipe()
os.close(read)
one, other = socket.socketpair()
other.close()
for send in (lambda: os.write(write, b"x"), lambda: one.send(b"x"), lambda: os.write(1, b"x")):
    for _ in range(3):
        try:
            send()
        except BrokenPipeError:
            pass
        else:
            raise AssertionError("no error")
assert bigsmall.verify(sys.argv[1])
"""
    for handling, want in (("ignored", 0), ("default", -signal.SIGPIPE)):
        read, write = os.pipe()
        os.close(read)
        try:
            code_, _, err = ended(start(code, small, loaded, handling, stdout=write))
        finally:
            os.close(write)
        assert (code_, err) == (want, ""), handling


def test_children_get_the_usual_signals(small: Path) -> None:
    """A program that this process starts ends by SIGPIPE and by Ctrl-C as if the library had not been loaded."""
    code = """
import subprocess
ask = "import re; print(*re.findall('(?:SigBlk|SigIgn):.*', open('/proc/self/status').read()))"
before = subprocess.check_output([sys.executable, "-c", ask], text=True)
assert bigsmall.verify(sys.argv[1])
assert subprocess.check_output([sys.executable, "-c", ask], text=True) == before
for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGURG):
    child = subprocess.run(["sh", "-c", f"kill -{int(number)} $$"])
    assert child.returncode == (0 if number == signal.SIGURG else -number), child
"""
    run_script(PRELUDE + code, small, timeout=SECONDS)


# ---- reports of crashes ----


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"])
def test_faulthandler(small: Path, order: str, name: str) -> None:
    """Reports a fatal signal, enabled before or after the library was loaded, and the process ends by that signal."""
    code = f"""
import faulthandler
if {order!r} == "before":
    faulthandler.enable()
assert bigsmall.decompress(sys.argv[1])
if {order!r} == "after":
    faulthandler.enable()

def the_guilty():
    os.kill(os.getpid(), signal.{name})
    time.sleep(30)

the_guilty()
"""
    code_, _, err = ended(start(code, small))
    assert code_ == -getattr(signal, name), err
    assert "in the_guilty" in err


def test_faulthandler_during_a_call(large: Path) -> None:
    """Says on request where all threads are, and ends a call that takes too long."""
    code = """
import faulthandler
faulthandler.register(signal.SIGUSR1, all_threads=True)

def busy():
    while True:
        bigsmall.verify(sys.argv[1], workers=1)

threading.Thread(target=busy, daemon=True).start()
bigsmall.cpu()
faulthandler.dump_traceback_later(1, exit=True)
os.kill(os.getpid(), signal.SIGUSR1)
sys.stderr.write("----\\n")
busy()
"""
    code_, _, err = ended(start(code, large / "w.bs"))
    assert code_ == 1
    asked, late = err.split("----\n")
    assert "in busy" in asked
    assert "Timeout (0:00:01)!" in late
    assert re.search(r"_native\.py.* in call_long", late)
