"""Every status of the header can be reached, and comes out as the exception it should be."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from test_abi import header_enum

import bigsmall
from bigsmall import _native, errors
from bigsmall.reader import Reader
from helpers import bfloat16, every_dtype, run_script, v1_file, v1_tensor, weights, write_safetensors


def payload(tensors=None):
    return tensors or {"weight": ("BF16", (300, 400), bfloat16(weights(1, 300, 400)))}


class Raw:
    """One call of the library without any Python around it."""

    def __init__(self) -> None:
        self.ffi, self.lib = _native.library()
        self.error = self.ffi.new("bs_error *")

    @property
    def text(self) -> str:
        return self.ffi.string(self.error.text).decode()

    def open(self, path: Path):
        reader = self.ffi.new("bs_reader **")
        assert self.lib.bs_reader_open(os.fsencode(path), self.ffi.NULL, reader, self.error) == 0, self.text
        return self.ffi.gc(reader[0], self.lib.bs_reader_close)


def test_every_status_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for name in header_enum("bs_status"):
        assert f"errors.{name[len('BS_') :]}" in source or name == "BS_OK"


def raises(status: int, cls: type[BaseException], match: str | None = None):
    class Check:
        def __enter__(self):
            self.context = pytest.raises(cls, match=match)
            return self.context.__enter__()

        def __exit__(self, *args):
            done = self.context.__exit__(*args)
            if not done:
                return done
            caught = self.context.excinfo.value
            assert isinstance(caught, errors.BigSmallError)
            assert caught.status == status, (caught, caught.status)
            assert str(caught)
            copy = pickle.loads(pickle.dumps(caught))
            assert (type(copy), str(copy), copy.status) == (type(caught), str(caught), caught.status)
            return done

    return Check()


# ---- the call is wrong ----


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\xff" * 64,
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (58).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}    ' + b"1234",
    ],
)
def test_source_is_no_safetensors_file(tmp_path, content: bytes) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(content)
    with raises(errors.INVALID_ARGUMENT, ValueError, "model.safetensors"):
        bigsmall.compress(source, tmp_path / "model.bs")
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_wrong_arguments(make, tmp_path) -> None:
    source, target = make(payload())
    with raises(errors.INVALID_ARGUMENT, ValueError, "mode"):
        bigsmall.compress(source, tmp_path / "x.bs", mode="tiny")
    with raises(errors.INVALID_ARGUMENT, ValueError, "workers"):
        bigsmall.decompress(target, workers=-1)
    for workers in (2**31, 10**12):
        with raises(errors.INVALID_ARGUMENT, ValueError, "workers must be from 1 to 2147483647"):
            bigsmall.decompress(target, workers=workers)
    for workers in ("2", 1.5):
        with pytest.raises(TypeError, match=r"workers must be a whole number or None, not '?[12]"):
            bigsmall.decompress(target, workers=workers)
    for workers in (np.int16(2), 2**31 - 1):
        assert set(bigsmall.decompress(target, workers=workers)) == {"weight"}
    with raises(errors.INVALID_ARGUMENT, ValueError, "NUL"):
        bigsmall.info("a\0b")
    with raises(errors.INVALID_ARGUMENT, ValueError, "framework"):
        bigsmall.safe_open(target, "tf")


def test_wrong_structs(make) -> None:
    _, target = make(payload())
    raw = Raw()
    ffi, lib, error = raw.ffi, raw.lib, raw.error
    reader = raw.open(target)
    room = ffi.new("char[]", 300 * 400 * 2)
    assert lib.bs_reader_open(ffi.NULL, ffi.NULL, ffi.new("bs_reader **"), error) == errors.INVALID_ARGUMENT
    assert lib.bs_reader_count(ffi.NULL, ffi.new("uint64_t *"), error) == errors.INVALID_ARGUMENT
    assert lib.bs_reader_decode(reader, 0, ffi.NULL, len(room), ffi.NULL, error) == errors.INVALID_ARGUMENT
    assert lib.bs_reader_describe(reader, 0, ffi.new("bs_tensor *"), error) == errors.INVALID_ARGUMENT  # size 0
    job = ffi.new("bs_job *")
    assert lib.bs_reader_decode(reader, 0, room, len(room), job, error) == errors.INVALID_ARGUMENT  # size 0
    assert lib.bs_reader_decode_range(reader, 0, 0, 300 * 400 + 1, room, len(room), ffi.NULL, error) != 0
    assert lib.bs_reader_decode_range(reader, 0, 2**64 - 1, 2, room, len(room), ffi.NULL, error) != 0
    lib.bs_reader_close(ffi.NULL)
    lib.bs_writer_close(ffi.NULL)
    # Without a bs_error the status still comes back.
    assert lib.bs_reader_describe(reader, 7, ffi.new("bs_tensor *", {"size": ffi.sizeof("bs_tensor")}), ffi.NULL) == 14


def test_room_too_small(make) -> None:
    _, target = make(payload())
    raw = Raw()
    reader = raw.open(target)
    room = raw.ffi.new("char[]", 300 * 400 * 2)
    length = raw.ffi.new("size_t *")
    assert raw.lib.bs_reader_decode(reader, 0, room, len(room) - 1, raw.ffi.NULL, raw.error) == errors.DST_TOO_SMALL
    assert raw.error.status == errors.DST_TOO_SMALL
    assert "weight" in raw.text
    for read in (raw.lib.bs_reader_info, raw.lib.bs_reader_metadata):
        assert read(reader, raw.ffi.NULL, 0, length, raw.error) == errors.DST_TOO_SMALL
        text = raw.ffi.new("char[]", length[0])
        assert read(reader, text, length[0], length, raw.error) == 0
    assert raw.lib.bs_reader_name(reader, 0, raw.ffi.NULL, 0, length, raw.error) == errors.DST_TOO_SMALL
    assert length[0] == len("weight")
    many = raw.ffi.new("bs_decode_item[]", [{"index": 0, "dst": room, "dst_cap": 7}])
    assert raw.lib.bs_reader_decode_many(reader, many, 1, raw.ffi.NULL, raw.error) == errors.DST_TOO_SMALL


def test_not_found(make) -> None:
    _, target = make(payload())
    raw = Raw()
    reader = raw.open(target)
    index = raw.ffi.new("uint64_t *")
    assert raw.lib.bs_reader_find(reader, b"weight", index, raw.error) == 0
    assert index[0] == 0
    assert raw.lib.bs_reader_find(reader, b"bias", index, raw.error) == errors.NOT_FOUND
    assert "bias" in raw.text
    described = raw.ffi.new("bs_tensor *", {"size": raw.ffi.sizeof("bs_tensor")})
    assert raw.lib.bs_reader_describe(reader, 1, described, raw.error) == errors.NOT_FOUND
    with Reader(target) as opened, raises(errors.NOT_FOUND, KeyError, "^.*no tensor is named 'bias'$"):
        opened.find("bias")


# ---- the file is wrong ----


def read_all(path: Path) -> None:
    bigsmall.decompress(path)


@pytest.mark.parametrize(
    ("status", "content"),
    [
        pytest.param(errors.UNSUPPORTED_VERSION, v1_file([], version=0xFFFF), id="version"),
        pytest.param(
            errors.UNSUPPORTED_CODEC,
            v1_file([v1_tensor("weight", codec="telepathy", shape=[4], compressed_bytes=8)], b"12345678"),
            id="codec",
        ),
    ],
)
def test_unsupported(tmp_path, status: int, content: bytes) -> None:
    path = tmp_path / "model.bs"
    path.write_bytes(content)
    with raises(status, errors.Unsupported):
        read_all(path)


def test_unsupported_dtype(tmp_path) -> None:
    source = tmp_path / "model.safetensors"
    header = b'{"weight":{"dtype":"F3_E1M1","shape":[8],"data_offsets":[0,3]}}'
    source.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with raises(errors.UNSUPPORTED_FEATURE, errors.Unsupported, "weight.*F3_E1M1"):
        bigsmall.compress(source, tmp_path / "model.bs")


@pytest.mark.parametrize("content", [b"GIF89a" + bytes(100), v1_file([], b"data", header=b"{not json" + bytes(30))])
def test_corrupt(tmp_path, content: bytes) -> None:
    path = tmp_path / "model.bs"
    path.write_bytes(content)
    with raises(errors.CORRUPT, errors.Corrupt, "model.bs"):
        read_all(path)


def test_truncated(make, tmp_path) -> None:
    _, target = make(payload())
    whole = target.read_bytes()
    path = tmp_path / "cut.bs"
    for length in (9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with raises(errors.TRUNCATED, errors.Truncated, "cut.bs"):
            read_all(path)
    path.write_bytes(b"")
    with pytest.raises(errors.Corrupt):
        read_all(path)


def test_checksum(make, tmp_path) -> None:
    _, target = make(payload())
    whole = bytearray(target.read_bytes())
    with Reader(target) as reader:
        entry = reader.info()["tensors"][0]
    # Most of the file is the payload of the one tensor: a bit in the middle of it.
    assert entry["compressed_bytes"] > 0.9 * len(whole)
    whole[len(whole) // 2] ^= 4
    path = tmp_path / "bad.bs"
    path.write_bytes(whole)
    with raises(errors.CHECKSUM, errors.ChecksumMismatch, "weight"):
        read_all(path)
    with raises(errors.CHECKSUM, ValueError):
        bigsmall.decompress(path, tmp_path / "restored.safetensors")
    assert not (tmp_path / "restored.safetensors").exists()
    report = bigsmall.verify(path)
    assert not report
    assert (report.n_tensors, report.n_bad) == (1, 1)
    assert report.bad[0].tensor == "weight"
    assert report.bad[0].problem


def test_verify_compares_with_the_source(make, tmp_path) -> None:
    tensors = every_dtype()
    source, target = make(tensors)
    report = bigsmall.verify(target, source)
    assert report
    assert (report.n_tensors, report.n_bad, report.bad) == (len(tensors), 0, [])
    dtype, shape, data = tensors["tensor.U8"]
    other = write_safetensors(tmp_path / "other.safetensors", {**tensors, "tensor.U8": (dtype, shape, data[::-1])})
    report = bigsmall.verify(target, other)
    assert not report
    assert [bad.tensor for bad in report.bad] == ["tensor.U8"]


def test_verify_raises_where_nothing_can_be_read(tmp_path) -> None:
    with raises(errors.IO, FileNotFoundError):
        bigsmall.verify(tmp_path / "none.bs")
    (tmp_path / "text.bs").write_bytes(b"hello, world" * 10)
    with raises(errors.CORRUPT, errors.Corrupt):
        bigsmall.verify(tmp_path / "text.bs")


def test_wrong_base(tmp_path) -> None:
    base = weights(1, 100, 100)
    for name, values in (("base", base), ("fine", base * 1.001), ("other", weights(2, 100, 100))):
        write_safetensors(tmp_path / f"{name}.safetensors", {"w": ("BF16", (100, 100), bfloat16(values))})
    delta = tmp_path / "fine.bs"
    bigsmall.compress_delta(tmp_path / "fine.safetensors", tmp_path / "base.safetensors", delta)
    with raises(errors.WRONG_BASE, ValueError):
        bigsmall.decompress(delta)
    with raises(errors.WRONG_BASE, errors.WrongBase):
        bigsmall.decompress(delta, tmp_path / "x.safetensors", base=tmp_path / "other.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# ---- the system says no ----


def test_io(make, tmp_path) -> None:
    source, target = make(payload())
    missing = tmp_path / "none.bs"
    for call in (bigsmall.info, bigsmall.decompress, bigsmall.verify):
        with raises(errors.IO, FileNotFoundError) as caught:
            call(missing)
        assert caught.value.errno == errno.ENOENT
        assert caught.value.filename == str(missing)
        assert str(missing) in str(caught.value)
    with raises(errors.IO, FileNotFoundError):
        bigsmall.compress(source, tmp_path / "no" / "such" / "folder" / "x.bs")
    with raises(errors.IO, FileExistsError) as caught:
        bigsmall.compress(source, target, overwrite=False)
    assert caught.value.errno == errno.EEXIST
    assert caught.value.filename == str(target)
    with raises(errors.IO, FileExistsError):
        bigsmall.decompress(target, source, overwrite=False)
    bigsmall.decompress(target, source)  # replaces it


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
def test_permission(make, tmp_path) -> None:
    source, _ = make(payload())
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with raises(errors.IO, PermissionError):
        bigsmall.compress(source, locked / "x.bs")


def test_cancelled(make, tmp_path) -> None:
    source, target = make(payload())
    raw = Raw()
    cancel = raw.ffi.new("int32_t *", 1)
    job = raw.ffi.new("bs_job *", {"size": raw.ffi.sizeof("bs_job"), "cancel": cancel})
    before = sorted(os.listdir(tmp_path))
    status = raw.lib.bs_compress(
        os.fsencode(source), os.fsencode(tmp_path / "new.bs"), raw.ffi.NULL, job, raw.ffi.NULL, raw.error
    )
    assert status == errors.CANCELLED
    room = raw.ffi.new("char[]", 300 * 400 * 2)
    assert raw.lib.bs_reader_decode(raw.open(target), 0, room, len(room), job, raw.error) == errors.CANCELLED
    assert sorted(os.listdir(tmp_path)) == before
    with raises(errors.CANCELLED, errors.Cancelled):
        _native.check(errors.CANCELLED, raw.error)


def test_progress_counters(make) -> None:
    _, target = make(payload())
    raw = Raw()
    done, total = raw.ffi.new("int64_t *"), raw.ffi.new("int64_t *")
    job = raw.ffi.new("bs_job *", {"size": raw.ffi.sizeof("bs_job"), "done": done, "total": total})
    room = raw.ffi.new("char[]", 300 * 400 * 2)
    assert raw.lib.bs_reader_decode(raw.open(target), 0, room, len(room), job, raw.error) == 0
    assert done[0] == total[0] == 300 * 400 * 2


# ---- the library is at fault ----

FAULT = """
import sys
import bigsmall
from bigsmall import errors
from bigsmall.numpy import empty, address
from bigsmall.reader import Destination, Reader

