"""A residual network of images in each library but linen."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class _Block(nnx.Module):
    def __init__(self, inner: int, outer: int, step: int, rngs: nnx.Rngs):
        plain = {"use_bias": False, "rngs": rngs}
        norm = {"use_running_average": True, "rngs": rngs}
        self.first = nnx.Conv(inner, outer, (3, 3), step, **plain)
        self.second = nnx.Conv(outer, outer, (3, 3), **plain)
        self.norm1, self.norm2 = (nnx.BatchNorm(outer, **norm) for _ in range(2))
        self.beside = nnx.Conv(inner, outer, (1, 1), step, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.first(x)))
        return nnx.relu(self.beside(x) + self.norm2(self.second(y)))


class Nnx(nnx.Module):
    """Two residual blocks, a pool, and a head behind a flatten."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([_Block(3, 8, 1, rngs), _Block(8, 16, 2, rngs)])
        self.head = nnx.Linear(8 * 8 * 16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        for block in self.blocks:
            x = block(x)
        x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


def of_nnx() -> Nnx:
    """The network in NNX."""
    return Nnx(nnx.Rngs(0))


def of_equinox() -> Any:
    """A network in Equinox: of one example, channels first, pools of its own."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(8, 16, 3, stride=2, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.AdaptiveAvgPool2d(1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(16, 10, key=keys[2]),
        ]
    )


def of_haiku(x: jax.Array) -> tuple[Any, Any]:
    """A network in Haiku, and its params."""
    import haiku as hk

    def forward(x: jax.Array) -> jax.Array:
        for width in (8, 16):
            y = jax.nn.relu(hk.Conv2D(width, 3, 2)(x))
            x = jax.nn.relu(hk.Conv2D(width, 1, 2)(x) + hk.Conv2D(width, 3)(y))
        return hk.Linear(10)(hk.Flatten()(hk.AvgPool(2, 2, "VALID")(x)))

    model = hk.without_apply_rng(hk.transform(forward))
    return model, model.init(jax.random.key(0), x)


def of_keras() -> Any:
    """A network in Keras, of separable convolutions."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras  # pyright: ignore[reportMissingImports]

    inputs = keras.Input((32, 32, 3), batch_size=1)
    x = keras.layers.Conv2D(8, 3, 2, padding="same", activation="relu")(inputs)
    for width in (16, 24):
        x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
        x = keras.layers.Conv2D(width, 1, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))


def of_torch() -> Any:
    """A network in PyTorch, channels first."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    class Block(nn.Module):
        def __init__(self, inner: int, outer: int):
            super().__init__()
            self.first = nn.Conv2d(inner, outer, 3, 2, 1, bias=False)
            self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
            self.norm1, self.norm2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
            self.beside = nn.Conv2d(inner, outer, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.norm1(self.first(x)))
            return torch.relu(self.beside(x) + self.norm2(self.second(y)))

    torch.manual_seed(0)
    blocks = nn.Sequential(Block(3, 8), Block(8, 16))
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10))
    return nn.Sequential(blocks, head).eval()
