"""bigsmall.safe_open does what safetensors.safe_open does: the same tests run over both."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import bigsmall
from helpers import DTYPES, array_bytes, every_dtype, n_bytes, storage_shape, weights, write_safetensors

safetensors = pytest.importorskip("safetensors")

METADATA = {"format": "pt", "name": "значение"}

TENSORS = {
    "zebra": ("F32", (5, 6, 7), weights(1, 5, 6, 7).tobytes()),
    "apple": ("I64", (40,), np.arange(40, dtype="<i8").tobytes()),
    "Mango": ("BOOL", (4, 4), np.eye(4, dtype=np.uint8).tobytes()),
    "half": ("F16", (9, 3), weights(2, 9, 3).astype("<f2").tobytes()),
    "scalar": ("F32", (), weights(3, 1).tobytes()),
    "nothing": ("F32", (0, 4), b""),
    "complex": ("C64", (3, 2), weights(4, 12).tobytes()),
    "имя": ("U8", (2, 2), b"abcd"),
}


def frameworks() -> list[str]:
    try:
        import torch  # noqa: F401
    except ImportError:
        return ["np"]
    return ["np", "pt"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    source = write_safetensors(folder / "model.safetensors", TENSORS, METADATA)
    bigsmall.compress(source, folder / "model.bs")
    return {"safetensors": source, "bigsmall": folder / "model.bs"}


@pytest.fixture(params=["safetensors", "bigsmall"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def path(files, kind):
    return files[kind]


@pytest.fixture
def opener(kind):
    return {"safetensors": safetensors.safe_open, "bigsmall": bigsmall.safe_open}[kind]


@pytest.fixture(params=frameworks())
def framework(request) -> str:
    return request.param


def same(one, other) -> bool:
    """The same type, dtype, shape and bits."""
    return (
        type(one) is type(other)
        and one.dtype == other.dtype
        and tuple(one.shape) == tuple(other.shape)
        and array_bytes(one) == array_bytes(other)
    )


# ---- both readers ----


def test_keys_and_metadata(opener, path, framework) -> None:
    with opener(path, framework) as file:
        assert file.keys() == sorted(TENSORS)
        assert isinstance(file.keys(), list)
        assert file.metadata() == METADATA


def test_offset_keys(opener, path, framework) -> None:
    with opener(path, framework) as file:
        if not hasattr(file, "offset_keys"):
            pytest.skip("this safetensors has no offset_keys")
        # Two tensors at one offset, one of them empty, may come in any order.
        assert [name for name in file.offset_keys() if name != "nothing"] == [n for n in TENSORS if n != "nothing"]
        assert set(file.offset_keys()) == set(TENSORS)


def test_no_metadata(opener, kind, tmp_path, framework) -> None:
    source = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    bigsmall.compress(source, tmp_path / "model.bs")
    with opener(source if kind == "safetensors" else tmp_path / "model.bs", framework) as file:
        assert file.metadata() is None


def test_empty_metadata(opener, kind, tmp_path, framework) -> None:
    source = write_safetensors(tmp_path / "model.safetensors", TENSORS, {})
    bigsmall.compress(source, tmp_path / "model.bs")
    with opener(source if kind == "safetensors" else tmp_path / "model.bs", framework) as file:
        assert file.metadata() == {}


def test_tensors(opener, path, framework) -> None:
    with opener(str(path), framework=framework, device="cpu") as file:
        for name, (dtype, shape, data) in TENSORS.items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == shape
            assert array_bytes(tensor) == data
            part = file.get_slice(name)
            assert part.get_shape() == list(shape)
            assert part.get_dtype() == dtype


def test_get_tensors(opener, path, framework) -> None:
    with opener(path, framework) as file:
        if not hasattr(file, "get_tensors"):
            pytest.skip("this safetensors has no get_tensors")
        assert {name: array_bytes(tensor) for name, tensor in file.get_tensors().items()} == {
            name: data for name, (_, _, data) in TENSORS.items()
        }


def test_without_with(opener, path, framework) -> None:
    file = opener(path, framework)
    assert array_bytes(file.get_tensor("apple")) == TENSORS["apple"][2]
    with file as again:
        assert again is file
        with file:
            pass
    with file as again:  # entering says nothing, using does
        assert again is file
        with pytest.raises(safetensors.SafetensorError, match="File is closed"):
            file.keys()


def test_unknown_name(opener, path, framework) -> None:
    with opener(path, framework) as file:
        for get in (file.get_tensor, file.get_slice):
            with pytest.raises(safetensors.SafetensorError, match=r"^File does not contain tensor pear$"):
                get("pear")


def test_closed(opener, path, framework) -> None:
    with opener(path, framework) as file:
        part = file.get_slice("zebra")
        expected = file.get_tensor("zebra")[1:3]
    for call in (file.keys, file.metadata, lambda: file.get_tensor("zebra"), lambda: file.get_slice("zebra")):
        with pytest.raises(safetensors.SafetensorError, match="File is closed"):
            call()
    assert same(part[1:3], expected)


def test_missing_file(opener, tmp_path, framework) -> None:
    with pytest.raises(FileNotFoundError):
        opener(tmp_path / "none.bs", framework)


def test_not_a_file_of_that_kind(opener, tmp_path, framework) -> None:
    (tmp_path / "text.bs").write_bytes(b"this is neither" * 100)
    with pytest.raises(safetensors.SafetensorError):
        opener(tmp_path / "text.bs", framework)


def test_unknown_framework(opener, path) -> None:
    with pytest.raises(safetensors.SafetensorError, match="framework cobol is invalid"):
        opener(path, "cobol")


def test_unknown_device(opener, path) -> None:
    pytest.importorskip("torch")
    for device in ("meta", "nowhere"):
        with pytest.raises(safetensors.SafetensorError, match=f"device {device} is invalid"):
            opener(path, "pt", device)


# ---- slices: the whole tensor of safetensors, indexed by the framework, is the truth ----

BASIC = [
    ...,
    (),
    0,
    -1,
    slice(None),
    slice(1, 3),
    slice(None, None, 2),
    (0, 1),
    (0, 1, 2),
    (slice(None), slice(1, 2)),
    (slice(None), slice(2, 5), slice(None, None, 3)),
    (slice(1, 4), 2, slice(0, 7, 2)),
    (..., 0),
    (..., slice(1, 3)),
    (0, ..., 1),
    (slice(None), slice(None), 6),
    (np.int64(2), slice(np.int64(1), np.int64(4))),
]
# safetensors' own numpy slices do not have these.
MORE = [
    slice(-2, None),
    slice(-100, 100),
    slice(0, 100),
    slice(9, 20),
    slice(3, 1),
    None,
    (None, 0),
    (slice(0, 1), None, 0),
    [0, 1],
    [-1],
    [],
    (slice(None), [0, 2]),
    ([0, 1], [0, 1]),
    [True, False, True, False, False],
    True,
    np.array([0, 3]),
    (slice(1, 3), [0, 1], slice(2, 4)),
]


@pytest.mark.parametrize("index", BASIC, ids=str)
def test_slices_of_both(opener, path, kind, files, framework, index) -> None:
    if (kind, framework) == ("safetensors", "np"):
        pytest.skip("what its numpy slices can do differs from release to release")
    with safetensors.safe_open(files["safetensors"], framework) as file:
        expected = file.get_tensor("zebra")[index]
    with opener(path, framework) as file:
        got = file.get_slice("zebra")[index]
    assert same(got, np.asarray(expected) if framework == "np" else expected)


@pytest.mark.parametrize("index", MORE, ids=str)
def test_more_slices(files, framework, index) -> None:
    with safetensors.safe_open(files["safetensors"], framework) as file:
        expected = file.get_tensor("zebra")[index]
    got = bigsmall.safe_open(files["bigsmall"], framework).get_slice("zebra")[index]
    assert same(got, expected)


def test_tensors_as_indices(files) -> None:
    torch = pytest.importorskip("torch")
    part = bigsmall.safe_open(files["bigsmall"], "pt").get_slice("zebra")
    whole = part[...]
    for index in (torch.tensor([0, 3]), torch.tensor(2), (slice(None), torch.tensor([1, 0])), whole > 0):
        assert same(part[index], whole[index])


@pytest.fixture
def like_0_8(kind) -> None:
    """Errors and keywords are those of safetensors 0.8; Python 3.9 has an older one."""
    if kind == "safetensors" and tuple(int(n) for n in safetensors.__version__.split(".")[:2]) < (0, 8):
        pytest.skip("this safetensors is older than 0.8")


# safetensors slices for numpy by itself, with errors of its own; ours are numpy's too.
@pytest.mark.usefixtures("like_0_8")
@pytest.mark.parametrize("index", [5, -6, (0, 1, 2, 3), (slice(None), 7), (..., -8), [5], 1.5])
def test_bad_index(opener, path, kind, framework, index) -> None:
    part = opener(path, framework).get_slice("zebra")
    if (kind, framework) == ("bigsmall", "np"):
        with pytest.raises(IndexError):
            part[index]
    with pytest.raises(safetensors.SafetensorError if framework == "np" else IndexError):
        part[index]


@pytest.mark.usefixtures("like_0_8")
@pytest.mark.parametrize("index", [slice(None, None, -1), (0, slice(5, 0, -2)), slice(0, 3, 0)], ids=str)
def test_bad_step(opener, path, kind, framework, index) -> None:
    part = opener(path, framework).get_slice("zebra")
    if (kind, framework) != ("safetensors", "np"):
        with pytest.raises(ValueError, match="step"):
            part[index]
    if framework == "np":
        with pytest.raises(safetensors.SafetensorError, match="step"):
            part[index]


def test_slice_of_no_integers(opener, path, framework) -> None:
    with pytest.raises(TypeError):
        opener(path, framework).get_slice("zebra")[1.5:2]


def test_slices_of_scalar_and_empty(opener, path, kind, framework) -> None:
    if kind == "safetensors" and framework == "np":
        pytest.skip("has errors of its own")
    file = opener(path, framework)
    assert array_bytes(file.get_slice("scalar")[...]) == TENSORS["scalar"][2]
    for index in (..., slice(None), slice(0, 3)):
        assert tuple(file.get_slice("nothing")[index].shape) == (0, 4)
    with pytest.raises(IndexError):
        file.get_slice("nothing")[0]
    with pytest.raises(IndexError):
        file.get_slice("scalar")[0]


def test_random_slices(files, framework) -> None:
    random = np.random.default_rng(0)
    with safetensors.safe_open(files["safetensors"], framework) as file:
        whole = file.get_tensor("zebra")
    part = bigsmall.safe_open(files["bigsmall"], framework).get_slice("zebra")
    for _ in range(200):
        index = []
        for size in whole.shape[: random.integers(0, 4)]:
            start, stop = (int(n) for n in random.integers(-size - 1, size + 2, 2))
            step = int(random.integers(1, 4))
            index.append(int(random.integers(-size, size)) if random.random() < 0.3 else slice(start, stop, step))
        expected = whole[tuple(index)]
        assert same(part[tuple(index)], np.asarray(expected) if framework == "np" else expected)


# ---- bigsmall's own ----


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if not dtype.startswith(("F4", "F6_"))])
def test_slices_of_every_dtype(make, framework, dtype) -> None:
    shape = (60, 30)
    tensors = {"t": every_dtype(shape)[f"tensor.{dtype}"]}
    data = np.frombuffer(tensors["t"][2], dtype=f"V{n_bytes(dtype, (1,))}").reshape(shape)
    _, path = make(tensors)
    part = bigsmall.safe_open(path, framework).get_slice("t")
    assert part.shape == shape
    assert part[...].dtype == part.dtype
    for index in (..., 5, slice(7, 20), (slice(None), slice(3, 9)), (slice(None, None, 7), slice(1, None, 2)), (3, 4)):
        assert array_bytes(part[index]) == data[index].tobytes()


def test_slices_over_block_borders(make, framework) -> None:
    words = np.arange(3 * 65536 + 77, dtype="<u4")
    words = (words * np.uint32(2654435761)).astype("<u2").reshape(-1, 5)
    _, path = make({"t": ("U16", words.shape, words.tobytes())})
    part = bigsmall.safe_open(path, framework).get_slice("t")
    for start, stop in ((0, 1), (13107, 13108), (13106, 26216), (len(words) - 1, len(words)), (0, len(words))):
        assert array_bytes(part[start:stop]) == words[start:stop].tobytes()
        assert array_bytes(part[start:stop, 2:4]) == words[start:stop, 2:4].tobytes()
    assert array_bytes(part[::1000, ::2]) == words[::1000, ::2].tobytes()


def test_packed_types(make, framework) -> None:
    random = np.random.default_rng(5)
    four = random.integers(0, 256, (6, 8), dtype=np.uint8)
    six = random.bytes(12)
    tensors = {"four": ("F4", (6, 16), four.tobytes()), "six": ("F6_E2M3", (4, 4), six)}
    _, path = make(tensors)
    with bigsmall.safe_open(path, framework) as file:
        part = file.get_slice("four")
        assert part.get_shape() == [6, 16]
        assert part.get_dtype() == "F4"
        assert tuple(file.get_tensor("four").shape) == storage_shape("F4", (6, 16)) == (6, 8)
        for index, stored in (
            (..., ...),
            (slice(None), slice(None)),
            (slice(1, 3), slice(1, 3)),
            (2, 2),
            ((slice(None), slice(4, 10)), (slice(None), slice(2, 5))),
            ((3, slice(0, 2)), (3, slice(0, 1))),
            ((None, slice(0, 4, 2)), (None, slice(0, 4, 2))),
        ):
            got = part[index]
            assert tuple(got.shape) == four[stored].shape
            assert array_bytes(got) == four[stored].tobytes()
        for index in ((0, 1), (slice(None), slice(1, 3)), (slice(None), slice(0, 4, 2)), (..., None), [0]):
            with pytest.raises(ValueError, match="whose values share bytes"):
                part[index]
        part = file.get_slice("six")
        assert part.get_shape() == [4, 4]
        if framework == "np":
            assert array_bytes(part[...]) == six
            with pytest.raises(ValueError, match="whose values share bytes"):
                part[0]
        else:
            with pytest.raises(bigsmall.errors.Unsupported):
                part[...]


def test_fresh_memory(files, framework) -> None:
    file = bigsmall.safe_open(files["bigsmall"], framework)
    file.get_tensor("apple")[...] = 0
    assert array_bytes(file.get_tensor("apple")) == TENSORS["apple"][2]


def test_named_get_tensors(files, framework) -> None:
    file = bigsmall.safe_open(files["bigsmall"], framework)
    got = file.get_tensors(["apple", "zebra"])
    assert {name: array_bytes(tensor) for name, tensor in got.items()} == {n: TENSORS[n][2] for n in ("apple", "zebra")}
    with pytest.raises(safetensors.SafetensorError, match="pear"):
        file.get_tensors(["apple", "pear"])


@pytest.mark.usefixtures("like_0_8")
def test_keywords(opener, path, framework) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        opener(path, framework, nonsense=1)
    file = opener(path, framework, device=None)
    assert array_bytes(file.get_tensor("apple")) == TENSORS["apple"][2]
    assert array_bytes(file.get_slice("apple")[...]) == TENSORS["apple"][2]
    if framework == "pt":
        assert file.get_tensor("apple").device.type == "cpu"


def test_backend_is_accepted(files, framework) -> None:
    assert bigsmall.safe_open(files["bigsmall"], framework, backend="pread").keys()


def test_errors_are_of_both_families(files, tmp_path) -> None:
    file = bigsmall.safe_open(files["bigsmall"], "np")
    with pytest.raises(bigsmall.errors.NotFound):
        file.get_tensor("pear")
    with pytest.raises(KeyError):
        file.get_tensor("pear")
    with pytest.raises(safetensors.SafetensorError) as caught:
        bigsmall.safe_open(tmp_path / "none.bs", "np")
    assert isinstance(caught.value, bigsmall.errors.BigSmallError)
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.filename == str(tmp_path / "none.bs")


def test_from_many_threads(files, framework) -> None:
    failures = []
    with bigsmall.safe_open(files["bigsmall"], framework) as file:

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            try:
                for _ in range(50):
                    name = list(TENSORS)[random.integers(len(TENSORS))]
                    data = TENSORS[name][2]
                    assert array_bytes(file.get_tensor(name)) == data
                    assert array_bytes(file.get_slice(name)[...]) == data
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