def decode(reader, name):
    tensor = reader.find(name)
    array = empty(tensor)
    reader.decode_many([Destination(tensor, address(array))])
    return array.tobytes()

with Reader(sys.argv[1]) as reader, Reader(sys.argv[1]) as other:
    assert decode(reader, "sound") == b"1234"
    for status in (errors.INTERNAL, errors.POISONED, errors.POISONED):
        try:
            decode(reader, "__panic__" if status == errors.INTERNAL else "sound")
        except errors.InternalError as error:
            assert error.status == status, error
            print(error)
        else:
            sys.exit("no error")
    assert decode(other, "sound") == b"1234"
assert bigsmall.info(sys.argv[1])["tensor_count"] == 2
"""


def test_internal_and_poisoned(tmp_path, fault_library) -> None:
    source = write_safetensors(
        tmp_path / "model.safetensors", {"__panic__": ("F32", (1,), b"abcd"), "sound": ("F32", (1,), b"1234")}
    )
    bigsmall.compress(source, tmp_path / "model.bs")
    run_script(FAULT, tmp_path / "model.bs", env={"BIGSMALL_LIB": str(fault_library)})


FORKED = """
import os, sys
from bigsmall import _native, errors
ffi, lib = _native.library()
error = ffi.new("bs_error *")
reader = ffi.new("bs_reader **")
assert lib.bs_reader_open(os.fsencode(sys.argv[1]), ffi.NULL, reader, error) == 0
child = os.fork()
if child == 0:
    # The library that the parent loaded, called as no Python code of ours would.
    count = ffi.new("uint64_t *")
    results = [
        lib.bs_set_workers(1),
        lib.bs_reader_open(os.fsencode(sys.argv[1]), ffi.NULL, ffi.new("bs_reader **"), error),
        lib.bs_reader_count(reader[0], count, error),
        error.status,
    ]
    lib.bs_reader_close(reader[0])
    os._exit(0 if results == [errors.FORKED] * 4 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked(make) -> None:
    _, target = make(payload())
    run_script(FORKED, target)


# ---- the exceptions themselves ----


def test_closed_reader(make) -> None:
    _, target = make(payload())
    reader = Reader(target)
    tensor = reader.find("weight")
    reader.close()
    reader.close()
    assert reader.closed
    with raises(errors.INVALID_ARGUMENT, ValueError, "closed"):
        reader.decode_range(tensor, 0, 1, 0)
    with raises(errors.INVALID_ARGUMENT, ValueError, "closed"):
        reader.metadata()


def test_classes() -> None:
    assert issubclass(errors.Truncated, errors.Corrupt)
    assert issubclass(errors.ChecksumMismatch, errors.Corrupt)
    assert issubclass(errors.InternalError, RuntimeError)
    error = errors.from_status(errors.IO, "open /a/b: no such file or directory", errno.ENOENT, ["/a", "/a/b", "/c"])
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.filename) == (errno.ENOENT, "/a/b")
    assert str(error) == "open /a/b: no such file or directory"
    odd = errors.from_status(errors.IO, "disk full", errno.ENOSPC)
    assert isinstance(odd, OSError)
    assert (odd.errno, odd.filename, odd.status) == (errno.ENOSPC, None, errors.IO)


