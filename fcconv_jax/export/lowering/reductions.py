"""How reductions, cumulative sums and pools become operations of the graph."""

from __future__ import annotations

import math
from typing import Any

from ...errors import ExportError
from ..graph import Value, constant
from .builder import Builder, rule


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(low: Builder, eqn: Any, x: Value) -> Value:
    axes = tuple(sorted(eqn.params["axes"]))
    out = eqn.outvars[0].aval
    if not axes:
        return x
    name = eqn.primitive.name
    return low.add(name, [x], out.shape, out.dtype, axes=axes, keepdims=False)


@rule("argmax", "argmin")
def _arg(low: Builder, eqn: Any, x: Value) -> Value:
    (axis,) = eqn.params["axes"]
    out = eqn.outvars[0].aval
    name = eqn.primitive.name
    return low.add(name, [x], out.shape, out.dtype, axis=axis)


@rule("cumsum")
def _cumsum(low: Builder, eqn: Any, x: Value) -> Value:
    axis, back = eqn.params["axis"], bool(eqn.params["reverse"])
    return low.add("cumsum", [x], x.shape, axis=axis, reverse=back)


@rule("reduce_window_max", "reduce_window_sum")
def _pool(low: Builder, eqn: Any, x: Value) -> Value:
    p, out = eqn.params, eqn.outvars[0].aval
    window, strides = p["window_dimensions"], p["window_strides"]
    padding = tuple(map(tuple, p["padding"]))
    dilated = {*p["base_dilation"], *p["window_dilation"]} - {1}
    outer = (window[0], window[-1], strides[0], strides[-1])
    fits = outer == (1, 1, 1, 1) and padding[0] == padding[-1] == (0, 0)
    if len(window) != 4 or not fits or dilated:
        raise ExportError(
            f"the model pools {list(x.shape)} with a window {window}, strides "
            f"{strides}, dilation {p['window_dilation']}; edge runtimes pool the two "
            "spatial axes of channel-last images, undilated"
        )
    maximum = eqn.primitive.name.endswith("max")
    attrs = {
        "window": tuple(window[1:-1]),
        "strides": tuple(strides[1:-1]),
        "padding": padding[1:-1],
    }
    if maximum:
        return low.add("pool_max", [x], out.shape, **attrs)
    if any(map(any, attrs["padding"])):
        widths = attrs["padding"]
        shape = [n + sum(w) for n, w in zip(x.shape, ((0, 0), *widths, (0, 0)))]
        wide = ((0, 0), *widths, (0, 0))
        x = low.add("pad", [x], shape, widths=wide, value=0.0)
        attrs["padding"] = ((0, 0), (0, 0))
    y = low.add("pool_mean", [x], out.shape, **attrs)
    number = constant(math.prod(attrs["window"]), x.dtype)
    return low.add("mul", [y, number], out.shape)
