"""Models written with ``flax.nnx``, in the ways that people write them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from .entry import Entry, Subject, normal, tokens

GROUP = "flax.nnx"


class Mixer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, 10, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.blocks = nnx.List(
            nnx.Dict(
                tokens=nnx.Sequential(
                    nnx.Linear(6, 14, rngs=rngs), nnx.gelu, nnx.Linear(14, 6, rngs=rngs)
                ),
                channels=nnx.Sequential(
                    nnx.Linear(10, 18, rngs=rngs),
                    nnx.gelu,
                    nnx.Linear(18, 10, rngs=rngs),
                ),
                norm=nnx.LayerNorm(10, rngs=rngs),
            )
            for _ in range(2)
        )
        self.head = nnx.Linear(10, 5, rngs=rngs)

    def __call__(self, image):
        x = self.patches(image)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = x + jnp.swapaxes(block.tokens(jnp.swapaxes(block.norm(x), 1, 2)), 1, 2)
            x = x + block.channels(x)
        return self.head(x.mean(1))


class Vgg(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.fc1 = nnx.Linear(96, 12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.fc2 = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, image):
        x = nnx.relu(self.norm(self.conv(image)))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.fc2(self.drop(nnx.relu(self.fc1(x))))


class Recurrent(nnx.Module):
    """An LSTM by ``nnx.RNN`` and a GRU by ``nnx.scan``."""

    def __init__(self, rngs: nnx.Rngs):
        self.lstm = nnx.RNN(nnx.LSTMCell(4, 9, rngs=rngs))
        self.gru = nnx.GRUCell(9, 11, rngs=rngs)
        self.head = nnx.Linear(11, 3, rngs=rngs)

    def __call__(self, x):
        x = self.lstm(x)
        carry = self.gru.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
        scan = nnx.scan(
            lambda cell, carry, x: cell(carry, x),
            in_axes=(None, nnx.Carry, 1),
            out_axes=(nnx.Carry, 1),
        )
        return self.head(scan(self.gru, carry, x)[1])


class DecoderBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
        self.up = nnx.Linear(12, 20, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(20, 12, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(x)))


class Decoder(nnx.Module):
    """A stack made by ``nnx.vmap`` and run by ``nnx.scan`` of ``nnx.remat``."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(31, 12, rngs=rngs)
        make = nnx.vmap(DecoderBlock, in_axes=0, out_axes=0)
        self.blocks = make(rngs.fork(split=3))

    def __call__(self, ids):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return self.embed.attend(run(self.blocks, self.embed(ids)))


class Experts(nnx.Module):
    """A mixture of experts: a grouped LinearGeneral, and an Einsum."""

    def __init__(self, rngs: nnx.Rngs):
        self.gate = nnx.Linear(6, 4, use_bias=False, rngs=rngs)
        self.up = nnx.Einsum("btd,edf->ebtf", (4, 6, 14), None, rngs=rngs)
        self.down = nnx.LinearGeneral(
            (14,), (6,), batch_axis={0: 4}, use_bias=False, rngs=rngs
        )

    def __call__(self, x):
        gates = jax.nn.softmax(self.gate(x))
        y = self.down(nnx.gelu(self.up(x)))
        return jnp.einsum("ebtd,bte->btd", y, gates)


class UNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Conv(3, 6, (4, 6), padding="VALID", rngs=rngs)
        self.middle = nnx.Linear(6, 10, rngs=rngs)
        self.up = nnx.ConvTranspose(10, 4, (4, 6), padding="VALID", rngs=rngs)
        self.out = nnx.Conv(7, 2, (1, 1), rngs=rngs)

    def __call__(self, image):
        up = self.up(nnx.relu(self.middle(nnx.relu(self.down(image)))))
        return self.out(jnp.concatenate([up, image], -1))


class Adapted(nnx.Module):
    """LoRA adapters beside and around a layer, and a kernel used at two places."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.LoRA(
            7, 2, 9, base_module=nnx.Linear(7, 9, rngs=rngs), rngs=rngs
        )
        self.second = nnx.LoRALinear(9, 9, lora_rank=2, rngs=rngs)
        self.third = nnx.Linear(9, 9, rngs=rngs)
        self.fourth = nnx.Linear(9, 9, rngs=rngs)
        self.fourth.kernel = self.third.kernel

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.fourth(nnx.relu(self.third(x)))


class Doubled(nnx.Linear):
    """A subclass that does more than the layer."""

    def __call__(self, x):
        return super().__call__(x) * 2


class Research(nnx.Module):
    """Parameters of its own, a subclass, a linen module, a stack on the last axis."""

    def __init__(self, rngs: nnx.Rngs):
        draw = nnx.initializers.lecun_normal()
        self.qkv = nnx.Param(draw(rngs(), (3, 8, 2, 4)))
        self.out = nnx.Param(draw(rngs(), (8, 2, 4)))
        self.double = Doubled(8, 8, rngs=rngs)
        self.position = nnx.Param(draw(rngs(), (5, 8)))
        axes = nnx.StateAxes({nnx.Param: -1, ...: 0})
        make = nnx.vmap(
            lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=0, out_axes=axes
        )
        self.stack = make(rngs.fork(split=3))
        head = nnx.bridge.ToNNX(linen.Dense(3), rngs=rngs)
        self.head = head.lazy_init(jnp.ones((1, 8)))

    def __call__(self, x):
        x = self.double(x + self.position)
        q, k, v = jnp.einsum("btc,nchd->nbthd", x, self.qkv[...])
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        y = jnp.einsum("bhts,bshd->bthd", weights, v)
        x = x + jnp.einsum("bthd,chd->btc", y, self.out[...])
        axes = nnx.StateAxes({nnx.Param: -1, ...: 0})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return nnx.relu(layer(x))

        return self.head(run(self.stack, x).mean(1))


def entries() -> list[Entry]:
    """The models by their class's name, each with an input."""
    models: list[tuple[Callable[..., nnx.Module], tuple[Any, ...]]] = [
        (Mixer, (normal(2, 8, 12, 3),)),
        (Vgg, (normal(2, 8, 6, 3),)),
        (Recurrent, (normal(2, 5, 4),)),
        (Decoder, (tokens(2, 7, below=31),)),
        (Experts, (normal(2, 5, 6),)),
        (UNet, (normal(2, 4, 6, 3),)),
        (Adapted, (normal(3, 7),)),
        (Research, (normal(2, 5, 8),)),
    ]
    return [
        Entry(make.__name__, GROUP, functools.partial(_build, make, inputs))
        for make, inputs in models
    ]


def _build(make: Callable[..., nnx.Module], inputs: tuple[Any, ...]) -> Subject:
    return Subject(make(nnx.Rngs(0)), None, inputs)
