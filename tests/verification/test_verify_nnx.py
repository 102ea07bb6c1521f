import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import module_list

import fcconv_jax as fc
from fcconv_jax.frontends.bind import bind


class Net(nnx.Module):
    """A flatten in channel-first order, and a tied pair in a List."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc1 = nnx.Linear(3 * 2 * 2, 4, rngs=rngs)
        self.fc2 = module_list([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.fc2[1].kernel = self.fc2[0].kernel

    def __call__(self, x):
        x = self.fc1(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))
        return self.fc2[1](nnx.relu(self.fc2[0](x)))


X = np.linspace(-1, 1, 5 * 3 * 2 * 2, dtype=np.float32).reshape(5, 3, 2, 2)


@pytest.fixture(scope="module")
def model():
    return Net()


def test_an_nnx_model_is_verified_with_its_own_params(model):
    plan = fc.make_plan(model, X)
    report = fc.verify(model, None, X, plan=plan)
    assert report.passed, report.failures
    assert report.original.dots == 3
    counts = report.converted
    assert (counts.dots, counts.convolutions) == (0, 3)
    assert [comparison.path for comparison in report.outputs] == ["output"]
    assert "gradient/fc1/kernel" in {found.path for found in report.gradients}
    # Every layer of a model has its row, the two that share a kernel too.
    assert [len(layer.outputs) for layer in report.layers] == [1, 1, 1]


def test_params_in_the_wrong_order_fail(model):
    plan = fc.make_plan(model, X)
    wrong = fc.make_plan(model, X, rules=["fc1=3x2:HWC"])
    assert plan["fc1"].order == "CHW"
    state = nnx.state(model)
    report = fc.verify(
        model,
        state,
        X,
        plan=plan,
        converted_params=fc.convert_params(state, wrong),
        gradients=False,
    )
    assert not report.passed
    assert any(f.startswith("'output': expected") for f in report.failures)


def test_assert_equivalent_names_the_leaf(model):
    plan = fc.make_plan(model, X)
    params = fc.convert_params(nnx.state(model), plan)
    kernel = params["fc2"][0]["kernel"]
    kernel[...] = kernel[...] + jnp.float32(0.5)
    with pytest.raises(AssertionError, match="fc2/0/kernel"):
        fc.assert_equivalent(
            model, None, X, plan=plan, converted_params=params, gradients=False
        )


def test_statistics_are_outputs_and_the_model_keeps_its_own():
    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    x = np.ones((3, 2), np.float32)
    bound = bind(norm, None, x)
    _, updated = jax.eval_shape(bound.call, bound.variables)
    assert updated["mean"].shape == (2,)
    _, updated = bound.call(bind(norm, nnx.state(norm), x).variables)
    np.testing.assert_array_equal(updated["mean"], np.float32(1 - 0.99))
    np.testing.assert_array_equal(norm.mean[...], 0)
