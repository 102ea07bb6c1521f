"""Models written with ``flax.linen``, in the ways that people write them."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .entry import Entry, Subject, normal, random_variables, tokens

GROUP = "flax.linen"


class Mixer(nn.Module):
    """MLP-Mixer: one Dense of each block runs over the transposed tokens."""

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(10, (4, 4), strides=(4, 4), padding="VALID")(image)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            y = nn.Dense(y.shape[-1])(nn.gelu(nn.Dense(14)(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            x = x + nn.Dense(10)(nn.gelu(nn.Dense(18)(nn.LayerNorm()(x))))
        return nn.Dense(5)(x.mean(1))


class Vgg(nn.Module):
    """Convolutions, batch statistics, and a flatten in PyTorch's order."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(image)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(12)(x))
        return nn.Dense(5)(x)


class Recurrent(nn.Module):
    """A GRU by ``nn.scan`` below a bidirectional LSTM by ``nn.RNN``."""

    @nn.compact
    def __call__(self, x):
        forward, backward = nn.RNN(nn.LSTMCell(9)), nn.RNN(nn.LSTMCell(7))
        x = nn.Bidirectional(forward, backward)(x)
        scan = nn.scan(
            nn.GRUCell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        cell = scan(11)
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        return nn.Dense(3)(cell(carry, x)[1])


class DecoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(3, deterministic=True)
        x = x + attention(nn.RMSNorm()(x), mask=mask)
        y = nn.RMSNorm()(x)
        y = nn.silu(nn.Dense(20, use_bias=False)(y)) * nn.Dense(20, use_bias=False)(y)
        return x + nn.Dense(x.shape[-1])(y), None


class Decoder(nn.Module):
    """A decoder under ``nn.scan`` of ``nn.remat``, its head tied to the embedding."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(31, 12)
        x, mask = embed(ids), nn.make_causal_mask(ids)
        stack = nn.scan(
            nn.remat(DecoderBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = stack()(x, mask)
        return embed.attend(x)


class Experts(nn.Module):
    """A mixture of experts whose kernels are stacked in one parameter."""

    @nn.compact
    def __call__(self, x):
        gates = jax.nn.softmax(nn.Dense(4, use_bias=False)(x))
        init = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", init, (4, x.shape[-1], 14))
        down = self.param("down", init, (4, 14, x.shape[-1]))
        y = nn.gelu(jnp.einsum("btd,edf->btef", x, up))
        return jnp.einsum("btef,efd,bte->btd", y, down, gates)


class MappedExperts(nn.Module):
    """Experts side by side under ``nn.vmap``, each with its own tokens."""

    @nn.compact
    def __call__(self, x):
        expert = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return expert(9)(x)


class UNet(nn.Module):
    """Down to 1x1 and up again by transposed convolutions, with a skip connection."""

    @nn.compact
    def __call__(self, image):
        h, w = image.shape[1:3]
        down = nn.relu(nn.Conv(6, (h, w), padding="VALID")(image))
        middle = nn.relu(nn.Dense(10)(down))
        up = nn.ConvTranspose(4, (h, w), padding="VALID")(middle)
        return nn.Conv(2, (1, 1))(jnp.concatenate([up, image], -1))


class Mae(nn.Module):
    """A masked autoencoder: patches, some of them masked, and pixels again."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), (4, 4), padding="VALID")(x)
        n, height, width, features = x.shape
        x = x.reshape(n, -1, features)
        mask = self.param("mask", nn.initializers.normal(), (features,))
        x = jnp.where(jnp.arange(height * width)[:, None] % 3 == 1, mask, x)
        x = x + nn.MultiHeadDotProductAttention(3)(nn.LayerNorm()(x))
        x = x + nn.Dense(12)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        x = x.reshape(n, height, width, features)
        return nn.ConvTranspose(3, (4, 4), (4, 4), name="pixels")(x)


class Dpt(nn.Module):
    """DPT's reassembling: tokens to maps of several sizes, fused on the way up."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), padding="VALID")(x)
        x = nn.gelu(nn.Dense(8, name="readout")(x))
        large = nn.ConvTranspose(6, (4, 4), (4, 4))(nn.Conv(5, (1, 1))(x))
        middle = nn.ConvTranspose(6, (2, 2), (2, 2))(nn.Conv(5, (1, 1))(x))
        small = nn.Conv(6, (1, 1))(x)
        for finer in (middle, large):
            small = nn.ConvTranspose(6, (3, 3), (2, 2))(nn.relu(small)) + finer
        return nn.Conv(1, (3, 3))(small)


class Depthwise(nn.Module):
    """Depthwise and grouped convolutions, and a squeeze-and-excite gate."""

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(12, (1, 1))(image)
        x = nn.Conv(12, (3, 3), feature_group_count=12)(nn.silu(x))
        gate = nn.sigmoid(nn.Dense(12)(nn.relu(nn.Dense(4)(x.mean((1, 2))))))
        x = nn.Conv(18, (1, 1), feature_group_count=3)(x * gate[:, None, None])
        return nn.DenseGeneral(5, axis=(-3, -2, -1))(nn.GroupNorm(3)(x))


class Heads(nn.Module):
    """Attention whose projections have a bias for each head."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((3, 5), name=n)(x) for n in ("q", "k", "v"))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / 5**0.5
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        y = jnp.moveaxis(y, 2, 0)  # one projection for each head
        y = nn.DenseGeneral(6, axis=-1, batch_dims=(0,), name="each")(y)
        y = jnp.moveaxis(y, 0, 2)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(y)


class Conv1D(nn.Module):
    """GPT-2's: a Dense with its kernel stored the other way round."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ kernel.T + bias


class GraphNet(nn.Module):
    """Messages along edges, with parameters called ``w`` and ``b``."""

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        for number in range(2):
            shape = (2 * nodes.shape[-1], 11)
            w = self.param(f"w{number}", nn.initializers.lecun_normal(), shape)
            b = self.param(f"b{number}", nn.initializers.zeros, (11,))
            pairs = jnp.concatenate([nodes[senders], nodes[receivers]], -1)
            messages = nn.relu(jnp.dot(pairs, w) + b)
            summed = jax.ops.segment_sum(messages, receivers, len(nodes))
            nodes = nn.Dense(7)(jnp.concatenate([nodes, summed], -1))
        return nn.Dense(2)(nodes.sum(0))


class StandardisedConv(nn.Conv):
    """A convolution whose kernel is standardised on the way."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = (value - value.mean((0, 1, 2))) / (value.std((0, 1, 2)) + 1e-3)
        return value


class Research(nn.Module):
    """Habits of research code: (out, in) kernels, weight norm, axes from the end."""

    @nn.compact
    def __call__(self, x):
        x = StandardisedConv(8, (3, 3))(x)
        x = nn.relu(nn.WeightNorm(nn.Dense(10))(x))
        w = self.param("w", nn.initializers.lecun_normal(), (6, x.shape[-1]))
        x = jnp.einsum("oi,bhwi->bhwo", w, x)
        x = nn.DenseGeneral((2, 4), axis=(-3, -1))(x)  # (batch, width, 2, 4)
        x = jnp.swapaxes(nn.Dense(3)(jnp.swapaxes(x, 1, 3)), 1, 3)
        return nn.Einsum((2, 3, 4, 5), "bwij,iwjo->bo")(x)


class Complex(nn.Module):
    """Complex parameters, as in a state-space layer in the Fourier domain."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(6, param_dtype=jnp.complex64)(jnp.fft.fft(x, axis=1))
        return nn.Dense(3)(jnp.concatenate([y.real, y.imag], -1))


def entries() -> list[Entry]:
    """The models by their class's name, each with an input."""
    senders, receivers = jnp.array([0, 1, 2, 3, 4, 1]), jnp.array([1, 2, 3, 4, 0, 3])
    models: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (Mixer(), (normal(2, 8, 12, 3),)),
        (Vgg(), (normal(2, 8, 6, 3),)),
        (Recurrent(), (normal(2, 5, 4),)),
        (Decoder(), (tokens(2, 7, below=31),)),
        (Experts(), (normal(2, 5, 6),)),
        (MappedExperts(), (normal(4, 3, 5),)),
        (UNet(), (normal(2, 4, 6, 3),)),
        (Mae(), (normal(2, 8, 12, 3),)),
        (Dpt(), (normal(2, 8, 12, 3),)),
        (Depthwise(), (normal(2, 6, 5, 3),)),
        (Heads(), (normal(2, 5, 8),)),
        (Conv1D(9), (normal(2, 5, 7),)),
        (GraphNet(), (normal(5, 7), senders, receivers)),
        (Research(), (normal(2, 4, 3, 3),)),
        (Complex(), (normal(2, 6, 4),)),
    ]
    return [
        Entry(type(model).__name__, GROUP, functools.partial(_build, model, inputs))
        for model, inputs in models
    ]


def _build(model: nn.Module, inputs: tuple[Any, ...]) -> Subject:
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return Subject(model, random_variables(shapes), inputs)
