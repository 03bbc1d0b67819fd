"""The library goes on working in children of fork(), also where the parent had used it. Before the loader took care of
it, such a child would hang for ever, so every test runs in a process of its own under a time limit."""

from __future__ import annotations

import os
import sys

import pytest

from helpers import bfloat16, run_script, weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PRELUDE = """
import hashlib, os, sys, threading
import bigsmall
from bigsmall import _native, errors
from bigsmall.numpy import read
from bigsmall.reader import Reader

path, expected = sys.argv[1], sys.argv[2]

def digest(arrays):
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()

def use(reader=None):
    if reader is None:
        got = digest(bigsmall.decompress(path, workers=2))
    else:
        got = digest(read(reader, reader.tensors, workers=2))
    assert got == expected

def in_child(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.fixture
def arguments(make):
    import hashlib

    tensors = {f"layer.{number}": ("BF16", (200, 400), bfloat16(weights(number, 200, 400))) for number in range(3)}
    _, target = make(tensors)
    return target, hashlib.sha256(b"".join(tensors[name][2] for name in sorted(tensors))).hexdigest()


def test_fork_before_use(arguments) -> None:
    run_script(PRELUDE + "in_child(use); use()", *arguments)


def test_fork_after_use(arguments) -> None:
    run_script(PRELUDE + "use(); in_child(use); in_child(use); use()", *arguments)


def test_nested(arguments) -> None:
    code = """
def nest(depth):
    use()
    if depth:
        in_child(lambda: nest(depth - 1))
    use()

nest(3)
"""
    run_script(PRELUDE + code, *arguments)


def test_open_reader_in_child(arguments) -> None:
    code = """
reader = Reader(path)
memory = Reader.from_memory(open(path, "rb").read())
file = bigsmall.safe_open(path, "np")
part = file.get_slice("layer.1")
rows = part[3:5].tobytes()

def child():
    for _ in range(2):
        use(reader)
        use(memory)
    assert part[3:5].tobytes() == rows
    assert file.get_tensor("layer.1")[3:5].tobytes() == rows
    in_child(lambda: use(reader))
    reader.close()
    os.chdir("/")
    use(relative)

os.chdir(os.path.dirname(path))
relative = Reader(os.path.basename(path))
in_child(child)
use(reader)
"""
    run_script(PRELUDE + code, *arguments)


def test_file_changed_before_the_child_used_it(arguments) -> None:
    code = """
reader = Reader(path)
with open(path, "ab") as file:
    file.write(b"more")

def child():
    try:
        use(reader)
    except errors.InvalidArgument as error:
        assert "has changed" in str(error)
    else:
        raise AssertionError("no error")

in_child(child)
"""
    run_script(PRELUDE + code, *arguments)


def test_writer_in_child_is_refused(arguments, tmp_path) -> None:
    code = """
from bigsmall._dtypes import BY_NAME
from bigsmall.writer import TensorSpec, Writer

with Writer(sys.argv[3], [TensorSpec("w", BY_NAME["uint8"], (0,))]) as writer:
    def child():
        try:
            writer.finish()
        except errors.InternalError as error:
            assert error.status == errors.FORKED
        else:
            raise AssertionError("no error")
    in_child(child)
    writer.put("w", 0, 0)
    writer.finish()
assert bigsmall.info(sys.argv[3])["tensor_count"] == 1
"""
    run_script(PRELUDE + code, *arguments, tmp_path / "new.bs")


def test_fork_while_other_threads_decode(arguments) -> None:
    code = """
use()  # with all imports done: a fork in the midst of one is Python's own trap
stop = threading.Event()

def busy():
    while not stop.is_set():
        use()

threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(5):
    in_child(use)
stop.set()
for thread in threads:
    thread.join()
"""
    run_script("import warnings; warnings.simplefilter('ignore')\n" + PRELUDE + code, *arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux only")
def test_temporary_file_where_there_is_no_memfd(arguments) -> None:
    code = """
def no(*args):
    raise OSError("no memfd today")

os.memfd_create = no
use()
in_child(use)
in_child(lambda: in_child(use))
"""
    run_script(PRELUDE + code, *arguments)


def test_clear_error_where_nothing_works(arguments) -> None:
    code = """
import tempfile

def no(*args, **kwargs):
    raise OSError("not allowed")

os.memfd_create = tempfile.mkstemp = no
use()

def child():
    try:
        use()
    except errors.InternalError as error:
        assert error.status == errors.FORKED
        assert "spawn" in str(error) and "not allowed" in str(error)
    else:
        raise AssertionError("no error")

in_child(child)
use()
"""
    run_script(PRELUDE + code, *arguments)


def test_multiprocessing_pool(arguments) -> None:
    code = """
import multiprocessing

reader = Reader(path)

def work(number):
    use(reader)
    use()
    return number

if __name__ == "__main__":
    use()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(work, range(20), chunksize=1) == list(range(20))
"""
    run_script(PRELUDE + code, *arguments)


def test_errors_reach_the_parent_of_a_pool(arguments) -> None:
    code = """
import multiprocessing

def work(number):
    bigsmall.safe_open(path + ".none", "np")

if __name__ == "__main__":
    use()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        try:
            pool.map(work, range(2))
        except FileNotFoundError as error:
            assert isinstance(error, errors.BigSmallError)
            assert error.filename == path + ".none"
        else:
            raise AssertionError("no error")
"""
    run_script(PRELUDE + code, *arguments)


def test_data_loader(arguments) -> None:
    pytest.importorskip("torch")
    code = """
import torch

class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.file = bigsmall.safe_open(path, "pt")
        self.part = self.file.get_slice("layer.0")

    def __len__(self):
        return 24

    def __getitem__(self, row):
        assert torch.utils.data.get_worker_info() is not None
        return self.part[row].float()

if __name__ == "__main__":
    whole = bigsmall.load(path)["layer.0"].float()
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), whole[:24])
"""
    run_script(PRELUDE + code, *arguments)
