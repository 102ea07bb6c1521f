"""Tuning of training steps: the step is the right one, and it decides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import integers, one_in
from flax import nnx

import fcconv_jax as fc
from fcconv_jax.backends.compilation import Program
from fcconv_jax.plan import Plan
from fcconv_jax.plan.tuning import Figure
from fcconv_jax.tuning import meters
from fcconv_jax.tuning.training import layer_step, model_step

X = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.ConvTranspose(5, (2, 2), (2, 2), name="up")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(4, name="head")(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init)(jax.random.key(1), X)


def test_the_step_is_value_and_gradient_by_the_float_params():
    params = {"w": jnp.ones((3, 2)), "steps": jnp.array(4), "b": jnp.ones(2)}
    x = integers(np.zeros((5, 3), np.float32))

    def call(variables, arrays):
        params = variables["params"]
        return arrays[0] @ params["w"] * params["steps"] + params["b"]

    step = model_step(Program(call, ({"params": params}, [x])))
    value, gradients = jax.jit(step.function)(*step.args)
    y = call({"params": params}, [x])
    np.testing.assert_array_equal(value, (y**2).sum())
    by_b, by_w = gradients
    np.testing.assert_array_equal(by_b, 2 * y.sum(0))
    np.testing.assert_array_equal(by_w, 8 * x.T @ y)


def test_the_step_of_a_layer_differentiates_by_its_input_too():
    def call(x, kernel, bias):
        assert bias is None
        return x @ kernel

    x, kernel = np.ones((2, 3), "f4"), np.ones((3, 4), "f4")
    step = layer_step(Program(call, (x, kernel, None)))
    _, (by_x, by_kernel) = step.function(*step.args)
    assert (by_x.shape, by_kernel.shape) == ((2, 3), (3, 4))


@pytest.mark.parametrize(
    "loss", one_in(2, [lambda outputs: jnp.mean(outputs[0] ** 4), None])
)
def test_a_linen_model_with_statistics(variables, loss, tmp_path):
    options = {"mutable": ["batch_stats"], "train": True}
    plan = fc.tune(
        *(Net(), variables, X),
        objective="training",
        loss=loss,
        budget=0.2,
        timings=tmp_path / "timings.json",
        progress=False,
        **options,
    )
    tuning = plan.tuning
    assert tuning.training
    assert tuning.objective == "latency"
    assert {name for name, _ in tuning.forward} == {n for n, _ in tuning.programs}
    measured = [layer for layer in tuning.layers if layer.figures]
    for layer in measured:
        assert dict(layer.forward).keys() == dict(layer.figures).keys()
    text = str(tuning)
    assert "training step" in text
    assert "forward" in text
    assert Plan.from_json(plan.to_json()).tuning == tuning
    with pytest.raises(fc.PlanError, match="Expected timings of"):
        fc.tune(
            Net(),
            variables,
            X,
            budget=0,
            timings=tmp_path / "timings.json",
            progress=False,
        )


def test_the_step_decides_not_the_forward_pass(variables, monkeypatch):
    """On a device where dense forms are slower forwards and faster in the step."""
    trained = []

    def race(runs, seconds, settle):
        figures = {}
        for key, run in runs.items():
            outputs = jax.tree.leaves(run())
            step = len(outputs) > 1 and outputs[0].ndim == 0
            trained.append(step)
            dense = "convolution" not in run.func.as_text()
            median = 1.0 if dense == step else 2.0
            figures[key] = Figure(median, median, median)
        return figures

    monkeypatch.setattr(meters, "race", race)
    options = {"budget": 20, "progress": False}
    slow = fc.tune(Net(), variables, X, rules=["head=skip"], **options)
    fast = fc.tune(
        Net(), variables, X, rules=["head=skip"], objective="training", **options
    )
    assert len(slow) == 0
    assert list(fast) == ["up/kernel"]
    assert set(trained) == {True, False}
    assert dict(fast.tuning.forward)["all to dense"].median == 2.0


def test_an_nnx_model():
    class Up(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.up = nnx.Conv(3, 5, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.up(self.norm(x))

    plan = fc.tune(
        Up(nnx.Rngs(0)), None, X, objective="training", budget=0.1, progress=False
    )
    assert plan.tuning.training


def test_what_makes_no_step_is_refused(variables):
    with pytest.raises(fc.PlanError, match="a loss that returns a float scalar"):
        fc.tune(
            *(Net(), variables, X),
            objective="training",
            loss=lambda y: y,
            budget=0,
            progress=False,
        )
    with pytest.raises(fc.PlanError, match='objective="training"'):
        fc.tune(Net(), variables, X, loss=jnp.sum, progress=False)
    with pytest.raises(fc.PlanError, match="Expected float params"):
        model_step(Program(lambda v, a: a, ({"params": jnp.arange(3)}, [X])))
    with pytest.raises(fc.PlanError, match="'training', got 'speed'"):
        fc.tune(Net(), variables, X, objective="speed", progress=False)
