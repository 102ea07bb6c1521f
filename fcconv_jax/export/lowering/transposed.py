"""Transposed convolutions in operations that every runtime runs alike.

Runtimes differ in how they crop and pad a transposed convolution, and int8 kernels and
accelerators often lack it; a plain convolution and a transpose are the same everywhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...plan.phases import in_phases
from ...tracing.protocols import Equation

Array = jax.Array


def as_plain_convolutions(eqn: Equation) -> Any:
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
    taps = jnp.flip(kernel, range(rank)).transpose(rank, rank + 1, *range(rank))
    spec = "DHW"[3 - rank :]
    y = lax.conv_general_dilated(
        *(x, taps.reshape(*[1] * rank, rows, -1), (1,) * rank, "VALID"),
        dimension_numbers=(f"N{spec}C", f"{spec}IO", f"N{spec}C"),
        feature_group_count=groups,
        **options,
    )
    n, *spatial, _ = y.shape
    y = y.reshape(n, *spatial, out, *window)
    pairs = [axis for i in range(rank) for axis in (1 + i, 2 + rank + i)]
    y = y.transpose(0, *pairs, 1 + rank)
    return y.reshape(n, *(s * k for s, k in zip(spatial, window)), out)
