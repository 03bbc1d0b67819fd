"""Faults while writing, through the command line, and what test_faults.py leaves out. The old file or the whole new
one, no source lost, nothing left beside the target, one line that says what went wrong.

BIGSMALL_LONG=1 in the environment repeats the random ones more often.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_faults import LONG, SECONDS, content, ended, model, start, strays

import bigsmall
from bigsmall import errors
from bigsmall._dtypes import BY_NAME
from bigsmall.writer import TensorSpec, Writer
from helpers import tree, weights, write_safetensors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits of POSIX")

FEW = 1 << 20  # bytes that a file may have where there is no room


def begin(*args: object, **options: Any) -> subprocess.Popen[str]:
    """Starts the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "bigsmall", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def command(*args: object, **options: Any) -> tuple[int, str]:
    return ended(begin(*args, **options))


def refused(outcome: tuple[int, str], *names: object) -> None:
    """It failed with one line that has all the names, and none of a file that only exists meanwhile."""
    status, err = outcome
    assert status == 1, outcome
    assert err.startswith("bigsmall: "), err
    assert err.count("\n") == 1, err
    assert ".tmp-" not in err, err
    for name in names:
        assert str(name) in err, err


def small(path: Path, data: bytes = b"abc") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_safetensors(path, {"w": ("U8", (len(data),), data)})


def size_below(folder: Path) -> int:
    """Bytes of what is being written there, -1 where nothing is."""
    size = -1
    for path in folder.rglob(".*"):
        for file in (path, *path.rglob("*")):
            with suppress(FileNotFoundError):  # it has its name now
                size = max(size, 0) + (file.stat().st_size if file.is_file() else 0)
    return size


def until_written(process: subprocess.Popen[str], folder: Path, n_bytes: int = 0) -> None:
    """Waits until so much is written, or the process has ended."""
    end = time.monotonic() + SECONDS
    while process.poll() is None and size_below(folder) < n_bytes:
        assert time.monotonic() < end
        time.sleep(0.0005)


def stopped_while_it_writes(folder: Path, *args: object) -> subprocess.Popen[str]:
    """A command that stands where something is in its file, so where it has the lock; its target is in the folder."""
    for _ in range(20):
        process = begin(*args, "--threads", "1")
        until_written(process, folder, 1)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if state is not None and state.si_code == os.CLD_STOPPED and strays(folder):
                return process
            process.send_signal(signal.SIGCONT)
        assert ended(process) == (0, "")  # it was done before it could be stopped: once more
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    pytest.fail("none could be stopped before it was done")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """model.safetensors and the directory folder, of 24 MB and 16 MB, compressed beside them; damaged.bs has parity."""
    folder = tmp_path_factory.mktemp("command")
    model(folder / "model.safetensors", 1, 12)
    for i in range(2):
        model(folder / "folder" / f"part{i}.safetensors", 50 * i, 4)
    (folder / "folder" / "config.json").write_text("{}")
    bigsmall.compress(folder / "model.safetensors", folder / "model.bs")
    bigsmall.compress(folder / "folder", folder / "folder-bs")
    bigsmall.compress(folder / "model.safetensors", folder / "damaged.bs", parity=3)
    with open(folder / "damaged.bs", "r+b") as file:
        file.seek(100_000)
        file.write(bytes(50_000))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for targets."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# ---- killed ----

# Subcommand, source, whether it is a directory. `repair` without -o replaces its source.
KILLED = {
    "compress": ("compress", "model.safetensors", []),
    "compress a directory": ("compress", "folder", ["--force"]),
    "decompress": ("decompress", "model.bs", []),
    "decompress a directory": ("decompress", "folder-bs", ["--force"]),
    "repair in place": ("repair", "damaged.bs", None),
}


