"""Modules that the planned call doesn't use, of a converted one's class and shapes."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from nnx_models import module_list

import fcconv_jax as fc


class Net(nnx.Module):
    """A layer of Flax, and a parameter of its own code."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.fc = nnx.Linear(3 * 2 * 4, features, rngs=rngs)
        self.head = nnx.Param(jax.random.normal(rngs.params(), (features, 2)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x.reshape(x.shape[0], -1)) @ self.head[...]


class Other(Net):
    """Another class, with the same shapes."""


class Average(nnx.Module):
    """Holds a running average of a net's parameters."""

    def __init__(self, net: nnx.Module):
        self.shadow = nnx.clone(net)


class Agent(nnx.Module):
    """As in reinforcement learning: all nets are there, one is called."""

    def __init__(self, rngs: nnx.Rngs):
        self.online = Net(5, rngs)
        self.target = Net(5, rngs)
        self.averages = module_list([Net(5, rngs), Net(6, rngs)])
        self.critic = Other(5, rngs)
        self.average = Average(self.online)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.online(x)

    def value(self, x: jax.Array) -> jax.Array:
        return self.target(x)


MODEL, X = Agent(nnx.Rngs(0)), jnp.arange(48.0).reshape(2, 3, 2, 4)


def test_a_twin_is_named_with_the_fix():
    plan = fc.make_plan(MODEL, X)
    with pytest.warns(UserWarning, match="doesn't use these modules") as caught:
        fc.convert_model(MODEL, plan)
    text = str(caught[0].message)
    assert "'target' (like 'online'), 'average/shadow' (like 'online'), " in text
    assert not any(other in text for other in ("averages/1", "critic", "fc"))
    fix = text.partition("pass ")[2].partition(", or join")[0]
    assert "plan | plan.moved('online', 'target') | " in fix
    assert caught[0].filename == __file__
    whole = eval(fix)  # as it is printed
    with warnings.catch_warnings(action="error"):
        fc.convert_model(MODEL, whole)


def test_twins_convert_when_asked_and_then_mix():
    plan = fc.make_plan(MODEL, X)
    whole = plan
    for path in ("target", "averages/0", "average/shadow"):
        whole |= plan.moved("online", path)
    conv = fc.convert_model(MODEL, whole)
    assert conv.online.fc.kernel.shape == conv.target.fc.kernel.shape == (3, 2, 4, 5)
    for model in (MODEL, conv):
        soft = jax.tree.map(
            lambda a, b: 0.25 * a + 0.75 * b,
            nnx.state(model.online),
            nnx.state(model.target),
        )
        nnx.update(model.target, soft)
    assert jnp.allclose(conv.target(X), MODEL.target(X), rtol=1e-5)
    back = fc.convert_model(conv, whole.inverse())
    assert (back.target.fc.kernel[...] == MODEL.target.fc.kernel[...]).all()


def test_plans_of_several_methods_leave_no_twin():
    plan = fc.make_plan(MODEL, X) | fc.make_plan(MODEL, X, method="value")
    with pytest.warns(UserWarning, match="doesn't use these modules") as caught:
        fc.convert_model(MODEL, plan)
    assert "'target'" not in str(caught[0].message).partition(":")[0]
    assert str(caught[0].message).count("like") == 2


def test_a_plan_of_no_module_is_refused():
    plan = fc.make_plan(MODEL, X)
    with pytest.raises(fc.PlanError, match=r"got 'onlin'\. Pass a path above"):
        plan.moved("onlin", "target")
