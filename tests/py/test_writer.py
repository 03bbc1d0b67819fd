"""Files from tensors in memory."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from bigsmall._dtypes import BY_NAME
from bigsmall.numpy import address
from bigsmall.writer import TensorSpec, Writer
from helpers import MODES, array_bytes, weights

PLAIN = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64"),
)
FROM_ML_DTYPES = (
    *("bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


def arrays_of_every_dtype():
    random = np.random.default_rng(0)
    arrays = {}
    for name in PLAIN + FROM_ML_DTYPES:
        dtype = np.dtype(getattr(ml_dtypes, name) if name in FROM_ML_DTYPES else name)
        data = random.bytes(60 * dtype.itemsize)
        arrays[name] = np.frombuffer(bytes(b & 1 for b in data) if name == "bool" else data, dtype).reshape(3, 4, 5)
    return arrays


def same(arrays, others) -> bool:
    return {n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in others.items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_numpy_arrays(tmp_path, mode: str) -> None:
    arrays = arrays_of_every_dtype()
    arrays["scalar"] = np.array(1.5, np.float32)
    arrays["nothing"] = np.empty((0, 3), np.float32)
    arrays["slot"] = np.float64(2.5)
    arrays["имя 🙂"] = weights(1, 200, 300)
    path = tmp_path / "model.bs"
    assert bigsmall.save_file(arrays, path, {"format": "pt", "ключ": 'знач"ение\n'}, mode) is None
    assert same(bigsmall.decompress(path), arrays)
    assert bigsmall.verify(path)
    with bigsmall.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "ключ": 'знач"ение\n'}
    assert bigsmall.info(path)["mode"] == mode
    assert os.listdir(tmp_path) == ["model.bs"]


def test_layouts_of_numpy(tmp_path) -> None:
    base = weights(2, 40, 30)
    arrays = {
        "transposed": base.T,
        "strided": base[::3, 1::2],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (5, 30)),
        "fortran": np.asfortranarray(base),
        "big": base.astype(">f4"),
        "read_only": np.frombuffer(base.tobytes(), "<f4"),
        "unaligned": np.frombuffer(b"x" + base.tobytes(), "<f4", offset=1),
    }
    bigsmall.save_file(arrays, tmp_path / "model.bs")
    for name, array in bigsmall.decompress(tmp_path / "model.bs").items():
        assert np.array_equal(array, arrays[name]), name
        assert array.dtype == np.float32, name


def test_order_is_that_of_safetensors(tmp_path) -> None:
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    from safetensors import safe_open

    arrays = {name: array for name, array in arrays_of_every_dtype().items() if name in PLAIN}
    arrays.update({"zz": arrays["float32"], "é": arrays["float32"], "B": arrays["int8"]})
    bigsmall.save_file(arrays, tmp_path / "model.bs")
    bigsmall.decompress(tmp_path / "model.bs", tmp_path / "restored.safetensors")
    safetensors_numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    assert same(safetensors_numpy.load_file(tmp_path / "restored.safetensors"), arrays)
    with safe_open(tmp_path / "theirs.safetensors", "np") as file:
        theirs = file.offset_keys() if hasattr(file, "offset_keys") else None
    if theirs is not None:
        assert bigsmall.safe_open(tmp_path / "model.bs", "np").offset_keys() == theirs


def test_torch_tensors(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    tensors = {
        name: torch.randint(0, 2, (7, 40), generator=generator, dtype=torch.uint8).repeat(1, 2).view(dtype)
        for name in BY_NAME
        if isinstance(dtype := getattr(torch, name, None), torch.dtype)
    }
    tensors.update(
        {
            "transposed": base.T,
            "expanded": base[0].expand(5, 30),
            "parameter": torch.nn.Parameter(base.bfloat16()),
            "conjugated": torch.randn(3, 4, dtype=torch.complex64, generator=generator).conj(),
            "scalar": torch.tensor(3.0),
            "nothing": torch.empty(0, 4),
            "tied": base,
            "tied.too": base,
        }
    )
    bigsmall.save_file({**tensors, "array": base.numpy()}, tmp_path / "model.bs")
    loaded = bigsmall.load(tmp_path / "model.bs", verify=True)
    assert torch.equal(loaded.pop("array"), base)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach().resolve_conj().contiguous()
        assert loaded[name].dtype == expected.dtype, name
        assert loaded[name].shape == expected.shape, name
        assert array_bytes(loaded[name]) == array_bytes(expected), name
    bigsmall.decompress(tmp_path / "model.bs", tmp_path / "model.safetensors")
    pytest.importorskip("safetensors", minversion="0.8")  # earlier ones do not know the FNUZ types
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "model.safetensors")) == {*tensors, "array"}


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3, np.complex128),
        np.array([None]),
        np.array(["text"]),
        np.zeros(3, "datetime64[s]"),
        np.zeros(3, [("a", "f4")]),
        np.zeros(3, ml_dtypes.float4_e2m1fn),
        np.zeros(3, ml_dtypes.int4),
        [1.0, 2.0],
        3.0,
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value))),
)
def test_what_safetensors_cannot_hold(tmp_path, value) -> None:
    with pytest.raises(ValueError, match=r"'layer\.weight'"):
        bigsmall.save_file({"fine": np.zeros(2), "layer.weight": value}, tmp_path / "model.bs")
    assert os.listdir(tmp_path) == []


def test_torch_tensors_that_cannot_be_held(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    for value in (
        torch.zeros(3, dtype=torch.complex128),
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"'layer\.weight'"):
            bigsmall.save_file({"layer.weight": value}, tmp_path / "model.bs")
    assert os.listdir(tmp_path) == []


def test_bad_names_and_metadata(tmp_path) -> None:
    array = np.zeros(2)
    with pytest.raises(ValueError, match="string"):
        bigsmall.save_file({3: array}, tmp_path / "model.bs")
    with pytest.raises(ValueError, match="NUL"):
        bigsmall.save_file({"a\0b": array}, tmp_path / "model.bs")
    with pytest.raises(ValueError, match=r"the tensor's name 'a\\ud800' is no Unicode text"):
        bigsmall.save_file({"fine": array, "a\ud800": array}, tmp_path / "model.bs")
    for metadata in ({"epoch": 3}, {3: "epoch"}, ["epoch"], "epoch", 3):
        with pytest.raises(ValueError, match="metadata must"):
            bigsmall.save_file({"a": array}, tmp_path / "model.bs", metadata)
    with pytest.raises(ValueError, match=r"the metadata key '\\udcff' is no Unicode text"):
        bigsmall.save_file({"a": array}, tmp_path / "model.bs", {"\udcff": "x"})
    with pytest.raises(ValueError, match=r"the metadata value of 'key', 'x\\udcff' is no Unicode text"):
        bigsmall.save_file({"a": array}, tmp_path / "model.bs", {"key": "x\udcff"})
    with pytest.raises(ValueError, match="__metadata__"):
        bigsmall.save_file({"__metadata__": array}, tmp_path / "model.bs")
    assert os.listdir(tmp_path) == []


def test_nothing_to_save(tmp_path) -> None:
    bigsmall.save_file({}, tmp_path / "model.bs")
    assert bigsmall.decompress(tmp_path / "model.bs") == {}


def test_replaces_only_when_complete(tmp_path) -> None:
    path = tmp_path / "model.bs"
    bigsmall.save_file({"a": np.zeros(4)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'b'"):
        bigsmall.save_file({"a": np.ones(4), "b": np.zeros(2, np.complex128)}, path)
    assert path.read_bytes() == before
    bigsmall.save_file({"a": np.ones(4)}, path)
    assert bigsmall.decompress(path)["a"].tolist() == [1.0] * 4
    with pytest.raises(FileNotFoundError):
        bigsmall.save_file({"a": np.ones(4)}, tmp_path / "none" / "model.bs")


# ---- the writer itself ----

SPECS = [
    TensorSpec("first", BY_NAME["float32"], (100, 50)),
    TensorSpec("second", BY_NAME["uint8"], (7,)),
    TensorSpec("nothing", BY_NAME["bfloat16"], (0, 3)),
    TensorSpec("scalar", BY_NAME["int64"], ()),
    TensorSpec("packed", BY_NAME["float4_e2m1fn_x2"], (4, 8)),
]
DATA = {spec.name: np.random.default_rng(i).integers(0, 256, spec.n_bytes, np.uint8) for i, spec in enumerate(SPECS)}


def put(writer: Writer, name: str) -> None:
    writer.put(name, address(DATA[name]), DATA[name].nbytes)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]])
def test_put_in_any_order(tmp_path, order: list[int]) -> None:
    path = tmp_path / "model.bs"
    with Writer(path, SPECS, {"a": "b"}) as writer:
        for number in order:
            put(writer, SPECS[number].name)
        assert not path.exists()
        size = writer.finish()
    assert path.stat().st_size == size
    arrays = bigsmall.decompress(path)
    assert set(arrays) == {spec.name for spec in SPECS}
    for spec in SPECS:
        assert arrays[spec.name].tobytes() == DATA[spec.name].tobytes()
        assert arrays[spec.name].shape == spec.shape
    assert os.listdir(tmp_path) == ["model.bs"]


def test_wrong_puts(tmp_path) -> None:
    with Writer(tmp_path / "model.bs", SPECS) as writer:
        for n_bytes in (0, 1, SPECS[0].n_bytes - 1, SPECS[0].n_bytes + 4):
            room = np.zeros(n_bytes, np.uint8)
            with pytest.raises(errors.InvalidArgument, match="first"):
                writer.put("first", address(room), n_bytes)
        with pytest.raises(errors.NotFound, match="third"):
            writer.put("third", 0, 0)
        put(writer, "first")
        with pytest.raises(errors.InvalidArgument):
            put(writer, "first")
        with pytest.raises(errors.InvalidArgument):
            writer.finish()  # the others are missing
        for spec in SPECS[1:]:
            put(writer, spec.name)
        writer.finish()
        with pytest.raises(errors.InvalidArgument):
            put(writer, "first")
    assert bigsmall.decompress(tmp_path / "model.bs")["first"].tobytes() == DATA["first"].tobytes()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        writer.finish()


def test_abandoned(tmp_path) -> None:
    with Writer(tmp_path / "model.bs", SPECS) as writer:
        put(writer, "first")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "model.bs", SPECS) as writer:
        put(writer, "first")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_wrong_specs(tmp_path) -> None:
    path = tmp_path / "model.bs"
    for specs in (
        [SPECS[0], SPECS[0]],
        [TensorSpec("a", BY_NAME["float32"]._replace(code=99), (1,))],
        [TensorSpec("a", BY_NAME["float32"], (1,) * 65)],
        [TensorSpec("a", BY_NAME["float64"], (2**40, 2**40))],
    ):
        with pytest.raises(errors.BigSmallError):
            Writer(path, specs)
    with pytest.raises(errors.InvalidArgument, match="mode"):
        Writer(path, SPECS, mode="huge")
    assert os.listdir(tmp_path) == []


def test_no_replace(tmp_path) -> None:
    path = tmp_path / "model.bs"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError), Writer(path, SPECS, overwrite=False) as writer:
        for spec in SPECS:
            put(writer, spec.name)
        writer.finish()
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["model.bs"]
