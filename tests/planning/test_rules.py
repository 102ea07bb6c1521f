"""Rules in all their forms, on models of each kind."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx

import fcconv_jax as fc

X = jnp.zeros((2, 6, 8))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.Dense(8, name="out")(nn.relu(nn.Dense(32, name="up")(x)))
        return nn.Dense(3, name="head")(x.mean(1))


class Linears(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.out = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return self.head(self.out(nnx.relu(self.up(x))).mean(1))


def matmul(params, x):
    h = jnp.maximum(x @ params["up"], 0) @ params["out"]
    return h.mean(1) @ params["head"]


PARAMS = {
    "up": jnp.zeros((8, 32)),
    "out": jnp.zeros((32, 8)),
    "head": jnp.zeros((8, 3)),
}
MODELS = {
    "linen": (Block(), X),
    "nnx": (Linears(nnx.Rngs(0)), X),
    "function": (matmul, PARAMS, X),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]


def test_only_the_head(model):
    for rules in (["head=auto", "*=skip"], [fc.Rule("head"), fc.Rule("*", skip=True)]):
        plan = fc.make_plan(*model, rules=rules)
        assert list(plan) == ["head"]
        assert "excluded by rule '*'" in plan.skipped["up"]


def test_only_above_a_size(model):
    plan = fc.make_plan(*model, rules=["*<256=skip"])
    assert set(plan) == {"up", "out"}
    assert "excluded by rule '*<256'" in plan.skipped["head"]
    assert len(fc.make_plan(*model, rules=["*<24=skip"])) == len(fc.make_plan(*model))


def test_attention_left_alone(model):
    rules = ["*attention*=skip"] if model[0] is not matmul else []
    assert set(fc.make_plan(*model, rules=rules)) == {"up", "out", "head"}


def test_one_or_two_dimensions(model):
    two = fc.make_plan(*model, rules=["*=1x1"])
    assert {layer.window for layer in two.values()} == {(1, 1)}
    one = fc.make_plan(*model, rules=["*=1"])
    assert {layer.window for layer in one.values()} == {(1,)}


def test_sizes_of_stacked_layers_are_those_of_one_layer():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="fc")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=5,
            )
            return scan(name="steps")(x, None)[0]

    assert len(fc.make_plan(Stack(), X, rules=["*<64=skip"])) == 1
    assert len(fc.make_plan(Stack(), X, rules=["*<65=skip"])) == 0


def test_from_shapes_too():
    shapes = {"up/kernel": (8, 32), "head/kernel": (8, 3)}
    plan = fc.plan_from_params(shapes, ["*<100=skip", "*=1"], backend="cuda")
    assert {path: layer.kernel.target for path, layer in plan.items()} == {
        "up": (32, 1, 8)
    }
