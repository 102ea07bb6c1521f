"""Small networks of every kind, whose planning, tracing and verifying is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class LlamaBlock(nnx.Module):
    """A decoder layer with a gated feed-forward, as in Llama."""

    def __init__(self, width: int, hidden: int, heads: int, rngs: nnx.Rngs):
        bias = {"use_bias": False, "rngs": rngs}
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, deterministic=True, **bias
        )
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, **bias)
        self.up = nnx.Linear(width, hidden, **bias)
        self.down = nnx.Linear(hidden, width, **bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, width)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """A small Llama: token ids to logits."""

    def __init__(
        self, layers: int, width: int, hidden: int, heads: int, rngs: nnx.Rngs
    ):
        self.embed = nnx.Embed(1000, width, rngs=rngs)
        self.blocks = nnx.List(
            LlamaBlock(width, hidden, heads, rngs) for _ in range(layers)
        )
        self.head = nnx.Linear(width, 1000, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ``(N, T)`` to ``(N, T, 1000)``."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ChwHead(nnx.Module):
    """VGG's classifier as PyTorch flattens it: one kernel is nine tenths of it."""

    def __init__(self, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(7 * 7 * 256, 2048, rngs=rngs)
        self.fc2 = nnx.Linear(2048, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, 7, 7, 256)`` to ``(N, 1000)``."""
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.fc2(nnx.relu(self.fc1(x)))


class Stack(nn.Module):
    """Twelve feed-forward blocks under one scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, 256)`` to the same shape."""

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                h = nn.gelu(nn.Dense(1024)(nn.LayerNorm()(x)))
                return x + nn.Dense(x.shape[-1])(h), None

        scanned = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=12
        )
        return scanned()(x, None)[0]


class OwnDense(nn.Module):
    """A linear layer as many repositories write their own."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the last axis to ``features``."""
        init = nn.initializers.lecun_normal()
        kernel = self.param("w", init, (x.shape[-1], self.features))
        bias = self.param("b", nn.initializers.zeros, (self.features,))
        return jnp.einsum("...d,df->...f", x, kernel) + bias


class OwnLayers(nn.Module):
    """Twelve feed-forward blocks, each with one layer of Flax and one of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, 256)`` to the same shape."""
        for _ in range(12):
            h = nn.gelu(OwnDense(1024)(nn.LayerNorm()(x)))
            x = x + nn.Dense(x.shape[-1])(h)
        return x


class VitBlock(nnx.Module):
    """A pre-norm block of width 192."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(192, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, 192, decode=False, rngs=rngs)
        self.up = nnx.Linear(192, 768, rngs=rngs)
        self.down = nnx.Linear(768, 192, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, 192)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Vit(nnx.Module):
    """Patches of 8x8, four blocks, ten classes."""

    def __init__(self, rngs: nnx.Rngs):
        size = (8, 8)
        self.patches = nnx.Conv(3, 192, size, size, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([VitBlock(rngs) for _ in range(4)])
        self.norm = nnx.LayerNorm(192, rngs=rngs)
        self.head = nnx.Linear(192, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, H, W, 3)`` to ``(N, 10)``."""
        x = self.patches(x).reshape(x.shape[0], -1, 192)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


# The parameters of a block, by name.
BLOCK: dict[str, tuple[int, ...]] = {
    **dict.fromkeys("qkv", (256, 4, 64)),
    "o": (4, 64, 256),
    "up": (256, 1024),
    "down": (1024, 256),
}


def block(p: Any, x: jax.Array) -> jax.Array:
    """A pre-norm block of attention and an MLP, in plain JAX."""
    h = jax.nn.standardize(x)
    q, k, v = (jnp.einsum("ntd,dhk->nthk", h, p[name]) for name in "qkv")
    attended = jax.nn.dot_product_attention(q, k, v)
    x = x + jnp.einsum("nthk,hkd->ntd", attended, p["o"])
    return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"]


def chain(block: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """A function that runs one block after the other."""

    def run(params: Any, x: jax.Array) -> jax.Array:
        for p in params:
            x = block(p, x)
        return x

    return run
