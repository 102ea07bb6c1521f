"""A conv that runs dense on an input of another size than it was planned on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc


def planned(model, shape):
    x = jnp.zeros(shape)
    plan = fc.make_plan(model, x, to="dense")
    variables = model.init(jax.random.key(0), x)
    return fc.convert_model(model, plan), fc.convert_params(variables, plan), variables


@pytest.mark.parametrize("size", [(4, 6), (8, 2)])
def test_other_sizes_that_keep_the_case(size):
    model = nn.Conv(3, (2, 2), strides=(2, 2), padding="SAME")
    converted, moved, variables = planned(model, (1, 4, 6, 5))
    x = np.random.default_rng(0).integers(-3, 4, (2, *size, 5)).astype(np.float32)
    variables = jax.tree.map(jnp.round, jax.tree.map(lambda k: 8 * k, variables))
    moved = jax.tree.map(jnp.round, jax.tree.map(lambda k: 8 * k, moved))
    got, want = converted.apply(moved, x), model.apply(variables, x)
    np.testing.assert_array_equal(got, want)


def test_a_size_where_same_pads_is_refused():
    model = nn.Conv(3, (2, 2), strides=(2, 2), padding="SAME")
    converted, moved, _ = planned(model, (1, 4, 6, 5))
    with pytest.raises(fc.PlanError, match=r"patchify on an input.*Padding"):
        converted.apply(moved, jnp.zeros((1, 5, 6, 5)))


def test_another_size_than_the_full_window_is_refused():
    model = nn.Conv(3, (4, 6), padding="VALID")
    converted, moved, _ = planned(model, (1, 4, 6, 5))
    with pytest.raises(
        fc.PlanError, match=r"planned as full_window on .*\(1, 4, 6, 5\)"
    ):
        converted.apply(moved, jnp.zeros((1, 5, 6, 5)))


def test_equal_dilations_are_left_alone():
    # Taps two apart on inputs two apart read each input once, in order; the plain
    # conv of the same window and strides would read it otherwise.
    model = nn.Conv(3, (2,), strides=4, padding=0, input_dilation=2, kernel_dilation=2)
    plan = fc.make_plan(model, jnp.zeros((1, 4, 5)), to="dense")
    assert not plan
    assert "only due to its padding or dilation" in plan.skipped[""]


def test_a_stacked_layer_is_refused_by_name_where_its_case_ends():
    class Patches(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (2, 2), (2, 2), name="patches")(x)

    stack = nn.vmap(
        Patches,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )()
    x = jnp.ones((3, 2, 4, 6, 3))
    variables = stack.init(jax.random.key(0), x)
    plan = fc.make_plan(stack, x, to="dense")
    dense = fc.convert_params(variables, plan)
    run = fc.convert_model(stack, plan).apply
    smaller, padded = x[:, :, :, :4], x[:, :, :, :5]
    np.testing.assert_allclose(
        run(dense, smaller), stack.apply(variables, smaller), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(fc.PlanError, match="planned as patchify"):
        run(dense, padded)