@pytest.mark.parametrize("case", KILLED)
def test_killed_command(sources: Path, out: Path, case: str) -> None:
    """At a random moment of the whole process, and of what it does once something is written."""
    verb, name, options = KILLED[case]
    source, target = sources / name, out / "target"
    before = content(source)
    args = [verb, target if options is None else source, "--quiet", "--threads", "1"]
    args += [] if options is None else ["-o", target, *options]

    def put_old() -> dict[str, bytes] | bytes | None:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if options is None:
            shutil.copy(source, target)
        elif source.is_dir():
            (target / "sub").mkdir(parents=True)
            (target / "sub" / "old").write_bytes(b"old")
        else:
            target.write_bytes(b"old")
        return content(target)

    old = put_old()
    since = time.monotonic()
    process = begin(*args)
    until_written(process, out)
    wrote = time.monotonic()
    assert ended(process) == (0, "")
    whole, working = time.monotonic() - since, time.monotonic() - wrote
    new = content(target)
    assert new not in (old, None)
    put_old()
    moments = random.Random(case)
    left = 0
    for i in range(40 if LONG else 4):
        process = begin(*args)
        if i % 2:
            until_written(process, out)
            time.sleep(0 if i == 1 else moments.uniform(0, 0.5 * working))  # one surely leaves something
        else:
            time.sleep(moments.uniform(0, 1.1 * whole))
        process.kill()
        process.communicate()
        left += strays(out) != []
        assert content(target) in (old, new)
        if content(target) == new:
            put_old()
    assert left, "none was killed while it wrote"
    assert content(source) == before
    assert command(*args) == (0, "")
    assert content(target) == new
    assert os.listdir(out) == ["target"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_the_living_write_stays(sources: Path, tmp_path: Path, out: Path, kind: str) -> None:
    """A process that is only stopped loses nothing to another of the same target, nor to what a dead one left."""
    target, name, options = out / "target", "model.safetensors", ["--quiet"]
    other = small(tmp_path / "other" / "model.safetensors")
    if kind == "directory":
        name, other, options = "folder", other.parent, ["--quiet", "--force"]
    stopped = stopped_while_it_writes(out, "compress", sources / name, "-o", target, *options)
    try:
        of_the_living = strays(out)
        dead = begin("compress", sources / name, "-o", target, *options)
        end = time.monotonic() + SECONDS
        while dead.poll() is None and len(list(out.glob(".*"))) < 2 and time.monotonic() < end:
            time.sleep(0.0005)
        dead.kill()
        dead.communicate()
        assert command("compress", other, "-o", target, *options) == (0, "")
        assert strays(out) == of_the_living
        assert bigsmall.verify(target, other)
    finally:
        stopped.send_signal(signal.SIGCONT)
    assert ended(stopped) == (0, "")
    assert os.listdir(out) == ["target"]
    assert content(target) == content(sources / ("folder-bs" if kind == "directory" else "model.bs"))


def test_a_replaced_directory_is_always_there(tmp_path: Path, out: Path) -> None:
    target, source = out / "target", small(tmp_path / "source" / "model.safetensors").parent
    bigsmall.compress(source, target)
    missing, looks, done = [], 0, threading.Event()

    def look() -> None:
        nonlocal looks
        while not done.is_set():
            looks += 1
            try:
                os.stat(target / "model.bs")
            except OSError as error:
                missing.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(200 if LONG else 20):
            bigsmall.compress(source, target, force=True)
    finally:
        done.set()
        watcher.join()
    assert looks > 100
    if sys.platform.startswith("linux"):  # elsewhere it may take two renames
        assert missing == []
    assert os.listdir(out) == ["target"]


# ---- no room ----

NO_ROOM = {
    "compress": ("compress", "model.safetensors", "target"),
    "compress a directory": ("compress", "folder", "target/part0.bs"),
    "decompress": ("decompress", "model.bs", "target"),
    "decompress a directory": ("decompress", "folder-bs", "target/part0.safetensors"),
    "repair": ("repair", "damaged.bs", "target"),
}


@pytest.mark.parametrize("case", NO_ROOM)
def test_file_size_limit(sources: Path, out: Path, case: str) -> None:
    """As `ulimit -f` sets it. The message has the name that the file would have had."""
    verb, name, named = NO_ROOM[case]
    process = begin(
        *(verb, sources / name, "-o", out / "target", "--json"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FEW, FEW)),
    )
    text, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert err == f"bigsmall: {out / named}: file too large\n"
    assert json.loads(text) == {"error": {"type": "IOFailure", "message": err[len("bigsmall: ") : -1]}}
    assert os.listdir(out) == []


