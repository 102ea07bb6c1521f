"""Models with sizes that jax.export leaves open: planned, converted and exported."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from conftest import one_in
from flax import nnx
from jax import export
from trees import assert_trees_all_close

import fcconv_jax as fc

B, T, H, W = export.symbolic_shape("b, t, h, w")
SIZES = {B: 3, T: 7, H: 6, W: 5, 4 * H: 8, 4 * W: 12}


class Head(nn.Module):
    """Behind a flatten."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3))(x)).reshape(x.shape[0], -1))


class Tokens(nn.Module):
    """A transformer's block."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(5)(nn.gelu(nn.Dense(16)(x)))


class Cnn(nn.Module):
    """On images of any size."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(nn.relu(nn.Conv(4, (1, 1))(x)).mean((1, 2)))


CASES = {
    "head": (Head(), (B, 4, 5, 3), "conv", {"Dense_0": "full_window"}),
    "tokens": (Tokens(), (B, T, 8), "conv", {"Dense_0": "pointwise"}),
    "cnn to conv": (Cnn(), (B, H, W, 3), "conv", {"Dense_0": "pointwise"}),
    "cnn to dense": (Cnn(), (B, H, W, 3), "dense", {"Conv_1": "pointwise"}),
    "1x1": (nn.Conv(4, (1, 1)), (B, H, H, 3), "dense", {"": "pointwise"}),
    "patches": (
        nn.Conv(5, (4, 4), (4, 4)),
        (B, 4 * H, 4 * W, 3),
        "dense",
        {"": "patchify"},
    ),
}


@pytest.mark.parametrize("name", one_in(3, CASES))
def test_linen_models_plan_and_export(name):
    model, symbolic, to, expected = CASES[name]
    abstract = jax.ShapeDtypeStruct(symbolic, jnp.float32)
    plan = fc.make_plan(model, abstract, to=to)
    assert {path: plan[path].case for path in expected} == expected
    assert fc.Plan.from_json(plan.to_json()) == plan
    x = jax.random.normal(jax.random.key(0), [SIZES.get(n, n) for n in symbolic])
    fixed = fc.make_plan(model, x, to=to)
    assert {p: layer.leaves for p, layer in fixed.items()} == {
        p: layer.leaves for p, layer in plan.items()
    }
    variables = model.init(jax.random.key(1), x)
    moved = fc.convert_params(variables, plan)
    converted = fc.convert_model(model, plan)
    exported = export.export(converted.apply)(moved, abstract)
    assert_trees_all_close(
        exported.call(moved, x), model.apply(variables, x), atol=1e-5
    )
    fc.assert_equivalent(model, variables, x, plan=plan, gradients=False)


def test_functions_and_nnx_models_plan_and_export():
    net = nnx.Linear(12, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 3))
    abstract = jax.ShapeDtypeStruct((B, 2, 2, 3), jnp.float32)

    def call(params, x):
        return x.reshape(x.shape[0], -1) @ params["w"]

    params = {"w": net.kernel[...]}
    plan = fc.make_plan(call, params, abstract)
    assert plan["w"].case == "full_window"
    moved = fc.convert_params(params, plan)
    exported = export.export(fc.convert_model(call, plan))(moved, abstract)
    assert_trees_all_close(exported.call(moved, x), call(params, x), atol=1e-5)

    class Flat(nnx.Module):
        def __init__(self):
            self.dense = net

        def __call__(self, x):
            return self.dense(x.reshape(x.shape[0], -1))

    plan = fc.make_plan(Flat(), abstract)
    assert plan["dense"].window == (2, 2)
    graph, state = nnx.split(fc.convert_model(Flat(), plan))
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    exported = export.export(run)(state, abstract)
    assert_trees_all_close(exported.call(state, x), Flat()(x), atol=1e-5)


def test_what_holds_for_some_sizes_only_is_left_or_refused():
    conv = nn.Conv(5, (4, 4), (4, 4))
    abstract = jax.ShapeDtypeStruct((B, H, W, 3), jnp.float32)
    plan = fc.make_plan(nn.Conv(5, (4, 4)), abstract, to="dense")
    assert not plan
    assert "isn't known for the symbolic sizes" in plan.skipped[""]
    x = jnp.ones((2, 8, 8, 3))
    plan = fc.make_plan(conv, x, to="dense")
    moved = fc.convert_params(conv.init(jax.random.key(0), x), plan)
    with pytest.raises(fc.PlanError, match=r"symbolic sizes .* that isn't known"):
        export.export(fc.convert_model(conv, plan).apply)(moved, abstract)
