"""What happens to files when something goes wrong while they are written: a process that is killed, a full disk, a
source that changes, two writers, a target that is the source. The old file or the whole new one, and nothing beside it.

BIGSMALL_LONG=1 in the environment repeats the random ones more often.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from bigsmall.reader import Reader
from helpers import bfloat16, tree, weights, write_safetensors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits of POSIX")

LONG = bool(os.environ.get("BIGSMALL_LONG"))
KILLS = 200 if LONG else 12
SECONDS = 60  # of a process, after which it hangs

# A process that says when it begins, so that the moment of a signal is one of the work and not of Python's start.
BEGIN = """
import sys
import bigsmall
bigsmall.cpu()
print("begin", flush=True)
"""


def start(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error; a process that takes too long fails the test."""
    try:
        _, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f"still running after {SECONDS} s: {process.args}")
    return process.returncode, err


def command(*args: object) -> tuple[int, str]:
    """Runs the command line."""
    return ended(
        subprocess.Popen(
            [sys.executable, "-m", "bigsmall", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


def strays(folder: Path) -> list[str]:
    """What is left of files being written, anywhere below the folder."""
    return [str(path) for path in folder.rglob(".*")]


def model(path: Path, seed: int, n: int) -> Path:
    """A source of n million BF16 weights."""
    path.parent.mkdir(exist_ok=True, parents=True)
    tensors = {f"layer.{i}": ("BF16", (1000, 100 * n), bfloat16(weights(seed + i, 1000, 100 * n))) for i in range(10)}
    return write_safetensors(path, tensors)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sources that take some tenths of a second: model, a file, and folder, two files and another."""
    folder = tmp_path_factory.mktemp("faults")
    model(folder / "model.safetensors", 1, 12)
    for i in range(2):
        model(folder / "folder" / f"part{i}.safetensors", 50 * i, 4)
    (folder / "folder" / "config.json").write_text("{}")
    bigsmall.compress(folder / "model.safetensors", folder / "model.bs")
    bigsmall.compress(folder / "folder", folder / "folder-bs")
    yield folder
    shutil.rmtree(folder)


# ---- killed ----

CASES = {
    "compress": ("model.safetensors", "bigsmall.compress(sys.argv[1], sys.argv[2])"),
    "compress a directory": ("folder", "bigsmall.compress(sys.argv[1], sys.argv[2], force=True)"),
    "decompress": ("model.bs", "bigsmall.decompress(sys.argv[1], sys.argv[2])"),
    "decompress a directory": ("folder-bs", "bigsmall.decompress(sys.argv[1], sys.argv[2], force=True)"),
    "repair": ("damaged.bs", "bigsmall.repair(sys.argv[1], sys.argv[2])"),
    "save_file": (
        "model.safetensors",
        "from safetensors.numpy import load_file\nimport numpy as np\n"
        "bigsmall.save_file({'w': np.zeros((3000, 4000), 'f4')}, sys.argv[2])",
    ),
}


def content(path: Path) -> dict[str, bytes] | bytes | None:
    if path.is_dir():
        return tree(path)
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("existing", [True, False], ids=["replacing", "new"])
def test_killed_at_any_moment(large: Path, tmp_path: Path, case: str, existing: bool) -> None:
    """The target is the old one or the whole new one; the next run takes away what was left."""
    name, code = CASES[case]
    source, target = large / name, tmp_path / "target"
    if case == "repair":
        source = tmp_path / "source" / name
        source.parent.mkdir()
        bigsmall.compress(large / "model.safetensors", source, parity=3)
        with open(source, "r+b") as file:
            file.seek(100_000)
            file.write(bytes(50_000))
    before = content(source)
    begun = start(code, source, target)
    assert begun.stdout is not None
    begun.stdout.readline()
    since = time.monotonic()
    assert ended(begun) == (0, "")
    takes = time.monotonic() - since
    new = content(target)

    def put_old() -> dict[str, bytes] | bytes | None:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if existing and isinstance(new, dict):
            target.mkdir()
            (target / "old").write_bytes(b"old")
        elif existing:
            target.write_bytes(b"old")
        return content(target)

    old = put_old()
    moments = random.Random(case)
    was_old = 0
    for kill in range(max(3, KILLS // (2 * len(CASES)) + 1) if not LONG else KILLS // 6):
        process = start(code, source, target)
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(moments.uniform(0, 1.1 * takes) if kill else 0)
        process.kill()
        process.communicate()
        found = content(target)
        assert found in (old, new)
        was_old += found == old
        if found == new:
            put_old()
    assert was_old, "none was killed before it was done"
    assert content(source) == before
    assert ended(start(code, source, target)) == (0, "")
    assert content(target) == new
    assert strays(tmp_path) == []


# ---- no room ----

NO_ROOM = """
import errno, os, resource
source, target = sys.argv[1], sys.argv[2]
{prepare}
try:
    {work}
except bigsmall.errors.BigSmallError as error:
    assert isinstance(error, OSError), repr(error)
    assert error.errno == {number}, repr(error)
    assert target in str(error), str(error)
else:
    raise AssertionError("no error")
"""

WRITES = {
    "compress": ("model.safetensors", "bigsmall.compress(source, target)"),
    "parity": ("model.safetensors", "bigsmall.compress(source, target, parity=50)"),
    "compress a directory": ("folder", "bigsmall.compress(source, target)"),
    "decompress": ("model.bs", "bigsmall.decompress(source, target)"),
    "decompress a directory": ("folder-bs", "bigsmall.decompress(source, target)"),
    "save_file": ("model.bs", "import numpy; bigsmall.save_file({'w': numpy.random.rand(2000, 1000)}, target)"),
}


@pytest.mark.parametrize("case", WRITES)
def test_file_size_limit(large: Path, tmp_path: Path, case: str) -> None:
    """Python ignores the signal that comes with it, so writing fails as on a full disk."""
    name, work = WRITES[case]
    target = tmp_path / "target"
    code = NO_ROOM.format(
        prepare="resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))", work=work, number="errno.EFBIG"
    )
    assert ended(start(code, large / name, target)) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode != 0:
        pytest.skip(f"needs root to mount a small tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("case", WRITES)
def test_full_disk(large: Path, small_disk: Path, case: str) -> None:
    name, work = WRITES[case]
    target = small_disk / "target"
    if "directory" not in case:
        target.write_bytes(b"old")
    code = NO_ROOM.format(prepare="", work=work, number="errno.ENOSPC")
    assert ended(start(code, large / name, target)) == (0, "")
    assert tree(small_disk) == ({} if "directory" in case else {"target": b"old"})


def test_command_on_a_full_disk(large: Path, tmp_path: Path) -> None:
    code = "import bigsmall.cli, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    code += "sys.exit(bigsmall.cli.main(sys.argv[1:]))"
    target = tmp_path / "out.bs"
    status, err = ended(start(code, "compress", large / "model.safetensors", "-o", target))
    assert status == 1
    assert err == f"bigsmall: {target}: file too large\n"
    assert list(tmp_path.iterdir()) == []


# ---- not allowed ----


def test_read_only_directory() -> None:
    """As another user, where the tests run as root, who may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder, locked = Path(name), Path(name) / "locked"
        source = write_safetensors(folder / "small.safetensors", {"w": ("U8", (3,), b"abc")})
        locked.mkdir()
        (locked / "target").write_bytes(b"old")
        locked.chmod(0o555)
        folder.chmod(0o755)
        become = "if os.geteuid() == 0:\n    os.setegid(65534); os.seteuid(65534)"
        code = NO_ROOM.format(prepare=become, work="bigsmall.compress(source, target)", number="errno.EACCES")
        assert ended(start(code, source, locked / "target")) == (0, "")
        assert tree(locked) == {"target": b"old"}
        locked.chmod(0o755)


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "none"])
def test_impossible_targets(large: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "directory":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "device":
        target = Path("/dev/null")
    else:
        target = tmp_path / "no" / "such" / "target"
    for call in (
        lambda: bigsmall.compress(large / "model.safetensors", target),
        lambda: bigsmall.decompress(large / "model.bs", target),
        lambda: bigsmall.save_file({"w": np.zeros(3)}, target),
    ):
        with pytest.raises(errors.BigSmallError) as caught:
            call()
        assert str(target if kind != "none" else target.parent) in str(caught.value)
        assert isinstance(caught.value, (errors.InvalidArgument, errors.FileMissing))
    assert strays(tmp_path) == []
    if kind == "device":
        assert not os.path.isfile("/dev/null")


# ---- changed underneath ----


def change(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "truncated":
        os.truncate(path, size // 3)
    elif how == "grown":
        with open(path, "ab") as file:
            file.write(b"more")
    elif how == "rewritten":
        with open(path, "r+b") as file:
            file.seek(size // 2)
            file.write(b"\xff" * (size // 3))
    else:
        other = path.with_name("other")
        other.write_bytes(b"another file")
        os.replace(other, path)


def while_writing(folder: Path, code: str, source: Path, target: Path, how: str) -> tuple[int, str]:
    """Runs the code, and changes its source as soon as something of the target is there."""
    process = start(code, source, target)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    end = time.monotonic() + SECONDS
    while process.poll() is None and not strays(folder):
        assert time.monotonic() < end
        time.sleep(0.0005)
    change(source, how)
    return ended(process)


@pytest.mark.parametrize("how", ["truncated", "grown", "rewritten", "replaced"])
@pytest.mark.parametrize("work", ["compress", "decompress"])
def test_source_changes(large: Path, tmp_path: Path, work: str, how: str) -> None:
    """What is written then is right, or nothing is."""
    name = "model.safetensors" if work == "compress" else "model.bs"
    target = tmp_path / "out" / "target"
    target.parent.mkdir()
    whole = (large / ("model.bs" if work == "compress" else "model.safetensors")).read_bytes()
    outcomes = set()
    for _ in range(10 if LONG else 3):
        source = tmp_path / name
        shutil.copy(large / name, source)
        code = f"bigsmall.{work}(sys.argv[1], sys.argv[2], workers=1)"
        status, err = while_writing(target.parent, code, source, target, how)
        last = err.strip().splitlines()[-1] if err else ""
        if status == 0:
            assert target.read_bytes() == whole, how
            target.unlink()
        else:
            assert status == 1, err
            assert last.startswith("bigsmall.errors."), err
            assert str(source) in last
        outcomes.add(status)
        assert list(target.parent.iterdir()) == []
    if how in ("replaced", "grown") and work == "decompress":
        assert outcomes == {0}  # the open file is what it was


def test_open_reader_and_a_file_that_shrinks_or_changes(large: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.bs"
    shutil.copy(large / "model.bs", path)
    want = bigsmall.decompress(path)
    with Reader(path) as reader, bigsmall.safe_open(path, "np") as file:
        spans = {tensor.name: reader.locate(tensor) for tensor in reader.tensors}
        first, last = (f(spans, key=lambda name: spans[name].offset) for f in (min, max))
        middle = "layer.5"
        with open(path, "r+b") as changed:
            changed.seek(spans[middle].offset + spans[middle].n_bytes // 2)
            changed.write(b"\x55" * 100)
            changed.truncate(spans[last].offset + 1000)
        assert np.array_equal(file.get_tensor(first), want[first])
        with pytest.raises(errors.ChecksumMismatch, match=rf"model\.bs.*{middle}"):
            file.get_tensor(middle)
        with pytest.raises(errors.Truncated, match=rf"model\.bs.*{last}"):
            file.get_tensor(last)
        with pytest.raises(errors.Truncated):
            file.get_slice(last)[-1:]


# ---- two writers ----


@pytest.mark.parametrize("kind", ["file", "directory", "directory without force"])
def test_writers_of_one_target(large: Path, tmp_path: Path, kind: str) -> None:
    """One whole winner."""
    target = tmp_path / "out" / "target"
    target.parent.mkdir()
    sources, code = [], "bigsmall.compress(sys.argv[1], sys.argv[2], force={})".format("force" not in kind)
    for i in range(4):
        source = tmp_path / f"source{i}"
        model(source / "model.safetensors", 100 * i, 1 + i % 2)
        sources.append(source if "directory" in kind else source / "model.safetensors")
    results = []
    for i, source in enumerate(sources):
        bigsmall.compress(source, tmp_path / f"result{i}")
        results.append(content(tmp_path / f"result{i}"))
    for _ in range(10 if LONG else 2):
        processes = [start(code, source, target) for source in sources]
        outcomes = [ended(process) for process in processes]
        assert content(target) in results
        winners = [status for status, _ in outcomes if status == 0]
        if kind == "directory without force":
            assert len(winners) == 1
            assert all("exists and is not empty" in err for status, err in outcomes if status != 0)
        else:
            assert len(winners) == 4, outcomes
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        shutil.rmtree(target) if target.is_dir() else target.unlink()


# ---- the target is the source ----


def test_no_source_is_lost(tmp_path: Path) -> None:
    """Output that is the input, by any name, is refused; nothing changes."""
    source = write_safetensors(tmp_path / "model.safetensors", {"w": ("BF16", (300,), bfloat16(weights(1, 300)))})
    bs = tmp_path / "model.bs"
    bigsmall.compress(source, bs)
    (tmp_path / "link").symlink_to("model.safetensors")
    os.link(source, tmp_path / "hard")
    (tmp_path / "bs-link").symlink_to(bs)
    os.link(bs, tmp_path / "bs-hard")
    (tmp_path / "in").mkdir()
    (tmp_path / "dir-link").symlink_to(tmp_path, target_is_directory=True)
    before = tree(tmp_path)
    for name in ("model.safetensors", "link", "hard", "in/../model.safetensors", "dir-link/model.safetensors"):
        with pytest.raises(errors.InvalidArgument, match="same file"):
            bigsmall.compress(source, tmp_path / name)
    for name in ("model.bs", "bs-link", "bs-hard", "in/../model.bs", "dir-link/bs-link"):
        with pytest.raises(errors.InvalidArgument, match="same file"):
            bigsmall.decompress(bs, tmp_path / name)
    for base in ("model.safetensors", "link", "hard"):
        other = tmp_path / "tune.safetensors"
        other.write_bytes(source.read_bytes())
        with pytest.raises(errors.InvalidArgument, match="base"):
            bigsmall.compress_delta(other, source, tmp_path / base)
        other.unlink()
    assert tree(tmp_path) == before
    status, err = command("compress", source, "-o", source)
    assert (status, "same file" in err) == (1, True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_no_directory_is_lost(tmp_path: Path, force: bool) -> None:
    """Nor where one lies in the other, whatever is forced."""
    root = tmp_path / "root"
    write_safetensors_in = root / "model"
    write_safetensors_in.mkdir(parents=True)
    write_safetensors(write_safetensors_in / "model.safetensors", {"w": ("U8", (3,), b"abc")})
    bigsmall.compress(write_safetensors_in, root / "packed")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    before = tree(root)
    calls: list[tuple[Callable[..., object], Path]] = [
        (bigsmall.compress, write_safetensors_in),
        (bigsmall.decompress, root / "packed"),
    ]
    for call, source in calls:
        for target in (
            source,
            source / "in",
            root,
            tmp_path / "link" / source.name,
            tmp_path / "link",
            source / ".." / "..",
        ):
            with pytest.raises(errors.BigSmallError):
                call(source, target, force=force)
            assert tree(root) == before
    assert strays(tmp_path) == []


def test_links_stay_links(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "model.safetensors", {"w": ("U8", (3,), b"abc")})
    real, link, dangling = tmp_path / "real.bs", tmp_path / "link.bs", tmp_path / "dangling.bs"
    real.write_bytes(b"old")
    link.symlink_to("real.bs")
    dangling.symlink_to("made.bs")
    bigsmall.compress(source, link)
    bigsmall.compress(source, dangling)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert real.read_bytes() == (tmp_path / "made.bs").read_bytes() != b"old"
    folder, packed = tmp_path / "folder", tmp_path / "packed"
    folder.mkdir()
    write_safetensors(folder / "m.safetensors", {"w": ("U8", (3,), b"abc")})
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_bytes(b"old")
    packed.symlink_to("real", target_is_directory=True)
    with pytest.raises(errors.FilePresent):
        bigsmall.compress(folder, packed)
    bigsmall.compress(folder, packed, force=True)
    assert packed.is_symlink()
    assert list(tree(tmp_path / "real")) == ["m.bs"]
    assert strays(tmp_path) == []


def test_the_library_leaves_limits_and_signals_alone() -> None:
    """Those of this process are what they were, after all of the above."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    assert errno.EFBIG
