"""One rule for each primitive: its result for all crops, with what they share.

A rule gets an equation and its operands as :class:`Value`; it returns the outputs, or
raises :class:`NotSharedError`: then each crop gets an array of its own, and the
equation runs on them as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ..errors import PlanError
from ..tracing.jaxprs import bind
from .maps import (
    Layout,
    Map,
    full_window_layouts,
    join,
    whole_layout,
    window_layouts,
)
from .values import (
    Grid,
    NotSharedError,
    Part,
    Value,
    array_of,
    classes_of,
    merged,
    own_arrays,
    reshaped,
    split_part,
    stored,
    take,
    take_padded,
)

Rule = Callable[[Any, Sequence[Value]], list[Value]]

# Sharing has to save this much, for what it costs to rearrange.
WORTH = 1.1

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type copy cos cosh digamma div eq
    erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
    is_finite le lgamma log log1p logistic lt max min mul mulhi ne neg nextafter not or
    polygamma population_count pow real reduce_precision regularized_incomplete_beta rem
    round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square stop_gradient sub tan tanh to_edtype xor
    zeta""".split()
)


def aligned(
    values: Sequence[Value], but: int | None = None
) -> tuple[list[Value], tuple[Part, ...], tuple[int, ...]]:
    """Values of one shape (or numbers), with the same parts and the same axes stored.

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
        values = [_stretched(value, shape) for value in values]
    else:
        shapes = [(*shape[:but], 1, *shape[but + 1 :]) for shape in shapes]
        assert len(set(shapes)) == 1
    values = _with_same_parts(values, but)
    here = None if but is None else sum(values[0].ranks[:but])
    fronts = {grid for value in values for grid in value.fronts}
    values = [_own_along(value, fronts) for value in values]
    parts: list[Part] = []
    for index in range(len(values[0].parts)):
        if index == here:
            parts.append(values[0].parts[index])
            continue
        values, part = _joined(values, index)
        parts.append(part)
    every = tuple(sorted({grid for value in values for grid in value.fronts}))
    values = [_with_fronts(value, every) for value in values]
    return values, tuple(parts), values[0].ranks


def _stretched(value: Value, shape: Sequence[int]) -> Value:
    """A value whose axes of size 1, and a number, stand for larger ones."""
    if not value.ranks:
        parts = tuple(Part(size, uniform=True) for size in shape)
        return value.replace(parts=parts, ranks=(1,) * len(parts))
    for dim, size in enumerate(shape):
        if value.shape[dim] == 1 and size > 1:
            value = _without_ones(value, dim)
            groups = value.groups
            groups[dim] = (*groups[dim], Part(size, uniform=True))
            value = value.with_groups(groups, value.data)
    return value


def _own_along(value: Value, grids: Any) -> Value:
    for grid in sorted(value.shared & set(grids)):
        value = own_arrays(value, grid)
    return value


def _with_same_parts(values: Sequence[Value], but: int | None) -> list[Value]:
    """Splits the parts of values of one shape so that all have the same sizes."""
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
        if any(b % a for a, b in itertools.pairwise(bounds)):
            raise NotSharedError("axes that are made up in different ways")
        sizes = [b // a for a, b in zip([1, *bounds], bounds)]
        values = [_split_axis(value, dim, sizes) for value in values]
    return values


def _with_ones(value: Value, dim: int, count: int) -> Value:
    """Says of an axis of size 1 that it is made up of so many."""
    groups = value.groups
    missing = count - len(groups[dim])
    groups[dim] = (*groups[dim], *(Part(1, uniform=True),) * missing)
    return value.with_groups(groups, value.data)


def _split_axis(value: Value, dim: int, sizes: Sequence[int]) -> Value:
    """Splits the parts of one axis into those of given sizes, none of them 1."""
    if any(part.size == 1 and part.map is not None for part in value.groups[dim]):
        raise NotSharedError("an axis of size 1 that is shared")
    value = _without_ones(value, dim)
    index = sum(value.ranks[:dim])
    for size in sizes:
        part = value.parts[index]
        if part.size != size:
            value = split_part(value, index, (size, part.size // size))
        index += 1
    return value


def _without_ones(value: Value, dim: int) -> Value:
    """Drops the parts of size 1 of an axis that has others."""
    start = sum(value.ranks[:dim])
    for index in reversed(range(start, start + value.ranks[dim])):
        part = value.parts[index]
        if part.size != 1 or part.map is not None:
            continue
        data = value.data
        if not part.uniform:
            data = jnp.squeeze(data, value.axis(index))
        ranks = list(value.ranks)
        ranks[dim] -= 1
        parts = (*value.parts[:index], *value.parts[index + 1 :])
        value = Value(data, value.fronts, parts, tuple(ranks))
    return value


def _joined(values: list[Value], index: int) -> tuple[list[Value], Part]:
    """Brings one part of all values into one order."""
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
            known = classes_of(value.data, value.axis(index))
            ids = np.arange(part.size) if known is None else known[0]
            source = None if known is None else known[1]
            map_ = np.broadcast_to(ids, like.shape)
        maps.append(map_)
        who.append(i)
        sources.append(source)
    map_, places = join(maps)
    grown = any(len(p) > int(m.max()) + 1 for p, m in zip(places, maps))
    if grown and len(places[0]) * WORTH > map_.size:
        return _joined([_own_along(value, {grid}) for value in values], index)
    values = list(values)
    for i, place, source in zip(who, places, sources):
        axis = values[i].axis(index)
        place = place if source is None else source[place]
        values[i] = values[i].replace(data=take(values[i].data, place, axis))
    values = [_one_axis(value, index) for value in values]
    return values, Part(shared[0].size, map_, grid)


def _one_axis(value: Value, index: int) -> Value:
    """Stores a uniform part as an axis of size 1."""
    if not value.parts[index].uniform:
        return value
    data = jnp.expand_dims(value.data, value.axis(index))
    parts = list(value.parts)
    parts[index] = Part(parts[index].size)
    return value.replace(data=data, parts=tuple(parts))


def _with_fronts(value: Value, fronts: tuple[Grid, ...]) -> Value:
    missing = [i for i, grid in enumerate(fronts) if grid not in value.fronts]
    return value.replace(data=jnp.expand_dims(value.data, missing), fronts=fronts)


def broadcast_data(values: Sequence[Value]) -> list[Any]:
    """The data of aligned values, in one shape."""
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    return [jnp.broadcast_to(value.data, shape) for value in values]


def elementwise(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """An equation that makes each entry from the same entry of its operands."""
    together, parts, ranks = aligned(values)
    outs = bind(eqn, broadcast_data(together))
    return [Value(out, together[0].fronts, parts, ranks) for out in outs]


def _convolution(eqn: Any, values: Sequence[Value]) -> list[Value]:
    value, kernel = values
    p = eqn.params
    spec = p["dimension_numbers"]
    if kernel.differs:
        raise NotSharedError("a kernel that is computed from the image")
    if p["batch_group_count"] != 1:
        raise NotSharedError("a convolution over groups of the batch")
    for dim in spec.lhs_spec[:2]:
        if any(part.map is not None for part in value.groups[dim]):
            raise NotSharedError("a convolution over the image's axes as channels")
    padding = [(low, high) for low, high in p["padding"]]
    holes = list(p["lhs_dilation"])
    window = [kernel.shape[dim] for dim in spec.rhs_spec[2:]]
    sweeps: list[_Sweep] = []
    for k, dim in enumerate(spec.lhs_spec[2:]):
        extent = (window[k] - 1) * p["rhs_dilation"][k] + 1
        stride = p["window_strides"][k]
        value, sweep = _sweep(value, dim, extent, stride, padding[k], holes[k])
        if sweep is not None:
            sweeps.append(dataclasses.replace(sweep, out=spec.out_spec[2 + k]))
            padding[k], holes[k] = (0, 0), 1
    for dim in range(len(value.ranks)):
        value = merged(value, dim)
    weights = array_of(kernel)
    # Without padding XLA's CPU backend takes a convolution of half the speed.
    cpu = jax.default_backend() == "cpu"
    more = [cpu and n > 1 and pad == (0, 0) for n, pad in zip(window, padding)]
    cut = [slice(None)] * len(value.ranks)
    for dim, longer in zip(spec.out_spec[2:], more):
        cut[dim] = slice(-1) if longer else slice(None)

    def convolve(data: Any, changed: Mapping[int, int]) -> Any:
        strides = [
            changed.get(dim, stride)
            for dim, stride in zip(spec.lhs_spec[2:], p["window_strides"])
        ]
        y = lax.conv_general_dilated(
            data,
            weights,
            strides,
            [(0, s) if m else pad for m, s, pad in zip(more, strides, padding)],
            holes,
            p["rhs_dilation"],
            spec,
            p["feature_group_count"],
            precision=p["precision"],
            preferred_element_type=p["preferred_element_type"],
        )
        return y[tuple(cut)] if any(more) else y

    places = math.prod(value.shape) / math.prod(
        value.shape[dim] for dim in spec.lhs_spec[1:]
    )
    each = 2 * places * math.prod(kernel.shape)
    return [_swept(convolve, value, eqn, sweeps, each, 0)]


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """A window along a shared axis.

    Args:
      axis: of the value's data, behind the crops' own axes.
      out: the axis of the result.
      layouts: ways to lay the axis out.
      grid: the image's axis.
    """

    axis: int
    out: int
    layouts: Sequence[Layout]
    grid: Grid


def _sweep(
    value: Value,
    dim: int,
    extent: int,
    stride: int,
    padding: tuple[int, int],
    holes: int,
) -> tuple[Value, _Sweep | None]:
    """Lays out a shared axis for a window; None where it is not shared (any more)."""
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
        return value, _Sweep(dim, dim, [layout], part.grid)
    layouts = window_layouts(part.map, size, extent, stride, padding, holes)
    least = min(layout.outputs for layout in layouts)
    if least * WORTH > layouts[0].map.size:
        return own_arrays(value, part.grid), None
    return value, _Sweep(dim, dim, layouts, part.grid)


# What a further pass costs, in floating point operations: some 0.2 ms.
_PASS = 2e7


def _cost(layouts: Sequence[Layout], each: float) -> float:
    """Of windows over these axes, in operations; ``each`` for one output position."""
    area = math.prod(layout.outputs for layout in layouts)
    passes = math.prod(len(layout.segments) for layout in layouts)
    moved = sum(not layout.in_order for layout in layouts)
    return area * each * WORTH**moved + passes * _PASS


def _least(sweeps: Sequence[_Sweep], each: float) -> tuple[Layout, ...]:
    """The layouts that cost least, one for each axis."""
    ways = itertools.product(*(sweep.layouts for sweep in sweeps))
    return min(ways, key=functools.partial(_cost, each=each))


def _swept(
    run: Callable[[Any, Mapping[int, int]], Any],
    value: Value,
    eqn: Any,
    sweeps: Sequence[_Sweep],
    each: float,
    fill: Any,
) -> Value:
    """Runs windows over shared axes, laid out in the way that costs least.

    Args:
      run: makes the result of one crop's own axes, or of what is laid out for them,
        with other strides for some axes.
      value: the operand, each of its axes one part.
      eqn: the equation.
      sweeps: the shared axes.
      each: floating point operations of one output position.
      fill: what padding holds.
    """
    todo = list(zip(sweeps, _least(sweeps, each)))
    parts = {
        sweep.out: Part(layout.map.shape[1], layout.map, sweep.grid)
        for sweep, layout in todo
    }
    changed = {sweep.axis: layout.stride for sweep, layout in todo}

    def passes(data: Any) -> Any:
        return _passes(lambda x: run(x, changed), data, todo, fill)

    return _mapped(passes, value, eqn, parts)


def _passes(
    run: Callable[[Any], Any],
    data: Any,
    todo: Sequence[tuple[_Sweep, Layout]],
    fill: Any,
) -> Any:
    """Runs windows over axes that are laid out, and sets their results side by side."""
    if not todo:
        return run(data)
    (sweep, layout), *rest = todo
    one = functools.partial(_passes, run, todo=rest, fill=fill)
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
    run: Callable[[Any], Any], value: Value, eqn: Any, shared: dict[int, Part]
) -> Value:
    """Runs a function of one array of parts on each crop's own."""
    for _ in value.fronts:
        run = jax.vmap(run)
    data = run(value.data)
    shape = eqn.outvars[0].aval.shape
    parts = [shared.get(dim, Part(size)) for dim, size in enumerate(shape)]
    return Value(data, value.fronts, tuple(parts), (1,) * len(parts))


