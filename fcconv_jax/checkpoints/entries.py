"""Lazy references to an array's entries: moved and compared piece by piece."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..geometry.kernels import Rearrangement
from ..messages.errors import CheckpointError
from .extents import (
    LARGE,
    PIECE,
    Advance,
    Extent,
    File,
    at_once,
    copy,
    give_back_memory,
    silent,
)
from .slabs import Shape, row_major_slabs, run_count, runs, slices

# First index of a box of an array, and what reads it.
Piece = tuple[Shape, Callable[[], np.ndarray]]


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

    def read_into(self, out: np.ndarray) -> None:
        """Read all entries into an array of unsigned integers of their size."""
        ...


@dataclasses.dataclass(frozen=True)
class InMemory:
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

    def reshaped(self, shape: Shape) -> InMemory:
        """Return the same entries as an array of another shape."""
        return InMemory(self.array.reshape(shape))

    def read_into(self, out: np.ndarray) -> None:
        """As :class:`Entries` has it."""
        out[...] = _opaque(self.array)

    def box(self, start: Shape, sizes: Shape) -> np.ndarray:
        """Any box of the array."""
        return _opaque(self.array)[slices(start, sizes)]


@dataclasses.dataclass(frozen=True)
class Filed:
    """Entries in a file.

    Args:
      shape: of the array.
      itemsize: bytes of an entry; 0 where entries are smaller than a byte.
      extent: their location.
    """

    shape: Shape
    itemsize: int
    extent: Extent

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.extent.nbytes

    def reshaped(self, shape: Shape) -> Filed:
        """Return the same entries as an array of another shape."""
        return Filed(shape, self.itemsize, self.extent)

    def read_into(self, out: np.ndarray) -> None:
        """As :class:`Entries` has it."""
        self.extent.read_into(0, _octets(out))

    def box(self, start: Shape, sizes: Shape) -> np.ndarray:
        """Any box of the array."""
        out = np.empty(sizes, raw_dtype(self.itemsize))
        for index, offset in runs(self.shape, start, sizes):
            self.extent.read_into(offset * self.itemsize, _octets(out[index]))
        return out


def raw_dtype(itemsize: int) -> np.dtype:
    """Return a dtype that moves entries of this size without looking at them."""
    return np.dtype(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")


def _octets(array: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array, in place."""
    return array.reshape(-1).view(np.uint8).data


def _permuted(values: Shape, perm: Shape) -> Shape:
    return tuple(values[axis] for axis in perm)


def _opaque(array: np.ndarray) -> np.ndarray:
    return (
        np.ascontiguousarray(array).reshape(array.shape).view(raw_dtype(array.itemsize))
    )


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """An array whose entries are read and moved when it is written.

    Args:
      entries: their present location.
      dtype: of the array; of those that NumPy lacks, the name that the file has.
      move: how they are rearranged; None to leave them as they are.
    """

    entries: Entries
    dtype: np.dtype | str
    move: Rearrangement | None = None

    @classmethod
    def of(cls, leaf: Any) -> LazyLeaf:
        """Return an array, or what is one already."""
        if isinstance(leaf, cls):
            return leaf
        array = np.asarray(leaf)
        # safetensors is little-endian, and a dtype's name, all that msgpack keeps of
        # it, has no byte order.
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        # ascontiguousarray makes a scalar one-dimensional: reshape undoes it.
        return cls(
            InMemory(np.ascontiguousarray(array).reshape(array.shape)), array.dtype
        )

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

    def write(self, out: Extent, scratch: Path, advance: Advance = silent) -> None:
        """Write the moved entries in row-major order.

        Args:
          out: where to, as large as the array.
          scratch: folder for entries that cannot be read in the order wanted.
          advance: called with the number of bytes written since.
        """
        here = landed(self.entries, scratch)
        if self.keeps_order:
            if isinstance(here, Filed):
                copy(here.extent, out, advance)
            else:
                out.write(0, _octets(_opaque(here.array)))
                advance(here.nbytes)
            return

        shape, perm, flip = self._split()
        here = here.reshaped(shape)
        target = _permuted(shape, perm)

        def write(piece: Piece) -> int:
            start, read = piece
            moved = read()
            _scatter(out, target, start, moved)
            return moved.nbytes

        for count in at_once(write, _moved_pieces(here, perm, flip)):
            advance(count)

    def differs(
        self, other: Entries, scratch: Path | None, advance: Advance = silent
    ) -> bool:
        """Return whether any moved entry differs from another array's, bit for bit."""
        theirs, mine = landed(other, scratch), landed(self.entries, scratch)
        if self.keeps_order and isinstance(mine, Filed) and isinstance(theirs, Filed):
            return _bytes_differ(mine.extent, theirs.extent, advance)
        shape, perm, flip = self._split()
        mine, theirs = mine.reshaped(shape), theirs.reshaped(_permuted(shape, perm))

        def compare(piece: Piece) -> int:
            start, read = piece
            moved = read()
            other_box = theirs.box(start, moved.shape)
            same = _same(np.ascontiguousarray(moved), np.ascontiguousarray(other_box))
            return moved.nbytes if same else 0

        for count in at_once(compare, _moved_pieces(mine, perm, flip)):
            if not count:
                return True
            advance(count)
        return False

    def _split(self) -> tuple[Shape, Shape, Shape]:
        """Return the entries' shape in the file, permuted axes and reversed axes."""
        if self.move is None:
            return self.entries.shape, tuple(range(len(self.entries.shape))), ()
        normal = self.move.normal()
        return normal.split, normal.perm, normal.flip

    def array(self) -> np.ndarray:
        """Return the moved array, whole and in memory.

        Raises:
          CheckpointError: NumPy has no such dtype.
        """
        if isinstance(self.dtype, str):
            raise CheckpointError(
                f"dtype {self.dtype} can't be loaded: neither NumPy nor ml_dtypes "
                "stores it as the file does. Convert the file with fcconv convert, "
                "which moves its bytes."
            )
        out = _in_memory(self.entries).view(self.dtype)
        return out if self.move is None else self.move(out)


