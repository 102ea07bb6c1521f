"""The float64 reading of programs, against JAX's own float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fcconv_jax.verification.obstacles import obstacles
from fcconv_jax.verification.reading import Reading
from fcconv_jax.verification.widening import widened
from fcconv_jax.versions import enable_x64

ROWS = np.array([0, 2, 2])
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def read(f, *args):
    outputs, _ = Reading(jax.make_jaxpr(f)(*args))(jax.tree.leaves(args))
    return outputs


def in_float64(f, *args):
    """The function on float64 arguments: what a program without casts reads as."""
    with enable_x64(True):
        wide = [np.asarray(x).astype(widened(np.asarray(x).dtype)) for x in args]
        return [np.asarray(y) for y in jax.tree.leaves(f(*wide))]


PROGRAMS = {
    "matmul": lambda x: x @ x.T,
    "highest": lambda x: jnp.dot(x, x.T, precision="highest"),
    "softmax": lambda x: jax.nn.softmax(x),
    "layer norm": lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 2**-20),
    "scatter": lambda x: (
        jnp.asarray(x).at[jnp.array([0, 2, 2])].add(1.5).at[1].mul(0.5)
    ),
    "reduce": lambda x: lax.reduce(x, x.dtype.type(0), lambda a, b: a + b, (0,)),
    "scan": lambda x: lax.scan(lambda c, r: (jnp.sin(c) + r, c), x[0], x)[1],
    "loop": lambda x: lax.fori_loop(0, 5, lambda i, y: jnp.sin(y) + i, x),
    "cond": lambda x: lax.cond(x[0, 0] > 9, jnp.sin, jnp.cos, x),
    "switch": lambda x: lax.switch(1, [jnp.sin, jnp.cos], x),
    "remat": jax.grad(lambda x: jax.checkpoint(lambda y: jnp.sin(y) ** 2)(x).sum()),
    "custom_jvp": jax.grad(lambda x: jax.nn.silu(jax.nn.relu(x)).sum()),
    "sort": lambda x: jnp.sort(x, 1),
    "fft": lambda x: jnp.abs(jnp.fft.fft(x)),
    "cholesky": lambda x: jnp.linalg.cholesky(x @ x.T + 4 * jnp.eye(4, dtype=x.dtype)),
    "pool": jax.grad(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID").sum()
    ),
    "vmap": jax.vmap(lambda r: lax.cond(r[0] > 0, jnp.sin, jnp.cos, r)),
    "complex": lambda x: jnp.einsum("ij,kj->ik", x + 1j * x, x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_reads_as_it_runs_in_float64(name):
    f = PROGRAMS[name]
    (got,), (want,) = read(f, X), in_float64(f, X)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


def test_float32_is_not_that_close():
    (got,) = read(PROGRAMS["matmul"], X)
    assert abs(got - np.asarray(X @ X.T)).max() > 1e-10


def test_casts_between_floats_are_left_out():
    def narrow(x):
        return (x.astype(jnp.bfloat16) @ x.T.astype(jnp.bfloat16)).astype(jnp.float32)

    (got,) = read(narrow, X)
    np.testing.assert_allclose(got, X.astype(float) @ X.T.astype(float), rtol=1e-14)


def test_masks_from_random_bits_are_the_program_s_own():
    key = jax.random.key(3)

    def masked(key, x):
        noise = jax.random.normal(key, x.shape)
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0), noise

    kept, noise = read(masked, key, X)
    want, drawn = masked(key, X)
    np.testing.assert_array_equal(kept, want)
    np.testing.assert_allclose(noise, drawn, rtol=1e-6)
    (gamma,) = read(lambda key: jax.random.gamma(key, 2.0, (5,)), key)
    # Drawn in float32: in float64 it would be another draw, off by whole numbers.
    np.testing.assert_allclose(gamma, jax.random.gamma(key, 2.0, (5,)), rtol=1e-6)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))

    def sizes(low, high):
        return [draw(st.integers(low, high)) for _ in range(rank)]

    groups, batch_groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
    channels, outs = (draw(st.integers(1, 3)) for _ in range(2))
    lhs = (draw(st.integers(1, 2)) * batch_groups, channels * groups, *sizes(1, 7))
    rhs = (outs * groups * batch_groups, channels, *sizes(1, 4))
    return (
        lhs,
        rhs,
        {
            "window_strides": sizes(1, 3),
            "padding": list(zip(sizes(-1, 3), sizes(-1, 3))),
            "lhs_dilation": sizes(1, 2),
            "rhs_dilation": sizes(1, 2),
            "feature_group_count": groups,
            "batch_group_count": batch_groups,
        },
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_every_convolution_is_lax_s_own(case):
    lhs, rhs, options = case
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=lhs), rng.normal(size=rhs)

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, **options)

    try:
        (want,) = in_float64(convolve, x, w)
    except (ValueError, TypeError):  # a window larger than its padded input
        return
    with enable_x64(True):
        (got,) = read(convolve, x, w)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "dims",
    [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC"), ("HWNC", "IOHW", "NCHW")],
)
def test_every_layout_of_a_convolution(dims):
    rng = np.random.default_rng(0)
    shapes = {"N": 2, "C": 3, "H": 5, "W": 4}, {"O": 6, "I": 3, "H": 2, "W": 3}
    x, w = (
        rng.normal(size=[sizes[axis] for axis in spec]).astype(np.float32)
        for sizes, spec in zip(shapes, dims)
    )

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=dims)

    (got,), (want,) = read(convolve, x, w), in_float64(convolve, x, w)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_names_come_out_of_calls_and_scans_in_order():
    def f(x):
        @jax.jit
        def inner(y):
            return checkpoint_name(jnp.sin(y), "z")

        def step(c, r):
            return checkpoint_name(c + r, "in the scan"), None

        x = inner(x)
        total, _ = lax.scan(step, x[0], x)
        return checkpoint_name(total, "a")

    jaxpr = jax.make_jaxpr(f)(X)
    _, named = Reading(jaxpr)([X])
    assert list(named) == ["z", "in the scan", "a"]
    assert named["in the scan"][0].shape == (4, 6)
    np.testing.assert_array_equal(named["in the scan"][0][-1], named["a"][0])


@pytest.mark.parametrize(
    ("f", "what"),
    [
        (jnp.signbit, "bits of a float"),
        (
            lambda x: lax.while_loop(lambda y: y.sum() > 1, lambda y: y / 2, x),
            "'while'",
        ),
        (
            lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4, 6), "f4"), x),
            "'pure_callback'",
        ),
    ],
)
def test_what_has_no_reading_is_named(f, what):
    (found,) = obstacles(jax.make_jaxpr(jax.jit(f))(X))
    assert what in found


def test_a_float_that_is_cut_by_its_bits_is_read():
    def cut(x):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
        high = lax.bitcast_convert_type(bits, jnp.float32)
        return high * high + (x - high) * (x + high)

    assert obstacles(jax.make_jaxpr(cut)(X)) == []
    (got,) = read(cut, X)
    np.testing.assert_allclose(got, X.astype(float) ** 2, rtol=1e-14)


def test_a_loop_of_a_fixed_number_of_steps_is_read():
    def f(x):
        return lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] / 3), (0, x)
        )[1]

    assert obstacles(jax.make_jaxpr(f)(X)) == []
    (got,) = read(f, X)
    np.testing.assert_allclose(got, X.astype(float) / 27, rtol=1e-15)
