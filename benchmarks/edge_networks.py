"""Thirty networks that people export, small: their layers as published, few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import edge_libraries
import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np


def normed(
    x: jax.Array, width: int, size: int, step: int = 1, groups: int = 1
) -> jax.Array:
    """A convolution without a bias, and a batch norm at inference."""
    conv = nn.Conv(width, (size, size), step, feature_group_count=groups)
    return nn.BatchNorm(use_running_average=True)(conv(x))


def depthwise(x: jax.Array, size: int = 3, step: int = 1) -> jax.Array:
    """A normed convolution of each channel by itself."""
    return normed(x, x.shape[-1], size, step, x.shape[-1])


def squeezed(x: jax.Array, gate: Callable[..., Any] = nn.sigmoid) -> jax.Array:
    """Squeeze and excite: channels scaled by the image's means."""
    y = nn.relu(nn.Conv(x.shape[-1] // 4, (1, 1))(x.mean((1, 2), keepdims=True)))
    return x * gate(nn.Conv(x.shape[-1], (1, 1))(y))


class Vgg16(nn.Module):
    """VGG16, its widths divided by 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        for repeats, width in ((2, 8), (2, 16), (3, 32), (3, 64), (3, 64)):
            for _ in range(repeats):
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


class Resnet(nn.Module):
    """ResNet: two basic or bottleneck blocks in each of its four stages."""

    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        x = nn.relu(normed(x, 8, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage in range(4):
            for block in range(2):
                width, step = 8 << stage, 2 if stage and not block else 1
                if self.bottleneck:
                    y = nn.relu(normed(x, width, 1))
                    y = nn.relu(normed(y, width, 3, step))
                    y = normed(y, 4 * width, 1)
                else:
                    y = normed(nn.relu(normed(x, width, 3, step)), width, 3)
                if x.shape != y.shape:
                    x = normed(x, y.shape[-1], 1, step)
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class MobilenetV1(nn.Module):
    """MobileNet (the first)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        x = nn.relu6(normed(x, 8, 3, 2))
        for width, step in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2)):
            x = nn.relu6(depthwise(x, 3, step))
            x = nn.relu6(normed(x, width, 1))
        return nn.Dense(10)(x.mean((1, 2)))


class Inverted(nn.Module):
    """MobileNetV2, V3 or EfficientNet: inverted residuals of (width, size, step)."""

    activations: tuple[Callable[[jax.Array], jax.Array], ...]
    gate: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        act = self.activations[0]
        x = self.activations[-1](normed(x, 8, 3, 2))
        for width, size, step in ((8, 3, 1), (12, 5, 2), (12, 3, 1), (16, 5, 2)):
            y = act(normed(x, 4 * x.shape[-1], 1))
            y = act(depthwise(y, size, step))
            y = y if self.gate is None else squeezed(y, self.gate)
            y = normed(y, width, 1)
            x = x + y if x.shape == y.shape else y
            act = self.activations[-1]
        x = act(normed(x, 64, 1)).mean((1, 2))
        return nn.Dense(10)(act(nn.Dense(32)(x)))


