"""Functions that differentiate their own convolutions: gradients are not layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import integers, same_bits
from jax import lax

import fcconv_jax as fc

NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(x, w):
    return lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=NUMBERS)


def up(x, w):
    return lax.conv_transpose(x, w, (2, 2), "SAME")


def by_input(forward):
    def run(params, x):
        return jax.grad(lambda x: (forward(x, params["w"]) ** 2).sum())(x)

    return run


def descent(forward):
    """Steps down the gradient, in a loop."""

    def run(params, x):
        def step(x, _):
            return x - 0.125 * by_input(forward)(params, x), forward(x, params["w"])

        return lax.scan(step, x, None, length=2)

    return run


def hessian_product(forward):
    return lambda params, x: jax.jvp(lambda x: by_input(forward)(params, x), (x,), (x,))


def backward_by_hand(params, x):
    """With the kernel of the layer itself, turned around."""
    y = conv(x, params["w"])
    turned = params["w"][::-1, ::-1].swapaxes(2, 3)
    return y, lax.conv_general_dilated(
        *(2 * y, turned, (1, 1), [(1, 1), (1, 1)]),
        lhs_dilation=(2, 2),
        dimension_numbers=NUMBERS,
    )


@jax.custom_vjp
def own_rule(x, w):
    return conv(x, w)


own_rule.defvjp(
    lambda x, w: (conv(x, w), (x, w)),
    lambda kept, g: jax.vjp(conv, *kept)[1](g),
)

# A function, the kernel's window, and the case; None for what is skipped.
FUNCTIONS = {
    "gradient of patchify": (by_input(conv), 2, "patchify"),
    "gradient of a strided 1x1": (by_input(conv), 1, "pointwise"),
    "gradient of a strided 3x3": (by_input(conv), 3, None),
    "gradient of unpatchify": (by_input(up), 2, "unpatchify"),
    "gradient of phases": (by_input(up), 3, "phases"),
    "descent through patchify": (descent(conv), 2, "patchify"),
    "descent through unpatchify": (descent(up), 2, "unpatchify"),
    "descent through phases": (descent(up), 3, "phases"),
    "Hessian product of phases": (hessian_product(up), 3, "phases"),
    "backward pass by hand": (backward_by_hand, 2, None),
    "a rule of its own": (lambda p, x: own_rule(x, p["w"]), 2, None),
    "gradient of a rule of its own": (by_input(own_rule), 2, "patchify"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_layer_converts_and_its_gradient_follows(name):
    function, window, case = FUNCTIONS[name]
    params = {"w": integers(np.zeros((window, window, 3, 4), "f4"))}
    x = integers(np.zeros((2, 4, 6, 3), "f4"))
    plan = fc.make_plan(function, params, x, to="dense", rules=["w=phases"])
    assert [layer.case for layer in plan.values()] == ([case] if case else [])
    got = fc.convert_model(function, plan)(fc.convert_params(params, plan), x)
    for mine, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(function(params, x)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_a_training_step_keeps_the_form_it_was_written_for():
    def step(params, x):
        def loss(params):
            return (
                up(jnp.maximum(conv(x, params["down"]), 0), params["up"]) ** 2
            ).sum()

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.125 * g, params, gradients)

    params = {
        "down": integers(np.zeros((2, 2, 3, 4), "f4")),
        "up": integers(np.zeros((2, 2, 4, 3), "f4"), seed=1),
    }
    x = integers(np.zeros((1, 4, 4, 3), "f4"))
    plan = fc.make_plan(step, params, x, to="dense")
    assert {path: layer.case for path, layer in plan.items()} == {
        "down": "patchify",
        "up": "unpatchify",
    }
    value, after = fc.convert_model(step, plan)(fc.convert_params(params, plan), x)
    wanted, trained = step(params, x)
    assert value == wanted
    assert same_bits(after, trained)
