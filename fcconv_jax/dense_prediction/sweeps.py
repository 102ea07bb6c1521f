"""Windows that are swept over axes which crops share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from ..messages.errors import PlanError
from . import costs
from .maps import WindowPasses, whole_layout, window_passes
from .values import CropArray, Grid, Part, merged, own_arrays, take_padded


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
    size = value.data.shape[axis]
    if part.grid.padded_outside:
        try:
            layout = whole_layout(part.map, size, extent, stride, padding, holes)
        except ValueError as error:
            raise PlanError(f"padding='image': {error}") from None
        return value, Sweep(dim, dim, [layout], part.grid)
    layouts = window_passes(part.map, size, extent, stride, padding, holes)
    least = min(layout.outputs for layout in layouts)
    if least * costs.WORTH > layouts[0].map.size:
        return own_arrays(value, part.grid), None
    return value, Sweep(dim, dim, layouts, part.grid)


def cost(layouts: Sequence[WindowPasses], each: float) -> float:
    """Of windows over these axes, in operations; ``each`` for one output position."""
    area = math.prod(layout.outputs for layout in layouts)
    passes = math.prod(len(layout.segments) for layout in layouts)
    moved = sum(not layout.in_order for layout in layouts)
    return area * each * costs.WORTH**moved + passes * costs.PASS


def least(sweeps: Sequence[Sweep], each: float) -> tuple[WindowPasses, ...]:
    """Return the layouts that cost least, one for each axis."""
    ways = itertools.product(*(sweep.layouts for sweep in sweeps))
    return min(ways, key=functools.partial(cost, each=each))


def swept(
    run: Callable[[Any, Mapping[int, int]], Any],
    value: CropArray,
    eqn: Any,
    sweeps: Sequence[Sweep],
    each: float,
    fill: Any,
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
    """
    todo = list(zip(sweeps, least(sweeps, each)))
    parts = {
        sweep.out: Part(layout.map.shape[1], layout.map, sweep.grid)
        for sweep, layout in todo
    }
    changed = {sweep.axis: layout.stride for sweep, layout in todo}

    def one(data: Any) -> Any:
        return passes(lambda x: run(x, changed), data, todo, fill)

    return _mapped(one, value, eqn, parts)


def passes(
    run: Callable[[Any], Any],
    data: Any,
    todo: Sequence[tuple[Sweep, WindowPasses]],
    fill: Any,
) -> Any:
    """Run windows over axes that are laid out, and join their results."""
    if not todo:
        return run(data)
    (sweep, layout), *rest = todo
    one = functools.partial(passes, run, todo=rest, fill=fill)
    outs = []
    for places in layout.segments:
        x = take_padded(data, places.reshape(-1), sweep.axis, fill)
        if len(places) == 1:
            outs.append(one(x))
            continue
        shape = list(x.shape)
        shape[sweep.axis : sweep.axis + 1] = places.shape
        y = jax.vmap(one, sweep.axis, sweep.out)(x.reshape(shape))
        shape = list(y.shape)
        shape[sweep.out : sweep.out + 2] = [-1]
        outs.append(y.reshape(shape))
    return lax.concatenate(outs, sweep.out) if len(outs) > 1 else outs[0]


def _mapped(
    run: Callable[[Any], Any], value: CropArray, eqn: Any, shared: dict[int, Part]
) -> CropArray:
    """Run a function of one array of parts on each crop's own."""
    for _ in value.fronts:
        run = jax.vmap(run)
    data = run(value.data)
    shape = eqn.outvars[0].aval.shape
    parts = [shared.get(dim, Part(size)) for dim, size in enumerate(shape)]
    return CropArray(data, value.fronts, tuple(parts), (1,) * len(parts))