class Convnext(nn.Module):
    """ConvNeXt: one block in each stage."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        for stage in range(4):
            width, size = 12 << stage, 2 if stage else 4
            conv = nn.Conv(width, (size, size), (size, size), padding="VALID")
            x = conv(nn.LayerNorm()(x)) if stage else nn.LayerNorm()(conv(x))
            y = nn.Conv(width, (7, 7), feature_group_count=width)(x)
            y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(y))))
            scale = nn.initializers.constant(1e-6)
            x = x + y * self.param(f"scale{stage}", scale, (width,))
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class Vit(nn.Module):
    """ViT of two blocks; as DeiT it has a second token with a head of its own."""

    heads: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        x = nn.Conv(48, (8, 8), (8, 8), padding="VALID")(x).reshape(x.shape[0], -1, 48)
        small = nn.initializers.normal(0.02)
        tokens = self.param("tokens", small, (1, self.heads, 48))
        x = jnp.concatenate([jnp.tile(tokens, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", small, (1, x.shape[1], 48))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(3)(y, y)
            y = nn.gelu(nn.Dense(192)(nn.LayerNorm()(x)), approximate=False)
            x = x + nn.Dense(48)(y)
        x = nn.LayerNorm()(x)
        logits = [nn.Dense(10)(x[:, i]) for i in range(self.heads)]
        return sum(logits[1:], logits[0]) / self.heads


class Swin(nn.Module):
    """Swin: a plain and a shifted window of 4x4, then patches merged, twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to 10 logits."""
        x = nn.LayerNorm()(nn.Conv(24, (4, 4), (4, 4), padding="VALID")(x))
        for stage in range(2):
            if stage:
                parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
                x = nn.Dense(48)(nn.LayerNorm()(jnp.concatenate(parts, -1)))
            for shift in (0, 2) if x.shape[1] > 4 else (0,):
                x = x + self.windows(nn.LayerNorm()(x), shift)
                y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
                x = x + nn.Dense(x.shape[-1])(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean((1, 2)))

    def windows(self, x: jax.Array, shift: int) -> jax.Array:
        """Attention within windows, with a bias for each pair of places."""
        n, h, w, c = x.shape
        x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = x.reshape(n, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
        qkv = nn.Dense(3 * c)(x.reshape(-1, 16, c)).reshape(-1, 16, 3, 3, c // 3)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        small = nn.initializers.normal(0.02)
        table = self.param(f"bias{c}_{shift}", small, (49, 3))
        places = jnp.stack(jnp.divmod(jnp.arange(16), 4), -1)
        away = places[:, None] - places + 3
        bias = table[away[..., 0] * 7 + away[..., 1]].transpose(2, 0, 1)
        scores = q @ k.swapaxes(-1, -2) * (c // 3) ** -0.5 + bias
        if shift:  # what the roll brought together is kept apart
            rows = jnp.where(jnp.arange(h) < h - shift, 0, 1)
            parts = (rows[:, None] * 2 + rows).reshape(h // 4, 4, w // 4, 4)
            parts = parts.transpose(0, 2, 1, 3).reshape(-1, 16)
            apart = jnp.where(parts[:, None] != parts[:, :, None], -100.0, 0.0)
            scores = scores + jnp.tile(apart, (n, 1, 1))[:, None]
        y = (nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(-1, 16, c)
        y = nn.Dense(c)(y).reshape(n, h // 4, w // 4, 4, 4, c)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return jnp.roll(y, (shift, shift), (1, 2))


class Unet(nn.Module):
    """A U-Net of two levels, up by a resize or by transposed convolutions."""

    transposed: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to logits of each pixel."""
        skips = []
        for width in (8, 16):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        for skip in reversed(skips):
            if self.transposed:
                x = nn.ConvTranspose(skip.shape[-1], (2, 2), (2, 2))(x)
            else:
                x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = jnp.concatenate([x, skip], -1)
            x = nn.relu(nn.Conv(skip.shape[-1], (3, 3))(x))
        return nn.Conv(2, (1, 1))(x)


class Recurrent(nn.Module):
    """A classifier of sequences by their last state."""

    cell: Callable[[int], nn.RNNCellBase]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, C)`` to 5 logits."""
        states: Any = nn.RNN(self.cell(24))(x)
        return nn.Dense(5)(states[:, -1])


class Bert(nn.Module):
    """BERT of two layers."""

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps token ids and a mask ``(N, T)`` to pooled features."""
        x = nn.Embed(200, 36)(ids) + nn.Embed(64, 36)(jnp.arange(ids.shape[-1]))
        x = nn.LayerNorm()(x)
        seen = nn.make_attention_mask(mask > 0, mask > 0)
        for _ in range(2):
            y = nn.MultiHeadDotProductAttention(3, deterministic=True)(x, mask=seen)
            x = nn.LayerNorm()(x + y)
            y = nn.Dense(36)(nn.gelu(nn.Dense(144)(x), approximate=False))
            x = nn.LayerNorm()(x + y)
        return nn.tanh(nn.Dense(36)(x[:, 0]))


class Whisper(nn.Module):
    """Whisper's encoder: two convolutions over time, positions, two blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps spectrograms ``(N, T, bands)`` to ``(N, T / 2, 48)``."""
        x = nn.gelu(nn.Conv(48, (3,), padding=1)(x), approximate=False)
        x = nn.gelu(nn.Conv(48, (3,), 2, padding=1)(x), approximate=False)
        rate = 10000.0 ** -jnp.linspace(0, 1, 24)
        angles = jnp.arange(x.shape[1])[:, None] * rate
        x = x + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(y, y)
            y = nn.gelu(nn.Dense(96)(nn.LayerNorm()(x)), approximate=False)
            x = x + nn.Dense(48)(y)
        return nn.LayerNorm()(x)


