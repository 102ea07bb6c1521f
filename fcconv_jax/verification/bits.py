"""Whether two trees hold the same bits."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ..params.leaves import leaf_path


def different_bits(expected: Any, got: Any) -> list[str]:
    """Name each leaf of two trees of arrays that is not bit-identical.

    Abstract arrays and random keys have no bits to compare.

    Example:
      >>> different_bits({"w": np.zeros(2)}, {"w": np.array([0.0, -0.0])})
      ["parameters: 'w': expected ...0.0... at (1,), got ...-0.0... (the same ...)"]
    """
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(expected, got)
    except AssertionError as error:
        return [f"parameters: {error}"]
    failures = []
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got)
    ):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in (a, b)):
            continue
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            continue
        a, b = np.asarray(a), np.asarray(b)
        differ = _bits(a) != _bits(b)
        if differ.any():
            index = tuple(int(i) for i in np.argwhere(differ)[0][: a.ndim])
            failures.append(
                f"parameters: {leaf_path(path)!r}: expected {a[index]!r} at {index}, "
                f"got {b[index]!r} (the same bits, rearranged)"
            )
    return failures


def _bits(array: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat.reshape(*array.shape, -1) if array.size else flat
