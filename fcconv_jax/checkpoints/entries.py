"""The entries of an array, where they lie: moved and compared a piece at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..kernels import Rearrangement
from .checkpoint import CheckpointError
from .extents import PIECE, Extent, File, Tell, copy, silent

Shape = tuple[int, ...]


class Entries(Protocol):
    """The entries of one array, in row-major order, wherever they lie."""

    @property
    def shape(self) -> Shape:
        """Shape of the array."""
        ...

    @property
    def itemsize(self) -> int:
        """Bytes of an entry; 0 where entries are smaller than a byte."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        ...

    def boxes(self) -> Iterator[tuple[Shape, np.ndarray]]:
        """Each entry once: the first index of a box of the array, and the box."""
        ...


@dataclasses.dataclass(frozen=True)
class Held:
    """Entries in memory."""

    array: np.ndarray

    @property
    def shape(self) -> Shape:
        """Shape of the array."""
        return self.array.shape

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return self.array.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.array.nbytes

    def boxes(self) -> Iterator[tuple[Shape, np.ndarray]]:
        """Slabs of the array, as :class:`Entries` has them."""
        yield from self.slabs(self.shape)

    def slabs(self, shape: Shape) -> Iterator[tuple[Shape, np.ndarray]]:
        """The same for the array in another shape."""
        array = _opaque(self.array).reshape(shape)
        for start, sizes in row_major_slabs(shape, self.itemsize, PIECE):
            yield start, array[tuple(slice(a, a + n) for a, n in zip(start, sizes))]

    def box(self, shape: Shape, start: Shape, sizes: Shape) -> np.ndarray:
        """A box of the array in another shape."""
        index = tuple(slice(a, a + n) for a, n in zip(start, sizes))
        return _opaque(self.array).reshape(shape)[index]


@dataclasses.dataclass(frozen=True)
class Filed:
    """Entries in a file.

    Args:
      shape: of the array.
      itemsize: bytes of an entry; 0 where entries are smaller than a byte.
      extent: where they lie.
    """

    shape: Shape
    itemsize: int
    extent: Extent

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.extent.nbytes

    def boxes(self) -> Iterator[tuple[Shape, np.ndarray]]:
        """Slabs of the array, as :class:`Entries` has them."""
        yield from self.slabs(self.shape)

    def slabs(self, shape: Shape) -> Iterator[tuple[Shape, np.ndarray]]:
        """The same for the array in another shape."""
        for start, sizes in row_major_slabs(shape, self.itemsize, PIECE):
            yield start, self.box(shape, start, sizes)

    def box(self, shape: Shape, start: Shape, sizes: Shape) -> np.ndarray:
        """A box of the array in another shape."""
        out = np.empty(sizes, _raw(self.itemsize))
        for index, offset, count in _runs(shape, start, sizes):
            begin = offset * self.itemsize
            data = self.extent.read(begin, begin + count * self.itemsize)
            out[index] = np.frombuffer(data, out.dtype).reshape(out[index].shape)
        return out


def row_major_slabs(
    shape: Shape, itemsize: int, limit: int
) -> Iterator[tuple[Shape, Shape]]:
    """First index and sizes of boxes that lie contiguously, of limited size.

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


def _runs(
    shape: Shape, start: Shape, sizes: Shape
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """The contiguous runs of a box: index in the box, first entry, their number."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = len(shape)
    while axis and (axis == len(shape) or sizes[axis] == shape[axis]):
        axis -= 1
    count = math.prod(sizes[axis:])
    first = sum(a * s for a, s in zip(start, strides))
    for index in itertools.product(*map(range, sizes[:axis])):
        yield index, first + sum(i * s for i, s in zip(index, strides)), count