def landed(entries: Entries, scratch: Path | None) -> InMemory | Filed:
    """Return entries that can be read in any order: in memory, or in a file if large.

    Args:
      entries: wherever they lie.
      scratch: folder for a file without a name, that is gone when it is closed; None
        to hold entries of any size in memory.
    """
    if isinstance(entries, InMemory | Filed):
        return entries
    # Small arrays are cheaper in memory than a file is to make.
    if scratch is None or entries.nbytes <= LARGE:
        return InMemory(_in_memory(entries))
    file = File.nameless(scratch)
    entries.read_into(file.mapped(entries.shape, raw_dtype(entries.itemsize)))
    give_back_memory()
    return Filed(entries.shape, entries.itemsize, file.extent(0, entries.nbytes))


def _moved_pieces(here: InMemory | Filed, perm: Shape, flip: Shape) -> Iterator[Piece]:
    """Pieces of an array with permuted and reversed axes, contiguous before or after.

    Whichever leaves fewer runs on the other side: each is one call to the system.
    """
    shape, itemsize = here.shape, here.itemsize
    moved = _permuted(shape, perm)
    back = tuple(perm.index(axis) for axis in range(len(perm)))
    before, after = (
        next(row_major_slabs(s, itemsize, PIECE), (s, s))[1] for s in (shape, moved)
    )
    by_target = run_count(shape, _permuted(after, back)) < run_count(
        moved, _permuted(before, perm)
    )

    def read(start: Shape, sizes: Shape) -> np.ndarray:
        return np.flip(here.box(start, sizes), flip).transpose(perm)

    def mirrored(start: Shape, sizes: Shape) -> Shape:
        """Return a box's start, counted from the end of each reversed axis."""
        return tuple(
            size - first - taken if axis in flip else first
            for axis, (size, first, taken) in enumerate(zip(shape, start, sizes))
        )

    if by_target:
        for start, sizes in row_major_slabs(moved, itemsize, PIECE):
            first, extents = _permuted(start, back), _permuted(sizes, back)
            yield start, functools.partial(read, mirrored(first, extents), extents)
    else:
        for start, sizes in row_major_slabs(shape, itemsize, PIECE):
            first = _permuted(mirrored(start, sizes), perm)
            yield first, functools.partial(read, start, sizes)


def _in_memory(entries: Entries) -> np.ndarray:
    """Return all entries, as unsigned integers of their size."""
    out = np.empty(entries.shape, raw_dtype(entries.itemsize))
    entries.read_into(out)
    return out


def _scatter(out: Extent, shape: Shape, start: Shape, box: np.ndarray) -> None:
    """Write a box of a row-major array."""
    for index, offset in runs(shape, start, box.shape):
        out.write(offset * box.itemsize, _octets(np.ascontiguousarray(box[index])))


def _bytes_differ(one: Extent, other: Extent, advance: Advance) -> bool:
    def compare(start: int) -> int:
        stop = min(start + PIECE, one.nbytes)
        parts = [np.empty(stop - start, np.uint8) for _ in range(2)]
        for extent, part in zip((one, other), parts):
            extent.read_into(start, part.data)
        return stop - start if _same(*parts) else 0

    if one.nbytes != other.nbytes:
        return True
    for count in at_once(compare, range(0, one.nbytes, PIECE)):
        if not count:
            return True
        advance(count)
    return False


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two contiguous arrays hold the same bytes."""
    a, b = (x.reshape(-1).view(np.uint8) for x in (one, other))
    # Words of 8 bytes compare faster than bytes; the few at the end follow.
    whole = len(a) // 8 * 8
    return bool(
        len(a) == len(b)
        and np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64))
        and np.array_equal(a[whole:], b[whole:])
    )
