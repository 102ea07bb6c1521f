"""A small transformer whose every part can be built wrongly, in one block."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Settings:
    """One block as it should be; a defect replaces some of them."""

    eps1: float = 1e-6
    eps2: float = 1e-6
    tanh_gelu: bool = False
    activation: str = "gelu"
    scale: float = 1.0
    mask_shift: int = 0
    residual1: bool = True
    residual2: bool = True
    bias_times: float = 1.0
    post_norm: bool = False
    dropout: bool = False
    stop_gradient: bool = False
    up_dtype: Any = None
    fast_variance: bool = True
    swap_heads: bool = False
    key_first: bool = False
    temperature: float = 1.0
    mask_value: float = -1e30


class Block(nn.Module):
    d: int
    heads: int
    settings: Settings
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        s, norm = self.settings, {"dtype": self.dtype}
        n1 = nn.LayerNorm(
            epsilon=s.eps1, use_fast_variance=s.fast_variance, name="norm1", **norm
        )
        y = x if s.post_norm else n1(x)
        split = (self.heads, self.d // self.heads)
        q, k, v = (
            nn.DenseGeneral(split, name=name, dtype=self.dtype)(y)
            for name in ("query", "key", "value")
        )
        if s.swap_heads:
            v = v[:, :, jnp.arange(self.heads).at[:2].set(jnp.array([1, 0]))]
        if s.key_first:
            q, k = k, q
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (s.scale / split[1] ** 0.5)
        n = x.shape[1]
        mask = jnp.tril(jnp.ones((n, n), bool), s.mask_shift)
        low = jnp.asarray(max(s.mask_value, float(jnp.finfo(scores.dtype).min)))
        scores = jnp.where(mask, scores, low.astype(scores.dtype)) / s.temperature
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        y = nn.DenseGeneral(self.d, axis=(-2, -1), name="out", dtype=self.dtype)(y)
        x = x + y if s.residual1 else y
        if s.post_norm:
            x = n1(x)
        y = nn.LayerNorm(epsilon=s.eps2, name="norm2", **norm)(x)
        up = nn.Dense(2 * self.d, name="up", dtype=s.up_dtype or self.dtype)
        y = up(y).astype(self.dtype)
        if s.bias_times != 1.0:
            bias = up.variables["params"]["bias"]
            y = y + (s.bias_times - 1) * bias.astype(y.dtype)
        if s.activation == "gelu":
            y = nn.gelu(y, approximate=s.tanh_gelu)
        else:
            y = getattr(nn, s.activation)(y)
        y = nn.Dropout(0.1, deterministic=not s.dropout)(y)
        y = nn.Dense(self.d, name="down", dtype=self.dtype)(y)
        if s.stop_gradient:
            y = jax.lax.stop_gradient(y)
        return x + y if s.residual2 else y


class Transformer(nn.Module):
    blocks: int = 2
    d: int = 16
    heads: int = 4
    dtype: Any = jnp.float32
    defect: Settings = Settings()
    at: int = 0
    position_shift: int = 0
    final_eps: float = 1e-6

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(11, self.d, name="table", dtype=self.dtype)
        x = table(tokens)
        n = tokens.shape[1]
        places = (jnp.arange(n) + self.position_shift) % n
        x = x + nn.Embed(n, self.d, name="places", dtype=self.dtype)(places)
        for i in range(self.blocks):
            settings = self.defect if i == self.at else Settings()
            block = Block(self.d, self.heads, settings, self.dtype, name=f"block_{i}")
            x = block(x)
        x = nn.LayerNorm(epsilon=self.final_eps, name="norm", dtype=self.dtype)(x)
        return nn.Dense(7, name="head", dtype=self.dtype)(x)


def tokens():
    return jax.random.randint(jax.random.key(1), (2, 6), 0, 11)


@functools.cache
def variables(model):
    """Params as training leaves them: no bias of zero, no scale of one."""
    found = jax.jit(model.init)(jax.random.key(0), tokens())
    leaves, tree = jax.tree.flatten(found)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves)
    ]
    return jax.tree.unflatten(tree, moved)
