"""A TrainState in the middle of training: converted, it goes on as it would have."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct, traverse_util
from flax.training.train_state import TrainState
from trees import assert_trees_all_close, assert_trees_all_equal

import fcconv_jax as fc


class Net(nn.Module):
    """Two layers, one behind a CHW flatten."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x)).transpose(0, 3, 1, 2)
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1))))


@pytest.fixture(scope="module")
def training():
    model, x = Net(), jax.random.normal(jax.random.key(0), (6, 4, 5, 3))
    params = model.init(jax.random.key(1), x)["params"]
    tx = optax.adamw(1e-2)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return model, x, trained(state, x, 3), fc.make_plan(model, x)


def trained(state, x, steps):
    @jax.jit
    def step(state):
        def loss(params):
            return (state.apply_fn({"params": params}, x) ** 2).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(steps):
        state = step(state)
    return state


def test_training_goes_on(training):
    model, x, state, plan = training
    moved = fc.convert_train_state(state, plan, model)
    assert moved.params["Dense_1"]["kernel"].shape == (4, 5, 4, 8)
    assert moved.step == state.step == 3
    there = trained(moved, x, 5)
    back = fc.restore_train_state(there, plan, model)
    want = trained(state, x, 5)
    assert jax.tree.structure(back) == jax.tree.structure(want)
    assert_trees_all_close(back, want, atol=1e-5)
    same = fc.restore_train_state(moved, plan, model)
    assert_trees_all_equal(same, state)


@pytest.mark.parametrize("wrap", [lambda apply: apply, jax.jit])
def test_the_apply_of_a_module_is_refused_where_it_would_fail(training, wrap):
    model, _, state, plan = training
    state = state.replace(apply_fn=wrap(model.apply))
    with pytest.raises(fc.PlanError, match="Call convert_train_state"):
        fc.convert_params(state, plan)
    moved = fc.convert_train_state(state, plan, model)
    with pytest.raises(fc.PlanError, match="restore_train_state"):
        fc.restore_params(moved, plan)


class WithCopies(TrainState):
    ema_params: Any = None
    more: Any = None


def test_every_copy_of_the_params_moves_along(training):
    model, x, state, plan = training
    copies = [jax.tree.map(lambda a, k=k: a + k, state.params) for k in (0.5, 2.0)]
    state = WithCopies.create(
        apply_fn=model.apply,
        params=state.params,
        tx=state.tx,
        ema_params=copies[0],
        more={"target": ({"params": copies[1]}, 3)},
    )
    moved = fc.convert_train_state(state, plan, model)
    for params, copy in (
        (moved.ema_params, copies[0]),
        (moved.more["target"][0]["params"], copies[1]),
    ):
        np.testing.assert_allclose(
            moved.apply_fn({"params": params}, x),
            model.apply({"params": copy}, x),
            rtol=1e-4,
            atol=1e-4,
        )
    optax.incremental_update(moved.params, moved.ema_params, 0.1)
    assert_trees_all_equal(fc.restore_train_state(moved, plan, model), state)


@dataclasses.dataclass
class Holder:
    """JAX takes it for a leaf."""

    copy: Any


def test_a_copy_with_tuples_of_levels_moves_and_a_hidden_one_is_refused(training):
    _, _, state, plan = training
    flat = traverse_util.flatten_dict(state.params)
    moved = fc.convert_params({"params": state.params, "ema": flat}, plan)
    assert_trees_all_equal(traverse_util.unflatten_dict(moved["ema"]), moved["params"])
    hidden = {"params": state.params, "ema": Holder(state.params)}
    with pytest.raises(fc.PlanError, match=r"'ema' is a Holder.*register_dataclass"):
        fc.convert_params(hidden, plan)
    other = {"params": state.params, "about": Holder("a name")}
    assert fc.convert_params(other, plan)["about"] is other["about"]


def test_a_clone_of_a_converted_model_is_converted(training):
    model, x, state, plan = training
    conv = fc.convert_model(model, plan)
    params = fc.convert_params(state.params, plan)
    want = conv.apply({"params": params}, x)
    assert_trees_all_equal(conv.clone().apply({"params": params}, x), want)


def test_a_copy_in_part_is_refused_by_name(training):
    model, _, state, plan = training
    part = {**state.params, "Dense_2": {"kernel": jnp.ones((3, 4))}}
    state = WithCopies.create(
        apply_fn=model.apply, params=state.params, tx=state.tx, ema_params=part
    )
    with pytest.raises(fc.PlanError, match="'ema_params' may be a copy of 'params'"):
        fc.convert_train_state(state, plan, model)


def test_an_apply_fn_of_ones_own_stays(training):
    _, _, state, plan = training
    state = state.replace(apply_fn=jnp.sum)
    assert fc.convert_params(state, plan).apply_fn is jnp.sum


@struct.dataclass
class Agent:
    """As reinforcement learning keeps them: twins, a target and another model."""

    critics: tuple[TrainState, TrainState]
    target: Any
    actor: TrainState


def test_states_in_a_tree(training):
    model, x, state, plan = training
    other = nn.Dense(2)
    variables = other.init(jax.random.key(2), x)
    actor = TrainState.create(
        apply_fn=other.apply, params=variables["params"], tx=optax.sgd(0.1)
    )
    agent = Agent((state, state.replace(step=7)), state.params, actor)
    moved = fc.convert_train_state(agent, plan, model)
    alone = fc.convert_train_state(state, plan, model)
    for critic in moved.critics:
        assert_trees_all_equal(critic.params, alone.params)
        assert_trees_all_equal(critic.opt_state, alone.opt_state)
        critic.apply_fn({"params": critic.params}, x)
    assert moved.critics[1].step == 7
    assert_trees_all_equal(moved.target, alone.params)
    assert moved.actor.apply_fn == other.apply
    assert_trees_all_equal(moved.actor, actor)
    back = fc.restore_train_state(moved, plan, model)
    assert_trees_all_equal(back, agent)
    with pytest.raises(fc.PlanError, match="a TrainState whose apply_fn would fail"):
        fc.convert_params(agent, plan)


def test_an_optimizer_in_a_tree_of_states_is_checked(training):
    model, _, state, plan = training
    by_rank = optax.masked(
        optax.add_decayed_weights(0.5),
        lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 2, tree),
    )
    params = state.params
    bad = TrainState.create(apply_fn=None, params=params, tx=by_rank)
    for convert in (
        lambda: fc.convert_train_state({"a": state, "b": bad}, plan, model),
        lambda: fc.convert_params({"b": bad}, plan),
    ):
        with pytest.raises(fc.PlanError, match="by ndim"):
            convert()
    with pytest.raises(fc.PlanError, match="a TrainState, or a tree with some, got"):
        fc.convert_train_state(params, plan, model)
