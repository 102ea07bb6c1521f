"""The bound must hold against float64, and defects must exceed it by a wide margin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from fcconv_jax.verification.bounds import compare, error_bounds
from fcconv_jax.verification.perturbation import UnboundedError
from fcconv_jax.verification.sensitivity import Functional

_RNG = np.random.default_rng(0)


def _normal(*shape, scale=1.0):
    return jnp.asarray(_RNG.normal(size=shape) * scale, jnp.float32)


def _conv_op(x, k):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=dims)


def _mlp(p, x):
    h = jax.nn.relu(x @ p["w"] + p["b"])
    return jax.nn.softmax(h @ p["v"])


def _convnet(p, x):
    x = jax.nn.relu(_conv_op(x, p["k"]) + p["b"])
    pool = (1, 2, 2, 1)
    x = lax.reduce_window(x, -np.inf, lax.max, pool, pool, "VALID")
    return x.reshape(x.shape[0], -1) @ p["w"]


def _layernorm(p, x):
    x = x + p["b"]
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6) * p["s"]


def _attention(p, x):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]).astype(np.float32)
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores) @ v


def _rnn(p, x):
    def step(h, x):
        h = jnp.tanh(h @ p["u"] + x @ p["w"])
        return h, h @ p["v"]

    h, ys = lax.scan(step, jnp.zeros((x.shape[1], p["u"].shape[0]), x.dtype), x)
    return h, ys


def _branches(p, x):
    def twice(x):
        return jax.checkpoint(jnp.exp)(x @ p["w"])

    def once(x):
        return jnp.log1p(jnp.square(x @ p["w"]))

    return lax.cond(jnp.sum(x) > 0, twice, once, x), lax.switch(0, [once, twice], x)


def _loss_gradient(p, x):
    return jax.grad(lambda p: -jnp.mean(jnp.log(_mlp(p, x)[:, 0])))(p)


def _conv_gradient(p, x):
    return jax.grad(lambda p: jnp.mean(jnp.square(_convnet(p, x))))(p)


def _adam_step(p, x):
    tx = optax.adam(1e-2, eps=1e-4)
    updates, state = tx.update(_loss_gradient(p, x), tx.init(p), p)
    return optax.apply_updates(p, updates), state


def _embedding_gradient(p, x):
    index = jnp.array([0, 1, 1, 1, 3])
    return jax.grad(lambda p: jnp.sum(jnp.tanh(p["e"][index] @ x)))(p)


_MLP = {
    "w": _normal(24, 32, scale=0.2),
    "b": _normal(32),
    "v": _normal(32, 5, scale=0.5),
}
_CONVNET = {
    "k": _normal(3, 2, 3, 8, scale=0.3),
    "b": _normal(8),
    "w": _normal(48, 4, scale=0.2),
}
_QKV = {name: _normal(16, 8, scale=0.4) for name in "qkv"}
_RNN = {
    "u": _normal(8, 8, scale=0.5),
    "w": _normal(3, 8),
    "v": _normal(8, 2),
}
# Large dynamic range, and cancellation: pairs of rows that nearly cancel.
_ADVERSARIAL = _normal(6, 24) * 10.0 ** _normal(6, 24)
_ADVERSARIAL = _ADVERSARIAL.at[:, 12:].set(-_ADVERSARIAL[:, :12] * 1.0001)
_PAIRED = {**_MLP, "w": jnp.concatenate([_MLP["w"][:12]] * 2)}

PROGRAMS = {
    "mlp": (_mlp, _MLP, _normal(6, 24)),
    "mlp, cancellation": (_mlp, _PAIRED, _ADVERSARIAL),
    "convnet": (_convnet, _CONVNET, _normal(2, 6, 7, 3)),
    "layernorm": (
        _layernorm,
        {"b": _normal(32), "s": _normal(32)},
        _normal(4, 32) + 100,
    ),
    "attention": (_attention, _QKV, _normal(2, 7, 16, scale=2.0)),
    "scanned RNN": (_rnn, _RNN, _normal(9, 4, 3)),
    "branches and remat": (_branches, {"w": _normal(24, 3, scale=0.1)}, _normal(4, 24)),
    "conv gradient": (_conv_gradient, _CONVNET, _normal(2, 6, 7, 3)),
    "adam step": (_adam_step, _MLP, _normal(6, 24)),
    "embedding gradient": (_embedding_gradient, {"e": _normal(4, 6)}, _normal(6, 3)),
}


def _oracle(f, *args):
    def widen(x):
        x = np.asarray(x)
        wide = np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return x.astype(wide)

    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: jnp.asarray(widen(x)), args)
        return jax.tree.map(np.asarray, f(*args))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in PROGRAMS]
    + [(n, "bfloat16") for n in ("mlp", "convnet", "layernorm")],
)
def test_one_program_keeps_its_bound(name, dtype):
    f, *args = PROGRAMS[name]
    args = jax.tree.map(lambda x: x.astype(dtype), args)
    model = error_bounds(f, *args)
    assert not model.unmodelled
    want = jax.tree.leaves(_oracle(f, *args))
    leaves, treedef = jax.tree.flatten(model.outputs)
    ratios = []
    for i, (leaf, exact) in enumerate(zip(leaves, want)):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        error = abs(np.asarray(leaf, np.float64) - exact)
        for index in {int(error.argmax()), 0, error.size - 1}:
            one = np.zeros(error.size)
            one[index] = 1
            zeros = [jnp.zeros_like(x) for x in leaves]
            zeros[i] = jnp.asarray(one.reshape(error.shape), leaf.dtype)
            bound = float(model.bound(jax.tree.unflatten(treedef, zeros), programs=1))
            assert error.reshape(-1)[index] <= bound < np.inf, (i, index)
            if index == error.argmax() and error.max():
                ratios.append(bound / error.max())
    assert ratios
    print(f"{name} {dtype}: bound over error {min(ratios):.3g}..{max(ratios):.3g}")


def _pair(x, p):
    """Dense after a flatten, and the same with a convolution."""

    def dense(p, x):
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ p["w"] + p["b"]) @ p["v"]

    def conv(p, x, kernel=lambda w: w):
        k = kernel(p["w"]).reshape(*x.shape[1:], -1)
        return jax.nn.relu(_conv_op(x, k)[:, 0, 0] + p["b"]) @ p["v"]

    def losses(f):
        return lambda p, x: jax.grad(lambda p: jnp.mean(jnp.square(f(p, x))))(p)

    return dense, conv, losses


def _swapped(w):
    return w.at[jnp.array([17, 18])].set(w[jnp.array([18, 17])])


_DEFECTS = {
    "two rows swapped": _swapped,
    "flipped kernel": lambda w: w.reshape(3, 4, 5, -1)[::-1, ::-1],
    "CHW read as HWC": lambda w: w.reshape(5, 3, 4, -1).transpose(1, 2, 0, 3),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request):
    dtype = request.param
    x = _normal(4, 3, 4, 5).astype(dtype)
    p = {
        "w": _normal(60, 16, scale=0.3).astype(dtype),
        "b": _normal(16).astype(dtype),
        "v": _normal(16, 3).astype(dtype),
    }
    dense, conv, losses = _pair(x, p)
    return (
        error_bounds(dense, p, x),
        error_bounds(losses(dense), p, x),
        conv,
        losses,
        p,
        x,
    )


def test_the_other_form_is_within_the_bound(pair):
    outputs, gradients, conv, losses, p, x = pair
    for model, f in ((outputs, conv), (gradients, losses(conv))):
        for leaf in compare(model, jax.jit(f)(p, x)):
            assert leaf.passed, leaf
            assert leaf.tightness >= 1
            assert leaf.max_abs_error <= leaf.likely_bound <= leaf.bound
            assert leaf.reason == ""


@pytest.mark.parametrize("name", _DEFECTS)
def test_a_defect_exceeds_the_bound_widely(pair, name):
    outputs, _, conv, _, p, x = pair
    (leaf,) = compare(outputs, conv(p, x, _DEFECTS[name]))
    assert not leaf.passed
    assert "more than the bound" in leaf.reason
    margin = 100 if x.dtype == jnp.float32 else 2
    assert leaf.max_abs_error > margin * leaf.bound, leaf


def test_a_small_output_beside_a_large_one_is_tested():
    model = error_bounds(lambda x: x * 3, jnp.array([1e6, 1e-3]))
    got = model.outputs.at[1].mul(1.01)
    (leaf,) = compare(model, got)
    assert not leaf.passed
    got = model.outputs.at[0].add(0.25).at[1].add(1e-4)
    (leaf,) = compare(model, got)
    assert leaf.index == (0,)
    assert "at (1,)" in leaf.reason


def test_a_drift_that_rounding_cannot_cause_is_caught():
    # All outputs share the error of one long sum, half of them with the other sign: a
    # drift of all of them upwards is within the bound of each, but not of their sum.
    signs = jnp.where(jnp.arange(50) < 25, 1.0, -1.0)
    model = error_bounds(lambda x: jnp.sum(x) * signs, _normal(40, 30))
    one = float(model.bound(jnp.zeros(50).at[0].set(1.0)))
    (leaf,) = compare(model, model.outputs + 0.9 * one * signs)
    assert leaf.passed, leaf
    (leaf,) = compare(model, model.outputs + 0.9 * one)
    assert leaf.reason.startswith("differences sum to")


def test_likely_bound_is_the_root_of_the_sum_of_squares():
    # 10000 roundings of one size: 2 * 10000 against 7 sqrt(2) * 100.
    x = jnp.ones(10_000)
    many = error_bounds(lambda x: x * 3, x)
    (total,), (root,) = many.sensitivity.first_order([Functional()], [x])
    assert float(total / root) == pytest.approx(100, rel=1e-3)
    assert many.likely(x) < many.bound(x) / 3


def test_integers_and_keys_must_be_equal():
    def f(x, key):
        return {"n": jnp.argmax(x), "key": key, "ok": x > 0}

    x, key = jnp.array([1.0, 3.0, -2.0]), jax.random.key(1)
    model = error_bounds(f, x, key)
    assert all(leaf.passed for leaf in compare(model, f(x, key)))
    found = compare(model, f(-x, jax.random.key(2)))
    assert [leaf.path for leaf in found if not leaf.passed] == ["key", "n", "ok"]
    assert "no rounding" in found[1].reason


def test_infinities_and_nans_must_be_at_their_places():
    x = jnp.array([0.0, 1.0, -1.0, 2.0])
    model = error_bounds(jnp.log, x)
    (leaf,) = compare(model, jnp.log(x))
    assert leaf.passed, leaf
    for index, value in ((0, jnp.inf), (2, 0.0), (3, jnp.nan)):
        (leaf,) = compare(model, jnp.log(x).at[index].set(value))
        assert not leaf.passed
        assert f"at ({index},)" in leaf.reason


def test_shapes_dtypes_and_structures_must_agree():
    model = error_bounds(lambda x: {"y": x * 2}, jnp.ones((2, 3)))
    (leaf,) = compare(model, {"y": jnp.ones((3, 2))})
    assert "expected float32(2, 3), got float32(3, 2)" in leaf.reason
    (leaf,) = compare(model, {"y": 2 * jnp.ones((2, 3), jnp.bfloat16)})
    assert not leaf.passed
    with pytest.raises(ValueError, match="differ in structure"):
        compare(model, {"z": jnp.ones((2, 3))})


def test_derivatives_that_are_stopped_or_infinite_do_not_hide_errors():
    # A stopped gradient still carries its error on.
    x = _normal(64)
    stopped = error_bounds(lambda x: jnp.sum(lax.stop_gradient(x * 3)), x)
    plain = error_bounds(lambda x: jnp.sum(x * 3), x)
    one = [jnp.float32(1)]
    of = [
        model.sensitivity.first_order([Functional()], one) for model in (stopped, plain)
    ]
    np.testing.assert_allclose(*of)

    # sqrt at 0 behind a where: its infinite slope must not become NaN.
    def f(x):
        y = x * 1.5
        return jnp.where(y > 0, jnp.sqrt(y * y), 0.0)

    model = error_bounds(f, jnp.array([0.0, 4.0]))
    bound = float(model.bound(jnp.ones(2)))
    assert 0 < bound < 1e-4


def test_a_mask_that_may_flip_is_in_the_bound():
    # The gradient of relu jumps where its input rounds to one side or the other.
    w = jnp.float32(1 / 3)

    def slope(x):
        total = x * w + x * w + x * w - x
        return jnp.where(total > 0, 1.0, -1.0) * x

    model = error_bounds(slope, jnp.float32(1.1))
    assert 1 < float(model.bound(jnp.float32(1))) < 10
    model = error_bounds(
        lambda x: jnp.where(x * w > 0, 1.0, -1.0) * x, jnp.float32(1.1)
    )
    assert float(model.bound(jnp.float32(1))) < 1e-5


def test_float_while_loops_are_refused_and_integer_ones_are_not():
    def floats(x):
        return lax.while_loop(lambda c: c < 9, lambda c: c * 2, x)

    with pytest.raises(UnboundedError, match="'while'"):
        error_bounds(floats, jnp.float32(1))

    def integers(x):
        n = lax.while_loop(lambda n: n * n < 50, lambda n: n + 1, jnp.int32(1))
        return x * n

    assert float(error_bounds(integers, jnp.float32(2)).outputs) == 16


def test_unmodelled_primitives_are_listed():
    model = error_bounds(lambda a: jnp.linalg.cholesky(a), jnp.eye(3))
    assert model.unmodelled == ("cholesky",)
    assert error_bounds(lambda a: a @ a, jnp.eye(3)).unmodelled == ()


def test_what_has_no_reverse_pass_is_named():
    def f(x, start):
        return lax.reduce_window(x * 3, start, lax.max, (2,), (2,), "VALID")

    with pytest.raises(UnboundedError, match="reduce_window"):
        error_bounds(f, jnp.arange(4.0), jnp.float32(0))


def test_random_masks_are_the_same_in_both_programs():
    def dropout(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x * 2, 0)

    model = error_bounds(dropout, jnp.ones(100), jax.random.key(0))
    assert model.unmodelled == ()
    assert float(model.bound(jnp.ones(100))) < 1e-4
