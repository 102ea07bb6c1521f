"""A convolution in float64, as a sum of matmuls.

XLA's CPU backend has no fast kernel for convolutions in float64. Any order of the sums
will do for a reference, so the window (or, where it is larger, the output) is taken
apart: each place is one slice of the input and one matmul.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnums=2)
def convolve(
    lhs: jax.Array, rhs: jax.Array, settings: tuple[tuple[str, Any], ...]
) -> jax.Array:
    """``lax.conv_general_dilated`` of float64 or complex128 arrays.

    Args:
      lhs: the input.
      rhs: the kernel.
      settings: the parameters of the primitive, as pairs: ``window_strides``,
        ``padding``, ``lhs_dilation``, ``rhs_dilation``, ``dimension_numbers``,
        ``feature_group_count``, ``batch_group_count``.

    Returns:
      The output, in the layout that ``dimension_numbers`` names.
    """
    p = dict(settings)
    numbers = p["dimension_numbers"]
    x = lhs.transpose(numbers.lhs_spec)  # (N, C, *spatial)
    w = rhs.transpose(numbers.rhs_spec)  # (O, I, *window)
    strides, dilation = p["window_strides"], p["rhs_dilation"]
    config = [
        (low, high, inner - 1)
        for (low, high), inner in zip(p["padding"], p["lhs_dilation"])
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *config])
    window, image = w.shape[2:], x.shape[2:]
    sizes = tuple(
        max(0, (n - (k - 1) * d - 1) // s + 1) if n else 0
        for n, k, d, s in zip(image, window, dilation, strides)
    )
    groups = max(p["feature_group_count"], p["batch_group_count"])
    # (G, N/G or N, C/G or C, *spatial) and (G, O/G, I, *window)
    if p["batch_group_count"] > 1:
        x = x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
    else:
        x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *image).swapaxes(0, 1)
    w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    if math.prod(window) <= math.prod(sizes):
        y = _over_window(x, w, sizes, strides, dilation)
    else:
        y = _over_output(x, w, sizes, strides, dilation)
    # (G, N, O/G, *sizes) to (N, O, *sizes)
    y = y.swapaxes(0, 1).reshape(y.shape[1], groups * y.shape[2], *sizes)
    inverse = [numbers.out_spec.index(axis) for axis in range(len(numbers.out_spec))]
    return y.transpose(inverse)


def _over_window(
    x: jax.Array,
    w: jax.Array,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> jax.Array:
    """Return one matmul for each place of the window."""
    y = jnp.zeros((x.shape[0], x.shape[1], w.shape[1], *sizes), x.dtype)
    if not y.size:
        return y
    for place in itertools.product(*map(range, w.shape[3:])):
        first = [i * d for i, d in zip(place, dilation)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, sizes, strides)]
        cut = [slice(f, e, s) for f, e, s in zip(first, last, strides)]
        part = x[(slice(None), slice(None), slice(None), *cut)]
        y += jnp.einsum("gnc...,goc->gno...", part, w[(..., *place)])
    return y


def _over_output(
    x: jax.Array,
    w: jax.Array,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> jax.Array:
    """Return one matmul for each place of the output."""
    groups, batch = x.shape[:2]
    matrix = w.reshape(groups, w.shape[1], -1)
    made = []
    for place in itertools.product(*map(range, sizes)):
        first = [i * s for i, s in zip(place, strides)]
        cut = [
            slice(f, f + (k - 1) * d + 1, d)
            for f, k, d in zip(first, w.shape[3:], dilation)
        ]
        part = x[(slice(None), slice(None), slice(None), *cut)]
        rows = part.reshape(groups, batch, -1)
        made.append(jnp.einsum("gnk,gok->gno", rows, matrix))
    if not made:
        return jnp.zeros((groups, batch, w.shape[1], *sizes), x.dtype)
    return jnp.stack(made, -1).reshape(groups, batch, w.shape[1], *sizes)
