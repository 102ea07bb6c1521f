"""Compares trees of arrays, leaf by leaf."""

import jax
import numpy as np


def assert_trees_all_close(got, want, rtol=1e-6, atol=0.0):
    for name, a, b in _pairs(got, want):
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=name)


def assert_trees_all_equal(got, want):
    for name, a, b in _pairs(got, want):
        np.testing.assert_array_equal(a, b, err_msg=name)


def assert_trees_all_equal_shapes(got, want):
    for name, a, b in _pairs(got, want, np.shape):
        assert a == b, name


def _pairs(got, want, read=None):
    read = read or _array
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(leaves, jax.tree.leaves(want)):
        yield jax.tree_util.keystr(path), read(a), read(b)


def _array(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array if array.dtype.isbuiltin == 1 else array.astype(np.float32)
