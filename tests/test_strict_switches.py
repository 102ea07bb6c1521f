"""JAX's strict switches: what a model runs under, planning and converting does too."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import one_in
from flax import nnx

import fcconv_jax as fc
from fcconv_jax.versions import enable_x64

SWITCHES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "leak checking": jax.checking_leaks,
    "no jit": jax.disable_jit,
    "x64": lambda: enable_x64(True),
    "no nans": lambda: jax.debug_nans(True),
    "no infs": lambda: jax.debug_infs(True),
    "other keys": lambda: jax.threefry_partitionable(False),
    "precision": lambda: jax.default_matmul_precision("float32"),
}


class Net(nn.Module):
    """A flatten, a batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (1, 1))(x))
        x = nn.relu(nn.Dense(6)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(x))


class Flat(nnx.Module):
    """An NNX layer behind a flatten."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.dense(x.reshape(x.shape[0], -1)))


def function(params, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["w"] + params["b"][None])


@pytest.fixture(scope="module")
def arrays():
    """Made without any switch."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 2, 3))
    variables = Net().init(jax.random.key(1), x)
    tx = optax.adam(1e-3)
    params = {"w": jax.random.normal(jax.random.key(2), (24, 3)), "b": jnp.zeros(3)}
    model = Flat(nnx.Rngs(0))
    return x, variables, tx, tx.init(variables["params"]), params, model


# Nothing is traced twice from a cache, or everything is compiled anew.
_SLOW = {"leak checking", "precision", "other keys", "no infs"}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else [])
        for name in SWITCHES
    ]
)
def switched(request):
    with SWITCHES[request.param]():
        yield


@pytest.mark.usefixtures("switched")
@pytest.mark.parametrize("to", one_in(2, ["conv", "dense"]))
def test_linen(arrays, to):
    x, variables, tx, state, *_ = arrays
    plan = fc.make_plan(Net(), x, to=to)
    assert set(plan) == ({"Dense_0", "Dense_1"} if to == "conv" else {"Conv_0"})
    moved = fc.convert_params(variables, plan)
    converted = fc.convert_model(Net(), plan)
    assert converted.apply(moved, x).shape == (2, 3)
    jax.jit(jax.grad(lambda v: converted.apply(v, x).sum()))(moved)
    fc.restore_params(moved, plan)
    fc.convert_opt_state(state, plan, tx=tx, params=variables["params"])
    if to == "conv":
        assert fc.verify(Net(), variables, x, plan=plan, progress=False).passed


@pytest.mark.usefixtures("switched")
def test_nnx(arrays):
    x, *_, model = arrays
    plan = fc.make_plan(model, x)
    converted = fc.convert_model(model, plan)
    assert converted(x).shape == (2, 5)
    assert fc.verify(model, None, x, plan=plan, progress=False).passed


@pytest.mark.usefixtures("switched")
def test_functions(arrays):
    x, *_, params, _ = arrays
    plan = fc.make_plan(function, params, x)
    moved = fc.convert_params(params, plan)
    converted = fc.convert_model(function, plan)
    assert converted(moved, x).shape == (2, 3)
    fc.assert_same(function, converted, f_args=(params, x), g_args=(moved, x))
    assert fc.verify(function, params, x, plan=plan, progress=False).passed


def test_a_switch_stays_on_for_the_model():
    """Planning under a switch raises what the model itself does."""

    def promotes(params, x):
        return x @ params["w"] + jnp.ones(3)

    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    with jax.numpy_rank_promotion("raise"), contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(ValueError, match="broadcast"))
        fc.make_plan(promotes, params, x)
