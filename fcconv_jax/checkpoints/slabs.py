"""Boxes of row-major arrays: which bytes they are, and slabs of limited size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

Shape = tuple[int, ...]


def row_major_slabs(
    shape: Shape, itemsize: int, limit: int
) -> Iterator[tuple[Shape, Shape]]:
    """Yield the first index and the sizes of contiguous boxes of limited size.

    Args:
      shape: of the array.
      itemsize: bytes of an entry.
      limit: bytes of a box; one entry at least.

    Example:
      >>> list(row_major_slabs((4, 3), 2, 12))
      [((0, 0), (2, 3)), ((2, 0), (2, 3))]
      >>> list(row_major_slabs((2, 3), 2, 4))[:2]
      [((0, 0), (1, 2)), ((0, 2), (1, 1))]
    """
    if not math.prod(shape):
        return
    inner, axis = itemsize, len(shape)
    while axis and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if not axis:
        yield (0,) * len(shape), shape
        return
    axis -= 1
    width = max(1, limit // inner)
    rest = len(shape) - axis - 1
    for lead in itertools.product(*map(range, shape[:axis])):
        for begin in range(0, shape[axis], width):
            count = min(width, shape[axis] - begin)
            yield (
                (*lead, begin, *(0,) * rest),
                (*(1,) * axis, count, *shape[axis + 1 :]),
            )


def run_count(shape: Shape, sizes: Shape) -> int:
    """Return the number of contiguous runs of a box of this size."""
    return math.prod(sizes[: _run_axis(shape, sizes)])


def _run_axis(shape: Shape, sizes: Shape) -> int:
    """Return the first axis of which a box is contiguous with those behind it."""
    axis = len(shape)
    while axis and (axis == len(shape) or sizes[axis] == shape[axis]):
        axis -= 1
    return axis


def runs(shape: Shape, start: Shape, sizes: Shape) -> Iterator[tuple[Any, int]]:
    """Yield the contiguous runs of a box: where in the box, and the first entry."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = _run_axis(shape, sizes)
    first = sum(a * s for a, s in zip(start, strides))
    for index in itertools.product(*map(range, sizes[:axis])):
        # The slice keeps a run of one entry an array.
        where = (*index, slice(None)) if len(shape) else (...,)
        yield where, first + sum(i * s for i, s in zip(index, strides))


def slices(start: Shape, sizes: Shape) -> tuple[slice, ...]:
    """Return a box as an index."""
    return tuple(slice(a, a + n) for a, n in zip(start, sizes))
