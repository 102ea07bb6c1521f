"""How each primitive of JAX becomes operations of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..errors import ExportError
from .graph import Value, constant
from .lowering import Lowering, Rule

RULES: dict[str, Rule] = {}

_SAME = {
    "abs": "abs",
    "and": "and",
    "ceil": "ceil",
    "cos": "cos",
    "div": "div",
    "eq": "eq",
    "erf": "erf",
    "exp": "exp",
    "floor": "floor",
    "ge": "ge",
    "gt": "gt",
    "le": "le",
    "log": "log",
    "logistic": "logistic",
    "lt": "lt",
    "max": "max",
    "min": "min",
    "mul": "mul",
    "ne": "ne",
    "neg": "neg",
    "or": "or",
    "pow": "pow",
    "rem": "rem",
    "rsqrt": "rsqrt",
    "sign": "sign",
    "sin": "sin",
    "sqrt": "sqrt",
    "sub": "sub",
    "tanh": "tanh",
}


def _rule(*names: str) -> Any:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@_rule(*_SAME, "add", "add_any", "not", "round")
def _elementwise(low: Lowering, eqn: Any, *values: Value) -> Value:
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    integers = np.issubdtype(values[0].dtype, np.integer)
    if name in ("and", "or", "not") and values[0].dtype != np.bool_:
        raise ExportError(
            f"the model has {name!r} on the bits of {values[0].dtype}: edge runtimes "
            "have it for booleans. Compute it before the model"
        )
    if name == "div" and integers:
        raise ExportError(
            "the model divides integers, which runtimes round in different ways. "
            "Divide floats"
        )
    if name == "round" and int(eqn.params["rounding_method"]) != 1:
        raise ExportError(
            "the model rounds halves away from zero; the runtimes round to even. "
            "Use jnp.round"
        )
    op = "add" if name == "add_any" else _SAME.get(name, name)
    return low.add(op, values, out.shape, out.dtype)


@_rule("copy", "copy_p", "stop_gradient", "optimization_barrier", "name", "pvary")
@_rule(
    "sharding_constraint", "reduce_precision", "layout_constraint", "checkpoint_name"
)
def _same(low: Lowering, eqn: Any, *values: Value) -> Sequence[Value]:
    if eqn.primitive.name == "reduce_precision":
        info = np.finfo(values[0].dtype)
        if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (
            info.nexp,
            info.nmant,
        ):
            raise ExportError("the model has 'reduce_precision', which no runtime has")
    return values


@_rule("convert_element_type")
def _cast(low: Lowering, eqn: Any, x: Value) -> Value:
    out = eqn.outvars[0].aval
    if x.dtype == out.dtype:
        return x
    if np.issubdtype(x.dtype, np.floating) and np.issubdtype(out.dtype, np.integer):
        low.notes.append("floats are cast to integers: out of range, runtimes differ")
    return low.add("cast", [x], out.shape, out.dtype)


@_rule("square")
def _square(low: Lowering, eqn: Any, x: Value) -> Value:
    return low.add("mul", [x, x], x.shape)


@_rule("integer_pow")
def _integer_pow(low: Lowering, eqn: Any, x: Value) -> Value:
    power = eqn.params["y"]
    out: Value | None = None
    base, left = x, abs(power)
    while left:
        if left & 1:
            out = base if out is None else low.add("mul", [out, base], x.shape)
        left >>= 1
        if left:
            base = low.add("mul", [base, base], x.shape)
    one = constant(np.ones((), x.dtype))
    if out is None:
        return low.add("broadcast", [one], x.shape)
    return out if power > 0 else low.add("div", [one, out], x.shape)


@_rule("erfc")
def _erfc(low: Lowering, eqn: Any, x: Value) -> Value:
    one = constant(np.ones((), x.dtype))
    return low.add("sub", [one, low.add("erf", [x], x.shape)], x.shape)


@_rule("log1p")
def _log1p(low: Lowering, eqn: Any, x: Value) -> Value:
    one = constant(np.ones((), x.dtype))
    return low.add("log", [low.add("add", [x, one], x.shape)], x.shape)


@_rule("expm1")
def _expm1(low: Lowering, eqn: Any, x: Value) -> Value:
    one = constant(np.ones((), x.dtype))
    return low.add("sub", [low.add("exp", [x], x.shape), one], x.shape)


@_rule("exp2")
def _exp2(low: Lowering, eqn: Any, x: Value) -> Value:
    scaled = low.add("mul", [x, constant(math.log(2), x.dtype)], x.shape)
    return low.add("exp", [scaled], x.shape)


@_rule("is_finite")
def _is_finite(low: Lowering, eqn: Any, x: Value) -> Value:
    largest = constant(np.finfo(x.dtype).max)
    return low.add("le", [low.add("abs", [x], x.shape), largest], x.shape, np.bool_)


@_rule("clamp")
def _clamp(low: Lowering, eqn: Any, least: Value, x: Value, most: Value) -> Value:
    return low.add("min", [low.add("max", [x, least], x.shape), most], x.shape)


@_rule("select_n")
def _select(low: Lowering, eqn: Any, which: Value, *cases: Value) -> Value:
    out = eqn.outvars[0].aval
    if which.dtype != np.bool_ or len(cases) != 2:
        raise ExportError(
            "the model chooses among more than two values with lax.select_n. Use "
            "jnp.where"
        )
    return low.add("select", [which, cases[1], cases[0]], out.shape, out.dtype)


@_rule("reshape")
def _reshape(low: Lowering, eqn: Any, x: Value) -> Value:
    if eqn.params.get("dimensions") is not None:
        x = low.transpose(x, eqn.params["dimensions"])
    return low.reshape(x, eqn.outvars[0].aval.shape)


@_rule("squeeze", "expand_dims")
def _squeeze(low: Lowering, eqn: Any, x: Value) -> Value:
    return low.reshape(x, eqn.outvars[0].aval.shape)


@_rule("transpose")
def _transpose(low: Lowering, eqn: Any, x: Value) -> Value:
    return low.transpose(x, eqn.params["permutation"])


@_rule("broadcast_in_dim")
def _broadcast(low: Lowering, eqn: Any, x: Value, *_: Value) -> Value:
    shape = tuple(map(int, eqn.outvars[0].aval.shape))
    beside = [1] * len(shape)
    for axis, size in zip(eqn.params["broadcast_dimensions"], x.shape):
        beside[axis] = size
    x = low.reshape(x, beside)
    if x.shape == shape:
        return x
    if x.data is not None:
        data = np.broadcast_to(x.data, shape)
        # Entries repeated: not a parameter rearranged, but made of it alone.
        return Value(shape, x.dtype, np.ascontiguousarray(data), None, x.leaves)
    return low.add("broadcast", [x], shape)


@_rule("rev")
def _reverse(low: Lowering, eqn: Any, x: Value) -> Value:
    axes = tuple(eqn.params["dimensions"])
    if x.data is not None:
        return x.moved("reverse", axes)
    return low.add("reverse", [x], x.shape, axes=axes)


@_rule("slice")
def _slice(low: Lowering, eqn: Any, x: Value) -> Value:
    p = eqn.params
    return low.slice(x, p["start_indices"], p["limit_indices"], p["strides"])


@_rule("dynamic_slice")
def _dynamic_slice(low: Lowering, eqn: Any, x: Value, *starts: Value) -> Value:
    sizes = eqn.params["slice_sizes"]
    if any(start.data is None for start in starts):
        raise ExportError(
            "the model takes a slice whose place depends on its inputs. Use jnp.take, "
            "or a fixed place"
        )
    first = [
        min(max(int(start.data), 0), n - size)  # as JAX does
        for start, n, size in zip(starts, x.shape, sizes)
        if start.data is not None
    ]
    return low.slice(x, first, [a + n for a, n in zip(first, sizes)])


@_rule("concatenate")
def _concatenate(low: Lowering, eqn: Any, *values: Value) -> Value:
    out = eqn.outvars[0].aval
    return low.add("concat", values, out.shape, axis=eqn.params["dimension"])


@_rule("stack")
def _stack(low: Lowering, eqn: Any, *values: Value) -> Value:
    axis, out = eqn.params["axis"], eqn.outvars[0].aval
    shape = list(values[0].shape)
    shape.insert(axis, 1)
    parts = [low.reshape(value, shape) for value in values]
    return low.add("concat", parts, out.shape, axis=axis)


@_rule("tile")
def _tile(low: Lowering, eqn: Any, x: Value) -> Value:
    for axis, count in enumerate(eqn.params["reps"]):
        if count > 1:
            shape = [n * count if i == axis else n for i, n in enumerate(x.shape)]
            x = low.add("concat", [x] * count, shape, axis=axis)
    return x


@_rule("split")
def _split(low: Lowering, eqn: Any, x: Value) -> list[Value]:
    axis, parts, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        first, last = [0] * len(x.shape), list(x.shape)
        first[axis], last[axis] = start, start + size
        parts.append(low.slice(x, first, last))
        start += size
    return parts


@_rule("pad")
def _pad(low: Lowering, eqn: Any, x: Value, fill: Value) -> Value:
    config = eqn.params["padding_config"]
    if fill.data is None or any(inner for *_, inner in config):
        raise ExportError(
            "the model pads between entries, or with a value that depends on its "
            "inputs; edge runtimes pad at the ends, with a constant"
        )
    first = [max(-low_, 0) for low_, _, _ in config]
    last = [n - max(-high, 0) for n, (_, high, _) in zip(x.shape, config)]
    x = low.slice(x, first, last)
    widths = tuple((max(a, 0), max(b, 0)) for a, b, _ in config)
    if not any(map(any, widths)):
        return x
    out = eqn.outvars[0].aval
    return low.add("pad", [x], out.shape, widths=widths, value=fill.data.item())


@_rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(low: Lowering, eqn: Any, x: Value) -> Value:
    axes = tuple(sorted(eqn.params["axes"]))
    out = eqn.outvars[0].aval
    if not axes:
        return x
    name = eqn.primitive.name
    return low.add(name, [x], out.shape, out.dtype, axes=axes, keepdims=False)


@_rule("argmax", "argmin")
def _arg(low: Lowering, eqn: Any, x: Value) -> Value:
    (axis,) = eqn.params["axes"]
    out = eqn.outvars[0].aval
    name = eqn.primitive.name
    return low.add(name, [x], out.shape, out.dtype, axis=axis)


@_rule("cumsum")
def _cumsum(low: Lowering, eqn: Any, x: Value) -> Value:
    axis, back = eqn.params["axis"], bool(eqn.params["reverse"])
    return low.add("cumsum", [x], x.shape, axis=axis, reverse=back)


@_rule("reduce_window_max", "reduce_window_sum")
def _pool(low: Lowering, eqn: Any, x: Value) -> Value:
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


@_rule("gather")
def _gather(low: Lowering, eqn: Any, x: Value, indices: Value) -> Value:
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
        "edge runtimes lack. Use jnp.take along one axis"
    )


@_rule("conv_general_dilated")
def _conv(low: Lowering, eqn: Any, x: Value, kernel: Value) -> Value:
    p, out = eqn.params, eqn.outvars[0].aval
    if kernel.data is None:
        raise ExportError(
            "the model has a convolution whose kernel depends on its inputs; edge "
            "runtimes take constants"
        )
    if set(p["lhs_dilation"]) - {1}:
        raise ExportError(
            "the model has a transposed convolution (lhs_dilation "
            f"{tuple(p['lhs_dilation'])}). Use a resize and a convolution"
        )
    if p["batch_group_count"] != 1 or any(a < 0 or b < 0 for a, b in p["padding"]):
        raise ExportError(
            "the model has a convolution over groups of the batch, or with negative "
            "padding, which edge runtimes lack"
        )
    lhs, rhs, made = p["dimension_numbers"]
    rank = len(lhs) - 2
    if rank > 2:
        raise ExportError(
            f"the model has a convolution of {rank} dimensions; the files take 1 and 2"
        )
    x = low.transpose(x, [lhs[0], *lhs[2:], lhs[1]])
    kernel = low.transpose(kernel, [*rhs[2:], rhs[1], rhs[0]])
    strides, padding = tuple(p["window_strides"]), tuple(map(tuple, p["padding"]))
    dilation = tuple(p["rhs_dilation"])
    spec = [made[0], *made[2:], made[1]]
    shape = [int(out.shape[axis]) for axis in spec]
    flat = rank == 1
    if flat:  # an image of one row
        x = low.reshape(x, (x.shape[0], 1, *x.shape[1:]))
        kernel = low.reshape(kernel, (1, *kernel.shape))
        strides, dilation, padding = (1, *strides), (1, *dilation), ((0, 0), *padding)
        shape = [shape[0], 1, *shape[1:]]
    y = low.add(
        *("conv", [x, kernel], shape, out.dtype),
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=p["feature_group_count"],
    )
    if flat:
        y = low.reshape(y, (shape[0], *shape[2:]))
    return low.transpose(y, [spec.index(axis) for axis in range(len(spec))])


@_rule("dot_general")
def _dot(low: Lowering, eqn: Any, a: Value, b: Value) -> Value:
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    if a.dtype != b.dtype:
        raise ExportError(
            f"the model multiplies {a.dtype} by {b.dtype}. Cast both to one dtype"
        )
    weight_first = a.data is not None
    if (weight_first or b.data is not None) and not ba:
        if weight_first:
            a, b, ca, cb = b, a, cb, ca
        y = _dense(low, a, b, ca, cb)
        if weight_first:  # its axes come first
            lead = len(a.shape) - len(ca)
            order = [*range(lead, len(y.shape)), *range(lead)]
            y = low.transpose(y, order)
        return _as(low, y, out)
    # Batch axes first; then rows and what is summed over, each as one axis.
    left, adj_a, rows = _matrix(low, a, ba, ca)
    right, adj_b, columns = _matrix(low, b, bb, cb)
    batch = [a.shape[axis] for axis in ba]
    m, n = math.prod(rows), math.prod(columns)
    # In _matrix what is summed over comes last: that is b's usual adjoint.
    y = low.add(
        *("matmul", [left, right], (*batch, m, n), a.dtype),
        adj_a=adj_a,
        adj_b=not adj_b,
    )
    return _as(low, low.reshape(y, (*batch, *rows, *columns)), out)


def _as(low: Lowering, y: Value, out: Any) -> Value:
    if y.dtype == out.dtype:
        return y
    raise ExportError(
        f"the model multiplies {y.dtype} and asks for {out.dtype}; runtimes give what "
        "they take. Drop preferred_element_type"
    )


def _dense(
    low: Lowering, x: Value, w: Value, cx: Sequence[int], cw: Sequence[int]
) -> Value:
    """``x @ w`` with the axes that are summed over in the order that x has them."""
    order = sorted(range(len(cx)), key=lambda i: cx[i])
    cx, cw = [cx[i] for i in order], [cw[i] for i in order]
    lead = [axis for axis in range(len(x.shape)) if axis not in cx]
    outs = [axis for axis in range(len(w.shape)) if axis not in cw]
    inner = math.prod(x.shape[axis] for axis in cx)
    sizes = [x.shape[axis] for axis in lead]
    x = low.reshape(low.transpose(x, [*lead, *cx]), (*sizes, inner))
    features = [w.shape[axis] for axis in outs]
    kernel = low.transpose(w, [*cw, *outs])
    kernel = low.reshape(kernel, (inner, math.prod(features)))
    y = low.add("dense", [x, kernel], (*sizes, kernel.shape[1]))
    return low.reshape(y, (*sizes, *features))


def _matrix(
    low: Lowering, x: Value, batch: Sequence[int], contracted: Sequence[int]
) -> tuple[Value, bool, list[int]]:
    """An operand as ``(*batch, rows, summed)``, or with the last two swapped.

    Returns:
      The operand, whether they are swapped, and the sizes of the rows' axes.
    """
    rows = [a for a in range(len(x.shape)) if a not in (*batch, *contracted)]
    sizes = [x.shape[axis] for axis in rows]
    shape = [x.shape[axis] for axis in batch]
    m, k = math.prod(sizes), math.prod(x.shape[axis] for axis in contracted)
    # Swapped where it saves a transpose.
    natural = [*batch, *rows, *contracted]
    other = [*batch, *contracted, *rows]
    swapped = other == sorted(other) and natural != sorted(natural)
    x = low.transpose(x, other if swapped else natural)
    return low.reshape(x, (*shape, k, m) if swapped else (*shape, m, k)), swapped, sizes


@_rule("iota")
def _iota(low: Lowering, eqn: Any) -> Value:
    p = eqn.params
    data = np.asarray(jax.lax.broadcasted_iota(p["dtype"], p["shape"], p["dimension"]))
    return constant(data)
