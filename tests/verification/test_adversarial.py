"""The bound against float64 on inputs that are made to break it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcconv_jax.verification.bounds import compare, error_bounds

_RNG = np.random.default_rng(0)


def _dense(w, x):
    return jnp.dot(x, w, precision="highest")


def _wide_range(*shape):
    return _RNG.normal(size=shape) * 10.0 ** _RNG.uniform(-18, 18, shape)


def _cancelling(*shape):
    half = _RNG.normal(size=(shape[0], shape[1] // 2))
    return np.concatenate([half, -half * (1 + 1e-6)], 1)


_W = np.repeat(_RNG.normal(size=(32, 4)), 2, 0).reshape(32, 2, 4)
CASES = {
    "cancellation": (_cancelling(3, 64), np.concatenate([_W[:, 0], _W[:, 0]])),
    "large range": (_wide_range(3, 64), _wide_range(64, 4)),
    "tiny times tiny": (
        _RNG.normal(size=(3, 64)) * 1e-20,
        _RNG.normal(size=(64, 4)) * 1e-19,
    ),
    "subnormal inputs": (
        _RNG.normal(size=(3, 64)) * 1e-39,
        _RNG.normal(size=(64, 4)) * 1e30,
    ),
    "subnormal weights": (
        _RNG.normal(size=(3, 64)) * 1e10,
        _RNG.normal(size=(64, 4)) * 3e-40,
    ),
    "near overflow": (
        abs(_RNG.normal(size=(3, 64))) * 1e18,
        abs(_RNG.normal(size=(64, 4))) * 1e18,
    ),
    "long": (_RNG.uniform(0, 1, size=(1, 2**16)), _RNG.uniform(0, 1, (2**16, 2))),
}


def _slacks(f, *args):
    """Bound over true error at the entries with the largest ones; checks them all."""
    model = error_bounds(f, *args)
    with jax.enable_x64(True):
        exact = f(*(jnp.asarray(np.asarray(a).astype(np.float64)) for a in args))
        exact = np.asarray(exact)
    got = np.asarray(model.outputs).astype(np.float64)
    assert np.isfinite(got).all()
    error = abs(got - exact)
    slacks = []
    for index in np.argsort(error.reshape(-1))[-4:]:
        one = np.zeros(error.size)
        one[index] = 1
        bound = model.bound(one.reshape(error.shape), programs=1)
        found = error.reshape(-1)[index]
        assert found <= bound < np.inf, (found, bound)
        if found:
            slacks.append(bound / found)
    return slacks


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    x, w = (a.astype(np.float32) for a in CASES[name])
    slacks = _slacks(_dense, w, x)
    print(f"{name}: bound over error {slacks}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-5])
def test_narrow_floats(dtype, scale):
    # float16 has no normal number below 6e-5.
    x = jnp.asarray(_cancelling(3, 64) * scale, dtype)
    w = jnp.asarray(_RNG.normal(size=(64, 4)) * scale**0.5, dtype)
    assert _slacks(_dense, w, x)
    assert _slacks(lambda w, x: jnp.dot(x * x, w) * w[0], w, x)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-126, 40), min_size=8, max_size=8),
    st.lists(st.integers(-60, 60), min_size=8, max_size=8),
)
def test_any_exponents(a, b):
    x = np.ldexp(1 + np.arange(8) / 9, a).astype(np.float32)
    w = np.ldexp(1 + np.arange(8) / 11, b).astype(np.float32)
    _slacks(lambda w, x: jnp.sum(x * w) + x * w, w, x)


def test_what_overflows_has_no_bound_and_says_so():
    x = np.float32([[3e38, 3e38, -3e38, -3e38]])
    w = np.ones((4, 1), np.float32)
    model = error_bounds(_dense, w, x * np.float32(0.5))
    assert model.bound(np.ones((1, 1))) == np.inf
    (leaf,) = compare(model, model.outputs + 1e30)
    assert "no finite bound exists" in leaf.reason


def test_equal_infinities_are_counted():
    model = error_bounds(lambda x: x * 2, np.float32([3e38, 1, np.nan, -np.inf]))
    (leaf,) = compare(model, model.outputs)
    assert leaf.passed
    assert leaf.nonfinite == 3
    (leaf,) = compare(model, model.outputs.at[0].set(3e38))
    assert not leaf.passed


def test_masked_scores_keep_a_finite_bound():
    def f(x):
        mask = jnp.tril(jnp.ones(x.shape, bool))
        return jax.nn.softmax(jnp.where(mask, x * 3, -jnp.inf))

    assert _slacks(f, _RNG.normal(size=(6, 6)).astype(np.float32))
