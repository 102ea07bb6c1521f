"""``compare``: pairs that are one function, pairs that are not, and what it reports."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fcconv_jax as fc

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 7)).astype(np.float32)
FAR = (X + 30).astype(np.float32)  # a mean far from its spread
SQUARE = RNG.normal(size=(5, 5)).astype(np.float32)
POSITIVE = np.exp(X)
IMAGE = RNG.normal(size=(2, 6, 5, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)
MATRIX = RNG.normal(size=(7, 6)).astype(np.float32)
BF16 = jnp.asarray(X, jnp.bfloat16)


def gelu_by_hand(x):
    """GELU as transformers has it."""
    c = jnp.sqrt(2 / jnp.pi)
    return 0.5 * x * (1 + jnp.tanh(c * (x + 0.044715 * x**3)))


def layer_norm(x, eps=1e-6, scale=1.0):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return scale * (x - mean) * lax.rsqrt(variance + eps)


def layer_norm_one_pass(x):
    mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(square - mean**2 + 1e-6)


def softmax(x, shift=True):
    e = jnp.exp(x - x.max(-1, keepdims=True) if shift else x)
    return e / e.sum(-1, keepdims=True)


def positions(x):
    place = jnp.arange(5.0)[:, None]
    frequency = jnp.exp(jnp.arange(20.0) * (-jnp.log(1e4) / 20))
    return x[:, :1] + jnp.sin(place * frequency)


TABLE = np.sin(
    np.arange(5.0)[:, None] * np.exp(np.arange(20) * (-np.log(1e4) / 20))
).astype(np.float32)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def convolution(x, k):
    return lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolution_by_patches(x, k):
    rows = [x[:, i : i + 4, j : j + 3] @ k[i, j] for i in range(3) for j in range(3)]
    return sum(rows)


def looped(x):
    return lax.fori_loop(0, 5, lambda i, y: jnp.sin(y) * 0.9, x)


def unrolled(x):
    for _ in range(5):
        x = jnp.sin(x) * 0.9
    return x


@jax.custom_vjp
def scaled(x):
    return 1.5 * x


scaled.defvjp(lambda x: (1.5 * x, None), lambda _, g: (1.5 * g,))


@jax.custom_vjp
def wrongly_scaled(x):
    return 1.5 * x


wrongly_scaled.defvjp(lambda x: (1.5 * x, None), lambda _, g: (g,))


# One function, written in two ways: both functions, and what they take.
EQUAL = {
    "gelu by hand": (nn.gelu, gelu_by_hand, [X]),
    "gelu by erf": (
        lambda x: nn.gelu(x, approximate=False),
        lambda x: 0.5 * x * (1 + lax.erf(x / jnp.sqrt(2.0))),
        [X],
    ),
    "x / 255": (lambda x: x / 255, lambda x: x * (1 / 255), [X]),
    "x / 3": (lambda x: x / 3, lambda x: x * (1 / 3), [X]),
    "sqrt(2)": (lambda x: x * jnp.sqrt(2.0), lambda x: x * 2**0.5, [X]),
    "1.1**5": (lambda x: x * 1.1**5, lambda x: x * 1.1 * 1.1 * 1.1 * 1.1 * 1.1, [X]),
    "constants of bfloat16": (lambda x: x / 10, lambda x: x * 0.1, [BF16]),
    "degrees": (lambda x: jnp.deg2rad(x), lambda x: x * np.pi / 180, [X]),
    "log2": (lambda x: jnp.log2(x), lambda x: jnp.log(x) * 1.442695041, [POSITIVE]),
    "exp by exp2": (jnp.exp, lambda x: jnp.exp2(x * 1.442695041), [X]),
    "a table of sines": (positions, lambda x: x[:, :1] + TABLE, [X]),
    "mean and std of an image": (
        lambda x: (x - MEAN) / STD,
        lambda x: x * (1 / STD) - MEAN / STD,
        [IMAGE],
    ),
    "gelu in bfloat16": (nn.gelu, gelu_by_hand, [BF16]),
    "selu": (
        nn.selu,
        lambda x: (
            1.0507009873554805
            * jnp.where(x > 0, x, 1.6732632423543772 * (jnp.exp(x) - 1))
        ),
        [X],
    ),
    "a temperature": (
        lambda x: softmax(x / 0.7),
        lambda x: softmax(x * (1 / 0.7)),
        [X],
    ),
    "folded statistics": (
        lambda x: (x - 0.3) / jnp.sqrt(1.7 + 1e-5) * 1.2 + 0.1,
        lambda x: x * (1.2 / 1.70001**0.5) + (0.1 - 0.36 / 1.70001**0.5),
        [X],
    ),
    "silu": (nn.silu, lambda x: x / (1 + jnp.exp(-x)), [X]),
    "softmax without its shift": (softmax, lambda x: softmax(x, False), [X]),
    "softmax of jax": (softmax, jax.nn.softmax, [X]),
    "log of softmax": (jax.nn.log_softmax, lambda x: jnp.log(softmax(x)), [X]),
    "sigmoid by tanh": (jax.nn.sigmoid, lambda x: 0.5 + 0.5 * jnp.tanh(x / 2), [X]),
    "softplus": (jax.nn.softplus, lambda x: jnp.log1p(jnp.exp(x)), [X]),
    "relu by where": (nn.relu, lambda x: jnp.where(x > 0, x, 0.0), [X]),
    "relu at 0": (nn.relu, lambda x: jnp.maximum(x, 0.0), [np.round(X)]),
    "the largest of equals": (
        lambda x: x.max(-1),
        lambda x: jnp.sort(x, -1)[..., -1],
        [np.round(X)],
    ),
    "a norm of layers": (layer_norm, nn.LayerNorm(use_scale=False, use_bias=False), X),
    "variance in one pass": (
        lambda x: (x * x).mean(-1) - x.mean(-1) ** 2,
        lambda x: x.var(-1),
        [FAR],
    ),
    "a sum from behind": (lambda x: x.sum(0), lambda x: x[::-1].sum(0), [X]),
    "a cumulative sum": (
        lambda x: jnp.cumsum(x, -1),
        lambda x: x @ jnp.triu(jnp.ones((7, 7))),
        [X],
    ),
    "a matmul by einsum": (
        jnp.matmul,
        lambda x, w: jnp.einsum("nk,km->nm", x, w),
        None,
    ),
    "a matmul by parts": (
        jnp.matmul,
        lambda x, w: x[:, :3] @ w[:3] + x[:, 3:] @ w[3:],
        None,
    ),
    "a convolution by patches": (convolution, convolution_by_patches, [IMAGE, KERNEL]),
    "a loop unrolled": (looped, unrolled, [X]),
    "a scan for a sum": (
        lambda x: lax.scan(lambda c, r: (c + r, None), jnp.zeros(7), x)[0],
        lambda x: x.sum(0),
        [X],
    ),
    "vmap": (jax.vmap(lambda x: x @ x), lambda x: (x * x).sum(-1), [X]),
    "a solve by an inverse": (
        lambda a, b: jnp.linalg.solve(a, b),
        lambda a, b: jnp.linalg.inv(a) @ b,
        [SQUARE, X],
    ),
    "a solve by Cholesky": (
        lambda a, b: jnp.linalg.solve(a @ a.T + jnp.eye(5), b),
        lambda a, b: jax.scipy.linalg.cho_solve(
            (jnp.linalg.cholesky(a @ a.T + jnp.eye(5)), True), b
        ),
        [SQUARE, X],
    ),
    "a determinant": (
        jnp.linalg.det,
        lambda a: jnp.exp(jnp.linalg.slogdet(a)[1]) * jnp.linalg.slogdet(a)[0],
        [SQUARE],
    ),
    "a custom_vjp that is right": (lambda x: 1.5 * x, scaled, [X]),
    "checkpoint": (
        lambda x: jnp.sin(jnp.sin(x)),
        jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
        [X],
    ),
    "nothing but rounding": (lambda x: x - x, lambda x: 3 * x - x - x - x, [X]),
    "a key": (
        lambda x: (x, jax.random.key(3)),
        lambda x: (x + 0, jax.random.key(3)),
        [X],
    ),
    "the same draws": (
        lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
        lambda x: jax.random.normal(jax.random.key(0), x.shape) + x,
        [X],
    ),
    "an index": (lambda x: x.argmax(-1), lambda x: (-x).argmin(-1), [X]),
    "NaN in some entries": (jnp.log, lambda x: jnp.log(jnp.abs(x) * jnp.sign(x)), [X]),
}

# Two functions that are near each other.
DIFFERENT = {
    "eps": (layer_norm, lambda x: layer_norm(x, 1e-5), [X]),
    "eps, of one row": (layer_norm, lambda x: layer_norm(x, 1e-5), [X[:1]]),
    "a scale of 1 + 1e-6": (
        lambda x: layer_norm(x, scale=0.1),
        lambda x: layer_norm(x, scale=0.1 * (1 + 1e-6)),
        [X],
    ),
    "a scale of 1 + 1e-6 among constants": (
        gelu_by_hand,
        lambda x: gelu_by_hand(x) * (1 + 1e-6),
        [X],
    ),
    "a scale of 1 + 1e-6 for 1": (lambda x: x, lambda x: x * (1 + 1e-6), [X]),
    "an offset of 1e-6": (lambda x: x + 0.1, lambda x: x + 0.100001, [X]),
    "tanh for erf": (lambda x: nn.gelu(x, approximate=False), nn.gelu, [X]),
    "a digit of a constant": (
        gelu_by_hand,
        lambda x: 0.5 * x * (1 + jnp.tanh(0.797885 * (x + 0.044715 * x**3))),
        [X],
    ),
    "0.0447 for 0.044715": (
        gelu_by_hand,
        lambda x: 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.0447 * x**3))),
        [X],
    ),
    "256 for 255": (lambda x: x / 255, lambda x: x / 256, [X]),
    "a constant in bfloat16": (
        lambda x: x * 0.1,
        lambda x: x * jnp.bfloat16(0.1).astype(jnp.float32),
        [X],
    ),
    "a table shifted by one": (positions, lambda x: x[:, :1] + np.roll(TABLE, 1), [X]),
    "a table scaled by 1 + 1e-6": (
        positions,
        lambda x: x[:, :1] + TABLE * np.float32(1 + 1e-6),
        [X],
    ),
    "one entry of a table": (
        lambda x: x[:, :1] + TABLE,
        lambda x: x[:, :1] + np.where(TABLE[2, 3] == TABLE, TABLE + 1e-5, TABLE),
        [X],
    ),
    "std of another channel": (
        lambda x: (x - MEAN) / STD,
        lambda x: (x - MEAN) / STD[::-1],
        [IMAGE],
    ),
    "n - 1 for n": (lambda x: x.var(-1), lambda x: x.var(-1, ddof=1), [X]),
    "softmax over the other axis": (
        lambda x: jax.nn.softmax(x, -1),
        lambda x: jax.nn.softmax(x, 0),
        [X],
    ),
    "leaky relu": (nn.relu, lambda x: nn.leaky_relu(x, 1e-7), [X]),
    "a step less": (
        looped,
        lambda x: lax.fori_loop(0, 4, lambda i, y: jnp.sin(y) * 0.9, x),
        [X],
    ),
    "a transposed matrix": (lambda x: x @ x.T, lambda x: (x.T @ x)[:5, :5], [X]),
    "a flipped kernel": (
        convolution,
        lambda x, k: convolution(x, k[::-1]),
        [IMAGE, KERNEL],
    ),
    "another key": (
        lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
        lambda x: x + jax.random.normal(jax.random.key(1), x.shape),
        [X],
    ),
    "a key that is returned": (
        lambda x: jax.random.key(0),
        lambda x: jax.random.key(1),
        [X],
    ),
    "a shape": (lambda x: x.sum(0), lambda x: x.sum(0, keepdims=True), [X]),
    "a reshape": (lambda x: x, lambda x: x.reshape(7, 5), [X]),
    "bool and int": (lambda x: x > 0, lambda x: (x > 0).astype(np.int32), [X]),
    "float32 and bfloat16": (lambda x: x, lambda x: x.astype(jnp.bfloat16), [X]),
    "names": (lambda x: {"a": x, "b": x}, lambda x: {"c": x, "d": x}, [X]),
    "a list for a tuple": (lambda x: (x, x), lambda x: [x, x], [X]),
    "an output less": (lambda x: (x, x), lambda x: (x,), [X]),
    "None": (lambda x: (x, None), lambda x: (x,), [X]),
    "one NaN": (lambda x: x, lambda x: x.at[0, 0].set(jnp.nan), [X]),
    "infinity for a large number": (
        lambda x: jnp.where(x > 0, x, -1e30),
        lambda x: jnp.where(x > 0, x, -jnp.inf),
        [X],
    ),
    "stop_gradient": (
        lambda x: jnp.sin(x) * x,
        lambda x: jnp.sin(x) * lax.stop_gradient(x),
        [X],
    ),
    "a custom_vjp that is wrong": (lambda x: 1.5 * x, wrongly_scaled, [X]),
    "a gradient of NaN": (
        lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0),
        lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0),
        [X],
    ),
    "a straight-through estimator": (
        jnp.round,
        lambda x: x + lax.stop_gradient(jnp.round(x) - x),
        [X],
    ),
}


def compared(case, **options):
    f, g, args = case
    args = [X, MATRIX] if args is None else args
    return fc.compare(f, g, args, progress=False, **options)


@pytest.mark.parametrize("name", EQUAL)
def test_one_function_in_two_ways(name):
    if name == "a norm of layers":
        f, g, x = EQUAL[name]
        found = fc.compare(f, g, [x], [g.init(jax.random.key(0), x), x], progress=False)
    else:
        found = compared(EQUAL[name])
    if name == "variance in one pass":  # the first loses digits, not the second
        found = compared((*reversed(EQUAL[name][:2]), EQUAL[name][2]))
        assert found.verdict == "lower precision", str(found)
    else:
        assert found.passed, str(found)
    # The margin that docs/howto/compare.md shows.
    assert found.distance is None or found.distance < 2.5
    assert (found.verdict == "rounded constants") == bool(
        found.constants or found.rounded_tables
    )


@pytest.mark.parametrize("name", DIFFERENT)
def test_two_functions(name):
    found = compared(DIFFERENT[name])
    assert found.verdict == "different functions", str(found)
    assert found.failures
    assert found.distance is None or found.distance > 10


class TestInterface:
    def test_what_differs_is_named(self):
        found = compared(DIFFERENT["names"])
        assert found.failures == (
            "expected outputs 'output/a', 'output/b', got 'output/c', 'output/d' in "
            "their place",
        )
        (why,) = compared(DIFFERENT["bool and int"]).failures
        assert why == (
            "'output': expected bool of shape (5, 7), got int32 of shape (5, 7)"
        )

    @pytest.mark.parametrize("name", ["a reshape", "bool and int", "names", "a shape"])
    def test_values_alone(self, name):
        found = compared(DIFFERENT[name], values_only=True)
        assert found.passed, str(found)

    def test_values_alone_differ_still(self):
        found = compared((lambda x: x, lambda x: x[:4], [X]), values_only=True)
        assert found.failures == ("expected outputs of [35] entries, got [28]",)
        found = compared((lambda x: x, lambda x: x.T, [X]), values_only=True)
        assert found.verdict == "different functions"


class TestNothingToCompare:
    def test_no_finite_entry(self):
        found = compared((lambda x: x * np.nan, lambda x: np.nan + x * np.nan, [X]))
        assert (found.verdict, found.passed) == ("unknown", False)
        assert "35 of 35 entries (100%) are NaN or infinite" in str(found)

    def test_a_share_is_reported(self):
        found = compared(EQUAL["NaN in some entries"])
        count = int(np.isnan(np.log(np.where(X > 0, X, np.nan))).sum())
        assert f"{count} of 35 entries" in str(found)

    def test_no_entry(self):
        found = compared((lambda x: x[:0], lambda x: x[:0] + 1, [X]))
        assert found.verdict == "unknown"
        assert "nothing was compared" in found.failures[0]

    def test_an_operation_without_a_reading_is_named(self):
        def f(x):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jax.pure_callback(np.sin, shape, x, vmap_method="sequential")

        found = compared((f, jnp.sin, [X]))
        assert found.verdict in ("unknown", "the same bits")
        assert "'pure_callback' runs its own code" in str(found)
        assert "compared instead: the outputs on cpu" in str(found)
        assert "1 output in the working precision alone" in found.headline


class TestGradients:
    def test_the_headline_lists_what_was_compared(self):
        found = compared(EQUAL["silu"])
        assert ": 1 output and 1 gradient on these inputs, on cpu" in found.headline
        found = compared(EQUAL["silu"], gradients=False)
        assert ": 1 output on these inputs, on cpu" in found.headline
        assert "note: no gradients: gradients=False" in str(found)

    def test_outputs_alone_pass(self):
        assert compared(DIFFERENT["stop_gradient"], gradients=False).passed
        (why,) = compared(DIFFERENT["stop_gradient"]).failures
        assert why.startswith("'gradient/input/0': expected ")

    def test_a_program_without_gradients(self):
        def loop(x):
            return lax.while_loop(
                lambda c: c[0] < 5, lambda c: (c[0] + 1, jnp.sin(c[1]) * 0.9), (0, x)
            )[1]

        found = compared((unrolled, loop, [X]))
        assert found.passed
        assert "no gradients: the second program has none" in str(found)
        assert compared((unrolled, loop, [X]), gradients=True).verdict == "unknown"

    def test_a_kink_is_no_difference(self):
        found = compared(EQUAL["relu at 0"])
        assert found.passed
        assert "a kink, such as a relu at 0" in str(found)

    def test_long_ones_are_left_out(self, monkeypatch):
        monkeypatch.setattr("fcconv_jax.verification.compare._CHEAP", -1.0)
        found = compared(EQUAL["silu"])
        assert not found.gradients
        assert "Pass gradients=True" in str(found)
        assert compared(EQUAL["silu"], gradients=True).gradients


@pytest.mark.parametrize("args", [{"params": {}}, X, "x"])
def test_arguments_that_are_no_list(args):
    with pytest.raises(TypeError, match=r"Expected f_args .* Pass compare\(f, g, "):
        fc.compare(jnp.sin, jnp.sin, args)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_arrays_of_64_bits(dtype):
    """NumPy's integers, as token ids have them: a call reads them in 32 bits."""
    ids, matrix = np.array([3, 1, 5], dtype), MATRIX.astype(np.float64)

    def table(w, ids):
        return w[ids]

    def product(w, ids):
        return jax.nn.one_hot(ids, 7, dtype=w.dtype) @ w

    assert fc.compare(table, product, [matrix, ids], progress=False).passed