def _raw(itemsize: int) -> np.dtype:
    """A dtype that moves entries of this size without looking at them."""
    return np.dtype(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")


def _octets(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _opaque(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(array.shape).view(_raw(array.itemsize))


@dataclasses.dataclass(frozen=True)
class Moved:
    """An array whose entries are still to be moved.

    Args:
      entries: where they lie now.
      dtype: of the array; of those that NumPy lacks, the name that the file has.
      move: how they are rearranged; None to leave them as they are.
    """

    entries: Entries
    dtype: np.dtype | str
    move: Rearrangement | None = None

    @classmethod
    def of(cls, leaf: Any) -> Moved:
        """An array, or what is one already."""
        if isinstance(leaf, cls):
            return leaf
        array = np.asarray(leaf)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        return cls(Held(np.ascontiguousarray(array).reshape(array.shape)), array.dtype)

    @property
    def shape(self) -> Shape:
        """Shape of the array, once moved."""
        return self.entries.shape if self.move is None else self.move.target

    @property
    def itemsize(self) -> int:
        """Bytes of an entry; 0 where entries are smaller than a byte."""
        return self.entries.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.entries.nbytes

    @property
    def keeps_order(self) -> bool:
        """Whether the bytes stay as they are, as those of a reshape do."""
        return self.move is None or self.move.is_reshape

    def write(self, out: Extent, scratch: Path, tell: Tell = silent) -> None:
        """Writes the moved entries in row-major order.

        Args:
          out: where to, as large as the array.
          scratch: folder for entries that cannot be read in the order wanted.
          tell: called with the number of bytes written since.
        """
        if self.keeps_order:
            if isinstance(self.entries, Filed):
                copy(self.entries.extent, out, tell)
                return
            _write_boxes(self.entries, out, tell)
            return
        for shape, start, box in self._moved_boxes(scratch):
            _scatter(out, shape, start, box)
            tell(box.nbytes)

    def differs(self, other: Entries, scratch: Path, tell: Tell = silent) -> bool:
        """Whether any moved entry differs from another array's, bit for bit.

        Args:
          other: of the shape that the move leads to.
          scratch: folder for entries that cannot be read in the order wanted.
          tell: called with the number of bytes compared since.
        """
        theirs = landed(other, scratch)
        mine = self.entries
        if self.keeps_order and isinstance(mine, Filed) and isinstance(theirs, Filed):
            return _bytes_differ(mine.extent, theirs.extent, tell)
        for shape, start, box in self._moved_boxes(scratch):
            other_box = theirs.box(shape, start, box.shape)
            if not np.array_equal(_octets(box), _octets(other_box)):
                return True
            tell(box.nbytes)
        return False

    def array(self) -> np.ndarray:
        """The moved array, whole and in memory.

        Raises:
          CheckpointError: NumPy has no such dtype.
        """
        if isinstance(self.dtype, str):
            raise CheckpointError(
                f"dtype {self.dtype} cannot be held in memory: neither NumPy nor "
                "ml_dtypes has it as it stands in the file"
            )
        out = _in_memory(self.entries).view(self.dtype)
        return out if self.move is None else self.move(out)

    def _moved_boxes(self, scratch: Path) -> Iterator[tuple[Shape, Shape, np.ndarray]]:
        """Boxes of the moved array: its shape for them, first index, entries."""
        here = landed(self.entries, scratch)
        if self.move is None:
            shape, perm = here.shape, tuple(range(len(here.shape)))
        else:
            normal = self.move.normal()
            shape, perm = normal.split, normal.perm
        moved = tuple(shape[axis] for axis in perm)
        for start, box in here.slabs(shape):
            yield moved, tuple(start[axis] for axis in perm), box.transpose(perm)


def landed(entries: Entries, scratch: Path) -> Held | Filed:
    """Entries that can be read in any order: in memory, or if large, in a file.

    Args:
      entries: wherever they lie.
      scratch: folder for a file without a name, that is gone when it is closed.
    """
    if isinstance(entries, Held | Filed):
        return entries
    if entries.nbytes <= PIECE:
        return Held(_in_memory(entries))
    extent = File.nameless(scratch).extent(0, entries.nbytes)
    _write_boxes(entries, extent, silent)
    return Filed(entries.shape, entries.itemsize, extent)


def _in_memory(entries: Entries) -> np.ndarray:
    """All entries, as unsigned integers of their size."""
    out = np.empty(entries.shape, _raw(entries.itemsize))
    for start, box in entries.boxes():
        out[tuple(slice(a, a + n) for a, n in zip(start, box.shape))] = _opaque(box)
    return out


def _write_boxes(entries: Entries, out: Extent, tell: Tell) -> None:
    for start, box in entries.boxes():
        _scatter(out, entries.shape, start, box)
        tell(box.nbytes)


def _scatter(out: Extent, shape: Shape, start: Shape, box: np.ndarray) -> None:
    """Writes a box of a row-major array."""
    box = _opaque(box)
    for index, offset, _ in _runs(shape, start, box.shape):
        run = box[index].reshape(-1).view(np.uint8)
        out.write(offset * box.itemsize, run.data)


def _bytes_differ(one: Extent, other: Extent, tell: Tell) -> bool:
    for start in range(0, one.nbytes, PIECE):
        stop = min(start + PIECE, one.nbytes)
        if one.read(start, stop) != other.read(start, stop):
            return True
        tell(stop - start)
    return one.nbytes != other.nbytes
