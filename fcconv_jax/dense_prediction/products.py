"""The rule of matrix products, and of a Dense layer over axes that crops share."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ..tracing.protocols import Equation
from . import costs
from .alignment import without_ones
from .blocks import array_from, take
from .maps import full_window_layouts
from .sweeps import Sweep, cost, least, passes
from .values import (
    CropArray,
    Grid,
    NotSharedError,
    Part,
    SlideRule,
    array_of,
    merged,
    own_arrays,
    stored,
)


def _dot(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    a, b = values
    if a.differs and b.differs:
        return [_within_windows(eqn, a, b)]
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


def _within_windows(eqn: Equation, a: CropArray, b: CropArray) -> CropArray:
    """Multiply two values that share the axes of the batch, and no others.

    So does attention within windows (Liu et al., Swin Transformer, 2021): crops that
    are a multiple of a window apart see the same windows.
    """
    (lhs, rhs), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    for i, j in zip(lhs_batch, rhs_batch):
        # Parts of size 1 would hide that the other parts are alike.
        a, b = without_ones(a, i), without_ones(b, j)
    both = (a, lhs, lhs_batch), (b, rhs, rhs_batch)
    alike = a.fronts == b.fronts and all(
        _alike(a.groups[i], b.groups[j]) for i, j in zip(lhs_batch, rhs_batch)
    )
    for value, _, batch in both:
        for dim, group in enumerate(value.groups):
            # A product of two shared axes would have an entry for each pair of places.
            alike &= dim in batch or all(part.map is None for part in group)
    if not alike:
        raise NotSharedError("a product of two values that are computed from the image")
    operands, numbers = [], []
    for value, contracted, batch in both:
        for dim in range(len(value.ranks)):
            value = value if dim in batch else merged(value, dim)
        for index in range(len(value.parts)):
            value = stored(value, index)
        bounds = np.cumsum((0, *value.ranks)).tolist()
        axes = [
            [value.axis(i) for dim in dims for i in range(bounds[dim], bounds[dim + 1])]
            for dims in (contracted, batch)
        ]
        operands.append(value)
        numbers.append((axes[0], [*range(len(value.fronts)), *axes[1]]))
    (summed, batches), (their_summed, their_batches) = numbers
    left, right = operands
    # One may hold entries behind the last that crops see.
    data, theirs = left.data, right.data
    for i, j in zip(batches, their_batches):
        size = min(data.shape[i], theirs.shape[j])
        data = lax.slice_in_dim(data, 0, size, axis=i)
        theirs = lax.slice_in_dim(theirs, 0, size, axis=j)
    data = lax.dot_general(
        data,
        theirs,
        ((summed, their_summed), (batches, their_batches)),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    groups = [left.groups[dim] for dim in lhs_batch]
    for value, (_, contracted, batch) in zip(operands, both):
        dims = range(len(value.ranks))
        groups += [value.groups[d] for d in dims if d not in (*contracted, *batch)]
    return left.with_groups(groups, data)


def _alike(group: Sequence[Part], other: Sequence[Part]) -> bool:
    """Return whether all crops see two axes of the same parts alike."""

    def same(p: Part, q: Part) -> bool:
        if p.map is None or q.map is None:
            return p.size == q.size and p.map is q.map
        return p.grid == q.grid and np.array_equal(p.map, q.map)

    return len(group) == len(other) and all(map(same, group, other))


def _full_window(
    eqn: Equation, value: CropArray, contracted: Sequence[int], weights: Any
) -> tuple[Any, tuple[Grid, ...]] | None:
    """Return a Dense layer over axes that crops share, as the convolution that it is.

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
    # A product may mix dtypes, a convolution may not.
    if data.dtype != weights.dtype or not jnp.issubdtype(data.dtype, jnp.floating):
        return None
    count = len(shared)
    sweeps: list[Sweep] = []
    for k, index in enumerate(shared):
        part = value.parts[index]
        assert part.map is not None
        assert part.grid is not None
        layouts = full_window_layouts(part.map)
        # Windows without overlap share nothing.
        if not layouts:
            return None
        sweeps.append(Sweep(1 + k, 1 + k, layouts, part.grid))
    ends = weights.shape[len(contracted) :]
    moved = {value.axis(i) for i in contracted}
    left = [axis for axis in range(data.ndim) if axis not in moved]
    kept = [data.shape[axis] for axis in left]
    entries = data.size / math.prod(data.shape[value.axis(i)] for i in shared)
    each = 2 * weights.size * math.prod(kept)
    chosen = least(sweeps, each, entries)
    rows = [len(layout.map) for layout in chosen]
    # Arrays of the crops' own have each entry once for each crop that sees it.
    maps = [value.parts[i].map for i in shared]
    read = math.prod(map_.size for map_ in maps if map_ is not None) * entries
    most = math.prod(rows) * each * costs.WORTH ** (count + 1) + costs.PASS
    if not sweeps or cost(chosen, each, entries) > most + read * costs.MOVE:
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
        y = array_from(passes(convolve, x, list(zip(sweeps, chosen)), 0))
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


RULES: dict[str, SlideRule] = {"dot_general": _dot}
