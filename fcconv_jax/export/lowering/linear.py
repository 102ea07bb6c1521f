"""How convolutions and matmuls become operations of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...messages.errors import ExportError
from ...tracing.protocols import Equation
from ..graph import Value
from .builder import Builder, rule
from .transposed import as_one_operation, as_plain_convolutions


@rule("conv_general_dilated")
def _conv(low: Any, eqn: Equation, x: Value, kernel: Value) -> Value:
    p, out = eqn.params, eqn.outvars[0].aval
    if kernel.data is None:
        raise ExportError(
            "the model has a convolution whose kernel depends on its inputs; edge "
            "runtimes require constants. Write it as a matmul."
        )
    spaced = set(p["lhs_dilation"]) - {1}
    spread = dict[str, Any]()
    if spaced and set(p["window_strides"]) == {1} and p["batch_group_count"] == 1:
        spread = as_one_operation(eqn) if "transposed" in low.whole else {}
        if not spread:
            return low.run(as_plain_convolutions(eqn), [x, kernel])[0]
    elif spaced:
        raise ExportError(
            "the model has a convolution with strides over spaced inputs (lhs_dilation "
            f"{tuple(p['lhs_dilation'])}), which edge runtimes lack. Use strides of 1, "
            "and slice the output."
        )
    if p["batch_group_count"] != 1 or any(a < 0 or b < 0 for a, b in p["padding"]):
        raise ExportError(
            "the model has a convolution over groups of the batch, or with negative "
            "padding, which edge runtimes lack. Slice its input, or convolve the "
            "groups one by one."
        )
    lhs, rhs, made = p["dimension_numbers"]
    rank = len(lhs) - 2
    if rank > 3:
        raise ExportError(
            f"the model has a convolution of {rank} dimensions; runtimes have up to "
            "3. Write it as a sum of 3-D convolutions."
        )
    x = low.transpose(x, [lhs[0], *lhs[2:], lhs[1]])
    kernel = low.transpose(kernel, [*rhs[2:], rhs[1], rhs[0]])
    strides, padding = tuple(p["window_strides"]), tuple(map(tuple, p["padding"]))
    dilation, cut = tuple(p["rhs_dilation"]), spread.pop("cut", None)
    padding = spread.pop("padding", padding)
    spec = [made[0], *made[2:], made[1]]
    shape = [int(out.shape[axis]) for axis in spec]
    if cut:
        shape = [
            shape[0],
            *(n + a + b for n, (a, b) in zip(shape[1:-1], cut)),
            shape[-1],
        ]
    flat = rank == 1
    if flat:  # an image of one row
        x = low.reshape(x, (x.shape[0], 1, *x.shape[1:]))
        kernel = low.reshape(kernel, (1, *kernel.shape))
        strides, dilation, padding = (1, *strides), (1, *dilation), ((0, 0), *padding)
        spread = {name: (1, *steps) for name, steps in spread.items()}
        shape = [shape[0], 1, *shape[1:]]
    y = low.add(
        *("conv", [x, kernel], shape, out.dtype),
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=p["feature_group_count"],
        **spread,
    )
    if flat:
        y = low.reshape(y, (shape[0], *shape[2:]))
    if cut:
        ends = [n - b for n, (_, b) in zip(y.shape[1:-1], cut)]
        first, last = (0, *(a for a, _ in cut), 0), (y.shape[0], *ends, y.shape[-1])
        y = low.slice(y, first, last)
    return low.transpose(y, [spec.index(axis) for axis in range(len(spec))])


@rule("dot_general")
def _dot(low: Builder, eqn: Equation, a: Value, b: Value) -> Value:
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    if a.dtype != b.dtype:
        raise ExportError(
            f"the model multiplies {a.dtype} by {b.dtype}. Cast both to one dtype."
        )
    weight_first = a.data is not None
    # Without batch axes, a weight makes a dense layer; else it is a batched product.
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


def _as(low: Builder, y: Value, out: Any) -> Value:
    if y.dtype == out.dtype:
        return y
    raise ExportError(
        f"the model multiplies {y.dtype} to {out.dtype}; runtimes keep the dtype of "
        "the inputs. Drop preferred_element_type."
    )


def _dense(
    low: Builder, x: Value, w: Value, cx: Sequence[int], cw: Sequence[int]
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
    low: Builder, x: Value, batch: Sequence[int], contracted: Sequence[int]
) -> tuple[Value, bool, list[int]]:
    """Arrange an operand as ``(*batch, rows, summed)``, or with the last two swapped.

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
