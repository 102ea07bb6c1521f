"""Plans that take some layers to conv and others to dense, in one go."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import fcconv_jax as fc

RNG = np.random.default_rng(0)
X = RNG.integers(-2, 3, (2, 6, 4, 3)).astype(np.float32)


class Net(nn.Module):
    """A patch embedding, a grouped 1x1, a body and a head behind a flatten."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2), padding="VALID", name="patches")(x)
        x = nn.Conv(8, (1, 1), feature_group_count=2, use_bias=False, name="mix")(x)
        x = nn.relu(nn.Conv(8, (3, 3), name="body")(x))
        x = nn.relu(nn.Dense(5, name="each")(x))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return nn.Dense(4, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(
            3, 8, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs
        )
        self.each = nnx.Linear(8, 5, rngs=rngs)
        self.head = nnx.Linear(30, 4, rngs=rngs)
        self.own = nnx.Param(jnp.asarray(RNG.integers(-2, 3, (4, 6)), jnp.float32))
        self.own_conv = nnx.Param(
            jnp.asarray(RNG.integers(-2, 3, (1, 8, 8)), jnp.float32)
        )

    def __call__(self, x):
        x = self.patches(x)
        y = lax.conv_general_dilated(
            x.reshape(x.shape[0], -1, 8),
            self.own_conv[...],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        x = nnx.relu(self.each(y.reshape(x.shape)))
        return self.head(x.reshape(x.shape[0], -1)) @ self.own[...]


def function(params, x):
    x = lax.conv_general_dilated(
        x,
        params["patches"],
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.nn.relu(x).reshape(x.shape[0], -1) @ params["head"]


def both(model, *inputs):
    return fc.make_plan(model, *inputs) | fc.make_plan(model, *inputs, to="dense")


def integers(tree):
    return jax.tree.map(
        lambda leaf: jnp.asarray(RNG.integers(-2, 3, leaf.shape), jnp.float32), tree
    )


@pytest.fixture(scope="module")
def linen():
    model = Net()
    params = integers(model.init(jax.random.key(0), X)["params"])
    return model, params, both(model, X)


def test_a_linen_model_goes_both_ways(linen):
    model, params, plan = linen
    assert plan.to == "mix"
    assert {path: layer.to for path, layer in plan.items()} == {
        "each": "conv",
        "head": "conv",
        "patches": "dense",
        "mix": "dense",
    }
    converted = fc.convert_model(model, plan)
    moved = fc.convert_params(params, plan)
    assert moved["patches"]["kernel"].shape == (12, 8)
    assert moved["mix"]["kernel"].shape == (2, 4, 4)
    assert moved["head"]["kernel"].shape == (3, 2, 5, 4)
    want = model.apply({"params": params}, X)
    np.testing.assert_array_equal(converted.apply({"params": moved}, X), want)
    back = fc.restore_params(moved, plan)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    program = converted.apply.lower({"params": moved}, X).as_text()
    # "body" stays; "patches" and "mix" have become matmuls, "each" and "head" none.
    assert program.count("stablehlo.convolution") == 3
    assert program.count("stablehlo.dot_general") == 2


@pytest.mark.slow
def test_it_is_verified_and_trains_on(linen):
    model, params, plan = linen
    report = fc.verify(model, params, X, plan=plan)
    assert report.passed, str(report)
    assert report.to == "mix"
    assert str(report).startswith("EQUIVALENT: 4 layers to conv and dense, on ")
    assert (report.original.dots, report.original.convolutions) == (2, 3)
    tx = optax.adam(0.1)
    state = tx.init(params)
    moved = fc.convert_opt_state(state, plan, tx=tx, params=params)
    shapes = jax.tree.map(jnp.shape, fc.convert_params(params, plan))
    assert jax.tree.map(jnp.shape, moved[0].mu) == shapes


def test_the_inverse_goes_both_ways_too(linen):
    _, params, plan = linen
    inverse = plan.inverse()
    assert inverse.to == "mix"
    assert inverse.inverse() == plan
    moved = fc.convert_params(params, plan)
    back = fc.convert_params(moved, inverse)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_nnx_layers_and_parameters_go_both_ways():
    model = NnxNet(nnx.Rngs(0))
    nnx.update(model, integers(nnx.state(model)))
    plan = both(model, X)
    assert {path: layer.to for path, layer in plan.items()} == {
        "each": "conv",
        "head": "conv",
        "own": "conv",
        "patches": "dense",
        "own_conv": "dense",
    }
    want = model(X)
    converted = fc.convert_model(model, plan)
    assert isinstance(converted.patches, nnx.Linear)
    assert isinstance(converted.head, nnx.Conv)
    assert converted.own.shape == (1, 1, 4, 6)
    assert converted.own_conv.shape == (8, 8)
    np.testing.assert_array_equal(nnx.jit(converted)(X), want)
    again = fc.convert_model(converted, plan.inverse())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    np.testing.assert_array_equal(again(X), want)


def test_a_function_goes_both_ways():
    params = integers({"patches": jnp.zeros((2, 2, 3, 8)), "head": jnp.zeros((48, 5))})
    plan = both(function, params, X)
    assert {path: layer.to for path, layer in plan.items()} == {
        "head": "conv",
        "patches": "dense",
    }
    converted = fc.convert_model(function, plan)
    moved = fc.convert_params(params, plan)
    np.testing.assert_array_equal(converted(moved, X), function(params, X))


def test_the_json_says_where_each_layer_goes(linen):
    *_, plan = linen
    assert fc.Plan.from_json(plan.to_json()) == plan
    lines = str(plan).splitlines()
    assert lines[0] == "4 layers to conv and dense"
    assert lines[1].split() == ["path", "layer", "case", "kernel", "order", "to"]
    assert lines[2].endswith("conv")
    assert lines[5].endswith("dense")


def test_what_goes_one_way_only_does_not_join_its_opposite():
    plan = fc.make_plan(Net(), X)
    with pytest.raises(fc.PlanError, match="planned in two ways"):
        plan | plan.inverse()
    with pytest.raises(fc.PlanError, match=r"a plan to dense, with 'each' to conv"):
        fc.Plan("dense", plan.layers)
