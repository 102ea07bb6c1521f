"""Values that all crops of an image share: what is stored, and what each crop sees."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..messages.errors import PlanError
from .blocks import Array, Blocks, Held, array_from, take
from .maps import Map, distinct, lie_apart, whole_rows


class NotSharedError(Exception):
    """Crops cannot share an equation's result; the message is the reason."""


@dataclasses.dataclass(frozen=True, order=True)
class Grid:
    """An axis of the image that crops move along.

    Args:
      index: counted from 0.
      padded_outside: padding lies around the image, where it belongs around each crop:
        windows that pass a crop's border read what is beside it.
    """

    index: int
    padded_outside: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """An axis of a value, or a factor of one.

    Args:
      size: as one crop sees it.
      map: where each crop sees the shared axis; None where all see the same.
      grid: the axis of the image that the crops move along, where there is a map.
      uniform: the same everywhere, so that it is not stored.
    """

    size: int
    map: Map | None = None
    grid: Grid | None = None
    uniform: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class CropArray:
    """An array of every crop.

    Args:
      held: an array, or one in blocks: first an axis of crops for each of ``fronts``,
        then one for each part that is not uniform.
      fronts: the image's axes along which each crop has an array of its own, sorted.
      parts: from the outermost axis to the innermost.
      ranks: how many parts make up each axis of the array; none for a size of 1.
    """

    held: Held
    fronts: tuple[Grid, ...]
    parts: tuple[Part, ...]
    ranks: tuple[int, ...]

    @classmethod
    def plain(cls, array: Any) -> CropArray:
        """Return an array that is the same for all crops."""
        parts = tuple(Part(size) for size in np.shape(array))
        return cls(array, (), parts, (1,) * len(parts))

    @property
    def data(self) -> Array:
        """The array, whole."""
        return array_from(self.held)

    @property
    def groups(self) -> list[tuple[Part, ...]]:
        """The parts of each axis."""
        ends = np.cumsum((0, *self.ranks))
        return [self.parts[a:b] for a, b in itertools.pairwise(ends)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one crop's array."""
        return tuple(math.prod(p.size for p in group) for group in self.groups)

    @property
    def differs(self) -> bool:
        """Whether crops see different arrays."""
        return bool(self.fronts) or any(part.map is not None for part in self.parts)

    @property
    def shared(self) -> set[Grid]:
        """The image's axes along which crops share what they have in common."""
        return {part.grid for part in self.parts if part.grid is not None}

    def axis(self, index: int) -> int:
        """Return where a part is stored."""
        stored = sum(not part.uniform for part in self.parts[:index])
        return len(self.fronts) + stored

    def replace(self, **changes: Any) -> CropArray:
        """Return the value with some of its fields changed."""
        if "data" in changes:
            changes["held"] = changes.pop("data")
        return dataclasses.replace(self, **changes)

    def with_groups(self, groups: Sequence[Sequence[Part]], data: Held) -> CropArray:
        """Other data with other parts."""
        parts = tuple(part for group in groups for part in group)
        return CropArray(data, self.fronts, parts, tuple(map(len, groups)))


SlideRule = Callable[[Any, Sequence[CropArray]], list[CropArray]]


def check_moves(parts: Sequence[Part]) -> None:
    """Refuse parts of which two move with one axis of the image.

    Of such a square, as of differences between all pairs of pixels, crops share blocks
    along its diagonal, which no map of one axis can name.

    Raises:
      NotSharedError: two of them do.
    """
    grids = [part.grid for part in parts if part.grid is not None]
    if len(set(grids)) < len(grids):
        raise NotSharedError("two axes that move with one axis of the image")


def own_arrays(value: CropArray, grid: Grid) -> CropArray:
    """Return the value with an array for each crop along one of the image's axes."""
    index = next((i for i, p in enumerate(value.parts) if p.grid == grid), None)
    if index is None:
        return value
    part = value.parts[index]
    assert part.map is not None
    axis = value.axis(index)
    data = value.data
    if lie_apart(part.map, data.shape[axis]):
        shape = *data.shape[:axis], *part.map.shape, *data.shape[axis + 1 :]
        data = data.reshape(shape)
    else:
        data = take(data, part.map, axis)
    fronts = tuple(sorted((*value.fronts, grid)))
    data = jnp.moveaxis(data, axis, fronts.index(grid))
    parts = list(value.parts)
    parts[index] = Part(part.size)
    return CropArray(data, fronts, tuple(parts), value.ranks)


def all_own(value: CropArray) -> CropArray:
    """Return the value with an array for each crop."""
    for grid in sorted(value.shared):
        value = own_arrays(value, grid)
    return value


def stored(value: CropArray, index: int) -> CropArray:
    """Return the value with a part stored that was uniform."""
    part = value.parts[index]
    if not part.uniform:
        return value
    axis = value.axis(index)
    shape = list(value.data.shape)
    shape.insert(axis, part.size)
    data = jnp.broadcast_to(jnp.expand_dims(value.data, axis), shape)
    parts = list(value.parts)
    parts[index] = Part(part.size)
    return value.replace(data=data, parts=tuple(parts))


def merged(value: CropArray, dim: int) -> CropArray:
    """Return the value with an axis that is one part.

    Raises:
      NotSharedError: the axis is made up of two that are shared.
    """
    group = value.groups[dim]
    if len(group) == 1:
        return stored(value, sum(value.ranks[:dim]))
    if any(part.map is not None for part in group):
        return _merged_map(value, dim)
    start = sum(value.ranks[:dim])
    for index in range(start, start + len(group)):
        value = stored(value, index)
    axis = value.axis(start)
    size = math.prod(part.size for part in group)
    shape = value.data.shape
    data = value.data.reshape(*shape[:axis], size, *shape[axis + len(group) :])
    groups = value.groups
    groups[dim] = (Part(size),)
    return value.with_groups(groups, data)


def _merged_map(value: CropArray, dim: int) -> CropArray:
    """The value with a shared part and its neighbours in the same axis as one part."""
    group = value.groups[dim]
    if sum(part.map is not None for part in group) > 1:
        raise NotSharedError("an axis that is made up of two shared ones")
    at = next(i for i, part in enumerate(group) if part.map is not None)
    map_, grid = group[at].map, group[at].grid
    assert map_ is not None
    axis = value.axis(sum(value.ranks[:dim]) + at)
    shape = value.data.shape
    length = shape[axis]
    rows = len(map_)
    inner = np.arange(1)
    for part in group[at + 1 :]:
        steps = np.zeros(part.size, np.int64) if part.uniform else np.arange(part.size)
        inner = (inner[:, None] * (1 if part.uniform else part.size) + steps).reshape(
            -1
        )
    width = math.prod(part.size for part in group[at + 1 :] if not part.uniform)
    outer = np.arange(1)
    for part in group[:at]:
        steps = np.zeros(part.size, np.int64) if part.uniform else np.arange(part.size)
        outer = (outer[:, None] * (1 if part.uniform else part.size) + steps).reshape(
            -1
        )
    places = (
        outer[None, :, None, None] * (length * width)
        + map_[:, None, :, None] * width
        + inner[None, None, None, :]
    )
    before = sum(not part.uniform for part in group[:at])
    after = sum(not part.uniform for part in group[at + 1 :])
    size = math.prod(shape[axis - before : axis + after + 1])
    ends = shape[axis + after + 1 :]
    data = value.data.reshape(*shape[: axis - before], size, *ends)
    places = places.reshape(rows, -1)
    groups = value.groups
    groups[dim] = (Part(places.shape[1], places, grid),)
    return value.with_groups(groups, data)


def array_of(value: CropArray) -> Any:
    """Return the arrays of all crops: the axes of ``fronts``, then the array's own."""
    value = all_own(value)
    for dim in range(len(value.ranks)):
        value = merged(value, dim)
    return value.data


def split_part(value: CropArray, index: int, sizes: Sequence[int]) -> CropArray:
    """Split a part into factors; those of a shared one are windows of it."""
    part = value.parts[index]
    if part.uniform:
        new = [Part(size, uniform=True) for size in sizes]
        return _with_parts(value, index, new, value.data)
    axis = value.axis(index)
    shape = value.data.shape
    if part.map is None:
        data = value.data
        with at_once(data):
            data = data.reshape(*shape[:axis], *sizes, *shape[axis + 1 :])
        return _with_parts(value, index, [Part(size) for size in sizes], data)
    # Factors of 1 take no place: they become parts that are not stored.
    outer, *inner = [size for size in sizes if size > 1] or [1]
    length = math.prod(inner)
    if part.grid is not None and part.grid.padded_outside:
        try:
            rows, ids = whole_rows(part.map, value.held.shape[axis], length)
        except ValueError as error:
            raise PlanError(f"padding='image': {error}") from None
    else:
        # Crops that see the same stretch go on sharing it.
        rows, ids = distinct(part.map.reshape(-1, length))
    data = take(value.data, rows, axis)
    data = data.reshape(*shape[:axis], len(rows), *inner, *shape[axis + 1 :])
    ids = ids.reshape(len(part.map), outer)
    new, rest = [], [Part(outer, ids, part.grid), *map(Part, inner)]
    for size in sizes:
        new.append(rest.pop(0) if size > 1 else Part(1, uniform=True))
    return _with_parts(value, index, [*new, *rest], data)


def _with_parts(
    value: CropArray, index: int, new: Sequence[Part], data: Array
) -> CropArray:
    ends = np.cumsum(value.ranks)
    dim = int(np.searchsorted(ends, index, side="right"))
    ranks = list(value.ranks)
    ranks[dim] += len(new) - 1
    parts = (*value.parts[:index], *new, *value.parts[index + 1 :])
    return CropArray(data, value.fronts, parts, tuple(ranks))


def reshaped(value: CropArray, shape: Sequence[int]) -> CropArray:
    """Return the value with other axes over the same entries.

    Raises:
      NotSharedError: the new axes cut through a shared one.
    """
    # Sizes of 0 have no factors to match.
    if not all(part.size for part in value.parts):
        raise NotSharedError("a reshape of no entries")
    ranks: list[int] = []
    index = 0
    for target in shape:
        size, count = 1, 0
        while size < target or (
            target == 1 and count == 0 and _is_one(value.parts, index)
        ):
            if index >= len(value.parts):
                raise NotSharedError("a reshape of no entries")
            part = value.parts[index]
            # The part reaches over the end of the new axis: its outer factor belongs
            # here.
            if target % (size * part.size):
                outer = target // size
                if target % size or part.size % outer:
                    raise NotSharedError("a reshape that cuts through an axis")
                value = split_part(value, index, (outer, part.size // outer))
                part = value.parts[index]
            size, index, count = size * part.size, index + 1, count + 1
        ranks.append(count)
    rest = len(value.parts) - index
    if rest and not ranks:
        if any(part.map is not None for part in value.parts):
            raise NotSharedError("a reshape to one number")
        return CropArray(
            value.data.reshape(value.data.shape[: len(value.fronts)]),
            value.fronts,
            (),
            (),
        )
    if rest:
        ranks[-1] += rest  # of size 1
    value = value.replace(ranks=tuple(ranks))
    # With the axes that the function has, operations are the function's.
    for dim, group in enumerate(value.groups):
        plain = not any(part.uniform or part.map is not None for part in group)
        if len(group) > 1 and plain and not isinstance(value.held, Blocks):
            with at_once(value.held):
                value = merged(value, dim)
    return value


def _is_one(parts: Sequence[Part], index: int) -> bool:
    return index < len(parts) and parts[index].size == 1


def at_once(*arrays: Any) -> contextlib.AbstractContextManager[Any]:
    """Compute what depends on known numbers alone now, so that it stays known."""
    if any(isinstance(array, Tracer | Blocks) for array in arrays):
        return contextlib.nullcontext()
    return jax.ensure_compile_time_eval()


def classes_of(data: Any, axis: int) -> tuple[Map, Map] | None:
    """Return which slices along an axis are the same, where the values are known.

    Returns:
      The class of each slice, and a slice of each class; None while they are traced.
    """
    if isinstance(data, Tracer | Blocks) or data.size > _KNOWN:
        return None
    rows = np.moveaxis(np.asarray(data), axis, 0)
    rows = np.ascontiguousarray(rows.reshape(len(rows), -1))
    # By their bits, in which a NaN equals itself.
    names = rows.view(np.uint8).reshape(len(rows), -1)
    _, first, ids = np.unique(names, axis=0, return_index=True, return_inverse=True)
    return ids.reshape(-1), first


_KNOWN = 1 << 22
