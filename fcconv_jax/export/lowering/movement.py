"""How primitives that place, pick or repeat entries become operations of the graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ...messages.errors import ExportError
from ...tracing.protocols import Equation
from ..graph import Value, constant
from .builder import Builder, rule


@rule("reshape")
def _reshape(low: Builder, eqn: Equation, x: Value) -> Value:
    if eqn.params.get("dimensions") is not None:
        x = low.transpose(x, eqn.params["dimensions"])
    return low.reshape(x, eqn.outvars[0].aval.shape)


@rule("squeeze", "expand_dims")
def _squeeze(low: Builder, eqn: Equation, x: Value) -> Value:
    return low.reshape(x, eqn.outvars[0].aval.shape)


@rule("transpose")
def _transpose(low: Builder, eqn: Equation, x: Value) -> Value:
    return low.transpose(x, eqn.params["permutation"])


@rule("broadcast_in_dim")
def _broadcast(low: Builder, eqn: Equation, x: Value, *_: Value) -> Value:
    shape = tuple(map(int, eqn.outvars[0].aval.shape))
    beside = [1] * len(shape)
    for axis, size in zip(eqn.params["broadcast_dimensions"], x.shape):
        beside[axis] = size
    x = low.reshape(x, beside)
    if x.shape == shape:
        return x
    if x.data is not None:
        return x.repeated(np.broadcast_to(x.data, shape))
    return low.add("broadcast", [x], shape)


@rule("rev")
def _reverse(low: Builder, eqn: Equation, x: Value) -> Value:
    axes = tuple(eqn.params["dimensions"])
    if x.data is not None:
        return x.moved("reverse", axes)
    return low.add("reverse", [x], x.shape, axes=axes)


@rule("slice")
def _slice(low: Builder, eqn: Equation, x: Value) -> Value:
    p = eqn.params
    return low.slice(x, p["start_indices"], p["limit_indices"], p["strides"])


@rule("dynamic_slice")
def _dynamic_slice(low: Builder, eqn: Equation, x: Value, *starts: Value) -> Value:
    sizes = eqn.params["slice_sizes"]
    if any(start.data is None for start in starts):
        raise ExportError(
            "the model takes a slice whose start depends on its inputs. Use jnp.take, "
            "or a fixed start."
        )
    first = [
        min(max(int(start.data), 0), n - size)  # as JAX does
        for start, n, size in zip(starts, x.shape, sizes)
        if start.data is not None
    ]
    return low.slice(x, first, [a + n for a, n in zip(first, sizes)])


@rule("concatenate")
def _concatenate(low: Builder, eqn: Equation, *values: Value) -> Value:
    axis, out = eqn.params["dimension"], eqn.outvars[0].aval
    # A roll by 0 appends nothing; XNNPACK fails to prepare empty arrays.
    parts = [value for value in values if value.shape[axis]] or values[:1]
    if len(parts) == 1:
        return parts[0]
    return low.add("concat", parts, out.shape, axis=axis)


@rule("stack")
def _stack(low: Builder, eqn: Equation, *values: Value) -> Value:
    axis, out = eqn.params["axis"], eqn.outvars[0].aval
    shape = list(values[0].shape)
    shape.insert(axis, 1)
    parts = [low.reshape(value, shape) for value in values]
    return low.add("concat", parts, out.shape, axis=axis)


@rule("tile")
def _tile(low: Builder, eqn: Equation, x: Value) -> Value:
    if x.data is not None:
        return x.repeated(np.tile(x.data, eqn.params["reps"]))
    for axis, count in enumerate(eqn.params["reps"]):
        if count > 1:
            shape = [n * count if i == axis else n for i, n in enumerate(x.shape)]
            x = low.add("concat", [x] * count, shape, axis=axis)
    return x


@rule("split")
def _split(low: Builder, eqn: Equation, x: Value) -> list[Value]:
    axis, parts, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        first, last = [0] * len(x.shape), list(x.shape)
        first[axis], last[axis] = start, start + size
        parts.append(low.slice(x, first, last))
        start += size
    return parts


@rule("unstack")
def _unstack(low: Builder, eqn: Equation, x: Value) -> list[Value]:
    axis, shape = eqn.params["axis"], eqn.outvars[0].aval.shape
    parts = []
    for i in range(x.shape[axis]):
        first, last = [0] * len(x.shape), list(x.shape)
        first[axis], last[axis] = i, i + 1
        parts.append(low.reshape(low.slice(x, first, last), shape))
    return parts


@rule("pad")
def _pad(low: Builder, eqn: Equation, x: Value, fill: Value) -> Value:
    config = eqn.params["padding_config"]
    if fill.data is None or any(inner for *_, inner in config):
        raise ExportError(
            "the model pads between entries, or with a value that depends on its "
            "inputs; edge runtimes pad at the ends, with a constant. Concatenate "
            "instead."
        )
    first = [max(-low_, 0) for low_, _, _ in config]
    last = [n - max(-high, 0) for n, (_, high, _) in zip(x.shape, config)]
    x = low.slice(x, first, last)
    widths = tuple((max(int(a), 0), max(int(b), 0)) for a, b, _ in config)
    if not any(map(any, widths)):
        return x
    out = eqn.outvars[0].aval
    return low.add("pad", [x], out.shape, widths=widths, value=fill.data.item())


@rule("gather")
def _gather(low: Builder, eqn: Equation, x: Value, indices: Value) -> Value:
    p, out = eqn.params, eqn.outvars[0].aval
    d = p["dimension_numbers"]
    sizes = p["slice_sizes"]
    axes = tuple(d.collapsed_slice_dims)
    batch = tuple(getattr(d, "operand_batching_dims", ()))
    lead = len(indices.shape) - 1
    if len(axes) == 1 and tuple(d.start_index_map) == axes and not batch:
        (axis,) = axes
        full = all(n == m for i, (n, m) in enumerate(zip(sizes, x.shape)) if i != axis)
        offsets = [
            *range(axis),
            *range(axis + lead, axis + lead + len(x.shape) - 1 - axis),
        ]
        if full and list(d.offset_dims) == offsets:
            ids = low.reshape(indices, indices.shape[:-1])
            if ids.data is None:
                low.notes.append(
                    "an index outside of its table is an error in the runtime"
                )
            return low.add("gather", [x, ids], out.shape, axis=axis)
    if indices.data is not None and not batch:
        starts = indices.data
        if p["mode"] == jax.lax.GatherScatterMode.CLIP:
            # As JAX clips: so that the whole window is inside.
            last = [x.shape[axis] - sizes[axis] for axis in d.start_index_map]
            starts = np.clip(starts, 0, last)
        windows = _windows(low, x, starts, d, sizes)
        if windows is not None:
            return low.reshape(windows, out.shape)
    raise ExportError(
        f"the model indexes {list(x.shape)} with {list(indices.shape)} in a way that "
        "edge runtimes lack. Use jnp.take along one axis."
    )


def _windows(
    low: Builder, x: Value, starts: np.ndarray, d: Any, sizes: Sequence[int]
) -> Value | None:
    """Take windows at fixed places, such as all crops of an image, an axis at a time.

    Returns:
      The windows, but for axes of one; None where the places are not those of a grid,
      or one lies outside.
    """
    if 0 in starts.shape[:-1]:
        return None
    starts, parts = _as_grid(starts)
    *lead, _ = starts.shape
    first, last = [0] * len(x.shape), list(sizes)
    varying: dict[int, tuple[int, np.ndarray]] = {}
    for axis, start in zip(d.start_index_map, np.moveaxis(starts, -1, 0)):
        # JAX fills or clips such windows, depending on the mode.
        if start.min() < 0 or start.max() > x.shape[axis] - sizes[axis]:
            return None
        ways = [i for i in range(len(lead)) if np.ptp(start, i).any()]
        if not ways:
            first[axis] = int(start.flat[0])
            last[axis] += first[axis]
            continue
        along = np.moveaxis(start, ways[0], 0).reshape(lead[ways[0]], -1)[:, 0]
        varying[axis] = ways[0], along
        last[axis] = x.shape[axis]
        if len(ways) > 1:
            return None
    if sorted(i for i, _ in varying.values()) != list(range(len(lead))):
        return None
    x = low.slice(x, first, last)
    # Where each axis of the operand is in what was made so far, and each of the starts.
    order: list[tuple[str, int]] = [("operand", axis) for axis in range(len(x.shape))]
    for axis, (i, along) in varying.items():
        at = order.index(("operand", axis))
        ids = constant((along[:, None] + np.arange(sizes[axis])).astype(np.int32))
        shape = (*x.shape[:at], lead[i], sizes[axis], *x.shape[at + 1 :])
        x = low.add("gather", [x, ids], shape, axis=at)
        order.insert(at, ("starts", i))
    dropped = list(d.collapsed_slice_dims)
    operand = iter([axis for axis in range(len(sizes)) if axis not in dropped])
    places = iter(parts)
    wanted: list[tuple[str, int]] = []
    for i in range(len(sizes) - len(dropped) + len(parts)):
        if i in d.offset_dims:
            wanted.append(("operand", next(operand)))
        else:
            wanted += [("starts", part) for part in next(places)]
    wanted += [("operand", axis) for axis in dropped]
    return low.transpose(x, [order.index(each) for each in wanted])


def _as_grid(starts: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Take a flat list of places apart into rows and columns, if it may be a grid's.

    Returns:
      The places with more axes, none of one; and what each axis became.

    Example:
      >>> flat = np.array([(row, column) for row in (0, 4) for column in (1, 2, 3)])
      >>> starts, parts = _as_grid(flat)
      >>> starts.shape, parts
      ((2, 3, 2), [[0, 1]])
    """
    shape, parts = list[int](), list[list[int]]()
    for axis, count in enumerate(starts.shape[:-1]):
        along = np.moveaxis(starts, axis, 0).reshape(count, -1)
        changes = along != along[:1]
        # After how many places each coordinate changes: those of the slowest first.
        runs = {int(column.argmax()) for column in changes.T if column.any()}
        ends = sorted({count, *runs, 1}, reverse=True)
        sizes = [a // b for a, b in itertools.pairwise(ends)]
        # Not a grid: the places stay one axis.
        if math.prod(sizes) != count:
            sizes = [count]
        parts.append(list(range(len(shape), len(shape) + len(sizes))))
        shape += sizes
    return starts.reshape(*shape, starts.shape[-1]), parts


@rule("iota")
def _iota(low: Builder, eqn: Equation) -> Value:
    p = eqn.params
    data = np.asarray(jax.lax.broadcasted_iota(p["dtype"], p["shape"], p["dimension"]))
    return constant(data)