class DsCnn(nn.Module):
    """DS-CNN for keywords."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps spectrograms ``(N, 49, 10, 1)`` to 12 logits."""
        conv = nn.Conv(24, (10, 4), (2, 2), use_bias=False)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(conv(x)))
        for _ in range(4):
            x = nn.relu(normed(nn.relu(depthwise(x)), 24, 1))
        return nn.Dense(12)(x.mean((1, 2)))


class Autoencoder(nn.Module):
    """The anomaly detector of MLPerf Tiny: Dense layers and batch norms."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps 64 features to 64."""
        for width in (32, 32, 8, 32, 32):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(width)(x))
            x = nn.relu(x)
        return nn.Dense(64)(x)


class ConvAutoencoder(nn.Module):
    """Strided convolutions, a code, and transposed convolutions back to the image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to images."""
        for width in (8, 16):
            x = nn.leaky_relu(nn.Conv(width, (3, 3), 2)(x))
        shape = x.shape
        x = nn.Dense(20)(x.reshape(x.shape[0], -1))
        x = nn.elu(nn.Dense(shape[1] * shape[2] * shape[3])(x)).reshape(shape)
        x = nn.elu(nn.ConvTranspose(8, (3, 3), (2, 2))(x))
        return nn.sigmoid(nn.ConvTranspose(3, (3, 3), (2, 2))(x))


class Yolo(nn.Module):
    """A detector with two scales: residual blocks, a neck, boxes and classes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Maps images to boxes and scores of each cell, at two scales."""
        maps = []
        for width in (8, 16, 32):
            x = nn.silu(normed(x, width, 3, 2))
            y = nn.silu(normed(nn.silu(normed(x, width // 2, 1)), width, 3))
            x = x + y
            maps.append(x)
        pools = [x]
        for _ in range(3):
            pools.append(nn.max_pool(pools[-1], (5, 5), (1, 1), "SAME"))
        x = nn.silu(normed(jnp.concatenate(pools, -1), 16, 1))
        up = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        outs = []
        for y in (jnp.concatenate([up, maps[1]], -1), x):
            y = nn.Conv(3 * 9, (1, 1))(nn.silu(normed(y, 16, 3)))
            y = y.reshape(*y.shape[:3], 3, 9)
            boxes, rest = y[..., :4], y[..., 4:]
            sides = jnp.exp(boxes[..., 2:])
            outs.append(jnp.concatenate([nn.sigmoid(boxes[..., :2]), sides], -1))
            outs.append(nn.sigmoid(rest))
        return tuple(outs)


class Pointnet(nn.Module):
    """PointNet: a learned rotation, layers of each point, a maximum over all."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps points ``(N, P, 3)`` to 10 logits."""
        y = nn.relu(nn.Dense(32)(nn.relu(nn.Dense(16)(x)))).max(1)
        turn = nn.Dense(9)(nn.relu(nn.Dense(16)(y))).reshape(-1, 3, 3)
        x = x @ (turn + jnp.eye(3))
        for width in (16, 32, 64):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(width)(x))
            x = nn.relu(x)
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x.max(1))))


class Wavenet(nn.Module):
    """WaveNet: gated causal convolutions, ever more dilated, and skips."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps waves ``(N, T, 1)`` to logits ``(N, T, 32)``."""
        x, skips = nn.Conv(16, (2,), padding="CAUSAL")(x), 0.0
        for dilation in (1, 2, 4, 8):
            spaced = {"padding": "CAUSAL", "kernel_dilation": dilation}
            y = nn.tanh(nn.Conv(16, (2,), **spaced)(x))
            y = y * nn.sigmoid(nn.Conv(16, (2,), **spaced)(x))
            skips = skips + nn.Conv(24, (1,))(y)
            x = x + nn.Conv(16, (1,))(y)
        return nn.Conv(32, (1,))(nn.relu(nn.Conv(24, (1,))(nn.relu(skips))))


