"""Tiles of positions: their sizes, places and writers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..messages.errors import PlanError
from .mapped import in_memory
from .program import AllCrops


class Sliced(Protocol):
    """Data read by slices: in memory, in a file, or computed on demand."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of its axes."""
        ...

    def __getitem__(self, where: Any, /) -> Any: ...


class LazyArray(Sliced, Protocol):
    """An array that is read by slices."""

    @property
    def dtype(self) -> Any:
        """NumPy's dtype, or one that holds it as ``numpy_dtype``."""
        ...


# A program holds a few arrays at once; the largest is what can be told beforehand.
_ALIVE = 3


class Place(NamedTuple):
    """A tile's slices: of the image, of the output, and of its own result."""

    read: tuple[slice, ...]
    new: tuple[slice, ...]
    inner: tuple[slice, ...]
    first: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of one size that cover all positions.

    A tile's crops are those of the whole image: their windows lie inside the part of
    the image that is read for it. Tiles are of one size, so that one program serves
    all; the last ones overlap those before them, and write what is new.

    Args:
      window: size of a crop along the axes that slide.
      stride: step along each.
      axes: those axes of the images.
      rank: of the images.
      counts: positions along each axis.
      tile: positions of a tile, likewise.
    """

    window: tuple[int, ...]
    stride: tuple[int, ...]
    axes: tuple[int, ...]
    rank: int
    counts: tuple[int, ...]
    tile: tuple[int, ...]

    @functools.cached_property
    def starts(self) -> list[tuple[int, ...]]:
        """Where each tile's new positions begin."""
        along = [range(0, n, size) for n, size in zip(self.counts, self.tile)]
        return list(itertools.product(*along))

    def place(self, number: int) -> Place:
        """Return the slices of a tile."""
        read = [slice(None)] * self.rank
        new, inner, first = [slice(None)], [slice(None)], []
        for axis, fresh, n, count, size, step in zip(
            *(self.axes, self.starts[number], self.counts),
            *(self.tile, self.window, self.stride),
        ):
            # The last tile is moved inwards: all tiles run the same program.
            begin = min(fresh, n - count)
            read[axis] = slice(begin * step, (begin + count - 1) * step + size)
            new.append(slice(fresh, begin + count))
            inner.append(slice(fresh - begin, None))
            first.append(begin)
        return Place(tuple(read), tuple(new), tuple(inner), tuple(first))

    def image(self, images: LazyArray) -> jax.ShapeDtypeStruct:
        """Return the part of the images that is read for a tile, abstract."""
        shape = list(images.shape)
        for axis, count, size, step in zip(
            self.axes, self.tile, self.window, self.stride
        ):
            shape[axis] = (count - 1) * step + size
        return jax.ShapeDtypeStruct(tuple(shape), dtype_of(images))

    def of_writer(self, shard: Sequence[int], writer: int, writers: int) -> list[int]:
        """Return the tiles of one of several writers, none of which share a shard.

        Args:
          shard: positions that the output stores as one, along each axis.
          writer: counted from 0.
          writers: how many there are.

        Example:
          >>> tiles = Tiles((1,), (1,), (1,), 3, (10,), (2,))
          >>> tiles.of_writer((4,), 0, 2), tiles.of_writer((4,), 1, 2)
          ([0, 1, 4], [2, 3])
        """
        blocks: dict[tuple[int, ...], int] = {}
        found = []
        for number, start in enumerate(self.starts):
            # Shards and tiles begin together at these places.
            block = tuple(
                at // math.lcm(size, whole)
                for at, size, whole in zip(start, self.tile, shard)
            )
            if blocks.setdefault(block, len(blocks)) % writers == writer:
                found.append(number)
        return found


def tiles_of(program: AllCrops, images: LazyArray, out: PyTree, memory: int) -> Tiles:
    """Return the tiles of a run of :meth:`fcconv_jax.Slide.write`.

    Args:
      program: on one window of the images.
      images: the whole.
      out: what holds the result.
      memory: bytes that a tile may take.

    Raises:
      ValueError: the output can't hold the result, or a window takes more memory.
    """
    counts = tuple(
        (images.shape[axis] - size) // step + 1
        for axis, size, step in zip(program.axes, program.window, program.stride)
    )
    _check_out(program.outputs, out, counts, images)
    tile = _tile(program, images, counts, memory)
    # A shard of the output that is written in two parts would be read in between.
    tile = [
        size // shard * shard or size
        for size, shard in zip(tile, shard_of(out, len(counts)))
    ]
    along = program.window, program.stride, program.axes
    return Tiles(*along, len(images.shape), counts, tuple(tile))


def shard_of(out: PyTree, rank: int) -> tuple[int, ...]:
    """Return how many positions an output stores as one, along each axis."""
    sizes = [1] * rank
    for target in jax.tree.leaves(out):
        layout = getattr(target, "chunk_layout", None)  # TensorStore
        found = getattr(getattr(layout, "write_chunk", None), "shape", None)
        found = found or getattr(target, "shards", None)  # zarr
        found = found or getattr(target, "chunks", None)  # zarr, h5py
        if found and all(isinstance(each, int) for each in found):
            along = found[1 : 1 + rank]
            sizes = [math.lcm(*pair) for pair in zip(sizes, along)]
    return tuple(sizes)


