"""Values that are combined entry by entry: the same parts, in one order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import costs
from .blocks import blockwise, retaken, segments_along
from .maps import join, join_whole
from .values import (
    CropArray,
    Grid,
    NotSharedError,
    Part,
    at_once,
    check_moves,
    classes_of,
    own_arrays,
    split_part,
)


def aligned(
    values: Sequence[CropArray], but: int | None = None
) -> tuple[list[CropArray], tuple[Part, ...], tuple[int, ...]]:
    """Give values of one shape (or numbers) the same parts and the same stored axes.

    Args:
      values: what is combined.
      but: an axis of one part that stays as it is.

    Returns:
      The values, the parts of a result that is made entry by entry, and its ranks. Each
      value's data have the fronts of all of them, and an axis of size 1 where it is
      the same everywhere.
    """
    shapes = [value.shape for value in values]
    if but is None:
        shape = np.broadcast_shapes(*shapes)
        values = [stretched(value, shape) for value in values]
    else:
        shapes = [(*shape[:but], 1, *shape[but + 1 :]) for shape in shapes]
        assert len(set(shapes)) == 1
    values = _with_same_parts(values, but)
    here = None if but is None else sum(values[0].ranks[:but])
    fronts = {grid for value in values for grid in value.fronts}
    values = [own_along(value, fronts) for value in values]
    parts: list[Part] = []
    for index in range(len(values[0].parts)):
        if index == here:
            parts.append(values[0].parts[index])
            continue
        values, part = _joined(values, index)
        parts.append(part)
    check_moves(parts)
    every = tuple(sorted({grid for value in values for grid in value.fronts}))
    values = [_with_fronts(value, every) for value in values]
    return values, tuple(parts), values[0].ranks


def stretched(value: CropArray, shape: Sequence[int]) -> CropArray:
    """Return a value whose axes of size 1, and a number, stand for larger ones."""
    if not value.ranks:
        parts = tuple(Part(size, uniform=True) for size in shape)
        return value.replace(parts=parts, ranks=(1,) * len(parts))
    for dim, size in enumerate(shape):
        if value.shape[dim] == 1 and size > 1:
            value = without_ones(value, dim)
            groups = value.groups
            groups[dim] = (*groups[dim], Part(size, uniform=True))
            value = value.with_groups(groups, value.held)
    return value


def own_along(value: CropArray, grids: Iterable[Grid | None]) -> CropArray:
    """Return the value with an array for each crop along some of the image's axes."""
    grids = set(grids)
    for grid in sorted(value.shared & grids):
        value = own_arrays(value, grid)
    return value


