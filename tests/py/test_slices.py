"""The plan of a slice, without the library: the right elements, and few more than those."""

from __future__ import annotations

import numpy as np
import pytest

from bigsmall import _slices

INDICES = [
    ...,
    (),
    0,
    -1,
    slice(None),
    slice(1, 3),
    slice(-2, None),
    slice(None, None, 2),
    slice(3, 1),
    slice(100, 200),
    None,
    (None, 0),
    (0, None),
    (0, 1),
    (slice(None), 1),
    (slice(None), slice(1, 3)),
    (slice(1, 3), slice(None, None, 2)),
    (..., 0),
    (..., slice(1, 2)),
    (..., slice(None, None, 3)),
    (0, ..., 1),
    (slice(None), slice(1, 2), slice(0, 2)),
    (slice(None, None, 3), slice(2, 4), slice(1, None, 2)),
    (1, 2, 3),
    (np.int64(1), slice(np.int64(0), np.int64(2))),
    (None, slice(1, 2), None, ..., None),
]


class Fetcher:
    """A flattened tensor that counts what is asked of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.flat = array.reshape(-1)
        self.fetched = 0
        self.calls = 0
        self.largest = 0

    def __call__(self, first: int, part: np.ndarray) -> None:
        assert part.flags.c_contiguous
        self.fetched += part.size
        self.calls += 1
        self.largest = max(self.largest, part.size)
        part.reshape(-1)[...] = self.flat[first : first + part.size]


def cut(array: np.ndarray, index) -> tuple[np.ndarray, Fetcher]:
    fetch = Fetcher(array)
    selection = _slices.select(index, array.shape)
    assert selection is not None
    out = np.empty([len(positions) for positions in selection.ranges], dtype=array.dtype)
    _slices.gather(fetch, array.shape, selection.ranges, out)
    return out.reshape(selection.shape), fetch


@pytest.fixture(params=["together", "apart", "tiny_scratch"])
def _strategy(request, monkeypatch) -> None:
    if request.param == "apart":
        monkeypatch.setattr(_slices, "_NEAR_ELEMENTS", 1)
    if request.param == "tiny_scratch":
        monkeypatch.setattr(_slices, "_SCRATCH_BYTES", 40)


@pytest.mark.usefixtures("_strategy")
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_like_numpy(index) -> None:
    array = np.arange(5 * 6 * 7, dtype=np.uint32).reshape(5, 6, 7)
    got, _ = cut(array, index)
    assert got.shape == array[index].shape
    assert np.array_equal(got, array[index])


@pytest.mark.usefixtures("_strategy")
def test_random_like_numpy() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(random.integers(1, 7, random.integers(1, 6)))
        array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
        index = []
        for size in shape[: random.integers(0, len(shape) + 1)]:
            if random.random() < 0.3:
                index.append(int(random.integers(-size, size)))
            else:
                start, stop = sorted(random.integers(-size - 1, size + 2, 2))
                index.append(slice(int(start), int(stop), int(random.integers(1, 4))))
        got, _ = cut(array, tuple(index))
        assert np.array_equal(got, array[tuple(index)])
        assert got.shape == array[tuple(index)].shape


def test_scalar_and_empty() -> None:
    scalar = np.array(7, dtype=np.uint8)
    assert cut(scalar, ())[0] == 7
    assert cut(scalar, None)[0].tolist() == [7]
    nothing = np.empty((0, 4), dtype=np.uint8)
    got, fetch = cut(nothing, slice(None))
    assert got.shape == (0, 4)
    assert fetch.calls == 0


def test_rows_are_one_run() -> None:
    array = np.zeros((1000, 1000), dtype=np.uint8)
    _, fetch = cut(array, slice(100, 200))
    assert (fetch.calls, fetch.fetched) == (1, 100_000)
    _, fetch = cut(array, (5, slice(10, 20)))
    assert (fetch.calls, fetch.fetched) == (1, 10)


def test_columns_take_little_memory() -> None:
    array = np.zeros((30_000, 1000), dtype=np.uint16)
    got, fetch = cut(array, (slice(None), slice(100, 101)))
    assert got.shape == (30_000, 1)
    assert fetch.largest * 2 <= 2 * _slices._SCRATCH_BYTES
    assert fetch.fetched <= array.size


def test_far_apart_columns_skip_what_lies_between() -> None:
    array = np.zeros((8, 1_000_000), dtype=np.uint8)
    _, fetch = cut(array, (slice(None), slice(10, 20)))
    assert (fetch.calls, fetch.fetched) == (8, 80)
    _, fetch = cut(array, slice(None, None, 4))
    assert fetch.fetched == 2_000_000


@pytest.mark.parametrize("index", [[0, 1], True, (0, [1]), np.array([0]), (..., ...), 1.5])
def test_left_to_the_framework(index) -> None:
    assert _slices.select(index, (5, 6)) is None


@pytest.mark.parametrize("index", [slice(None, None, -1), (0, slice(None, None, -2))])
def test_negative_step(index) -> None:
    with pytest.raises(ValueError, match="step must be greater than zero"):
        _slices.select(index, (5, 6))
