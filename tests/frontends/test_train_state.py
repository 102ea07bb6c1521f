"""A TrainState in the middle of training: converted, it goes on as it would have."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

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
    chex.assert_trees_all_close(back, want, atol=1e-5)
    same = fc.restore_train_state(moved, plan, model)
    chex.assert_trees_all_equal(same, state)


def test_apply_fn_of_the_other_form_explains_itself(training):
    _, x, state, plan = training
    moved = fc.convert_params(state, plan)
    with pytest.raises(fc.PlanError, match="Pass convert_train_state"):
        moved.apply_fn({"params": moved.params}, x)
    again = fc.convert_params(state, plan)
    assert jax.tree.structure(moved) == jax.tree.structure(again)
    back = fc.restore_params(moved, plan)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert back.apply_fn({"params": back.params}, x).shape == (6, 3)


def test_an_apply_fn_of_ones_own_stays(training):
    _, _, state, plan = training
    state = state.replace(apply_fn=jnp.sum)
    assert fc.convert_params(state, plan).apply_fn is jnp.sum
