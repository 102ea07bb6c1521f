"""What a backend runs best changes the form's layout and no number."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import fcconv_jax as fc

BACKENDS = [None, "any", "cpu", "cuda:h100", "gpu", "rocm", "tpu", "tpu:v4", "tpu:v5e"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="map")(x)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # as PyTorch flattens
        x = nn.relu(nn.Dense(7, name="fc")(x))
        return nn.DenseGeneral(2, axis=-1, batch_dims=(0,), name="heads")(
            x.reshape(-1, 7)[:4]
        )


class Sequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="tokens")(x)


def integers(*shape, seed=0):
    return jnp.asarray(
        np.random.default_rng(seed).integers(-3, 4, shape), dtype=jnp.float32
    )


def of_integers(tree):
    return jax.tree.map(lambda leaf: integers(*leaf.shape, seed=leaf.size), tree)


X = integers(4, 3, 2, 6)


@pytest.fixture(scope="module")
def net():
    model = Net()
    return model, of_integers(model.init(jax.random.key(0), X))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_numbers(net, backend):
    model, variables = net
    plan = fc.make_plan(model, X, backend=backend)
    moved = fc.convert_params(variables, plan)
    conv = fc.convert_model(model, plan)
    np.testing.assert_array_equal(conv.apply(moved, X), model.apply(variables, X))
    back = fc.restore_params(moved, plan)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert fc.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_too(net, backend):
    model, variables = net

    def run(params, x):
        return model.apply({"params": params}, x)

    params = {**variables["params"], "unused": jnp.ones(3)}
    plan = fc.make_plan(run, params, X, backend=backend)
    assert len(plan) == 3
    moved = fc.convert_params(params, plan)
    conv = fc.convert_model(run, plan)
    np.testing.assert_array_equal(conv(moved, X), run(params, X))
    want = jax.grad(lambda p: run(p, X).sum())(params)
    got = jax.grad(lambda p: conv(p, X).sum())(moved)
    jax.tree.map(np.testing.assert_array_equal, fc.restore_params(got, plan), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nnx_models_too(backend):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.map = nnx.Linear(6, 5, rngs=rngs)
            self.fc = nnx.Linear(30, 7, rngs=rngs)

        def __call__(self, x):
            return self.fc(nnx.relu(self.map(x)).reshape(x.shape[0], -1))

    model = Model(nnx.Rngs(0))
    nnx.update(model, of_integers(nnx.state(model, nnx.Param)))
    plan = fc.make_plan(model, X, backend=backend)
    conv = fc.convert_model(model, plan)
    assert isinstance(conv.fc, nnx.Conv)
    np.testing.assert_array_equal(nnx.jit(conv)(X), model(X))
    again = fc.convert_model(conv, plan.inverse())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def layouts(model, x, backend):
    plan = fc.make_plan(model, x, backend=backend)
    return {p: f"{layer.kernel_layout} {layer.layout}" for p, layer in plan.items()}


def test_the_defaults_of_backends():
    every = {"map": "HWIO fold", "fc": "HWIO fold", "heads": "HWIO fold"}
    assert layouts(Net(), X, "any") == layouts(Net(), X, "rocm") == every
    assert layouts(Net(), X, "cpu") == dict.fromkeys(every, "HWIO flat")
    assert layouts(Net(), X, "cuda:a100") == dict.fromkeys(every, "OHWI flat")
    # Rows of 2 do not fill a TPU's tiles: folding them would copy.
    assert layouts(Net(), X, "tpu:v5e") == {**every, "map": "HWIO keep"}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_without_a_backend_it_is_the_one_at_hand(platform, monkeypatch):
    def same(device):
        assert device == jax.devices()[0]
        return platform

    monkeypatch.setattr("fcconv_jax.planning.layouts.jax_platform", same)
    named = layouts(Net(), X, platform)
    # The kernels are stored as everywhere: params convert alike on every machine.
    assert layouts(Net(), X, None) == {
        path: layout.replace("OHWI", "HWIO") for path, layout in named.items()
    }
    params = {"fc/kernel": (8, 7)}
    plan = fc.plan_from_params(params, ["fc=2x2:HWC"])
    assert (plan["fc"].layout, plan["fc"].kernel_layout) == (
        "flat" if platform in ("cpu", "cuda") else "fold",
        "HWIO",
    )


@pytest.mark.parametrize("generation", ["tpu", "tpu:v4", "tpu:v5e", "tpu:7x"])
def test_a_tpu_keeps_the_axes_that_it_would_copy_to_fold(generation):
    for shape, layout in (
        ((4, 128, 6), "fold"),  # 16 tiles of 8 rows each
        ((8, 197, 6), "keep"),  # the tokens of ViT-B/16
        ((1, 197, 6), "fold"),  # one image: nothing to fold
        ((8, 14, 14, 6), "keep"),
        ((2, 14, 16, 6), "fold"),  # the rows are those of the last axis
        ((64, 6), "fold"),
        ((6,), "fold"),
    ):
        found = layouts(Sequence(), jnp.zeros(shape), generation)
        assert found == {"tokens": f"HWIO {layout}"}, shape


def test_the_rows_are_those_beside_all_features():
    def heads(params, x):
        return jnp.einsum("nthd,hdo->nto", x, params["out"])

    params = {"out": jnp.zeros((4, 16, 6))}
    for tokens, layout in ((16, "fold"), (10, "keep")):
        x = jnp.zeros((2, tokens, 4, 16))
        plan = fc.make_plan(heads, params, x, rules=["out=1"], backend="tpu")
        assert plan["out"].dense_input_shape() == (2, tokens, 64)
        assert plan["out"].layout == layout


def test_a_stored_ohwi_kernel(net):
    model, variables = net
    plan = fc.make_plan(model, X, backend="cuda")
    assert plan["fc"].kernel.target == (7, 3, 2, 5)
    assert plan["heads"].kernel.target == (8, 1, 1, 7)
    assert "(30, 7) -> (7, 3, 2, 5) OHWI flat" in str(plan)
    dense = np.asarray(variables["params"]["fc"]["kernel"]).reshape(5, 3, 2, 7)
    moved = fc.convert_params(variables, plan)["params"]["fc"]["kernel"]
    np.testing.assert_array_equal(moved, dense.transpose(3, 1, 2, 0))


def test_grouped_windows_are_not_flat():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape(2, 3, 2, 3, 4).transpose(3, 0, 1, 2, 4).reshape(3, 2, 24)
            return nn.DenseGeneral(5, axis=-1, batch_dims=(0,), name="g")(x)

    rule = fc.Rule("g", window=(3, 2))
    x = integers(2, 3, 2, 12)
    plan = fc.make_plan(Grouped(), x, backend="cuda", rules=[rule])
    layer = plan["g"]
    assert (layer.groups, layer.layout, layer.kernel_layout) == (3, "fold", "OHWI")
    variables = of_integers(Grouped().init(jax.random.key(0), x))
    conv = fc.convert_model(Grouped(), plan)
    got = conv.apply(fc.convert_params(variables, plan), x)
    np.testing.assert_array_equal(got, Grouped().apply(variables, x))
    with pytest.raises(fc.PlanError, match="'flat' for a window of several groups"):
        dataclasses.replace(layer, layout="flat")


def test_rules_come_before_the_backend():
    rules = [
        fc.Rule("fc", layout="fold"),
        fc.Rule("map", kernel_layout="HWIO"),
        fc.Rule("heads", layout="keep", kernel_layout="HWIO"),
    ]
    plan = fc.make_plan(Net(), X, backend="cuda:b200", rules=rules)
    found = {p: (layer.kernel_layout, layer.layout) for p, layer in plan.items()}
    assert found == {
        "map": ("HWIO", "flat"),
        "fc": ("OHWI", "fold"),
        "heads": ("HWIO", "keep"),
    }


def test_a_backend_that_is_none():
    for name in ("xpu", "tpu:v9", "cpu:fast"):
        with pytest.raises(fc.PlanError, match=f"backend='{name}'.* There are cpu, "):
            fc.make_plan(Net(), X, backend=name)


def test_init_optimizer_and_specs_of_an_ohwi_kernel(net):
    model, variables = net
    plan = fc.make_plan(model, X, backend="cuda")
    key = jax.random.key(3)
    conv = fc.convert_model(model, plan)
    want = fc.convert_params(model.init(key, X), plan)
    jax.tree.map(np.testing.assert_array_equal, conv.init(key, X), want)
    assert "OHWI" in conv.tabulate(key, X)

    tx, params = optax.adam(1e-2), variables["params"]
    state = fc.convert_opt_state(tx.init(params), plan, tx=tx, params=params)
    fresh = tx.init(fc.convert_params(params, plan))
    jax.tree.map(np.testing.assert_array_equal, state, fresh)

    specs = jax.tree.map(lambda leaf: P(), params)
    specs["map"]["kernel"] = P(None, "m")
    moved = fc.convert_params(specs, plan)
    assert moved["map"]["kernel"] == P("m", None, None, None)
    assert fc.restore_params(moved, plan)["map"]["kernel"] == P(None, "m")


@pytest.mark.parametrize("backend", ["cpu", "cuda", "tpu:v6e"])
def test_the_certificate_is_of_the_layout_that_runs(net, backend):
    model, variables = net
    plan = fc.make_plan(model, X, backend=backend)
    report = fc.verify(model, variables, X, plan=plan, gradients=False)
    assert report.passed, report.failures
