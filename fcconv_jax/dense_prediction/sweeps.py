"""Windows that are swept over axes which crops share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from ..messages.errors import PlanError
from ..tracing.protocols import Equation
from . import costs
from .blocks import (
    Blocks,
    Held,
    array_from,
    as_blocks,
    cut,
    reread,
    segments_along,
    simplest,
)
from .maps import WindowPasses, lie_apart, whole_layout, window_passes
from .values import CropArray, Grid, Part, merged, own_arrays


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A window along a shared axis.

    Args:
      axis: of the value's data, behind the crops' own axes.
      out: the axis of the result.
      layouts: ways to lay the axis out.
      grid: the image's axis.
    """

    axis: int
    out: int
    layouts: Sequence[WindowPasses]
    grid: Grid


def lay_out(
    value: CropArray,
    dim: int,
    extent: int,
    stride: int,
    padding: tuple[int, int],
    holes: int,
) -> tuple[CropArray, Sweep | None]:
    """Lay out a shared axis for a window; None where it is not shared (any more)."""
    if not any(part.map is not None for part in value.groups[dim]):
        return value, None
    value = merged(value, dim)
    (part,) = value.groups[dim]
    axis = value.axis(sum(value.ranks[:dim]))
    assert part.map is not None
    assert part.grid is not None
    size = value.held.shape[axis]
    if part.grid.padded_outside:
        try:
            layout = whole_layout(part.map, size, extent, stride, padding, holes)
        except ValueError as error:
            raise PlanError(f"padding='image': {error}") from None
        return value, Sweep(dim, dim, [layout], part.grid)
    cuts = segments_along(value.held, axis)
    one = (extent, stride, padding, holes) == (1, 1, (0, 0), 1)
    # A window of one entry is pointwise: blocks stay as they are.
    if cuts and one:
        read = tuple(cut(np.arange(size), cuts))
        layout = WindowPasses(read, part.map, size, 1)
        return value, Sweep(dim, dim, [layout], part.grid)
    if one and lie_apart(part.map, size):
        return value, None
    layouts = window_passes(part.map, size, extent, stride, padding, holes)
    least = min(layout.outputs for layout in layouts)
    # Crops have hardly more windows of their own: sharing would copy for nothing.
    if least * costs.WORTH > layouts[0].map.size:
        return own_arrays(value, part.grid), None
    return value, Sweep(dim, dim, layouts, part.grid)


def cost(layouts: Sequence[WindowPasses], each: float, entries: float) -> float:
    """Return what windows over these axes cost, in floating point operations.

    Args:
      layouts: one for each axis.
      each: floating point operations of one output position.
      entries: of one position of the operand.
    """
    area = math.prod(layout.outputs for layout in layouts)
    passes = math.prod(len(layout.segments) for layout in layouts)
    read = math.prod(sum(s.size for s in layout.segments) for layout in layouts)
    kept = math.prod(layout.in_place for layout in layouts)
    # A single pass copies along each axis.
    copies = 1 if passes > 1 else sum(not layout.in_place for layout in layouts)
    moved = (read - kept) * entries * copies
    return area * each + moved * costs.MOVE + passes * costs.PASS


def least(
    sweeps: Sequence[Sweep], each: float, entries: float
) -> tuple[WindowPasses, ...]:
    """Return the layouts that cost least, one for each axis."""
    ways = itertools.product(*(sweep.layouts for sweep in sweeps))
    return min(ways, key=functools.partial(cost, each=each, entries=entries))


def swept(
    run: Callable[[Any, Mapping[int, int]], Any],
    value: CropArray,
    eqn: Equation,
    sweeps: Sequence[Sweep],
    each: float,
    fill: ArrayLike,
    kept: Mapping[int, Part],
) -> CropArray:
    """Run windows over shared axes, laid out in the way that costs least.

    Args:
      run: makes the result of one crop's own axes, or of what is laid out for them,
        with other strides for some axes.
      value: the operand, each of its axes one part.
      eqn: the equation.
      sweeps: the shared axes.
      each: floating point operations of one output position.
      fill: what padding holds.
      kept: the parts of other axes of the result, if crops see them differently.
    """
    shape = value.held.shape[len(value.fronts) :]
    entries = math.prod(shape) / math.prod(shape[sweep.axis] for sweep in sweeps)
    todo = list(zip(sweeps, least(sweeps, each, entries)))
    parts = {dim: part for dim, part in kept.items() if part.map is not None}
    parts |= {
        sweep.out: Part(layout.map.shape[1], layout.map, sweep.grid)
        for sweep, layout in todo
    }
    changed = {sweep.axis: layout.stride for sweep, layout in todo}

    def one(held: Held) -> Any:
        return passes(lambda x: run(x, changed), held, todo, fill)

    shape = eqn.outvars[0].aval.shape
    new = tuple(parts.get(dim, Part(size)) for dim, size in enumerate(shape))
    held = value.held
    if value.fronts:
        held = value.data
        # vmap takes arrays, not blocks.
        run_one, one = one, lambda held: array_from(run_one(held))
        for _ in value.fronts:
            one = jax.vmap(one)
    return CropArray(one(held), value.fronts, new, (1,) * len(new))


def passes(
    run: Callable[[Any], Any],
    held: Held,
    todo: Sequence[tuple[Sweep, WindowPasses]],
    fill: ArrayLike,
) -> Any:
    """Run windows over axes that are laid out; the results stay in blocks."""
    if not todo:
        return run(array_from(held))
    blocks = as_blocks(held, [sweep.axis for sweep, _ in todo])
    for k, (_, layout) in enumerate(todo):
        blocks = reread(blocks, k, layout.segments, fill)
        run = jax.vmap(run)
    outs = {key: run(array) for key, array in blocks.arrays.items()}
    axes = tuple(sweep.out for sweep, _ in todo)
    segments = [list(each) for each in blocks.segments]
    for key, out in outs.items():
        for k, (i, axis) in enumerate(zip(key, axes)):
            segments[k][i] = (segments[k][i][0], out.shape[len(axes) + axis])
    return simplest(Blocks(axes, tuple(map(tuple, segments)), outs))
