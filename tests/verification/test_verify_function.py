import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fcconv_jax as fc


def net(p, x):
    """Stored (out, in), a stack under a scan, experts side by side."""
    x = jax.nn.relu(x @ p["in"].T + p["bias"])
    x = lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), x, p["stack"])[0]
    return jnp.einsum("bed,edf->bef", x.reshape(2, 2, 3), p["experts"])


@pytest.fixture(scope="module")
def case():
    shapes = {"in": (6, 4), "bias": (6,), "stack": (2, 6, 6), "experts": (2, 3, 5)}
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    x = rng.normal(size=(2, 4)).astype(np.float32)
    return params, x, fc.make_plan(net, params, x)


def test_a_function_is_verified(case):
    params, x, plan = case
    report = fc.verify(net, params, x, plan=plan)
    assert report.passed
    assert {layer.path for layer in report.layers} == {"in", "stack", "experts"}
    assert report.outputs
    assert report.gradients
    assert report.step
    assert report.original.dots == 3
    assert report.converted.dots == 0
    assert report.converted.convolutions == 3


def test_a_wrong_function_fails(case):
    params, x, plan = case
    right = fc.convert_model(net, plan)

    def wrong(p, x):
        return right(p, x) * 1.001

    with pytest.raises(AssertionError, match="output"):
        fc.assert_equivalent(
            net, params, x, plan=plan, converted_model=wrong, gradients=False
        )


def test_wrong_params_fail_by_name(case):
    params, x, plan = case
    moved = fc.convert_params(params, plan)
    moved["in"] = moved["in"] * 2
    with pytest.raises(AssertionError, match="'params/in'"):
        fc.assert_equivalent(
            net, params, x, plan=plan, converted_params=moved, gradients=False
        )


def test_convolutions_to_dense_are_verified():
    def f(p, x):
        dims = ("NCHW", "OIHW", "NCHW")
        return lax.conv_general_dilated(x, p, (2, 3), "VALID", dimension_numbers=dims)

    rng = np.random.default_rng(0)
    kernel, x = (
        rng.normal(size=s).astype(np.float32) for s in ((5, 3, 2, 3), (1, 3, 4, 6))
    )
    plan = fc.make_plan(f, kernel, x, to="dense")
    fc.assert_equivalent(f, kernel, x, plan=plan)


def test_leaves_that_are_no_arrays_are_refused():
    params = {"w": np.ones((4, 3), np.float32), "act": "relu"}
    x = np.ones((2, 4), np.float32)

    def f(p, x):
        return x @ p["w"]

    plan = fc.make_plan(f, params, x)
    with pytest.raises(TypeError, match=r"str at \['act'\]"):
        fc.verify(f, params, x, plan=plan)
