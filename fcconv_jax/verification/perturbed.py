"""Arrays perturbed by one unit in the last place: how a program answers to rounding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

# How often a program is also run with its params perturbed.
PERTURBED = 3


def perturbed_by_an_ulp(tree: PyTree, seed: int, stored: str | None = None) -> PyTree:
    """Return each float of a tree up or down by one unit in the last place; zeros stay.

    Args:
      tree: of arrays.
      seed: of the directions.
      stored: a dtype that weights, arrays of two axes or more, are rounded to: they
        move by half a unit of it, as far as rounding to it moves them.

    Example:
      >>> found = perturbed_by_an_ulp(np.ones(2, np.float32), 0)
      >>> sorted(float((x - 1) / np.finfo(np.float32).eps) for x in found)
      [-1.0, 1.0]
    """
    rng = np.random.default_rng(seed)

    def move(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return leaf
        signs = rng.integers(0, 2, np.shape(leaf), np.int8) * 2 - 1
        step = float(jnp.finfo(dtype).eps)
        if stored is not None and np.ndim(leaf) > 1:
            step = max(step, float(jnp.finfo(stored).eps) / 2)
        factor = (1 + step * signs).astype(dtype)
        moved = (np.asarray(leaf) * factor).astype(dtype)
        return jax.device_put(moved, getattr(leaf, "sharding", None))

    return jax.tree.map(move, tree)
