"""Models without a float64 reading: each layer on the input that the model gives it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

import fcconv_jax as fc
from fcconv_jax.geometry.kernels import Rearrangement
from fcconv_jax.verification import reference


def doubled(x):
    """A kernel that has no float64 twin."""

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)


class Net(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = doubled(nn.Dense(8, name="fc", dtype=self.dtype)(x))
        return nn.Dense(3, use_bias=False, name="head", dtype=self.dtype)(jnp.sin(x))


class NnxNet(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(6, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return doubled(self.fc(x))


X = jax.random.normal(jax.random.key(1), (2, 4, 3, 2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_layer_is_compared_on_its_own_input(dtype):
    model = Net(dtype)
    variables = model.init(jax.random.key(0), X)
    report = fc.verify(model, variables, X, gradients=False, progress=False)
    assert report.passed, str(report)
    assert report.arrays == ()
    assert "no float64 reference: 'pallas_call' runs its own code" in report.notes
    for layer in report.layers:
        assert layer.forced is not None
        assert layer.forced.calls == 1
        assert 0 <= layer.forced.difference <= layer.forced.allowed
        assert (
            layer.forced.allowed
            < {"float32": 1e-4, "bfloat16": 1}[jnp.dtype(dtype).name]
        )
    assert "alone" in str(report)


def test_a_wrong_map_is_caught_there():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    plan = fc.make_plan(model, X)
    layer = plan["fc"]
    assert layer.order == "CHW"
    wrong = Rearrangement.reshape(layer.kernel.source, layer.kernel.target)
    layer = dataclasses.replace(layer, leaves=(("kernel", wrong), *layer.leaves[1:]))
    bad = dataclasses.replace(plan, layers=(("fc", layer), *plan.layers[1:]))
    report = fc.verify(model, variables, X, plan=bad, gradients=False, progress=False)
    forced = [f for f in report.failures if "more than one matmul rounds" in f]
    assert len(forced) == 1
    assert forced[0].startswith("layer 'fc': expected ")


def test_nnx_models_too():
    report = fc.verify(NnxNet(), None, X.reshape(8, 6), gradients=False, progress=False)
    assert report.passed
    assert report.layers[0].forced is not None


def test_a_model_that_would_not_fit_is_named(monkeypatch):
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    monkeypatch.setattr(reference, "free_memory", lambda: 100)
    report = fc.verify(model, variables, x, progress=False)
    assert report.passed
    assert report.arrays == ()
    assert any("GiB in float64, 0.0 GiB are free" in note for note in report.notes)
    assert report.layers[0].forced is not None


def test_a_function_says_what_is_not_compared():
    def f(params, x):
        return doubled(x @ params)

    w = np.ones((4, 3), np.float32)
    report = fc.verify(
        f, w, np.ones((2, 4), np.float32), gradients=False, progress=False
    )
    assert any(
        note.startswith("not compared on the model's own") for note in report.notes
    )