def one_window(grid: Any, images: LazyArray) -> jax.ShapeDtypeStruct:
    """Return one crop of the images, abstract."""
    shape = list(images.shape)
    for axis, size in zip(grid.axes, grid.window):
        shape[axis] = size
    return jax.ShapeDtypeStruct(tuple(shape), dtype_of(images))


def middle_crop(grid: Any, images: LazyArray) -> np.ndarray[Any, Any]:
    """Read the crop in the middle of the first image, whose corners may be blank."""
    where = [slice(1), *(slice(None) for _ in images.shape[1:])]
    for axis, size in zip(grid.axes, grid.window):
        start = (images.shape[axis] - size) // 2
        where[axis] = slice(start, start + size)
    return read_part(images, where)


def _check_out(
    one: Sequence[Any], out: PyTree, counts: Sequence[int], images: LazyArray
) -> None:
    """Refuse outputs that cannot hold the result, before anything is computed."""
    wanted = [(leaf.shape[0], *counts, *leaf.shape[1:]) for leaf in one]
    targets = jax.tree.leaves(out)
    if odd := [each for each in targets if not hasattr(each, "shape")]:
        raise ValueError(
            f"out: expected arrays of shape {wanted}, got {odd[0]!r}. Pass "
            "numpy.lib.format.open_memmap(path, 'w+', dtype, shape) to write a file."
        )
    found = [tuple(target.shape) for target in targets]
    if wanted != found:
        raise ValueError(
            f"out: expected arrays of shape {wanted}, got {found}. Pass arrays of "
            "these shapes."
        )
    for leaf, target in zip(one, targets):
        if not _holds(dtype_of(target), dtype_of(leaf)):
            raise ValueError(
                f"out: expected {leaf.dtype}, got {target.dtype}, which can't hold "
                f"the result. Pass an array of {leaf.dtype}."
            )
        if isinstance(target, jax.Array) or not _is_writable(target):
            raise ValueError(
                "out: expected a writable array, got a read-only "
                f"{type(target).__name__}. Pass a NumPy array or a writable file."
            )
        if _overlap(images, target):
            raise ValueError(
                "out: expected an array apart from the images, which later tiles read, "
                "got one in the same memory or file. Pass a new array."
            )


def _overlap(one: object, other: object) -> bool:
    """Return whether two arrays may share memory, or are maps of one file."""
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
        return False
    files = [getattr(array, "filename", None) for array in (one, other)]
    same = files[0] is not None and files[0] == files[1]
    return same or np.may_share_memory(one, other)


def _holds(dtype: np.dtype[Any], result: np.dtype[Any]) -> bool:
    # To round floats to shorter ones is the caller's choice; to cut them is not.
    if jnp.issubdtype(result, jnp.floating):
        return jnp.issubdtype(dtype, jnp.inexact)
    return dtype == result or np.can_cast(result, dtype, "safe")


def _is_writable(target: Any) -> bool:
    return not isinstance(target, np.ndarray) or target.flags.writeable


def _tile(
    program: AllCrops, images: LazyArray, counts: Sequence[int], memory: int
) -> list[int]:
    """Return the largest tile, halved until it fits."""
    tile = list(counts)
    while True:
        needed = 0
        along = program.window, program.stride, program.axes
        tiles = Tiles(*along, len(images.shape), tuple(counts), tuple(tile))
        part = tiles.image(images)
        # A guess from the image alone keeps the maps of a huge one from being made.
        least = _ALIVE * part.size * part.dtype.itemsize
        if least <= memory:
            report = dataclasses.replace(program, images=part).report
            needed = report.bytes if report.shares else report.crop_bytes
            if _ALIVE * needed <= memory:
                return tile
        if max(tile) == 1:
            raise PlanError(
                f"memory: expected at least {max(_ALIVE * needed, least)} bytes, "
                f"enough for one window, got {memory}. Pass more, or fewer images at "
                "once."
            )
        longest = tile.index(max(tile))
        # Rounded up, so that it never takes more tiles than twice as many.
        tile[longest] = -(-tile[longest] // 2)


def dtype_of(images: LazyArray) -> np.dtype[Any]:
    """Return an array's dtype as NumPy has it in memory; TensorStore has its own."""
    found = np.dtype(getattr(images.dtype, "numpy_dtype", images.dtype))
    return found if found.isnative else found.newbyteorder("=")


def read_part(images: Sliced, where: Sequence[slice | int]) -> Any:
    """Read a part of an array, which may be in a file."""
    part: Any = images[tuple(where)]
    reader: Any = getattr(part, "read", None)
    if callable(reader):  # TensorStore
        future: Any = reader()
        part = future.result()
    return in_memory(part)
