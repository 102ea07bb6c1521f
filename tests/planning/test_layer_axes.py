"""How dense layers read their inputs: every order of batch, kept and summed axes."""

import jax.numpy as jnp
import numpy as np
import pytest

from fcconv_jax.planning.layer_axes import DenseAxes

X = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)

# The axes, the kernel's shape, and the same product as an einsum.
CASES = {
    "last": (DenseAxes((), (0, 1, 2), (3,), (6,)), (5, 6), "abcd,de->abce"),
    "two at once": (
        *(DenseAxes((), (0, 1), (2, 3), (6, 7)), (4, 5, 6, 7)),
        "abcd,cdef->abef",
    ),
    "in another order": (
        *(DenseAxes((), (0, 3), (2, 1), (6,)), (4, 3, 6)),
        "abcd,cbe->ade",
    ),
    "batch": (DenseAxes((0,), (1, 2), (3,), (6,)), (2, 5, 6), "abcd,ade->abce"),
    "two batch axes": (
        *(DenseAxes((0, 1), (2,), (3,), (6,)), (2, 3, 5, 6)),
        "abcd,abde->abce",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_canonical_and_restore_compute_the_layer(name):
    axes, shape, product = CASES[name]
    kernel = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    batch = tuple(X.shape[a] for a in axes.batch)
    groups = axes.groups(X)
    assert groups == int(np.prod(batch))
    rows = axes.canonical(jnp.asarray(X))
    matrices = kernel.reshape(groups, rows.shape[-1], -1)
    if groups > 1:
        y = jnp.einsum("...gi,gio->...go", rows, matrices)
    else:
        y = rows @ matrices[0]
    got = axes.restore(y, batch)
    np.testing.assert_allclose(got, np.einsum(product, X, kernel), rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_is_no_group():
    axes = DenseAxes((0,), (1, 2), (3,), (6,))
    assert axes.canonical(jnp.asarray(X[:1])).shape == (3, 4, 5)
    assert axes.canonical(jnp.asarray(X)).shape == (3, 4, 2, 5)
