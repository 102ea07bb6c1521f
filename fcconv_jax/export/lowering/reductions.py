"""How reductions, cumulative sums and pools become operations of the graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...messages.errors import ExportError
from ...tracing.protocols import Equation
from ..graph import Node, Value, constant
from .builder import Builder, rule


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(low: Builder, eqn: Equation, x: Value) -> Value:
    axes = tuple(sorted(eqn.params["axes"]))
    out = eqn.outvars[0].aval
    if not axes:
        return x
    name = eqn.primitive.name
    return low.add(name, [x], out.shape, out.dtype, axes=axes, keepdims=False)


@rule("reduce_or", "reduce_and")
def _any_or_all(low: Builder, eqn: Equation, x: Value) -> Value:
    axes = tuple(sorted(eqn.params["axes"]))
    if not axes:
        return x
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if x.dtype != np.bool_:
        raise ExportError(
            f"the model has {name!r} on the bits of {x.dtype}, which edge runtimes "
            "support for booleans only. Compute it before the model."
        )
    # ONNX reduces no booleans: any is the maximum, all the minimum of 0 and 1.
    ones = low.add("cast", [x], x.shape, np.int32)
    reduce = "reduce_max" if name == "reduce_or" else "reduce_min"
    made = low.add(reduce, [ones], shape, np.int32, axes=axes, keepdims=False)
    return low.add("cast", [made], shape, np.bool_)


@rule("argmax", "argmin")
def _arg(low: Builder, eqn: Equation, x: Value) -> Value:
    (axis,) = eqn.params["axes"]
    out = eqn.outvars[0].aval
    name = eqn.primitive.name
    return low.add(name, [x], out.shape, out.dtype, axis=axis)


@rule("top_k")
def _top_k(low: Builder, eqn: Equation, x: Value) -> list[Value]:
    axis, last = eqn.params.get("axis", -1), len(x.shape) - 1
    if axis % len(x.shape) != last:
        raise ExportError(
            f"the model takes a top-k along axis {axis}; edge runtimes support only "
            "the last one. Transpose first."
        )
    low.notes.append("top-k: JAX puts 0.0 before -0.0, runtimes treat them as equal")
    outs = [Value(tuple(v.aval.shape), np.dtype(v.aval.dtype)) for v in eqn.outvars]
    low.nodes.append(Node("top_k", [x], outs, {"k": outs[0].shape[-1]}))
    return outs


@rule("cumsum")
def _cumsum(low: Builder, eqn: Equation, x: Value) -> Value:
    axis, back = eqn.params["axis"], bool(eqn.params["reverse"])
    return low.add("cumsum", [x], x.shape, axis=axis, reverse=back)


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _pool(low: Builder, eqn: Equation, x: Value) -> Value:
    if not eqn.primitive.name.endswith("min"):
        return _pooled(low, eqn, x)
    # Integers may wrap when they are negated.
    if not np.issubdtype(x.dtype, np.floating):
        raise ExportError(
            f"the model takes the minimum of windows of {x.dtype}; edge runtimes do so "
            "of floats only. Cast to float32 first."
        )
    y = _pooled(low, eqn, low.add("neg", [x], x.shape))
    return low.add("neg", [y], y.shape)


def _pooled(low: Builder, eqn: Equation, x: Value) -> Value:
    p = eqn.params
    if {*p["base_dilation"], *p["window_dilation"]} - {1}:
        raise ExportError(
            f"the model pools {list(x.shape)} with dilation {p['window_dilation']}, "
            f"spread by {p['base_dilation']}; edge runtimes lack dilation there. Take "
            "every n-th row and column with a slice before or after the pool."
        )
    windows = list(zip(p["window_dimensions"], p["window_strides"], p["padding"]))
    pooled = [i for i, (k, s, pad) in enumerate(windows) if k > 1 or s > 1 or any(pad)]
    maximum = not eqn.primitive.name.endswith("sum")
    # A window is the same as one along some axes after one along the others.
    for first in range(0, len(pooled), 2):
        axes = pooled[first : first + 2]
        x = _pool_axes(low, x, axes, [windows[i] for i in axes], maximum)
    return x


def _pool_axes(
    low: Builder, x: Value, axes: list[int], windows: list[Any], maximum: bool
) -> Value:
    """Append a pool along one or two axes."""
    others = [i for i in range(len(x.shape)) if i not in axes]
    # vmap leaves axes of one for every example: they would make poor channels.
    channels = [i for i in reversed(others) if x.shape[i] > 1] or others[::-1]
    last = channels[:1]
    lead = [i for i in others if i not in last]
    order = [*lead, *axes, *last]
    turned = low.transpose(x, order)
    windows = [(1, 1, (0, 0))] * (2 - len(axes)) + windows
    sizes = [1] * (2 - len(axes)) + [x.shape[i] for i in axes]
    batch = math.prod(x.shape[i] for i in lead)
    depth = math.prod(x.shape[i] for i in last)
    image = low.reshape(turned, (batch, *sizes, depth))
    window, strides, padding = map(tuple, zip(*windows))
    made = [
        (n + sum(pad) - k) // s + 1
        for n, k, s, pad in zip(sizes, window, strides, padding)
    ]
    shape = (batch, *made, depth)
    attrs: dict[str, Any] = {"window": window, "strides": strides, "padding": padding}
    if maximum:
        y = low.add("pool_max", [image], shape, **attrs)
    else:
        y = low.add("pool_mean", [image], shape, **attrs)
        # Runtimes have means: a sum is the mean of a window times its entries.
        number = constant(math.prod(window), x.dtype)
        y = low.add("mul", [y, number], shape)
    along = dict(zip(axes, made[2 - len(axes) :]))
    y = low.reshape(y, [along.get(i, x.shape[i]) for i in order])
    return low.transpose(y, [order.index(i) for i in range(len(order))])