def _lowest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(-np.inf, dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.zeros((), dtype)
    return np.asarray(jnp.iinfo(dtype).min, dtype)


def _highest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(np.inf, dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.ones((), dtype)
    return np.asarray(jnp.iinfo(dtype).max, dtype)


_POOLS = {
    "reduce_window_max": _lowest,
    "reduce_window_min": _highest,
    "reduce_window_sum": lambda dtype: np.zeros((), dtype),
}


def _pool(eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,) = values
    p = dict(eqn.params)
    padding = [(low, high) for low, high in p["padding"]]
    base = list(p["base_dilation"])
    fill = _POOLS[eqn.primitive.name](eqn.invars[0].aval.dtype)
    sweeps: list[_Sweep] = []
    for dim, size in enumerate(p["window_dimensions"]):
        extent = (size - 1) * p["window_dilation"][dim] + 1
        stride = p["window_strides"][dim]
        value, sweep = _sweep(value, dim, extent, stride, padding[dim], base[dim])
        if sweep is not None:
            sweeps.append(sweep)
            padding[dim], base[dim] = (0, 0), 1
    for dim in range(len(value.ranks)):
        value = merged(value, dim)
    p["padding"], p["base_dilation"] = tuple(padding), tuple(base)

    def run(data: Any, changed: Mapping[int, int]) -> Any:
        strides = [changed.get(i, s) for i, s in enumerate(p["window_strides"])]
        return eqn.primitive.bind(data, **p | {"window_strides": tuple(strides)})

    mapped = math.prod(value.shape[sweep.axis] for sweep in sweeps)
    each = math.prod(p["window_dimensions"]) * math.prod(value.shape) / max(mapped, 1)
    return [_swept(run, value, eqn, sweeps, each, fill)]


_SEPARABLE = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split()
)


def _reduction(eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,) = values
    axes = sorted(eqn.params["axes"])
    p = {k: v for k, v in eqn.params.items() if k != "axes"}
    bounds = np.cumsum((0, *value.ranks)).tolist()
    indices = [i for dim in axes for i in range(bounds[dim], bounds[dim + 1])]
    for index in indices:
        value = stored(value, index)
    # A shared axis at a time, so that the next is read for fewer entries.
    for index in indices:
        part = value.parts[index]
        if part.grid is not None:
            value = own_arrays(value, part.grid)
            axis = value.axis(index)
            data = eqn.primitive.bind(value.data, axes=(axis,), **p)
            parts = list(value.parts)
            parts[index] = Part(1, uniform=True)
            value = value.replace(data=data, parts=tuple(parts))
    left = tuple(
        value.axis(index) for index in indices if not value.parts[index].uniform
    )
    data = eqn.primitive.bind(value.data, axes=left, **p) if left else value.data
    groups = [g for dim, g in enumerate(value.groups) if dim not in axes]
    return [value.with_groups(groups, data)]


def _dot(eqn: Any, values: Sequence[Value]) -> list[Value]:
    a, b = values
    if a.differs and b.differs:
        raise NotSharedError("a product of two values that are computed from the image")
    (lhs, rhs), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    first = a.differs
    value, other = (a, b) if first else (b, a)
    contracted, theirs = (lhs, rhs) if first else (rhs, lhs)
    batch, their_batch = (lhs_batch, rhs_batch) if first else (rhs_batch, lhs_batch)
    for dim in batch:
        if any(part.map is not None for part in value.groups[dim]):
            raise NotSharedError("a product that is batched over the image's axes")
        value = merged(value, dim)
    for index in range(len(value.parts)):
        value = stored(value, index)
    weights = array_of(other)
    # Each contracted axis of the weights in the parts that the value has.
    groups = value.groups
    bounds = np.cumsum((0, *value.ranks)).tolist()
    order = [*their_batch, *theirs]
    free = [dim for dim in range(weights.ndim) if dim not in order]
    weights = jnp.transpose(weights, (*their_batch, *theirs, *free))
    sizes = [part.size for dim in contracted for part in groups[dim]]
    kept = [weights.shape[i] for i in range(len(their_batch))]
    ends = [weights.shape[len(order) + i] for i in range(len(free))]
    weights = weights.reshape(*kept, *sizes, *ends)
    rest = [dim for dim in range(len(value.ranks)) if dim not in (*contracted, *batch)]
    mine_groups = [groups[dim] for dim in rest]
    theirs_groups = [(Part(size),) for size in ends]
    both = [*mine_groups, *theirs_groups] if first else [*theirs_groups, *mine_groups]
    indices = [i for dim in contracted for i in range(bounds[dim], bounds[dim + 1])]
    if not batch:
        done = _full_window(eqn, value, indices, weights)
        if done is not None:
            data, fronts = done
            if not first:
                nf, count = len(fronts), len(ends)
                order = [*range(data.ndim - count, data.ndim)]
                order = [*range(nf), *order, *range(nf, data.ndim - count)]
                data = jnp.transpose(data, order)
            return [value.replace(fronts=fronts).with_groups(both, data)]
    for index in indices:
        if (grid := value.parts[index].grid) is not None:
            value = own_arrays(value, grid)
    mine = [value.axis(index) for index in indices]
    mine_batch = [value.axis(bounds[dim]) for dim in batch]
    nb, nc = len(their_batch), len(sizes)
    there, there_batch = list(range(nb, nb + nc)), list(range(nb))
    if first:
        left, right = value.data, weights
        numbers = (mine, there), (mine_batch, there_batch)
    else:
        left, right = weights, value.data
        numbers = (there, mine), (there_batch, mine_batch)
    data = lax.dot_general(
        left,
        right,
        numbers,
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    nf, count = len(value.fronts), len(free)
    # The result has the batch, then the free axes of the left operand, then the right.
    if first:
        order = [*range(nb, nb + nf), *range(nb), *range(nb + nf, data.ndim)]
    else:
        order = [
            *range(nb + count, nb + count + nf),
            *range(nb + count),
            *range(nb + count + nf, data.ndim),
        ]
    data = jnp.transpose(data, order)
    batches = [(Part(size),) for size in kept]
    return [value.with_groups([*batches, *both], data)]


def _full_window(
    eqn: Any, value: Value, contracted: Sequence[int], weights: Any
) -> tuple[Any, tuple[Grid, ...]] | None:
    """A Dense layer over axes that crops share, as the convolution that it is.

    Args:
      eqn: the product.
      value: what differs between crops, all of its parts stored.
      contracted: its parts that are summed over.
      weights: their axes in this order, then the features.

    Returns:
      Data with the axes of all fronts, the parts that are left, and the features, and
      the fronts; None where the crops' own arrays cost less.
    """
    shared = [i for i in contracted if value.parts[i].map is not None]
    summed = [i for i in contracted if value.parts[i].map is None]
    data, fronts = value.data, value.fronts
    if data.dtype != weights.dtype or not jnp.issubdtype(data.dtype, jnp.floating):
        return None
    count = len(shared)
    sweeps: list[_Sweep] = []
    for k, index in enumerate(shared):
        part = value.parts[index]
        assert part.map is not None
        assert part.grid is not None
        layouts = full_window_layouts(part.map)
        if not layouts:
            return None
        sweeps.append(_Sweep(1 + k, 1 + k, layouts, part.grid))
    moved = {value.axis(i) for i in contracted}
    left = [axis for axis in range(data.ndim) if axis not in moved]
    ends = weights.shape[len(contracted) :]
    kept = [data.shape[axis] for axis in left]
    each = 2 * weights.size * math.prod(kept)
    chosen = _least(sweeps, each)
    rows = [len(layout.map) for layout in chosen]
    most = math.prod(rows) * each * WORTH ** (count + 1) + _PASS
    if not sweeps or _cost(chosen, each) > most:
        return None
    order = [value.axis(i) for i in (*shared, *summed)]
    places = [contracted.index(i) for i in (*shared, *summed)]
    inner = tuple(range(1, count + 1))
    spec = lax.ConvDimensionNumbers(
        (0, count + 1, *inner),
        (count + 1, count, *range(count)),
        (0, count + 1, *inner),
    )
    types = {key: eqn.params[key] for key in ("precision", "preferred_element_type")}

    # The crops' axes go to the front, sorted.
    now = [*fronts, *(sweep.grid for sweep in sweeps)]
    where = [*range(len(fronts)), *range(len(left), len(left) + count)]
    front = [where[now.index(grid)] for grid in sorted(now)]

    def own(data: Any, weights: Any) -> Any:
        """From an array for each crop."""
        each = value.replace(data=data)
        for sweep in sweeps:
            each = own_arrays(each, sweep.grid)
        numbers = [each.axis(i) for i in contracted], list(range(len(contracted)))
        return lax.dot_general(each.data, weights, (numbers, ((), ())), **types)

    @jax.custom_jvp
    def product(data: Any, weights: Any) -> Any:
        x = jnp.transpose(data, (*left, *order))
        lengths = x.shape[len(left) : len(left) + count]
        x = x.reshape(math.prod(kept), *lengths, -1)
        kernel = jnp.transpose(weights, (*places, *range(len(places), weights.ndim)))
        kernel = kernel.reshape(*kernel.shape[:count], x.shape[-1], -1)
        convolve = functools.partial(
            lax.conv_general_dilated,
            rhs=kernel,
            window_strides=[layout.stride for layout in chosen],
            padding="VALID",
            dimension_numbers=spec,
            **types,
        )
        y = _passes(convolve, x, list(zip(sweeps, chosen)), 0)
        for sweep, layout in zip(sweeps, chosen):
            y = take(y, layout.map[:, 0], sweep.out)
        y = y.reshape(*kept, *rows, *ends)
        return jnp.transpose(y, (*front, *(a for a in range(y.ndim) if a not in front)))

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        # The gradient of a convolution by its kernel is slow where windows are large.
        (data, weights), (of_data, of_weights) = primals, tangents
        out = product(data, weights)
        terms = []
        if not isinstance(of_data, SymbolicZero):
            terms.append(own(of_data, weights))
        if not isinstance(of_weights, SymbolicZero):
            terms.append(own(data, of_weights))
        return out, functools.reduce(jnp.add, terms)

    return product(data, weights), tuple(sorted(now))


def _reshape(eqn: Any, values: Sequence[Value]) -> list[Value]:
    if eqn.params["dimensions"] is not None:
        raise NotSharedError("a reshape in another order")
    return [reshaped(values[0], eqn.params["new_sizes"])]


def _broadcast(eqn: Any, values: Sequence[Value]) -> list[Value]:
    value = values[0]
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if value.ranks:
        value = _stretched(value, [shape[out] for out in where])
    groups: list[tuple[Part, ...]] = [(Part(size, uniform=True),) for size in shape]
    for out, group in zip(where, value.groups):
        groups[out] = group
    return [value.with_groups(groups, value.data)]


def _transpose(eqn: Any, values: Sequence[Value]) -> list[Value]:
    value = values[0]
    permutation = eqn.params["permutation"]
    bounds = np.cumsum((0, *value.ranks)).tolist()
    order = [i for dim in permutation for i in range(bounds[dim], bounds[dim + 1])]
    axes = [value.axis(i) for i in order if not value.parts[i].uniform]
    data = jnp.transpose(value.data, (*range(len(value.fronts)), *axes))
    return [value.with_groups([value.groups[dim] for dim in permutation], data)]


def _squeeze(eqn: Any, values: Sequence[Value]) -> list[Value]:
    value = values[0]
    gone = eqn.params["dimensions"]
    for dim in gone:
        if any(part.map is not None for part in value.groups[dim]):
            for part in value.groups[dim]:
                if part.grid is not None:
                    value = own_arrays(value, part.grid)
        value = _without_ones(value, dim)
    groups = [group for dim, group in enumerate(value.groups) if dim not in gone]
    return [value.with_groups(groups, value.data)]


def _expand(eqn: Any, values: Sequence[Value]) -> list[Value]:
    groups: list[Any] = list(values[0].groups)
    for dim in sorted(eqn.params["dimensions"]):
        groups.insert(dim, ())
    return [values[0].with_groups(groups, values[0].data)]


def _slice(eqn: Any, values: Sequence[Value]) -> list[Value]:
    value = values[0]
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    for dim, (start, stop, step) in enumerate(zip(starts, stops, steps)):
        if (start, stop, step) == (0, value.shape[dim], 1):
            continue
        value = _picked(value, dim, np.arange(start, stop, step))
    return [value]


def _reverse(eqn: Any, values: Sequence[Value]) -> list[Value]:
    value = values[0]
    for dim in eqn.params["dimensions"]:
        value = _picked(value, dim, np.arange(value.shape[dim])[::-1])
    return [value]


def _picked(value: Value, dim: int, places: Map) -> Value:
    """Some entries of an axis; of a shared one the crops just see less."""
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


def _pad(eqn: Any, values: Sequence[Value]) -> list[Value]:
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


def _concatenate(eqn: Any, values: Sequence[Value]) -> list[Value]:
    dim = eqn.params["dimension"]
    values = [merged(v, dim) if len(v.groups[dim]) != 1 else v for v in values]
    moving = {v.groups[dim][0].grid for v in values} - {None}
    if len(moving) > 1:
        raise NotSharedError("an axis that moves with two axes of the image")
    if any(moving & set(v.fronts) for v in values):
        values = [_own_along(value, moving) for value in values]
        moving = set()
    together, parts, ranks = aligned(values, but=dim)
    here = sum(ranks[:dim])
    if moving & {grid for v in together for grid in v.fronts}:
        together = [_own_along(value, moving) for value in together]
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
        shape[axis] = 1
    shape = list(np.broadcast_shapes(*map(tuple, shapes)))
    data = []
    for value, length in zip(together, lengths):
        shape[axis] = length
        data.append(jnp.broadcast_to(value.data, shape))
    joined = lax.concatenate(data, axis)
    size = sum(value.parts[here].size for value in together)
    parts = (*parts[:here], Part(size, map_, grid), *parts[here + 1 :])
    return [Value(joined, together[0].fronts, parts, ranks)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_SEPARABLE, _reduction),
    "conv_general_dilated": _convolution,
    "optimization_barrier": lambda eqn, values: list(values),
    "dot_general": _dot,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "slice": _slice,
    "rev": _reverse,
    "pad": _pad,
    "concatenate": _concatenate,
}
