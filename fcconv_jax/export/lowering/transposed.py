"""Transposed convolutions: as a runtime's own operation, or as plain convolutions.

Runtimes differ in how they crop and pad a transposed convolution, and accelerators
often lack it; a plain convolution and a transpose are the same everywhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...plan.phases import in_phases
from ...tracing.jaxprs import AnyJaxpr
from ...tracing.protocols import Equation

Array = jax.Array


def as_one_operation(eqn: Equation) -> dict[str, Any]:
    """Return the geometry of a transposed convolution; empty if runtimes lack it.

    Two paddings are the same in all runtimes: the whole output, and what TensorFlow
    calls SAME, whose output is the input times the strides. Others are the first, cut.

    Args:
      eqn: a ``conv_general_dilated`` with ``lhs_dilation``, and strides of 1.

    Returns:
      ``spread``, the strides; ``padding`` of the spread input; ``cut``, how much to
      remove from both ends of each axis of the output.
    """
    p = eqn.params
    window = [eqn.invars[1].aval.shape[axis] for axis in p["dimension_numbers"][1][2:]]
    strides = tuple(p["lhs_dilation"])
    crops = [(k - 1 - a, k - 1 - b) for k, (a, b) in zip(window, p["padding"])]
    plain = p["feature_group_count"] == 1 and set(p["rhs_dilation"]) == {1}
    if not plain or len(window) > 2 or any(a < 0 or b < 0 for a, b in crops):
        return {}
    over = [k - s for k, s in zip(window, strides)]
    same = [(n // 2, n - n // 2) for n in over]
    if min(over) >= 0 and crops == same:
        return {"spread": strides}
    whole = tuple((k - 1, k - 1) for k in window)
    return {
        "spread": strides,
        "padding": whole,
        "cut": crops if any(map(any, crops)) else None,
    }


def as_plain_convolutions(eqn: Equation) -> AnyJaxpr:
    """Return the jaxpr of a convolution of spaced inputs, without the spacing.

    Windows that do not overlap are one pointwise convolution, then depth-to-space;
    others are a convolution for each residue of the strides, interleaved.

    Args:
      eqn: a ``conv_general_dilated`` with ``lhs_dilation``, and strides of 1.
    """
    p = eqn.params
    lhs, rhs, made = p["dimension_numbers"]
    strides, padding = p["lhs_dilation"], p["padding"]
    order = [made[0], *made[2:], made[1]]

    def run(x: Array, kernel: Array) -> Array:
        x = x.transpose(lhs[0], *lhs[2:], lhs[1])
        kernel = kernel.transpose(*rhs[2:], rhs[1], rhs[0])
        window = kernel.shape[:-2]
        whole = [(k - 1, k - 1) for k in window]
        apart = window == tuple(strides) and [*map(tuple, padding)] == whole
        options = {"precision": p["precision"]}
        groups = p["feature_group_count"]
        if apart and set(p["rhs_dilation"]) == {1}:
            y = _apart(x, kernel, groups, **options)
        else:
            y = in_phases(
                *(x, kernel, strides, padding, p["rhs_dilation"], groups), **options
            )
        return y.transpose([order.index(axis) for axis in range(y.ndim)])

    return jax.make_jaxpr(run)(*(var.aval for var in eqn.invars))


def _apart(x: Array, kernel: Array, groups: int, **options: Any) -> Array:
    """Compute each input's window of outputs in one pointwise convolution."""
    *window, rows, out = kernel.shape
    rank = len(window)
    # It applies its kernel from the other end.
    taps = jnp.flip(kernel, range(rank)).reshape(*window, rows, groups, -1)
    taps = taps.transpose(rank, rank + 1, *range(rank), rank + 2)
    spec = "DHW"[3 - rank :]
    y = lax.conv_general_dilated(
        *(x, taps.reshape(*[1] * rank, rows, -1), (1,) * rank, "VALID"),
        dimension_numbers=(f"N{spec}C", f"{spec}IO", f"N{spec}C"),
        feature_group_count=groups,
        **options,
    )
    n, *spatial, _ = y.shape
    y = y.reshape(n, *spatial, groups, *window, out // groups)
    pairs = [axis for i in range(rank) for axis in (1 + i, 2 + rank + i)]
    y = y.transpose(0, *pairs, 1 + rank, 2 + 2 * rank)
    return y.reshape(n, *(s * k for s, k in zip(spatial, window)), out)
