"""Functions with derivatives inside: forces, physics-informed nets, inner updates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_in
from flax import nnx

import fcconv_jax as fc

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (3, 6)),
    "b": jax.random.normal(jax.random.key(1), (6, 1)),
}
X = jax.random.normal(jax.random.key(2), (4, 3))


def net(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def force(p, x):
    return -jax.grad(lambda x: net(p, x).sum())(x)


def force_of_a_call(p, x):
    return -jax.grad(lambda x: jax.jit(net)(p, x).sum())(x)


def force_with_remat(p, x):
    return -jax.grad(lambda x: jax.checkpoint(net)(p, x).sum())(x)


def energy_and_forces(p, x):
    return jax.value_and_grad(lambda x: net(p, x).sum())(x)


def laplacian(p, x):
    return jax.vmap(lambda x: jnp.trace(jax.hessian(lambda x: net(p, x)[0])(x)))(x)


def inner_update(p, x):
    gradients = jax.grad(lambda p: (net(p, x) ** 2).mean())(p)
    return net(jax.tree.map(lambda w, g: w - 0.1 * g, p, gradients), x)


@pytest.mark.parametrize(
    "f",
    one_in(
        3,
        [
            *(force, force_of_a_call, force_with_remat),
            *(energy_and_forces, laplacian, inner_update),
        ],
    ),
)
def test_the_inner_programs_weights_convert(f, assert_close):
    plan = fc.make_plan(f, PARAMS, X)
    assert set(plan) == {"a", "b"}
    assert not [why for why in plan.skipped.values() if "two activations" not in why]
    moved, converted = fc.convert_params(PARAMS, plan), fc.convert_model(f, plan)
    assert "conv_general_dilated" in str(jax.make_jaxpr(converted)(moved, X))
    assert_close(converted(moved, X), lambda p: f(p, X), PARAMS)

    def loss(f):
        return lambda p: sum((y**2).sum() for y in jax.tree.leaves(f(p, X)))

    want, got = jax.grad(loss(f))(PARAMS), jax.grad(loss(converted))(moved)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        fc.restore_params(got, plan),
        want,
    )


def test_a_convolution_with_a_gradient_inside_goes_to_dense(assert_close):
    def patches(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def f(w, x):
        return jax.grad(lambda x: (patches(w, x) ** 2).sum())(x)

    w, x = jnp.ones((2, 3, 2, 5)), jax.random.normal(jax.random.key(0), (2, 4, 6, 2))
    plan = fc.make_plan(f, w, x, to="dense")
    assert plan[""].case == "patchify"
    y = fc.convert_model(f, plan)(fc.convert_params(w, plan), x)
    assert_close(y, lambda w: f(w, x), w)


def test_a_head_tied_to_its_transpose_is_no_gradient():
    def f(p, x):
        return jax.grad(lambda x: (jnp.tanh(x @ p["a"]) @ p["a"].T).sum())(x)

    plan = fc.make_plan(f, PARAMS, X)
    assert not plan
    assert "in two roles" in plan.skipped["a"]


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.tanh(nn.Dense(6)(x)))


class Force(nn.Module):
    def setup(self):
        self.energy = Mlp()

    def __call__(self, x):
        return -jax.grad(lambda x: self.energy(x).sum())(x)


class NnxForce(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(3, 6, rngs=nnx.Rngs(0))
        self.w = nnx.Param(PARAMS["b"])

    def __call__(self, x):
        return -jax.grad(lambda x: (jnp.tanh(self.first(x)) @ self.w).sum())(x)


def test_modules_convert_as_the_function_does(assert_close):
    model = Mlp()
    variables = model.init(jax.random.key(0), X)

    def f(variables, x):
        return -jax.grad(lambda x: model.apply(variables, x).sum())(x)  # pyright: ignore

    assert set(fc.make_plan(Force(), X)) == {"energy/Dense_0", "energy/Dense_1"}
    plan = fc.make_plan(f, variables, X)
    assert set(plan) == {"params/Dense_0/kernel", "params/Dense_1/kernel"}
    plan = fc.make_plan(NnxForce(), X)
    assert set(plan) == {"first", "w"}
    graphdef, state = nnx.split(NnxForce())
    y = fc.convert_model(NnxForce(), plan)(X)
    assert_close(y, lambda state: nnx.merge(graphdef, state)(X), state)
