"""How primitives that place, pick or repeat entries become operations of the graph."""

from __future__ import annotations

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
                low.notes.append("an index outside of its table is an error there")
            return low.add("gather", [x, ids], out.shape, axis=axis)
    if indices.data is not None and lead == 0 and not batch:
        # One fixed place, as x[:, 0] has it.
        first = [0] * len(x.shape)
        for axis, start in zip(d.start_index_map, indices.data.reshape(-1)):
            first[axis] = int(np.clip(start, 0, x.shape[axis] - sizes[axis]))
        taken = low.slice(x, first, [a + n for a, n in zip(first, sizes)])
        return low.reshape(taken, out.shape)
    raise ExportError(
        f"the model indexes {list(x.shape)} with {list(indices.shape)} in a way that "
        "edge runtimes lack. Use jnp.take along one axis."
    )


@rule("iota")
def _iota(low: Builder, eqn: Equation) -> Value:
    p = eqn.params
    data = np.asarray(jax.lax.broadcasted_iota(p["dtype"], p["shape"], p["dimension"]))
    return constant(data)
