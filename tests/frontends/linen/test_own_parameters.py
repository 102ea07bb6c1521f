from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import fcconv_jax as fc


def bits(tree):
    return [
        (jax.tree_util.keystr(path), np.shape(leaf), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


class Net(nn.Module):
    """Layers of Flax, and matmuls of its own on both sides of them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3))(x)).reshape(x.shape[0], -1)
        x = x @ self.param("fc6", nn.initializers.lecun_normal(), (x.shape[-1], 6))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        x = nn.remat(nn.Dense)(5, name="fc7")(x)
        self.sow("intermediates", "seen", x)
        return nn.Einsum((5, 3), "...c,co->...o", name="head")(x)


X = jax.random.normal(jax.random.key(1), (4, 3, 5, 2))
PLAN = fc.make_plan(Net(), X)
CONV = fc.convert_model(Net(), PLAN)
VARIABLES: Any = Net().init(jax.random.key(0), X)
MOVED: Any = fc.convert_params(VARIABLES, PLAN)


def test_init_is_the_init_of_the_model_converted_to_the_bit():
    assert set(PLAN) == {"fc6", "fc7", "head/kernel"}
    assert bits(CONV.init(jax.random.key(0), X)) == bits(MOVED)
    lazy = CONV.lazy_init(jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert jax.tree.map(jnp.shape, lazy) == jax.tree.map(jnp.shape, MOVED)


def test_mutable_collections_rngs_and_methods():
    options = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    net: Any = Net()
    want, stats = net.apply(VARIABLES, X, mutable=["batch_stats"], **options)
    for mutable in (["batch_stats"], ["params", "batch_stats"], True):
        y, there = CONV.apply(MOVED, X, mutable=mutable, **options)
        np.testing.assert_allclose(y, want, atol=1e-5)
        mean = there["batch_stats"]["BatchNorm_0"]["mean"]
        expected = stats["batch_stats"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(mean, expected, atol=1e-5)
        assert ("params" in there) == (mutable != ["batch_stats"])
        if "params" in there:
            assert bits(there["params"]) == bits(MOVED["params"])
    assert "seen" in CONV.apply(MOVED, X, mutable="intermediates")[1]["intermediates"]
    y = CONV.apply(MOVED, X, method=lambda model, x: model(x) * 2)
    np.testing.assert_allclose(y, 2 * CONV.apply(MOVED, X), rtol=1e-6)


def test_gradients_are_those_of_the_model_converted():
    def gradient(model, variables):
        def loss(params):
            return (model.apply({**variables, "params": params}, X) ** 2).sum()

        return jax.grad(loss)(variables["params"])

    want = fc.convert_params(gradient(Net(), VARIABLES), PLAN)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(CONV, MOVED),
        want,
    )


def test_inside_jit_and_vmap_and_one_trace_per_shape():
    traced = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traced.append(x.shape)
            return nn.Dense(3)(x @ self.param("w", nn.initializers.ones, (4, 4)))

    model, x = Counted(), jnp.arange(24.0).reshape(2, 3, 4)
    variables = model.init(jax.random.key(0), x)
    plan = fc.make_plan(model, x)
    conv, moved = fc.convert_model(model, plan), fc.convert_params(variables, plan)
    want: Any = model.apply(variables, x)
    traced.clear()
    for _ in range(2):
        np.testing.assert_allclose(conv.apply(moved, x), want, rtol=1e-5)
    assert len(traced) == 1
    mapped = jax.jit(jax.vmap(lambda each: conv.apply(moved, each)))
    np.testing.assert_allclose(mapped(x), want, rtol=1e-5)
    # Neither form is served a trace of the other.
    assert bits(model.apply(variables, x)) == bits(want)


@pytest.mark.slow
def test_a_train_state_trains():
    tx = optax.adam(1e-2)

    def steps(model, state):
        def loss(params):
            return (state.apply_fn({**VARIABLES, "params": params}, X) ** 2).mean()

        for _ in range(3):
            state = state.apply_gradients(grads=jax.grad(loss)(state.params))
        return state

    state = TrainState.create(
        apply_fn=jax.jit(Net().apply), params=VARIABLES["params"], tx=tx
    )
    there = fc.convert_train_state(state, PLAN, Net())
    want = fc.convert_params(steps(Net(), state).params, PLAN)
    got = steps(CONV, there).params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want
    )


def test_unconverted_or_otherwise_used_params_are_refused_by_name():
    with pytest.raises(fc.PlanError, match=r"converted params, got .*'fc7/kernel'"):
        CONV.apply(VARIABLES, X)
    mixed = {**MOVED, "params": {**MOVED["params"], "fc6": VARIABLES["params"]["fc6"]}}
    with pytest.raises(fc.PlanError, match=r"converted params, got 'fc6'"):
        CONV.apply(mixed, X)

    class Other(nn.Module):
        turned: bool = False

        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (4, 4))
            return x @ (w.T if self.turned else w)

    plan = fc.make_plan(Other(), X[:, 0, :4, 0])
    moved = fc.convert_params(Other().init(jax.random.key(0), jnp.ones((2, 4))), plan)
    with pytest.raises(fc.PlanError, match=r"'w' .* multiplied in another way"):
        fc.convert_model(Other(turned=True), plan).apply(moved, jnp.ones((2, 4)))


def test_the_way_back_and_own_convolutions():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (5, 3, 2, 6))
            x = jax.lax.conv_general_dilated(
                x, w, (1, 1), "VALID", dimension_numbers=("NWHC", "WHIO", "NHWC")
            )
            return nn.Conv(3, (1, 1))(x)

    x = jnp.round(X.transpose(0, 2, 1, 3) * 3)
    plan = fc.make_plan(Own(), x, to="dense")
    assert set(plan) == {"w", "Conv_0"}
    variables = jax.tree.map(
        lambda leaf: jnp.round(leaf * 9), Own().init(jax.random.key(0), x)
    )
    dense = fc.convert_model(Own(), plan)
    y = dense.apply(fc.convert_params(variables, plan), x)
    np.testing.assert_array_equal(y, Own().apply(variables, x))
    assert "conv" not in str(
        jax.make_jaxpr(dense.apply)(fc.convert_params(variables, plan), x)
    )


@pytest.mark.slow
def test_it_is_proved_and_stored(tmp_path):
    report = fc.verify(Net(), VARIABLES, X, plan=PLAN)
    assert report.passed, str(report)
    assert [layer.path for layer in report.layers] == list(PLAN)
    assert all(layer.certificate.passed for layer in report.layers)
    assert report.converted is not None
    assert report.converted.dots == 0
    opt_state = fc.convert_opt_state(
        optax.adam(1e-3).init(VARIABLES["params"]),
        PLAN,
        tx=optax.adam(1e-3),
        params=VARIABLES["params"],
    )
    assert opt_state[0].mu["fc6"].shape == MOVED["params"]["fc6"].shape
    from flax import serialization

    src = tmp_path / "net.msgpack"
    src.write_bytes(serialization.msgpack_serialize(VARIABLES))
    fc.convert_checkpoint(src, tmp_path / "conv.msgpack", PLAN)
    fc.restore_checkpoint(tmp_path / "conv.msgpack", tmp_path / "back.msgpack")
    back = serialization.msgpack_restore((tmp_path / "back.msgpack").read_bytes())
    assert bits(back) == bits(VARIABLES)


def test_a_wrong_matmul_is_caught():
    moved = jax.tree.map(lambda leaf: leaf, MOVED)
    moved["params"]["head"]["kernel"] = (
        moved["params"]["head"]["kernel"].at[0, 0].add(1)
    )
    report = fc.verify(
        Net(), VARIABLES, X, plan=PLAN, converted_params=moved, gradients=False
    )
    assert any("head/kernel" in failure for failure in report.failures)
    assert any("output" in failure for failure in report.failures)
