"""The table of elementwise errors must cover what this backend does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fcconv_jax.verification.arithmetic import unit_roundoff
from fcconv_jax.verification.rounding import ELEMENTWISE, EXACT, local_errors

_vectorised = np.vectorize
# name: function, oracle in float64, range of the inputs.
_SWEEPS = {
    "sqrt": (lax.sqrt, np.sqrt, (1e-6, 1e6)),
    "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x), (1e-6, 1e6)),
    "cbrt": (lax.cbrt, np.cbrt, (-1e6, 1e6)),
    "exp": (lax.exp, np.exp, (-80, 80)),
    "exp2": (lax.exp2, np.exp2, (-100, 100)),
    "log": (lax.log, np.log, (1e-6, 1e6)),
    "log near 1": (lax.log, np.log, (0.9, 1.1)),
    "log1p": (lax.log1p, np.log1p, (-0.99, 100)),
    "log1p near 0": (lax.log1p, np.log1p, (-0.01, 0.01)),
    "expm1": (lax.expm1, np.expm1, (-20, 20)),
    "expm1 near 0": (lax.expm1, np.expm1, (-0.1, 0.1)),
    "tanh": (lax.tanh, np.tanh, (-20, 20)),
    "tanh near 0": (lax.tanh, np.tanh, (-0.5, 0.5)),
    "logistic": (lax.logistic, lambda x: 1 / (1 + np.exp(-x)), (-80, 80)),
    "erf": (lax.erf, _vectorised(math.erf), (-6, 6)),
    "erfc": (lax.erfc, _vectorised(math.erfc), (-6, 6)),
    "sin": (lax.sin, np.sin, (-100, 100)),
    "cos": (lax.cos, np.cos, (-100, 100)),
    "tan": (lax.tan, np.tan, (-10, 10)),
    "asin": (lax.asin, np.arcsin, (-1, 1)),
    "acos": (lax.acos, np.arccos, (-1, 1)),
    "atan": (lax.atan, np.arctan, (-100, 100)),
    "sinh": (lax.sinh, np.sinh, (-20, 20)),
    "cosh": (lax.cosh, np.cosh, (-20, 20)),
    "asinh": (lax.asinh, np.arcsinh, (-100, 100)),
    "acosh": (lax.acosh, np.arccosh, (1, 100)),
    "atanh": (lax.atanh, np.arctanh, (-0.99, 0.99)),
    "lgamma": (lax.lgamma, _vectorised(math.lgamma), (0.01, 50)),
    "integer_pow": (lambda x: lax.integer_pow(x, 7), lambda x: x**7, (-10, 10)),
    "integer_pow < 0": (lambda x: lax.integer_pow(x, -3), lambda x: x**-3.0, (1, 9)),
    "pow": (lambda x: lax.pow(x, x), lambda x: np.power(x, x), (0.01, 20)),
    "div": (lambda x: lax.div(x, x + 3), lambda x: x / (x + 3), (1, 100)),
    "atan2": (lambda x: lax.atan2(x, x * x), lambda x: np.arctan2(x, x * x), (-9, 9)),
}


def _errors(f, x):
    """Outputs of f and the bound on the error of its last equation."""
    from fcconv_jax.tracing import jaxprs

    bounds = []

    def visit(eqn, operands):
        outs = jaxprs.bind(eqn, operands)
        bounds.append((local_errors(eqn, operands, outs) or [None])[0])
        return outs

    (out,) = jaxprs.evaluate(jax.make_jaxpr(f)(x), [x], visit)
    return out, bounds[-1]


def _swept(name, dtype):
    f, oracle, (low, high) = _SWEEPS[name]
    rng = np.random.default_rng(0)
    if low > 0:
        x = np.exp(rng.uniform(np.log(low), np.log(high), 2**16))
    else:
        x = rng.uniform(low, high, 2**16)
    x = jnp.asarray(np.minimum(x, float(jnp.finfo(dtype).max)), dtype)
    if name in ("div", "atan2"):  # the inner equation must be exact
        x = jnp.round(x * 2) / 2
        x = x[x != 0]
    _, bound = _errors(f, x)
    want = oracle(np.asarray(x, np.float64))
    got = np.asarray(jax.jit(f)(x), np.float64)
    info = jnp.finfo(dtype)
    normal = (abs(want) < float(info.max) / 2) & (abs(want) > 2 * float(info.tiny))
    assert normal.sum() > 100
    # The bounds add the smallest normal number, for what is flushed to zero.
    bound = np.asarray(bound, np.float64) + float(jnp.finfo("float32").tiny)
    return abs(got - want)[normal], bound[normal]


@pytest.mark.parametrize("name", _SWEEPS)
def test_table_covers_float32(name):
    error, bound = _swept(name, "float32")
    assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("name", ["exp", "tanh", "logistic", "log", "erf", "rsqrt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_table_covers_narrow_floats(name, dtype):
    error, bound = _swept(name, dtype)
    assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} of the bound"


def test_table_is_not_loose():
    # A table that is always right because it is huge would say nothing.
    loose = {
        name: float((error / bound).max())
        for name in ("exp", "log", "tanh", "logistic", "sqrt", "rsqrt")
        for error, bound in [_swept(name, "float32")]
    }
    assert all(used > 0.1 for used in loose.values()), loose


def _one_equation(f, *args):
    closed = jax.make_jaxpr(f)(*args)
    (eqn,) = closed.eqns
    from fcconv_jax.tracing import jaxprs

    outs = jaxprs.bind(eqn, args)
    return local_errors(eqn, args, outs), outs[0]


def test_contractions_take_the_reduction_length():
    a, b = jnp.ones((3, 5, 7)), -jnp.ones((7, 5, 2))
    (error,), _ = _one_equation(
        lambda a, b: lax.dot_general(a, b, (((1, 2), (1, 0)), ((), ()))), a, b
    )
    u = unit_roundoff("float32")
    np.testing.assert_allclose(error, (35 * 35 + 35) * u, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_count_one_group(groups):
    x, k = jnp.ones((2, 5, 4, 6)), jnp.ones((3, 2, 6 // groups, 8))
    (error,), _ = _one_equation(
        lambda x, k: lax.conv_general_dilated(
            x,
            k,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        ),
        x,
        k,
    )
    n = 3 * 2 * 6 // groups
    np.testing.assert_allclose(error, (n * n + n) * unit_roundoff("float32"), rtol=1e-5)


def test_scattered_sums_count_what_lands():
    base, updates = jnp.zeros(4), jnp.ones(6)
    index = jnp.array([1, 1, 1, 2, 2, 3])[:, None]
    dims = lax.ScatterDimensionNumbers((), (0,), (0,))
    (error,), out = _one_equation(
        lambda b, i, u: lax.scatter_add(b, i, u, dims), base, index, updates
    )
    np.testing.assert_array_equal(out, [0, 3, 2, 1])
    np.testing.assert_allclose(
        error / unit_roundoff("float32"), [0, 9, 4, 1], rtol=1e-6, atol=1e-20
    )


def test_conversions():
    def error(x, dtype):
        return _one_equation(lambda x: lax.convert_element_type(x, dtype), x)[0][0]

    assert error(jnp.ones(3, jnp.bfloat16), "float32") is None
    assert error(jnp.ones(3, bool), "float32") is None
    assert error(jnp.ones(3, jnp.int8), "float32") is None
    whole = jnp.array([1, -(2**24) + 1, 2**24 + 1, -(2**25) - 1], "int32")
    found = error(whole, "float32")
    np.testing.assert_allclose(found, [0, 0, 1, 2], rtol=1e-6, atol=1e-30)
    assert (np.abs(np.float64(np.float32(whole)) - np.float64(whole)) <= found).all()
    assert error(jnp.array([257], "int32"), jnp.bfloat16) >= 1
    np.testing.assert_allclose(error(jnp.ones(3), jnp.bfloat16), 2.0**-8)


def test_a_stack_moves_values():
    x = jnp.ones(3)
    eqns = jax.make_jaxpr(lambda x: jnp.stack([x, x]))(x).eqns
    assert {eqn.primitive.name for eqn in eqns} <= EXACT


def test_no_primitive_is_both_exact_and_rounding():
    assert not EXACT & set(ELEMENTWISE)


def test_what_is_not_modelled_says_so():
    eye = jnp.eye(3)
    eqns = jax.make_jaxpr(lax.linalg.cholesky)(eye).eqns
    eqn = next(eqn for eqn in eqns if eqn.primitive.name == "cholesky")
    assert local_errors(eqn, [eye], [eye]) is None