def _with_same_parts(values: Sequence[CropArray], but: int | None) -> list[CropArray]:
    """Split the parts of values of one shape so that all have the same sizes."""
    values = list(values)
    for dim in range(len(values[0].ranks)):
        groups = [value.groups[dim] for value in values]
        if dim == but:
            continue
        if len({tuple(p.size for p in group) for group in groups}) == 1:
            continue
        if values[0].shape[dim] == 1:
            most = max(map(len, groups))
            values = [_with_ones(value, dim, most) for value in values]
            continue
        ends: set[int] = set()
        for group in groups:
            ends |= set(np.cumprod([part.size for part in group]).tolist())
        bounds = sorted(ends - {1})
        # One value's axis ends within a factor of another's: they share no factors.
        if any(b % a for a, b in itertools.pairwise(bounds)):
            raise NotSharedError("axes that are made up in different ways")
        sizes = [b // a for a, b in zip([1, *bounds], bounds)]
        values = [_split_axis(value, dim, sizes) for value in values]
    return values


def _with_ones(value: CropArray, dim: int, count: int) -> CropArray:
    """Mark an axis of size 1 as made up of so many."""
    groups = value.groups
    missing = count - len(groups[dim])
    groups[dim] = (*groups[dim], *(Part(1, uniform=True),) * missing)
    return value.with_groups(groups, value.held)


def _split_axis(value: CropArray, dim: int, sizes: Sequence[int]) -> CropArray:
    """Split the parts of one axis into those of given sizes, none of them 1."""
    if any(part.size == 1 and part.map is not None for part in value.groups[dim]):
        raise NotSharedError("an axis of size 1 that is shared")
    value = without_ones(value, dim)
    index = sum(value.ranks[:dim])
    for size in sizes:
        part = value.parts[index]
        if part.size != size:
            value = split_part(value, index, (size, part.size // size))
        index += 1
    return value


def without_ones(value: CropArray, dim: int) -> CropArray:
    """Drop the parts of size 1 of an axis that has others."""
    start = sum(value.ranks[:dim])
    for index in reversed(range(start, start + value.ranks[dim])):
        part = value.parts[index]
        if part.size != 1 or part.map is not None:
            continue
        data = value.held
        if not part.uniform:
            data = value.data
            with at_once(data):
                data = jnp.squeeze(data, value.axis(index))
        ranks = list(value.ranks)
        ranks[dim] -= 1
        parts = (*value.parts[:index], *value.parts[index + 1 :])
        value = CropArray(data, value.fronts, parts, tuple(ranks))
    return value


def _joined(values: list[CropArray], index: int) -> tuple[list[CropArray], Part]:
    """Bring one part of all values into one order."""
    parts = [value.parts[index] for value in values]
    shared = [part for part in parts if part.map is not None]
    if not shared:
        if all(part.uniform for part in parts):
            return values, parts[0]
        values = [_one_axis(value, index) for value in values]
        return values, Part(parts[0].size)
    grid = shared[0].grid
    if any(part.grid != grid for part in shared):
        raise NotSharedError("an axis that moves with two axes of the image")
    like = shared[0].map
    assert like is not None
    maps, who, sources = [], [], []
    for i, (value, part) in enumerate(zip(values, parts)):
        if part.uniform:
            continue
        map_, source = part.map, None
        if map_ is None:
            # Equal entries count as one: the counts of a SAME average pool stay shared.
            known = classes_of(value.held, value.axis(index))
            ids = np.arange(part.size) if known is None else known[0]
            source = None if known is None else known[1]
            map_ = np.broadcast_to(ids, like.shape)
        maps.append(map_)
        who.append(i)
        sources.append(source)
    whole = None
    if grid is not None and grid.padded_outside and len(shared) == len(who):
        sizes = [values[i].held.shape[values[i].axis(index)] for i in who]
        whole = join_whole(maps, sizes)
    map_, places = whole or join(maps)
    grown = any(len(p) > int(m.max()) + 1 for p, m in zip(places, maps))
    # Combinations of entries are as many as the crops' own arrays have.
    if whole is None and grown and len(places[0]) * costs.WORTH > map_.size:
        return _joined([own_along(value, {grid}) for value in values], index)
    values = list(values)
    segments = None
    for i, place in zip(who, places):
        found = segments_along(values[i].held, values[i].axis(index))
        # The order of blocks that stay in place is kept, so that only the others are
        # read again.
        if found and np.array_equal(place, np.arange(len(place))):
            segments = found
    for i, place, source in zip(who, places, sources):
        axis = values[i].axis(index)
        place, held = place if source is None else source[place], values[i].held
        with at_once(held):
            held = retaken(held, place, axis, segments)
        values[i] = values[i].replace(held=held)
    values = [_one_axis(value, index) for value in values]
    return values, Part(shared[0].size, map_, grid)


def _one_axis(value: CropArray, index: int) -> CropArray:
    """Store a uniform part as an axis of size 1."""
    if not value.parts[index].uniform:
        return value
    data = value.data
    with at_once(data):
        data = jnp.expand_dims(data, value.axis(index))
    parts = list(value.parts)
    parts[index] = Part(parts[index].size)
    return value.replace(data=data, parts=tuple(parts))


def _with_fronts(value: CropArray, fronts: tuple[Grid, ...]) -> CropArray:
    missing = [i for i, grid in enumerate(fronts) if grid not in value.fronts]
    if not missing:
        return value
    return value.replace(data=jnp.expand_dims(value.data, missing), fronts=fronts)


def broadcast_data(values: Sequence[CropArray]) -> list[Any]:
    """Return the data of aligned values, in one shape."""
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    return [jnp.broadcast_to(value.data, shape) for value in values]


def combined(run: Callable[..., Any], values: Sequence[CropArray]) -> Any:
    """Run a function of arrays of one shape on aligned values, block by block."""

    def each(arrays: Sequence[Any]) -> Any:
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        return run(*(jnp.broadcast_to(array, shape) for array in arrays))

    return blockwise(each, [value.held for value in values])
