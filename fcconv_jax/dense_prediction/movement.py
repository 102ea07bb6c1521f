"""Rules of what moves entries: reshapes, slices, concatenations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..tracing.protocols import Equation
from .alignment import aligned, own_along, stretched, without_ones
from .blocks import take
from .maps import Map
from .values import (
    CropArray,
    NotSharedError,
    Part,
    SlideRule,
    array_of,
    merged,
    own_arrays,
    reshaped,
    stored,
)


def _reshape(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    if eqn.params["dimensions"] is not None:
        raise NotSharedError("a reshape in another order")
    return [reshaped(values[0], eqn.params["new_sizes"])]


def _broadcast(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value = values[0]
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if value.ranks:
        value = stretched(value, [shape[out] for out in where])
    groups: list[tuple[Part, ...]] = [(Part(size, uniform=True),) for size in shape]
    for out, group in zip(where, value.groups):
        groups[out] = group
    return [value.with_groups(groups, value.held)]


def _transpose(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value = values[0]
    permutation = eqn.params["permutation"]
    bounds = np.cumsum((0, *value.ranks)).tolist()
    order = [i for dim in permutation for i in range(bounds[dim], bounds[dim + 1])]
    axes = [value.axis(i) for i in order if not value.parts[i].uniform]
    data = jnp.transpose(value.data, (*range(len(value.fronts)), *axes))
    return [value.with_groups([value.groups[dim] for dim in permutation], data)]


def _squeeze(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    return [_without_axes(values[0], eqn.params["dimensions"])]


def _without_axes(value: CropArray, gone: Sequence[int]) -> CropArray:
    for dim in gone:
        for part in value.groups[dim]:
            if part.grid is not None:
                # One entry that differs between crops: nothing of the axis is left to
                # share.
                value = own_arrays(value, part.grid)
        value = without_ones(value, dim)
    groups = [group for dim, group in enumerate(value.groups) if dim not in gone]
    return value.with_groups(groups, value.held)


def _expand(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value = values[0]
    for dim in sorted(eqn.params["dimensions"]):
        value = _with_new_axis(value, dim)
    return [value]


def _with_new_axis(value: CropArray, dim: int) -> CropArray:
    groups: list[tuple[Part, ...]] = value.groups
    groups.insert(dim, ())
    return value.with_groups(groups, value.held)


def _slice(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value = values[0]
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    for dim, (start, stop, step) in enumerate(zip(starts, stops, steps)):
        if (start, stop, step) == (0, value.shape[dim], 1):
            continue
        value = _picked(value, dim, np.arange(start, stop, step))
    return [value]


def _reverse(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value = values[0]
    for dim in eqn.params["dimensions"]:
        value = _picked(value, dim, np.arange(value.shape[dim])[::-1])
    return [value]


def _picked(value: CropArray, dim: int, places: Map) -> CropArray:
    """Pick entries of an axis; of a shared one, crops just see fewer."""
    if len(value.groups[dim]) != 1:
        value = merged(value, dim)
    index = sum(value.ranks[:dim])
    part = value.parts[index]
    parts = list(value.parts)
    if part.uniform:
        parts[index] = Part(len(places), uniform=True)
        return value.replace(parts=tuple(parts))
    if part.map is not None:
        parts[index] = Part(len(places), part.map[:, places], part.grid)
        return value.replace(parts=tuple(parts))
    parts[index] = Part(len(places))
    axis = value.axis(index)
    return value.replace(data=take(value.data, places, axis), parts=tuple(parts))


def _pad(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value, fill = values
    if fill.differs:
        raise NotSharedError("padding with a value that is computed from the image")
    number = array_of(fill)
    for dim, (low, high, inside) in enumerate(eqn.params["padding_config"]):
        if (low, high, inside) == (0, 0, 0):
            continue
        if len(value.groups[dim]) != 1:
            value = merged(value, dim)
        index = sum(value.ranks[:dim])
        value = stored(value, index)
        part, axis = value.parts[index], value.axis(index)
        widths = [(0, 0, 0)] * value.data.ndim
        parts = list(value.parts)
        if part.map is None:
            widths[axis] = (low, high, inside)
            data = lax.pad(value.data, number, widths)
            parts[index] = Part(data.shape[axis])
        else:
            # One entry of padding behind the axis serves all crops: their maps point to
            # it.
            widths[axis] = (0, 1, 0)
            data = lax.pad(value.data, number, widths)
            size = value.data.shape[axis]
            map_ = np.full((len(part.map), (part.size - 1) * (inside + 1) + 1), size)
            map_[:, :: inside + 1] = part.map
            map_ = map_[:, max(-low, 0) : map_.shape[1] - max(-high, 0)]
            ends = (max(low, 0), max(high, 0))
            map_ = np.pad(map_, ((0, 0), ends), constant_values=size)
            parts[index] = Part(map_.shape[1], map_, part.grid)
        value = value.replace(data=data, parts=tuple(parts))
    return [value]


def _concatenate(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    dim = eqn.params["dimension"]
    # Of a roll by 0, one piece is empty: its data would be kept beside the other's.
    pieces = [value for value in values if value.shape[dim]] or values[:1]
    return [pieces[0] if len(pieces) == 1 else _side_by_side(pieces, dim)]


def _stack(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    dim = eqn.params["axis"]
    return [_side_by_side([_with_new_axis(value, dim) for value in values], dim)]


def _split(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    ends = np.cumsum([0, *eqn.params["sizes"]])
    pieces = itertools.pairwise(ends)
    return [_picked(values[0], eqn.params["axis"], np.arange(*p)) for p in pieces]


def _unstack(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    dim = eqn.params["axis"]
    each = [
        _picked(values[0], dim, np.arange(i, i + 1)) for i in range(len(eqn.outvars))
    ]
    return [_without_axes(value, [dim]) for value in each]


def _tile(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value = values[0]
    for dim, count in enumerate(eqn.params["reps"]):
        if count != 1:
            value = _picked(value, dim, np.tile(np.arange(value.shape[dim]), count))
    return [value]


def _side_by_side(values: Sequence[CropArray], dim: int) -> CropArray:
    values = [merged(v, dim) if len(v.groups[dim]) != 1 else v for v in values]
    moving = {v.groups[dim][0].grid for v in values} - {None}
    # A part has one map, of the crops along one of the image's axes.
    if len(moving) > 1:
        raise NotSharedError("an axis that moves with two axes of the image")
    # Along one axis of the image, crops have all operands of their own or share them
    # all.
    if any(moving & set(v.fronts) for v in values):
        values = [own_along(value, moving) for value in values]
        moving = set()
    together, parts, ranks = aligned(values, but=dim)
    here = sum(ranks[:dim])
    if moving & {grid for v in together for grid in v.fronts}:
        together = [own_along(value, moving) for value in together]
        moving = set()
    together = [stored(value, here) for value in together]
    axis = together[0].axis(here)
    map_, grid = None, None
    if moving:
        (grid,) = moving
        rows = next(v.parts[here].map for v in together if v.parts[here].grid == grid)
        assert rows is not None
        maps, offset = [], 0
        for value in together:
            own = value.parts[here].map
            own = np.arange(value.parts[here].size) if own is None else own
            own = np.broadcast_to(own, (len(rows), own.shape[-1]))
            maps.append(own + offset)
            offset += value.data.shape[axis]
        map_ = np.concatenate(maps, 1)
    lengths = [value.data.shape[axis] for value in together]
    shapes = [list(value.data.shape) for value in together]
    for shape in shapes:
        # Their lengths along the axis that is joined may differ.
        shape[axis] = 1
    shape = list(np.broadcast_shapes(*map(tuple, shapes)))
    data = []
    for value, length in zip(together, lengths):
        shape[axis] = length
        data.append(jnp.broadcast_to(value.data, shape))
    joined = lax.concatenate(data, axis)
    size = sum(value.parts[here].size for value in together)
    parts = (*parts[:here], Part(size, map_, grid), *parts[here + 1 :])
    return CropArray(joined, together[0].fronts, parts, ranks)


RULES: dict[str, SlideRule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "expand_dims": _expand,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
