"""Whether two trees hold the same bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..params.leaves import leaf_path


def different_bits(expected: PyTree, got: PyTree) -> list[str]:
    """Name each leaf of two trees of arrays that is not bit-identical.

    Abstract arrays and random keys have no bits to compare.

    Example:
      >>> different_bits({"w": np.zeros(2)}, {"w": np.array([0.0, -0.0])})
      ["parameters: 'w': expected ...0.0... at (1,), got ...-0.0... (the same ...)"]
    """
    want = dict(jax.tree_util.tree_leaves_with_path(expected))
    have = dict(jax.tree_util.tree_leaves_with_path(got))
    if want.keys() != have.keys():
        missing, more = (
            sorted(map(leaf_path, one.keys() - other.keys()))
            for one, other in ((want, have), (have, want))
        )
        return [f"parameters: missing {missing}, unexpected {more}"]
    failures = []
    for path, a in want.items():
        b = have[path]
        types = [f"{jnp.result_type(leaf)}{list(np.shape(leaf))}" for leaf in (a, b)]
        if types[0] != types[1]:
            failures.append(
                f"parameters: {leaf_path(path)!r}: expected {types[0]}, got {types[1]}"
            )
            continue
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
