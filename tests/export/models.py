"""Models of every kind that people export, small, each with its inputs and params."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import fcconv_jax as fc


class Digits(nn.Module):
    """Convolutions, then Dense layers behind a flatten."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(12, (3, 3), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="fc2")(x)


class VGGHead(nn.Module):
    """A head behind a flatten in PyTorch's order."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(16, name="fc1")(x))
        return nn.Dense(10, name="fc2")(x)


class MLP(nn.Module):
    """Dense layers alone, one without a bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(24)(x))
        x = nn.silu(nn.Dense(16, use_bias=False)(x))
        return nn.softmax(nn.Dense(7)(x))


class Block(nn.Module):
    """A block of a vision transformer."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
        y = nn.gelu(nn.Dense(24, name="up")(nn.LayerNorm()(x)), approximate=False)
        return x + nn.Dense(12, name="down")(y)


class Patches(nn.Module):
    """A patch embedding and a norm on its tokens."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(10, (4, 4), (4, 4), padding="VALID", name="embed")(x)
        return nn.LayerNorm()(x.reshape(x.shape[0], -1, 10))


class Mobile(nn.Module):
    """Depthwise and pointwise convolutions, batch norms, a mean over the image."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(8, (3, 3), (2, 2))(x))
        for features in (12, 16):
            channels = x.shape[-1]
            x = nn.Conv(channels, (3, 3), feature_group_count=channels, use_bias=False)(
                x
            )
            x = nn.relu6(nn.BatchNorm(use_running_average=True)(x))
            x = nn.relu6(nn.Conv(features, (1, 1))(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class LSTMStep(nn.Module):
    """One step of an LSTM and its head."""

    @nn.compact
    def __call__(self, carry, x):
        carry, y = nn.LSTMCell(6, name="cell")(carry, x)
        return carry, nn.Dense(3, name="head")(y)


class Embedded(nn.Module):
    """A table of embeddings and a Dense on them."""

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(4, name="out")(nn.Embed(9, 6, name="table")(ids))


class Grouped(nn.Module):
    """Grouped and dilated convolutions, one of one dimension."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 2), feature_group_count=2, name="grouped")(x)
        x = nn.relu(nn.Conv(6, (3, 3), kernel_dilation=2, padding=2, name="wide")(x))
        return nn.Conv(4, (3,), strides=2, name="line")(x.reshape(x.shape[0], -1, 6))


class NNXNet(nnx.Module):
    """An NNX model with batch statistics."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(6 * 4 * 8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


def function(params, x):
    """A function of its own parameters."""
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["w"] + params["b"])


def normal(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def _made(model, *inputs):
    """With every parameter at random: a bias of zeros would hide what becomes of it."""
    start = model.init(jax.random.key(0), *inputs)
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [
        jnp.abs(leaf + 0.3 * jax.random.normal(key, leaf.shape))
        if (leaf == 1).all()  # scales and variances
        else leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys)
    ]
    return model, jax.tree.unflatten(tree, moved), inputs


MODELS = {
    "digits": lambda: _made(Digits(), normal(2, 8, 6, 1)),
    "vgg head": lambda: _made(VGGHead(), normal(1, 12, 8, 3)),
    "mlp": lambda: _made(MLP(), normal(4, 10)),
    "vit block": lambda: _made(Block(), normal(2, 5, 12)),
    "patches": lambda: _made(Patches(), normal(1, 12, 8, 3)),
    "mobile": lambda: _made(Mobile(), normal(1, 10, 12, 3)),
    "lstm step": lambda: _made(LSTMStep(), (normal(2, 6), normal(2, 6)), normal(2, 5)),
    "embedding": lambda: _made(Embedded(), jnp.array([[1, 8, 0], [2, 2, 5]])),
    "grouped": lambda: _made(Grouped(), normal(2, 6, 8, 4)),
    "nnx": lambda: (NNXNet(nnx.Rngs(0)), None, (normal(1, 12, 8, 3),)),
    "function": lambda: (
        function,
        {"w": normal(24, 5), "b": normal(5, seed=2)},
        (normal(2, 2, 3, 4),),
    ),
}


def export_two_roles(to, path):
    """The report of ``x @ w @ w.T``, whose weight no one kernel holds."""

    def model(params, x):
        return x @ params["w"] @ params["w"].T

    params, x = {"w": normal(6, 4)}, normal(3, 6)
    return fc.export(model, params, x, path=path, progress=False)
