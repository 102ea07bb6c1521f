"""Inputs that a command line describes."""

import jax.numpy as jnp
import numpy as np
import pytest

from fcconv_jax.cli.inputs import ArgumentError, parse_input, random_inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex64"])
def test_random_inputs_are_of_their_dtype_and_seed(dtype):
    spec = parse_input(f"64,3:{dtype}")
    (x,), (y,), (z,) = (random_inputs([spec], seed) for seed in (0, 0, 1))
    assert x.shape == (64, 3)
    assert x.dtype == jnp.dtype(dtype)
    assert (x == y).all()
    assert (x != z).any()
    if jnp.issubdtype(x.dtype, jnp.integer):
        assert set(np.unique(x)) == {0, 1, 2, 3}


@pytest.mark.parametrize("text", ["1,-8,8,1", "-1", "2,8:floot32", "8,,8"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ArgumentError, match=f"expected SHAPE.* got '{text}'"):
        parse_input(text)
