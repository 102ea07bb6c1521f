"""Convolutions of a single tap that skip inputs, such as the shortcuts of ResNets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import integers, same_bits
from flax import nnx

import fcconv_jax as fc

NUMBERS = {1: ("NCW", "OIW", "NCW"), 2: ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize(
    ("shape", "strides", "groups"), [((2, 6, 5), (2,), 3), ((2, 5, 8, 6), (2, 3), 2)]
)
def test_functions_of_any_layout_and_groups(shape, strides, groups):
    rank = len(strides)
    kernel = (4 * groups, 6 // groups, 1) if rank == 1 else (1, 1, 3, 4 * groups)
    params = {"w": integers(np.zeros(kernel, "f4"), seed=1)}

    def f(params, x):
        return jax.lax.conv_general_dilated(
            *(x, params["w"], strides, "VALID"),
            dimension_numbers=NUMBERS[rank],
            feature_group_count=groups,
        )

    x = integers(np.zeros(shape, "f4"))
    plan = fc.make_plan(f, params, x, to="dense")
    assert [(layer.case, layer.base) for layer in plan.values()] == [
        ("grouped", "pointwise")
    ]
    assert fc.Plan.from_json(plan.to_json()) == plan
    dense = fc.convert_params(params, plan)
    assert same_bits(fc.restore_params(dense, plan), params)
    run = fc.convert_model(f, plan)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(run)(dense, x))
    np.testing.assert_array_equal(run(dense, x), f(params, x))
    # Of another size, too.
    x = integers(np.zeros((1, *(n + 1 if n != 6 else n for n in shape[1:])), "f4"))
    np.testing.assert_array_equal(run(dense, x), f(params, x))
    assert fc.verify(f, params, x, plan=plan, progress=False).passed


class Block(nn.Module):
    """A residual block whose shortcut skips three of four inputs."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(5, (3, 3), 2, name="body")(x))
        return y + nn.Conv(5, (1, 1), 2, use_bias=False, name="shortcut")(x)


def test_gradients_of_a_shortcut_are_those_of_the_convolution():
    model, x = Block(), integers(np.zeros((2, 5, 6, 3), "f4"))
    variables = integers(model.init(jax.random.key(0), x))
    plan = fc.make_plan(model, x, to="dense")
    assert list(plan) == ["shortcut"]
    dense = fc.convert_params(variables, plan)
    run = fc.convert_model(model, plan).apply

    def step(apply, variables):
        return jax.grad(lambda v, x: (apply(v, x) ** 2).sum(), (0, 1))(variables, x)

    (found, by_x), (wanted, wanted_by_x) = (
        step(run, dense),
        step(model.apply, variables),
    )
    assert same_bits(fc.restore_params(found, plan), wanted)
    np.testing.assert_array_equal(by_x, wanted_by_x)


def test_an_nnx_layer_goes_to_dense_and_back():
    model = nnx.Conv(3, 5, (1, 1), (2, 3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    plan = fc.make_plan(model, x, to="dense")
    dense = fc.convert_model(model, plan)
    np.testing.assert_allclose(dense(x), model(x), rtol=1e-5, atol=1e-6)
    back = fc.convert_model(dense, plan.inverse())
    np.testing.assert_allclose(back(x), model(x), rtol=1e-5, atol=1e-6)
    assert same_bits(nnx.state(back), nnx.state(model))


@pytest.mark.parametrize(
    ("size", "strides"),
    [
        (5, (1, 2)),
        (4, (2, 3)),  # as many positions, of other inputs
    ],
)
def test_one_kernel_of_two_strides_is_skipped(size, strides):
    def f(w, x):
        return [
            jax.lax.conv_general_dilated(
                *(x, w, (s, s), "VALID"), dimension_numbers=NUMBERS[2]
            )
            for s in strides
        ]

    x = jnp.ones((2, size, size, 3))
    plan = fc.make_plan(f, jnp.ones((1, 1, 3, 4)), x, to="dense")
    assert plan.skipped == {"": "called with several strides"}


def test_other_strides_than_the_planned_ones_are_refused():
    """Of a single position each, the calls agree; of two, they read other inputs."""

    def f(w, x):
        return [
            jax.lax.conv_general_dilated(
                *(x, w, (s,), "VALID"), dimension_numbers=NUMBERS[1]
            )
            for s in (8, 5)
        ]

    w, x = np.ones((4, 3, 1), "f4"), np.ones((2, 3, 5), "f4")
    plan = fc.make_plan(f, w, x, to="dense")
    assert len(plan) == 1
    run, dense = fc.convert_model(f, plan), fc.convert_params(w, plan)
    np.testing.assert_array_equal(run(dense, x)[1], f(w, x)[1])
    with pytest.raises(fc.PlanError, match="its forms differ"):
        run(dense, np.ones((2, 3, 9), "f4"))
