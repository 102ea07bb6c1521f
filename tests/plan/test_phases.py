"""Phases against lax's own transposed convolutions, exactly, on integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import integers, one_in
from jax import lax

from fcconv_jax.plan.phases import in_phases

# Inputs, window, strides, padding, dilation, groups.
GEOMETRIES = {
    "4x4 stride 2 SAME": ((3, 5), (4, 4), (2, 2), [(2, 2)] * 2, (1, 1), 1),
    "odd, unequal": ((5, 2), (3, 4), (2, 3), [(1, 2), (3, 0)], (1, 1), 1),
    "1-D": ((4,), (5,), (3,), [(4, 4)], (1,), 2),
    "3-D with groups": ((2, 3, 2), (3, 2, 4), (2, 1, 3), [(2, 1)] * 3, (1, 1, 1), 2),
    "cropped": ((4, 4), (3, 4), (2, 2), [(0, -1), (-1, 2)], (1, 1), 1),
    "strides beyond the window": ((3, 4), (2, 1), (3, 2), [(1, 3)] * 2, (1, 1), 1),
    "taps spread like the inputs": ((4, 5), (3, 3), (2, 2), [(3, 4)] * 2, (2, 2), 1),
    "taps spread by 3": ((6, 5), (3, 2), (2, 4), [(7, 6), (4, 4)], (3, 6), 1),
    "padding alone": ((1,), (1,), (4,), [(-2, 4)], (1,), 1),
}


@pytest.mark.parametrize("name", one_in(3, GEOMETRIES))
def test_phases_are_the_transposed_convolution(name):
    spatial, window, strides, padding, dilation, groups = GEOMETRIES[name]
    rank = len(spatial)
    letters = "DHW"[-rank:]
    x = integers(np.zeros((2, *spatial, 2 * groups), "f4"))
    kernel = integers(np.zeros((*window, 2, 3 * groups), "f4"), seed=1)

    def convolved(x, kernel):
        return lax.conv_general_dilated(
            *(x, kernel, (1,) * rank, padding),
            lhs_dilation=strides,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=groups,
        )

    def phased(x, kernel):
        return in_phases(x, kernel, strides, padding, dilation, groups)

    want, transpose = jax.vjp(convolved, x, kernel)
    got, other = jax.vjp(phased, x, kernel)
    np.testing.assert_array_equal(got, want)
    cotangent = integers(np.zeros(want.shape, "f4"), seed=2)
    for mine, theirs in zip(other(cotangent), transpose(cotangent)):
        np.testing.assert_array_equal(mine, theirs)
    assert np.any(want) or name == "padding alone"


def test_no_input_is_spaced_and_the_sums_have_their_type():
    x, kernel = jnp.ones((1, 4, 2), jnp.bfloat16), jnp.ones((3, 2, 5), jnp.bfloat16)

    def phased(x, kernel):
        return in_phases(
            *(x, kernel, (2,), [(2, 2)], (1,), 1),
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST,
        )

    convolutions = [
        eqn.params
        for eqn in jax.make_jaxpr(phased)(x, kernel).eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    assert len(convolutions) == 2
    for params in convolutions:
        assert params["lhs_dilation"] == (1,)
        assert params["precision"] == (lax.Precision.HIGHEST,) * 2
    assert phased(x, kernel).dtype == jnp.float32