def test_file_size_limit_of_a_writer(out: Path) -> None:
    """It is over then: nothing can be put, nothing is published, what was there stays."""
    target = out / "target"
    target.write_bytes(b"old")
    code = """
import errno, resource, numpy as np
from bigsmall import errors
from bigsmall._dtypes import BY_NAME
from bigsmall.writer import TensorSpec, Writer
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
data = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8)
with Writer(sys.argv[1], [TensorSpec(name, BY_NAME["uint8"], data.shape) for name in "ab"]) as writer:
    for call in (lambda: writer.put("a", data.ctypes.data, data.nbytes), writer.finish,
                 lambda: writer.put("b", data.ctypes.data, data.nbytes)):
        try:
            call()
        except errors.BigSmallError as error:
            print(type(error).__name__, getattr(error, "errno", None) == errno.EFBIG, sys.argv[1] in str(error))
"""
    process = start(code, target)
    text, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, "")
    first, *others = text.splitlines()[1:]  # the first line says that it begins
    assert first == "IOFailure True True"
    assert [line.split()[0] for line in others] == ["InvalidArgument"] * 2
    assert tree(out) == {"target": b"old"}


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=SECONDS)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode != 0:
        pytest.skip(f"needs root to mount a small tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=SECONDS)


@pytest.mark.parametrize("case", NO_ROOM)
@pytest.mark.parametrize("room", ["some", "none"])
def test_full_disk(sources: Path, tmp_path: Path, case: str, room: str) -> None:
    """What was there stays, a directory that may be replaced too; once there is room the same command works."""
    verb, name, named = NO_ROOM[case]
    with disk(tmp_path / "disk", "size=36m") as folder:
        target, old = folder / "target", folder / "target"
        options = []
        if (sources / name).is_dir():
            old, options = target / "old", ["--force"]
            target.mkdir()
        old.write_bytes(b"old")
        with open(folder / "filling", "wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1 << 16))
            if room == "some":
                file.truncate(34 << 20)
        filled = (folder / "filling").stat().st_size
        outcome = command(verb, sources / name, "-o", target, *options)
        # Where there is no room at all a directory fails at one of several steps: the directory, a file, its bytes.
        refused(outcome, folder / (named if room == "some" else "target"), "no space left on device")
        assert old.read_bytes() == b"old"
        assert sorted(os.listdir(folder)) == ["filling", "target"]
        assert (folder / "filling").stat().st_size == filled
        (folder / "filling").unlink()
        assert command(verb, sources / name, "-o", target, *options, "--quiet") == (0, "")
        assert os.listdir(folder) == ["target"]
        assert not old.exists() or old.read_bytes() != b"old"


def test_repair_in_place_on_a_full_disk(sources: Path, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=24m") as folder:
        damaged = folder / "damaged.bs"
        shutil.copy(sources / "damaged.bs", damaged)
        refused(command("repair", damaged), damaged, "no space left on device")
        assert tree(folder) == {"damaged.bs": (sources / "damaged.bs").read_bytes()}


@pytest.mark.parametrize(("options", "text"), [("nr_inodes=2", "no space left"), ("ro", "read-only file system")])
def test_file_systems_that_take_no_file(sources: Path, tmp_path: Path, options: str, text: str) -> None:
    with disk(tmp_path / "disk", f"size=40m,{options}") as folder:
        if options != "ro":
            (folder / "taken").write_bytes(b"")
        before = tree(folder)
        for verb, name, _ in NO_ROOM.values():
            refused(command(verb, sources / name, "-o", folder / "target"), folder / "target", text)
        assert tree(folder) == before


# ---- not allowed, not possible ----

# All that is needed is loaded before, since another user may not read it.
AS_NOBODY = """
import contextlib, os
import bigsmall.api, bigsmall.cli
with contextlib.suppress(SystemExit):
    bigsmall.cli.main(["--version"])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(bigsmall.cli.main(sys.argv[1:]))
"""


@pytest.fixture
def public(sources: Path) -> Iterator[Path]:
    """A folder that others can reach, unlike tmp_path: locked may not be written to, unreadable not be read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in ("model.safetensors", "model.bs", "damaged.bs"):
            shutil.copy(sources / path, folder)
        for path in ("folder", "folder-bs"):
            shutil.copytree(sources / path, folder / path)
        for path in ("locked", "open"):
            (folder / path).mkdir()
        (folder / "locked" / "target").write_bytes(b"old")
        shutil.copy(sources / "damaged.bs", folder / "locked")
        small(folder / "unreadable.safetensors").chmod(0)
        (folder / "locked").chmod(0o555)
        (folder / "open").chmod(0o777)
        folder.chmod(0o755)
        yield folder
        (folder / "locked").chmod(0o755)


def test_read_only_directory(public: Path) -> None:
    locked = public / "locked"
    before = tree(locked)
    for verb, name, _ in NO_ROOM.values():
        target = locked / ("new" if (public / name).is_dir() else "target")
        refused(ended(start(AS_NOBODY, verb, public / name, "-o", target)), target, "permission denied")
    refused(ended(start(AS_NOBODY, "repair", locked / "damaged.bs")), locked / "damaged.bs", "permission denied")
    assert tree(locked) == before


def test_source_that_may_not_be_read(public: Path) -> None:
    (public / "folder" / "part1.safetensors").chmod(0)
    (public / "folder-bs" / "part1.bs").chmod(0)
    for verb, name, named in (
        ("compress", "unreadable.safetensors", "unreadable.safetensors"),
        ("compress", "folder", "folder/part1.safetensors"),
        ("decompress", "folder-bs", "folder-bs/part1.bs"),
    ):
        outcome = ended(start(AS_NOBODY, verb, public / name, "-o", public / "open" / "target"))
        refused(outcome, public / named, "permission denied")
    assert os.listdir(public / "open") == []


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """What is neither file nor directory."""
    fifo, name = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as unix:
        try:
            unix.bind(str(name))
        except OSError:  # the path is too long for one
            name = fifo
        yield {"FIFO": fifo, "socket": name, "device": Path("/dev/zero")}


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_targets_that_are_no_files(sources: Path, out: Path, odd: dict[str, Path], kind: str) -> None:
    """A link to one neither: each is still what it was."""
    (out / "link").symlink_to(odd[kind])
    before = stat.S_IFMT(odd[kind].stat().st_mode)
    for verb, name, _ in NO_ROOM.values():
        refused(command(verb, sources / name, "-o", odd[kind], "--quiet"), odd[kind])
    for name in ("model.safetensors", "folder"):
        refused(command("compress", sources / name, "-o", out / "link", "--quiet"), odd[kind])
    assert stat.S_IFMT(odd[kind].stat().st_mode) == before
    assert (out / "link").is_symlink()
    assert os.listdir(out) == ["link"]


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_sources_that_are_no_files(out: Path, odd: dict[str, Path], kind: str) -> None:
    """Nothing waits for them; alone, in a directory, or as a base."""
    target, file = out / "target", small(out.parent / "model.safetensors")
    folder = small(out.parent / "folder" / "model.safetensors").parent
    (folder / "odd").symlink_to(odd[kind])
    for args in (
        ("compress", odd[kind], "-o", target),
        ("compress", folder, "-o", target),
        ("compress", file, "--base", odd[kind], "-o", target),
        ("decompress", odd[kind], "-o", target),
        ("verify", odd[kind]),
        ("info", odd[kind]),
        ("repair", odd[kind]),
    ):
        refused(command(*args), folder / "odd" if folder in args else odd[kind])
    assert os.listdir(out) == []


def test_directories_do_not_replace_files(sources: Path, out: Path) -> None:
    """Nor is a directory made for them to stand in; --force changes nothing."""
    (out / "file").write_bytes(b"old")
    for options in ([], ["--force"]):
        for verb, name in (("compress", "folder"), ("decompress", "folder-bs")):
            refused(command(verb, sources / name, "-o", out / "file", *options), out / "file")
            refused(command(verb, sources / name, "-o", out / "no" / "such", *options), out / "no")
            refused(command(verb, sources / name, "-o", out / "file" / "in", *options), out / "file")
    assert tree(out) == {"file": b"old"}


def test_names_as_long_as_the_file_system_takes(out: Path) -> None:
    """What stands beside the target meanwhile has a name too, which must not be too long where the target's is not."""
    most = os.pathconf(out, "PC_NAME_MAX")
    source = small(out.parent / "model.safetensors")
    for i, target in enumerate((out / ("n" * most), out / ("m" * (most - 1)))):
        folder = small(out.parent / f"folder{i}" / "m.safetensors").parent
        assert command("compress", source, "-o", target, "--quiet") == (0, "")
        assert bigsmall.verify(target, source)
        target.unlink()
        assert command("compress", folder, "-o", target, "--quiet") == (0, "")
    assert strays(out) == []


# ---- changed underneath ----


def test_source_written_through_a_mapping(tmp_path: Path, out: Path) -> None:
    """Which changes no time of the file, once its pages are dirty. What is said to be done is whole all the same."""
    source, target = model(tmp_path / "model.safetensors", 1, 12), out / "target"
    for _ in range(12 if LONG else 3):
        with open(source, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            pages = range(1 << 20, len(view), mmap.PAGESIZE)
            for at in pages:
                view[at] = view[at]
            process = begin("compress", source, "-o", target, "--quiet", "--threads", "1")
            until_written(process, out)
            value = 0
            while process.poll() is None:
                value = (value + 1) % 256
                for at in pages[value % 64 :: 64]:
                    view[at] = value
            outcome = ended(process)
        if outcome[0] == 0:
            report = bigsmall.verify(target)
            assert report, report.bad[:3]
            target.unlink()
        else:
            refused(outcome, source)
        assert os.listdir(out) == []


@pytest.mark.parametrize("verb", ["compress", "decompress"])
def test_copied_file_that_changes(tmp_path: Path, out: Path, verb: str) -> None:
    """What is copied is as it was at some moment, or nothing is done."""
    n = 150 << 20
    source = small(tmp_path / "folder" / "model.safetensors").parent
    if verb == "decompress":
        source = Path(bigsmall.compress(source, tmp_path / "packed"))
    old = np.random.default_rng(0).bytes(n)
    for _ in range(6 if LONG else 2):
        (source / "a.bin").write_bytes(old)
        process = begin(verb, source, "-o", out / "target", "--quiet")
        until_written(process, out, FEW)
        # From front to back, as it is copied: its front is new only where its end may be old.
        with open(source / "a.bin", "r+b", buffering=0) as file:
            file.write(bytes(4096))
            file.seek(n - 4096)
            file.write(bytes(4096))
        outcome = ended(process)
        if outcome[0] == 0:
            with open(out / "target" / "a.bin", "rb") as file:
                front = file.read(4096)
                file.seek(n - 4096)
                end = file.read()
            states = [(old[:4096], old[-4096:]), (bytes(4096), old[-4096:]), (bytes(4096), bytes(4096))]
            assert (front, end) in states, "its front is of before, its end of after a change"
            shutil.rmtree(out / "target")
        else:
            refused(outcome, source / "a.bin")
        assert os.listdir(out) == []


@pytest.mark.parametrize("how", ["shard", "folder of the target", "temporary", "target"])
def test_what_vanishes_or_appears_meanwhile(sources: Path, tmp_path: Path, out: Path, how: str) -> None:
    source, target = tmp_path / "folder", out / "target"
    shutil.copytree(sources / "folder", source)
    process = stopped_while_it_writes(out, "compress", source, "-o", target, "--quiet")
    try:
        if how == "shard":
            (source / "part1.safetensors").unlink()
        elif how == "folder of the target":
            shutil.rmtree(out)
        elif how == "temporary":
            for path in out.glob(".*"):
                shutil.rmtree(path)
        else:
            target.mkdir()
            (target / "of another").write_bytes(b"mine")
    finally:
        process.send_signal(signal.SIGCONT)
    outcome = ended(process)
    refused(outcome, source / "part1.safetensors" if how == "shard" else target)
    if how == "folder of the target":
        assert not out.exists()
    else:
        assert tree(out) == ({"target/of another": b"mine"} if how == "target" else {})
        assert strays(out) == []


@pytest.mark.parametrize("how", ["cut", "written"])
def test_base_that_changes(sources: Path, tmp_path: Path, out: Path, how: str) -> None:
    """The fine-tune itself, or an error."""
    base, tune = tmp_path / "base.safetensors", model(tmp_path / "tune.safetensors", 1, 12)
    with open(tune, "r+b") as file:
        file.seek(-(4 << 20), os.SEEK_END)
        file.write(bytes(1000))
    shutil.copy(sources / "model.safetensors", base)
    delta = bigsmall.compress_delta(tune, base, tmp_path / "delta.bs")
    for verb, source in (("decompress", delta), ("compress", tune)):
        shutil.copy(sources / "model.safetensors", base)
        process = begin(verb, source, "--base", base, "-o", out / "target", "--quiet", "--threads", "1")
        until_written(process, out)
        with open(base, "r+b") as file:
            if how == "cut":
                file.truncate(base.stat().st_size // 2)
            else:
                file.seek(-(12 << 20), os.SEEK_END)
                file.write(bytes(10 << 20))
        outcome = ended(process)
        shutil.copy(sources / "model.safetensors", base)
        if outcome[0] == 0:
            target = out / "target"
            whole = target if verb == "decompress" else bigsmall.decompress(target, out / "whole", base=base)
            assert Path(whole).read_bytes() == tune.read_bytes()
            for path in out.iterdir():
                path.unlink()
        else:
            refused(outcome)
        assert os.listdir(out) == []


READ = """
import time
import numpy as np
from bigsmall import errors
path, source, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
want = bigsmall.decompress(source)
right = failed = 0
names = sorted(want)
with bigsmall.safe_open(path, "np") as file:
    parts = {name: file.get_slice(name) for name in names}
    print("open", flush=True)
    end = time.monotonic() + seconds
    for i in range(10**9):
        if time.monotonic() > end:
            break
        name = names[i % len(names)]
        row = i * 37 % (len(want[name]) - 3)
        reads = (
            lambda: (file.get_tensor(name), want[name]),
            lambda: (parts[name][row : row + 3], want[name][row : row + 3]),
            lambda: (file.get_tensors(names[:2])[names[1]], want[names[1]]),
        )
        try:
            got, expected = reads[i // len(names) % 3]()
        except errors.BigSmallError:
            failed += 1
        else:
            assert np.array_equal(got.view(np.uint8), expected.view(np.uint8)), name
            right += 1
print(right, failed)
"""


def test_reader_while_its_file_is_damaged_and_mended(sources: Path, tmp_path: Path) -> None:
    """Right bytes or an error at any moment, and right ones again once the file is."""
    path = tmp_path / "model.bs"
    shutil.copy(sources / "model.bs", path)
    whole = path.read_bytes()
    process = start(READ, path, sources / "model.bs", 30 if LONG else 3)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["begin\n", "open\n"]
    random_of_damage = random.Random(3)
    with open(path, "r+b", buffering=0) as file:
        while process.poll() is None:
            at = random_of_damage.randrange(len(whole))
            if random_of_damage.random() < 0.5:
                os.ftruncate(file.fileno(), at)
                time.sleep(0.002)
                os.pwrite(file.fileno(), whole[at:], at)
            else:
                os.pwrite(file.fileno(), random_of_damage.randbytes(2000)[: len(whole) - at], at)
                time.sleep(0.002)
                os.pwrite(file.fileno(), whole[at : at + 2000], at)
            time.sleep(0.01)
    text, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, "")
    right, failed = map(int, text.split())
    assert right > 0
    assert failed > 0
    assert path.read_bytes() == whole


# ---- many writers ----


@pytest.mark.parametrize(
    ("verb", "kind", "n"),
    [
        ("compress", "file", 2),
        ("compress", "file", 4),
        ("compress", "directory", 2),
        ("compress", "directory", 4),
        ("decompress", "file", 4),
        ("decompress", "directory", 4),
    ],
)
def test_many_commands(tmp_path: Path, out: Path, verb: str, kind: str, n: int) -> None:
    """All succeed, one of them is there; another that is killed among them changes nothing."""
    target, results, commands = out / "target", [], []
    for i in range(n):
        source = model(tmp_path / f"source{i}" / "model.safetensors", 100 * i, 1 + i % 2)
        source = source.parent if kind == "directory" else source
        packed = Path(bigsmall.compress(source, tmp_path / f"packed{i}"))
        results.append(content(packed if verb == "compress" else source))
        commands.append([verb, source if verb == "compress" else packed, "-o", target, "--quiet"])
        commands[-1] += ["--force"] if kind == "directory" else []
    for _ in range(10 if LONG else 1):
        processes = [begin(*args) for args in commands]
        killed = begin(*commands[0])
        until_written(killed, out)
        killed.kill()
        killed.communicate()
        assert [ended(process) for process in processes] == [(0, "")] * n
        assert content(target) in results
        assert command(*commands[0]) == (0, "")
        assert content(target) == results[0]
        assert os.listdir(out) == ["target"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_many_writers_of_the_same_again_and_again(tmp_path: Path, out: Path, kind: str) -> None:
    """What one of them has just made, another must not take for a leftover."""
    source, target = small(tmp_path / "source" / "model.safetensors"), out / "target"
    source = source.parent if kind == "directory" else source
    code = "for _ in range(int(sys.argv[3])): bigsmall.compress(sys.argv[1], sys.argv[2], force={})".format(
        kind == "directory"
    )
    processes = [start(code, source, target, 500 if LONG else 150) for _ in range(4)]
    assert [ended(process) for process in processes] == [(0, "")] * 4
    assert bigsmall.verify(target, source)
    assert os.listdir(out) == ["target"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_many_commands_of_the_default_output(tmp_path: Path, kind: str) -> None:
    """Which replaces nothing: one succeeds, the others say that it exists."""
    source = model(tmp_path / "model" / "model.safetensors", 1, 2)
    target = source.with_suffix(".bs")
    if kind == "directory":
        source, target = source.parent, tmp_path / "model-bs"
    for _ in range(10 if LONG else 2):
        outcomes = [ended(process) for process in [begin("compress", source, "--quiet") for _ in range(4)]]
        assert sorted(status for status, _ in outcomes) == [0, 1, 1, 1], outcomes
        for outcome in outcomes:
            if outcome[0] != 0:
                refused(outcome, target, "exists")
        assert bigsmall.verify(target, source)
        assert strays(tmp_path) == []
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def test_many_threads(tmp_path: Path, out: Path) -> None:
    """Of one process: a lock that is the process's own would not tell them apart."""
    data = [np.full((300, 1000), i, np.uint8) for i in range(6)]
    living = Writer(out / "target", [TensorSpec("w", BY_NAME["uint8"], data[5].shape)])
    threads = [threading.Thread(target=bigsmall.save_file, args=({"w": array}, out / "target")) for array in data[:5]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert bigsmall.decompress(out / "target")["w"][0, 0] < 5
    living.put("w", data[5].ctypes.data, data[5].nbytes)
    living.finish()
    living.close()
    assert np.array_equal(bigsmall.decompress(out / "target")["w"], data[5])
    assert os.listdir(out) == ["target"]


# ---- the target is the source ----


def files_of_links(tmp_path: Path, path: Path) -> tuple[Path, Path]:
    """A store of files and a directory that only has links to them, as the cache of the Hugging Face Hub."""
    store, links = tmp_path / "store", tmp_path / f"links-to-{path.name}"
    store.mkdir(exist_ok=True)
    links.mkdir()
    (store / "other").write_bytes(b"of another model")
    shutil.move(path, store / f"{path.name}-0123")
    (links / path.name).symlink_to(f"../store/{path.name}-0123")
    return store, links


@pytest.mark.parametrize(
    "case", ["compress", "decompress", "base of a delta", "base of a delta that is read", "for the Hub"]
)
def test_files_that_links_lead_to_are_not_lost(tmp_path: Path, case: str) -> None:
    """A target that holds what a link in the source or the base leads to, whatever is forced."""
    values = weights(1, 100, 100)
    source = write_safetensors(tmp_path / "model.safetensors", {"w": ("F32", (100, 100), values.tobytes())})
    tune = tmp_path / "tune"
    tune.mkdir()
    near = (values * np.float32(1.0001)).tobytes()
    write_safetensors(tune / "model.safetensors", {"w": ("F32", (100, 100), near)})
    delta, packed = tmp_path / "delta", tmp_path / "model.bs"
    (tmp_path / "base").mkdir()
    shutil.copy(source, tmp_path / "base")
    bigsmall.compress_delta(tune, tmp_path / "base", delta)
    bigsmall.compress(source, packed)
    store, links = files_of_links(tmp_path, packed if case == "decompress" else source)
    args: dict[str, list[object]] = {
        "compress": ["compress", links],
        "decompress": ["decompress", links],
        "base of a delta": ["compress", tune, "--base", links],
        "base of a delta that is read": ["decompress", delta, "--base", links],
    }
    before = tree(tmp_path)
    if case == "for the Hub":
        with pytest.raises(errors.InvalidArgument, match=str(store)):
            bigsmall.compress_for_hub(links, store, force=True)
    else:
        refused(command(*args[case], "-o", store, "--force"), store)
    assert tree(tmp_path) == before
    assert strays(tmp_path) == []


def test_commands_whose_output_is_their_input(tmp_path: Path) -> None:
    """By any name, from the folder itself too, with all that is forced."""
    folder = tmp_path / "folder"
    source = small(folder / "model.safetensors")
    packed = bigsmall.compress(folder, tmp_path / "packed")
    bs = bigsmall.compress(source, tmp_path / "model.bs")
    (tmp_path / "link.safetensors").symlink_to(source)
    (tmp_path / "chain").symlink_to("link.safetensors")
    os.link(source, tmp_path / "hard")
    (tmp_path / "folder-link").symlink_to("folder", target_is_directory=True)
    before = tree(tmp_path)
    calls: list[tuple[object, ...]] = [
        ("compress", "link.safetensors", "-o", source),
        ("compress", "chain", "-o", "hard"),
        ("compress", "hard", "-o", "chain"),
        ("compress", "folder/../link.safetensors", "-o", "packed/../folder/./model.safetensors"),
        ("compress", "hard", "--base", "chain", "-o", "link.safetensors"),
        ("decompress", "model.bs", "--base", "model.bs", "-o", "./model.bs"),
        ("decompress", bs, "--base", source, "-o", "hard"),
        ("repair", source, "-o", "hard"),
        ("compress", "folder-link", "-o", "folder", "--force"),
        ("compress", "folder", "-o", ".", "--force"),
        ("compress", "folder", "-o", "folder/in", "--force"),
        ("compress", "folder", "-o", "folder/../folder-link/in/it", "--force"),
        ("compress", "folder", "--base", "packed", "-o", "packed", "--force"),
        ("decompress", "packed", "-o", "packed/../packed", "--force"),
        ("decompress", packed, "-o", tmp_path, "--force"),
        ("decompress", "packed", "--base", "folder-link", "-o", "folder", "--force"),
    ]
    for args in calls:
        outcome = command(*args, cwd=tmp_path)
        assert outcome[0] == 1, args
        refused(outcome)
        assert tree(tmp_path) == before, args
    refused(command("compress", ".", "-o", "../folder", "--force", cwd=folder))
    refused(command("compress", ".", "-o", "..", "--force", cwd=folder))
    assert tree(tmp_path) == before
    assert all(path.is_symlink() for path in (tmp_path / "chain", tmp_path / "folder-link"))
    assert strays(tmp_path) == []


def test_output_that_is_a_link(tmp_path: Path) -> None:
    """What it leads to is written, through a chain and into a directory that is elsewhere; links stay links."""
    source, folder = small(tmp_path / "model.safetensors"), small(tmp_path / "folder" / "m.safetensors").parent
    far = tmp_path / "far" / "away"
    far.mkdir(parents=True)
    for name, to in (("one", "two"), ("two", "far/away/file"), ("three", str(far / "folder")), ("four", "no/such")):
        (tmp_path / name).symlink_to(to)
    assert command("compress", source, "-o", "one", "--quiet", cwd=tmp_path) == (0, "")
    assert command("compress", folder, "-o", "three", "--quiet", cwd=tmp_path) == (0, "")
    assert bigsmall.verify(far / "file", source)
    assert bigsmall.verify(far / "folder", folder)
    assert command("compress", folder, "-o", "three", "--force", "--quiet", cwd=tmp_path) == (0, "")
    refused(command("compress", source, "-o", "four", cwd=tmp_path), "no")
    refused(command("compress", folder, "-o", "four", "--force", cwd=tmp_path), "no")
    assert [os.path.islink(tmp_path / name) for name in ("one", "two", "three", "four")] == [True] * 4
    assert not (tmp_path / "no").exists()
    assert sorted(tree(far)) == ["file", "folder/m.bs"]
    assert strays(tmp_path) == []


def test_output_that_is_a_link_to_itself(tmp_path: Path) -> None:
    """Leads nowhere: an error, and the links stay."""
    source, folder = small(tmp_path / "model.safetensors"), small(tmp_path / "folder" / "m.safetensors").parent
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    calls: list[Callable[[], object]] = [
        lambda: bigsmall.compress(source, tmp_path / "one"),
        lambda: bigsmall.compress(folder, tmp_path / "one", force=True),
        lambda: bigsmall.save_file({"w": np.zeros(3)}, tmp_path / "two"),
    ]
    for call in calls:
        with pytest.raises(errors.BigSmallError):
            call()
        assert (tmp_path / "one").is_symlink()
        assert (tmp_path / "two").is_symlink()
    assert strays(tmp_path) == []


def test_output_of_the_command_that_nobody_takes(tmp_path: Path) -> None:
    """The work is done before it is reported; that the report is lost is a failure of its own, in one line."""
    source = small(tmp_path / "model.safetensors")
    with open("/dev/full", "w") as full:
        args = [sys.executable, "-m", "bigsmall", "compress", str(source), "-o", str(tmp_path / "out.bs")]
        process = subprocess.Popen(args, stdout=full, stderr=subprocess.PIPE, text=True)
        refused(ended(process), "No space left on device")
    assert bigsmall.verify(tmp_path / "out.bs", source)
    assert strays(tmp_path) == []
