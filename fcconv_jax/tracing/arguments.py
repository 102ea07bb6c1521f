"""Splits the arguments of a call: arrays to trace, and values that stay static."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True)
class Static:
    """The rest of a PyTree without its arrays; hashable.

    Python numbers, strings, functions and flags stay here, so that a model can
    branch on them as it does outside of ``jit``.
    """

    treedef: Any
    leaves: tuple[Any, ...]
    types: tuple[type, ...]  # 1, 1.0 and True are equal, but trace differently

    def merge(self, arrays: Sequence[Any]) -> PyTree:
        """Return the PyTree again, with ``arrays`` in the places of the arrays."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is _ARRAY else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)


def split(tree: PyTree) -> tuple[list[Any], Static]:
    """Return the arrays (also abstract ones) of a PyTree, and everything else.

    Example:
      >>> arrays, static = split(((np.ones(2),), {"train": True}))
      >>> [a.shape for a in arrays], static.merge(["x"])
      ([(2,)], (('x',), {'train': True}))
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    static = tuple(_ARRAY if is_array(leaf) else leaf for leaf in leaves)
    return arrays, Static(treedef, static, tuple(map(type, static)))


def split_hashable(tree: PyTree, caller: str) -> tuple[list[Any], Static]:
    """:func:`split`, for a static argument of ``jax.jit``.

    Raises:
      TypeError: an argument other than an array isn't hashable; names ``caller``.
    """
    arrays, static = split(tree)
    try:
        hash(static)
    except TypeError as error:
        raise TypeError(
            f"{caller}: expected arguments that are arrays or hashable, as in jax.jit: "
            f"{error}. Pass arrays, numbers, text or tuples of them."
        ) from None
    return arrays, static


def is_key(array: object) -> bool:
    """Return whether an array holds random keys, whose dtype NumPy lacks.

    Example:
      >>> is_key(jax.random.key(0)), is_key(np.ones(2)), is_key("text")
      (True, False, False)
    """
    dtype = getattr(array, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)


def native(value: Any) -> Any:
    """Return a NumPy array in this machine's byte order; anything else as it is.

    JAX refuses other orders, as of FITS and some TIFF files. But a function that is
    compiled for the dtype already takes the bytes as they are, in JAX 0.10.

    Example:
      >>> native(np.ones(2, ">f4")).dtype.isnative, native("text")
      (True, 'text')
    """
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def is_array(leaf: object) -> bool:
    """Return whether a leaf is an array, a tracer or an abstract array."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


class _Array:
    def __repr__(self) -> str:
        return "<array>"


_ARRAY = _Array()