class Siamese(nn.Module):
    """Two images, one encoder, the distance of their features."""

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Maps two images to one number for each pair."""
        convs = [nn.Conv(8, (3, 3), 2), nn.Conv(16, (3, 3), 2)]
        head = nn.Dense(12)

        def features(x: jax.Array) -> jax.Array:
            for conv in convs:
                x = nn.relu(conv(x))
            y = head(x.reshape(x.shape[0], -1))
            return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

        return jnp.square(features(a) - features(b)).sum(-1)


class Network(NamedTuple):
    """What :func:`fcconv_jax.export` takes."""

    model: Any
    params: Any
    inputs: tuple[Any, ...]


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """Random inputs."""
    return jax.random.normal(jax.random.key(seed), shape)


def _flax(model: nn.Module, *inputs: Any) -> Network:
    """A model with every parameter at random, made from its shape: none compiled."""
    leaves, tree = jax.tree.flatten(
        jax.eval_shape(model.init, jax.random.key(0), *inputs)
    )
    rng = np.random.default_rng(7)
    made = [
        # Kernels keep the size of features; scales and variances are positive.
        rng.normal(size=x.shape) / (x.size / x.shape[-1]) ** 0.5
        if len(x.shape) > 1
        else 1 + 0.1 * rng.uniform(size=x.shape)
        for x in leaves
    ]
    params = [jnp.asarray(leaf, jnp.float32) for leaf in made]
    return Network(model, jax.tree.unflatten(tree, params), inputs)


def _image() -> jax.Array:
    return normal(1, 32, 32, 3)


def _ids() -> tuple[jax.Array, jax.Array]:
    ids = jax.random.randint(jax.random.key(1), (2, 16), 0, 200)
    return ids, jnp.ones((2, 16), jnp.int32).at[1, 12:].set(0)


NETWORKS: dict[str, Callable[[], Network]] = {
    "VGG16": lambda: _flax(Vgg16(), _image()),
    "ResNet-18": lambda: _flax(Resnet(False), _image()),
    "ResNet-50": lambda: _flax(Resnet(True), _image()),
    "MobileNetV1": lambda: _flax(MobilenetV1(), _image()),
    "MobileNetV2": lambda: _flax(Inverted((nn.relu6,)), _image()),
    "MobileNetV3": lambda: _flax(
        Inverted((nn.relu, nn.hard_swish), nn.hard_sigmoid), _image()
    ),
    "EfficientNet-B0": lambda: _flax(Inverted((nn.silu,), nn.sigmoid), _image()),
    "ConvNeXt-T": lambda: _flax(Convnext(), _image()),
    "ViT-S": lambda: _flax(Vit(), _image()),
    "DeiT": lambda: _flax(Vit(2), _image()),
    "MLP-Mixer": lambda: _flax(networks.Mixer(2, 40, 8, 24, 96, 10), _image()),
    "Swin": lambda: _flax(Swin(), _image()),
    "U-Net, resized": lambda: _flax(Unet(False), _image()),
    "U-Net, transposed": lambda: _flax(Unet(True), _image()),
    "LSTM": lambda: _flax(Recurrent(nn.LSTMCell), normal(2, 20, 8)),
    "GRU": lambda: _flax(Recurrent(nn.GRUCell), normal(2, 20, 8)),
    "BERT-tiny": lambda: _flax(Bert(), *_ids()),
    "Whisper-tiny encoder": lambda: _flax(Whisper(), normal(1, 40, 20)),
    "DS-CNN": lambda: _flax(DsCnn(), normal(1, 49, 10, 1)),
    "autoencoder": lambda: _flax(Autoencoder(), normal(2, 64)),
    "convolutional autoencoder": lambda: _flax(ConvAutoencoder(), _image()),
    "YOLO-like": lambda: _flax(Yolo(), normal(1, 64, 64, 3)),
    "PointNet": lambda: _flax(Pointnet(), normal(2, 50, 3)),
    "WaveNet": lambda: _flax(Wavenet(), normal(1, 60, 1)),
    "Siamese": lambda: _flax(Siamese(), _image(), normal(1, 32, 32, 3, seed=2)),
    "NNX": lambda: Network(edge_libraries.of_nnx(), None, (_image(),)),
    "Equinox": lambda: Network(edge_libraries.of_equinox(), None, (normal(3, 32, 32),)),
    "Haiku": lambda: Network(*edge_libraries.of_haiku(_image()), (_image(),)),
    "Keras": lambda: Network(edge_libraries.of_keras(), None, (_image(),)),
    "PyTorch": lambda: Network(
        edge_libraries.of_torch(), None, (normal(1, 3, 32, 32),)
    ),
}
