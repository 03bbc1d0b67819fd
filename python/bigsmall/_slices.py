"""Which elements an index selects, and how to fetch them from a flattened tensor with little decoding.

Only basic indices are planned here: integers, slices with a positive step, `...` and None. Everything else is left to
the framework, on the whole tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Two runs of wanted elements closer than this are fetched as one. It is what a block holds: with less between them
# every block of that stretch has wanted elements, and run by run the same block would be decoded again and again.
_NEAR_ELEMENTS = 1 << 16

# Most bytes that are decoded at a time when only some of them are wanted.
_SCRATCH_BYTES = 8 << 20


class Selection(NamedTuple):
    """`ranges` has the selected positions of every dimension, `shape` is that of the result, and `sources` says for
    each dimension of the result which one of the tensor it comes from, None for a new one."""

    ranges: tuple[range, ...]
    shape: tuple[int, ...]
    sources: tuple[int | None, ...]


def select(index: Any, shape: Sequence[int]) -> Selection | None:
    """The selection of an index that the framework has accepted for `shape`, or None where it is no basic one.
    ValueError where a step is not positive."""
    if not is_basic(index):
        return None
    parts = list(index) if isinstance(index, tuple) else [index]
    missing = len(shape) - sum(part is not None and part is not Ellipsis for part in parts)
    at = next((number for number, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[at : at + 1] = [slice(None)] * missing
    ranges: list[range] = []
    sources: list[int | None] = []
    for part in parts:
        if part is None:
            sources.append(None)
            continue
        size = shape[len(ranges)]
        if isinstance(part, slice):
            sources.append(len(ranges))
            ranges.append(range(*part.indices(size)))
        else:
            position = operator.index(part) % size
            ranges.append(range(position, position + 1))
    result = (1 if source is None else len(ranges[source]) for source in sources)
    return Selection(tuple(ranges), tuple(result), tuple(sources))


def is_basic(index: Any) -> bool:
    """Whether `select` plans that index. ValueError where a step is not positive."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(_is_basic_part(part) for part in parts) and sum(part is Ellipsis for part in parts) <= 1


def _is_basic_part(part: Any) -> bool:
    if part is None or part is Ellipsis:
        return True
    if isinstance(part, slice):
        # Refused for all frameworks alike, though numpy could do it.
        if part.step is not None and operator.index(part.step) < 0:
            raise ValueError("step must be greater than zero")
        return True
    # Truth values are integers to Python, but they mask or add a dimension as an index.
    return isinstance(part, (int, np.integer)) and not isinstance(part, (bool, np.bool_))


# (first element, array of the elements to fill); the array is contiguous.
Fetch = Callable[[int, "Array"], None]


def gather(fetch: Fetch, shape: Sequence[int], ranges: Sequence[range], out: Array) -> None:
    """Fills `out`, contiguous and of shape [len(r) for r in ranges], from the flattened tensor of that shape."""
    if out.size == 0:
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # From here on dimensions are wanted whole, so that what lies before makes contiguous runs.
    whole = len(shape)
    while whole and ranges[whole - 1] == range(shape[whole - 1]):
        whole -= 1
    _gather(fetch, strides, ranges, whole, 0, 0, out)


def _gather(
    fetch: Fetch, strides: Sequence[int], ranges: Sequence[range], whole: int, dim: int, base: int, out: Array
) -> None:
    if dim == whole:
        fetch(base, out)
        return
    wanted, stride = ranges[dim], strides[dim]
    if dim == whole - 1 and wanted.step == 1:
        fetch(base + wanted.start * stride, out)
        return
    if len(wanted) == 1:
        # With "...", since a plain out[0] of one dimension is a value and no view.
        _gather(fetch, strides, ranges, whole, dim + 1, base + wanted.start * stride, out[0, ...])
        return
    # One position of this dimension needs elements `first` .. `first + span - 1` of the `stride` that it has.
    inner = range(dim + 1, whole)
    first = sum(ranges[i].start * strides[i] for i in inner)
    last = sum(ranges[i][-1] * strides[i] for i in inner)
    span = last - first + strides[whole - 1]
    step = wanted.step * stride
    if step - span >= _NEAR_ELEMENTS or span * out.itemsize > _SCRATCH_BYTES:
        for number, position in enumerate(wanted):
            _gather(fetch, strides, ranges, whole, dim + 1, base + position * stride, out[number, ...])
        return
    together = max(1, _SCRATCH_BYTES // (step * out.itemsize))
    scratch = np.empty((min(together, len(wanted)) - 1) * step + span, dtype=out.dtype)
    inner_steps = [ranges[i].step * strides[i] for i in inner] + list(strides[whole:])
    view_strides = [count * out.itemsize for count in [step, *inner_steps]]
    for start in range(0, len(wanted), together):
        part = out[start : start + together]
        covered = scratch[: (len(part) - 1) * step + span]
        fetch(base + wanted[start] * stride + first, covered)
        part[...] = as_strided(covered, shape=part.shape, strides=view_strides)
