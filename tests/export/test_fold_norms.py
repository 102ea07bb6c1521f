"""Norms folded into the layers of JAX models: the same function of fewer params."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import fcconv_jax as fc

from .models import NNXNet, _made, normal
from .test_fold import Before, Behind, Branched, Padded


def nchw(params, x):
    """As PyTorch ports have it: a norm along axis 1."""
    numbers = ("NCHW", "OIHW", "NCHW")
    x = lax.conv_general_dilated(
        x, params["k"], (2, 1), "SAME", dimension_numbers=numbers
    )
    scale, shift = (params[name][:, None, None] for name in ("scale", "shift"))
    return nn.relu(x * scale + shift)


class Transposed(nn.Module):
    """A norm behind a transposed convolution, and none in front of it."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(5, (3, 2), (2, 2), padding="SAME")(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.ConvTranspose(4, (2, 2), (2, 2))((x - 0.3) / 0.7)


def elementwise(function, *args):
    eqns = jax.make_jaxpr(function)(*args).eqns
    return sum(eqn.primitive.name in ("sub", "mul", "div") for eqn in eqns)


PORT = {"k": normal(6, 3, 2, 3), "scale": normal(6), "shift": normal(6, seed=2)}
CASES = {
    "behind": (lambda: _made(Behind(), normal(1, 6, 8, 3)), 0),
    "before": (lambda: _made(Before(), normal(1, 6, 8, 3)), 0),
    "padded": (lambda: _made(Padded(), normal(1, 6, 8, 3)), 1),
    "branched": (lambda: _made(Branched(), normal(1, 6, 8, 3)), 2),
    "transposed": (lambda: _made(Transposed(), normal(1, 4, 3, 2)), 1),
    "channels first": (lambda: (nchw, PORT, (normal(1, 3, 6, 5),)), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_function_of_fewer_params(name):
    make, left = CASES[name]
    model, params, inputs = make()
    function, folded = fc.fold_norms(model, params, *inputs)
    run = model.apply if isinstance(model, nn.Module) else model
    assert not any("mean" in key or "var" in key for key in folded) or left
    assert elementwise(function, folded, *inputs) <= left
    for batch in (1, 3):
        x = normal(batch, *inputs[0].shape[1:], seed=batch)
        got, want = jax.jit(function)(folded, x), run(params, x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-6)


def test_an_nnx_model_and_its_own_params():
    model, x = NNXNet(nnx.Rngs(0)), normal(2, 12, 8, 3)
    function, folded = fc.fold_norms(model, None, x)
    assert {key.rpartition("/")[2] for key in folded} == {"kernel", "bias"}
    np.testing.assert_allclose(function(folded, x), model(x), rtol=1e-4, atol=1e-5)


def test_a_shared_kernel_is_kept_once():
    def model(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    params, x = {"w": normal(4, 4)}, normal(2, 4)
    function, folded = fc.fold_norms(model, params, x)
    assert list(folded) == ["params/w"]
    np.testing.assert_array_equal(function(folded, x), model(params, x))


def test_params_of_the_model_in_the_place_of_the_folded():
    model, params, inputs = _made(Behind(), normal(1, 6, 8, 3))
    function, _ = fc.fold_norms(model, params, *inputs)
    with pytest.raises(fc.ExportError, match="Expected the params that fold_norms"):
        function(params, *inputs)


def test_random_numbers_are_refused():
    def model(params, x):
        return x * params["w"] + jax.random.normal(jax.random.key(0), x.shape)

    with pytest.raises(fc.ExportError, match="random numbers"):
        fc.fold_norms(model, {"w": normal(4)}, normal(2, 4))