def test_safetensors_variants_can_be_pickled() -> None:
    safetensors = pytest.importorskip("safetensors")
    for error in (
        errors.NotFound("no tensor"),
        errors.Unsupported("new", status=errors.UNSUPPORTED_VERSION),
        errors.from_status(errors.IO, "open /a: gone", errno.ENOENT, ["/a"]),
    ):
        both = errors.as_safetensors(error)
        assert isinstance(both, safetensors.SafetensorError)
        assert isinstance(both, type(error))
        copy = pickle.loads(pickle.dumps(both))
        assert isinstance(copy, safetensors.SafetensorError)
        assert (type(copy), str(copy), copy.status) == (type(both), str(error), error.status)
        assert getattr(copy, "filename", None) == getattr(error, "filename", None)


def test_memory_that_is_not_there(make, monkeypatch) -> None:
    _, target = make(payload())

    def refuse(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(MemoryError):
        bigsmall.decompress(target)


# ---- a device that cannot ----


def test_no_device_and_a_device_that_fails() -> None:
    """What brings them about needs a driver, or the one of test_cuda_driver."""
    for status, cls in ((errors.NO_DEVICE, errors.NoDevice), (errors.DEVICE, errors.DeviceError)):
        with raises(status, cls, "the reason"):
            raise errors.from_status(status, "the reason")
    assert issubclass(errors.NoDevice, errors.DeviceError)
    assert issubclass(errors.DeviceError, RuntimeError)
