"""Runs ``fcconv`` in this process, on small models and checkpoints."""

import re
import shlex
from pathlib import Path

import flax.serialization
import jax
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from typer.testing import CliRunner

from fcconv_jax import cli
from fcconv_jax.cli import app

KEY = jax.random.key(0)
COMMANDS = [module.__name__.rpartition(".")[2] for module in cli.COMMANDS]
MODEL = """
from __future__ import annotations

import flax.linen as nn

NUMBER = 3


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(5, name="fc1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(4, name="fc2")(x)


class Wide(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name="fc")(x)


class Tokens(nn.Module):
    def setup(self):
        self.embed = nn.Embed(6, 8)
        self.head = nn.Dense(3)

    def __call__(self, ids):
        return self.head(self.encode(ids))

    def encode(self, ids):
        return self.embed(ids)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 4), name="q")(x)


class Plain(nn.Module):
    def __call__(self, x):
        return x + 1


class Holder:
    wide = Wide(3)


def make_wide():
    return Wide(2)


def make_number():
    return 3


wide = Wide(7)
"""
SHAPES = {
    "fc1/kernel": (48, 5),
    "fc1/bias": (5,),
    "fc2/kernel": (5, 4),
    "fc2/bias": (4,),
}
BRANCHES = """import flax.linen as nn
class Net(nn.Module):
    def __call__(self, x):
        if x.sum() > 0: return x
        return -x
"""
OTHER_KINDS = """
import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(x)

def function():
    return (lambda params, x: jnp.sin(x @ params["w"])), {"w": jnp.ones((4, 3))}

def doubled():
    return (lambda params, x: 2 * (x @ params["w"])), {"w": jnp.ones((4, 3))}

class Linen(nn.Module):
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm(epsilon=self.eps)(x))

def other():
    return Linen(eps=1e-4)
"""


def run(command, status=0):
    """Runs ``fcconv COMMAND`` in this process and checks its exit status."""
    result = CliRunner().invoke(app, shlex.split(command))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    if status:
        assert "Traceback" not in result.output
    return result


def fails(command, message, status=1):
    """Runs a command that must fail with one line on stderr, and nothing else."""
    result = run(command, status)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr


def save(path, tree):
    """Writes params as msgpack."""
    Path(path).write_bytes(flax.serialization.msgpack_serialize(tree))


def train_state(path, params):
    """Writes an Orbax checkpoint of a TrainState."""
    state = TrainState.create(apply_fn=print, params=params, tx=optax.adam(1e-3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), state)
