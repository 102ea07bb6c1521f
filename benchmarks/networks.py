"""Networks that are measured: Flax's own layers, at their published widths."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class Head(nn.Module):
    """The fully connected head of VGG16, its widths divided."""

    divided: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, 7, 7, 512)`` to ``(N, 1000)``."""
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = nn.relu(nn.Dense(4096 // self.divided, name=name)(x))
        return nn.Dense(1000, name="fc8")(x)


class Vgg(nn.Module):
    """VGG16, its widths divided."""

    divided: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to ``(N, 1000)``."""
        for repeats, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(repeats):
                x = nn.relu(nn.Conv(width // self.divided, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return Head(self.divided, name="head")(x)


class Vit(nn.Module):
    """ViT-B/16."""

    layers: int = 12
    width: int = 768

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to ``(N, 1000)``."""
        patches = nn.Conv(self.width, (16, 16), (16, 16), padding="VALID", name="embed")
        x = patches(x).reshape(x.shape[0], -1, self.width)
        zero = nn.initializers.zeros
        token = self.param("token", zero, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", zero, (1, x.shape[1], self.width))
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(12)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(1000, name="head")(nn.LayerNorm()(x)[:, 0])


class Resnet(nn.Module):
    """ResNet-50, at inference or in training."""

    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to ``(N, 1000)``."""

        def conv(x: jax.Array, features: int, size: int, stride: int = 1) -> jax.Array:
            layer = nn.Conv(features, (size, size), (stride, stride), use_bias=False)
            return nn.BatchNorm(use_running_average=not self.train)(layer(x))

        x = nn.max_pool(nn.relu(conv(x, 64, 7, 2)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                width, stride = 64 * 2**stage, 2 if stage and not block else 1
                y = nn.relu(conv(x, width, 1))
                y = nn.relu(conv(y, width, 3, stride))
                y = conv(y, 4 * width, 1)
                if not block:
                    x = conv(x, 4 * width, 1, stride)
                x = nn.relu(x + y)
        return nn.Dense(1000, name="head")(x.mean((1, 2)))


class Convnext(nn.Module):
    """ConvNeXt-T, at inference."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to ``(N, 1000)``."""
        for stage, blocks in enumerate((3, 3, 9, 3)):
            width = 96 * 2**stage
            if stage:
                x = nn.Conv(width, (2, 2), (2, 2), padding="VALID")(nn.LayerNorm()(x))
            else:
                x = nn.LayerNorm()(nn.Conv(width, (4, 4), (4, 4), padding="VALID")(x))
            for block in range(blocks):
                y = nn.Conv(width, (7, 7), feature_group_count=width)(x)
                y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(y)))
                y = nn.Dense(width)(y)
                small = nn.initializers.constant(1e-6)
                x = x + y * self.param(f"scale_{stage}_{block}", small, (width,))
        return nn.Dense(1000, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class Mixer(nn.Module):
    """MLP-Mixer, B/16 as it is published."""

    layers: int = 12
    width: int = 768
    window: int = 16
    tokens: int = 384
    channels: int = 3072
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, H, W, 3)`` to ``(N, classes)``."""
        window = (self.window, self.window)
        x = nn.Conv(self.width, window, window, padding="VALID", name="stem")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(self.tokens)(y)))
            x = x + y.swapaxes(1, 2)
            y = nn.gelu(nn.Dense(self.channels)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


class Encoder(nn.Module):
    """One encoder layer of BERT-base: 12 heads of 64, a feed-forward of 3072."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, 768)`` to the same shape."""
        h = nn.MultiHeadDotProductAttention(num_heads=12, deterministic=True)(x)
        x = nn.LayerNorm()(x + h)
        h = nn.Dense(768)(nn.gelu(nn.Dense(3072)(x)))
        return nn.LayerNorm()(x + h)


class Bert(nn.Module):
    """BERT-base in size: 12 layers, 110 million parameters."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps token ids ``(N, T)`` to pooled features ``(N, 768)``."""
        x = nn.Embed(30522, 768)(ids)
        x = nn.LayerNorm()(x + nn.Embed(512, 768)(jnp.arange(ids.shape[-1])))
        for _ in range(12):
            x = Encoder()(x)
        return nn.tanh(nn.Dense(768, name="pooler")(x[:, 0]))


class Mobilenet(nn.Module):
    """MobileNet (the first), at inference."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to ``(N, 1000)``."""

        def conv(
            x: jax.Array, features: int, size: int, stride: int = 1, groups: int = 1
        ) -> jax.Array:
            x = nn.Conv(
                *(features, (size, size), (stride, stride)),
                feature_group_count=groups,
                use_bias=False,
            )(x)
            return nn.relu(nn.BatchNorm(use_running_average=True)(x))

        x = conv(x, 32, 3, 2)
        widths = (64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)
        for number, width in enumerate(widths):
            stride = 2 if number in (1, 3, 5, 11) else 1
            x = conv(x, x.shape[-1], 3, stride, groups=x.shape[-1])
            x = conv(x, width, 1)
        return nn.Dense(1000, name="head")(x.mean((1, 2)))


class Unet(nn.Module):
    """A U-Net with transposed convolutions 2x2, as published, its widths halved."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, H, W, 3)`` to logits ``(N, H, W, 2)``."""

        def convs(x: jax.Array, width: int) -> jax.Array:
            for _ in range(2):
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            return x

        skips = []
        for level in range(4):
            x = convs(x, self.width << level)
            skips.append(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = convs(x, self.width << 4)
        for level, skip in reversed(list(enumerate(skips))):
            x = nn.ConvTranspose(self.width << level, (2, 2), (2, 2))(x)
            x = convs(jnp.concatenate([skip, x], axis=-1), self.width << level)
        return nn.Conv(2, (1, 1), padding="VALID")(x)


class MaeDecoder(nn.Module):
    """The decoder of a masked autoencoder, which ends in a transposed convolution."""

    layers: int = 8
    width: int = 512
    window: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens ``(N, H, W, 1024)`` to images ``(N, 16 H, 16 W, 3)``."""
        n, height, width, _ = x.shape
        x = nn.Dense(self.width, name="embed")(x.reshape(n, height * width, -1))
        zero = nn.initializers.zeros
        x = x + self.param("positions", zero, (1, x.shape[1], self.width))
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(16)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        x = nn.LayerNorm()(x).reshape(n, height, width, self.width)
        window = (self.window, self.window)
        return nn.ConvTranspose(3, window, window, name="pixels")(x)
