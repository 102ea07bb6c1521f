import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fcconv_jax.verification.bounds import compare, error_bounds
from fcconv_jax.verification.perturbation import run_shifted


def program(x):
    def body(carry, row):
        return carry * row, jnp.sin(carry)

    carry, rows = lax.scan(body, x[0], x)
    return lax.cond(carry[0] > 0, jnp.exp, lambda v: v * v, carry), jax.nn.relu(rows)


def test_random_numbers_between_computed_limits_have_a_bound():
    """``truncated_normal`` takes the next number after the error function's value."""

    def f(x, key):
        return x * jax.random.truncated_normal(key, x[0] - 3, 2, x.shape)

    x, key = jnp.ones(5), jax.random.key(0)
    model = error_bounds(f, x, key)
    assert model.unmodelled == ()
    (leaf,) = compare(model, f(x, key))
    assert leaf.passed
    assert 0 < leaf.bound < 1e-3


def test_shifts_act_alike_whether_or_not_errors_are_worked_out():
    x = jnp.arange(6.0).reshape(3, 2) + 1
    closed = jax.make_jaxpr(program)(x)
    unmodelled = {}
    plain, errors = run_shifted(closed, [x], None, unmodelled)
    shifts = jax.tree.map(lambda e: jnp.full_like(e, 0.5), errors)
    shifted, _ = run_shifted(closed, [x], shifts, unmodelled)
    again, _ = run_shifted(closed, [x], shifts, None)
    unshifted, _ = run_shifted(closed, [x], None, None)
    assert not unmodelled
    for a, b, c, d in zip(plain, shifted, again, unshifted, strict=True):
        assert not np.array_equal(a, b)
        np.testing.assert_array_equal(b, c)
        np.testing.assert_array_equal(a, d)
