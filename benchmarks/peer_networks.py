"""Networks in Flax and in Keras from one description, with the same weights.

A description calls the layers of a framework: :class:`FlaxLayers` inside a Flax module,
another class on Keras's symbolic tensors. Widths are divided and images are
small, so that files take seconds to make; operators are those of the full networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np

# Activations of both frameworks by their common name.
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_sigmoid": nn.hard_sigmoid,
    "hard_swish": nn.hard_swish,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "softmax": nn.softmax,
}


class FlaxLayers:
    """Layers of Flax, in a compact call."""

    def __init__(self) -> None:
        self.count = 0

    def name(self) -> str:
        """The next layer's name, as both frameworks have it."""
        self.count += 1
        return f"layer{self.count:03}"

    def conv(
        self, x: Any, features: int, size: int = 3, stride: int = 1, bias: bool = False
    ) -> Any:
        """A convolution with padding SAME."""
        options = {"use_bias": bias, "name": self.name()}
        return nn.Conv(features, (size, size), (stride, stride), **options)(x)

    def depthwise(self, x: Any, size: int = 3, stride: int = 1) -> Any:
        """A depthwise convolution with padding SAME."""
        width = x.shape[-1]
        return nn.Conv(
            *(width, (size, size), (stride, stride)),
            feature_group_count=width,
            use_bias=False,
            name=self.name(),
        )(x)

    def transposed(self, x: Any, features: int, size: int = 3, stride: int = 2) -> Any:
        """A transposed convolution with padding SAME."""
        window = (size, size), (stride, stride)
        return nn.ConvTranspose(features, *window, name=self.name())(x)

    def dense(self, x: Any, features: int) -> Any:
        """A dense layer."""
        return nn.Dense(features, name=self.name())(x)

    def norm(self, x: Any) -> Any:
        """A batch norm at inference."""
        return nn.BatchNorm(use_running_average=True, name=self.name())(x)

    def act(self, x: Any, name: str = "relu") -> Any:
        """An activation."""
        return _ACTIVATIONS[name](x)

    def max_pool(self, x: Any, size: int, stride: int) -> Any:
        """A max pool with padding SAME."""
        window = {"window_shape": (size, size), "strides": (stride, stride)}
        return nn.max_pool(x, **window, padding="SAME")

    def mean(self, x: Any, keep: bool = False) -> Any:
        """The mean over positions."""
        return x.mean((1, 2), keepdims=keep)

    def flatten(self, x: Any) -> Any:
        """Rows of all that belongs to an example."""
        return x.reshape(x.shape[0], -1)


class _KerasLayers:
    """Layers of Keras, on its symbolic tensors."""

    def __init__(self, layers: Any):
        self.layers, self.count = layers, 0

    name = FlaxLayers.name

    def conv(
        self, x: Any, features: int, size: int = 3, stride: int = 1, bias: bool = False
    ) -> Any:
        options = {"padding": "same", "use_bias": bias, "name": self.name()}
        return self.layers.Conv2D(features, size, stride, **options)(x)

    def depthwise(self, x: Any, size: int = 3, stride: int = 1) -> Any:
        options = {"padding": "same", "use_bias": False, "name": self.name()}
        return self.layers.DepthwiseConv2D(size, stride, **options)(x)

    def transposed(self, x: Any, features: int, size: int = 3, stride: int = 2) -> Any:
        options = {"padding": "same", "name": self.name()}
        return self.layers.Conv2DTranspose(features, size, stride, **options)(x)

    def dense(self, x: Any, features: int) -> Any:
        return self.layers.Dense(features, name=self.name())(x)

    def norm(self, x: Any) -> Any:
        options = {"epsilon": 1e-5, "name": self.name()}  # Flax's own
        return self.layers.BatchNormalization(**options)(x)

    def act(self, x: Any, name: str = "relu") -> Any:
        return self.layers.Activation(name)(x)

    def max_pool(self, x: Any, size: int, stride: int) -> Any:
        return self.layers.MaxPooling2D(size, stride, padding="same")(x)

    def mean(self, x: Any, keep: bool = False) -> Any:
        return self.layers.GlobalAveragePooling2D(keepdims=keep)(x)

    def flatten(self, x: Any) -> Any:
        return self.layers.Flatten()(x)


def ds_cnn(b: Any, x: Any) -> Any:
    """DS-CNN for keywords: spectrograms ``(N, 49, 10, 1)`` to twelve words."""
    x = b.act(b.norm(b.conv(x, 64, 5, 2)))
    for _ in range(4):
        x = b.act(b.norm(b.depthwise(x)))
        x = b.act(b.norm(b.conv(x, 64, 1)))
    return b.act(b.dense(b.mean(x), 12), "softmax")


def mobilenet_v1(b: Any, x: Any, divided: int = 4) -> Any:
    """MobileNet, the first."""
    x = b.act(b.norm(b.conv(x, 32 // divided, 3, 2)), "relu6")
    widths = (64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)
    for number, width in enumerate(widths):
        stride = 2 if number in (1, 3, 5, 11) else 1
        x = b.act(b.norm(b.depthwise(x, 3, stride)), "relu6")
        x = b.act(b.norm(b.conv(x, width // divided, 1)), "relu6")
    return b.act(b.dense(b.mean(x), 1000 // divided), "softmax")


def mobilenet_v2(b: Any, x: Any, divided: int = 4) -> Any:
    """MobileNetV2: inverted residuals."""
    x = b.act(b.norm(b.conv(x, 32 // divided, 3, 2)), "relu6")
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
    for wide, width, blocks, stride in (*stages, (6, 96, 3, 1), (6, 160, 3, 2)):
        for block in range(blocks):
            y = x
            if wide > 1:
                y = b.act(b.norm(b.conv(y, x.shape[-1] * wide, 1)), "relu6")
            step = 1 if block else stride
            y = b.act(b.norm(b.depthwise(y, 3, step)), "relu6")
            y = b.norm(b.conv(y, width // divided, 1))
            x = x + y if block else y
    x = b.act(b.norm(b.conv(x, 1280 // divided, 1)), "relu6")
    return b.act(b.dense(b.mean(x), 1000 // divided), "softmax")


def _squeezed(b: Any, x: Any, features: int, act: str, gate: str) -> Any:
    """Squeeze-and-excite, its layers pointwise convolutions."""
    y = b.act(b.conv(b.mean(x, keep=True), features, 1, bias=True), act)
    return x * b.act(b.conv(y, x.shape[-1], 1, bias=True), gate)


def mobilenet_v3(b: Any, x: Any, divided: int = 4) -> Any:
    """MobileNetV3-Small."""
    x = b.act(b.norm(b.conv(x, 16, 3, 2)), "hard_swish")
    relu, swish = "relu", "hard_swish"
    for size, wide, width, squeeze, act, stride in (
        *((3, 16, 16, True, relu, 2), (3, 72, 24, False, relu, 2)),
        *((3, 88, 24, False, relu, 1), (5, 96, 40, True, swish, 2)),
        *((5, 240, 40, True, swish, 1), (5, 240, 40, True, swish, 1)),
        *((5, 120, 48, True, swish, 1), (5, 144, 48, True, swish, 1)),
        *((5, 288, 96, True, swish, 2), (5, 576, 96, True, swish, 1)),
        (5, 576, 96, True, swish, 1),
    ):
        y = x
        if wide != 16:
            y = b.act(b.norm(b.conv(y, wide, 1)), act)
        y = b.act(b.norm(b.depthwise(y, size, stride)), act)
        if squeeze:
            y = _squeezed(b, y, max(8, wide // 4), "relu", "hard_sigmoid")
        y = b.norm(b.conv(y, width, 1))
        x = x + y if stride == 1 and x.shape[-1] == width else y
    x = b.act(b.norm(b.conv(x, 576, 1)), "hard_swish")
    x = b.act(b.conv(b.mean(x, keep=True), 1024 // divided, 1, bias=True), swish)
    return b.act(b.flatten(b.conv(x, 1000 // divided, 1, bias=True)), "softmax")


def efficientnet_b0(b: Any, x: Any, divided: int = 4) -> Any:
    """EfficientNet-B0."""
    x = b.act(b.norm(b.conv(x, 32 // divided, 3, 2)), "silu")
    for size, wide, width, blocks, stride in (
        *((3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2)),
        *((5, 6, 112, 3, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1)),
    ):
        for block in range(blocks):
            y, before = x, x.shape[-1]
            if wide > 1:
                y = b.act(b.norm(b.conv(y, before * wide, 1)), "silu")
            y = b.act(b.norm(b.depthwise(y, size, 1 if block else stride)), "silu")
            y = _squeezed(b, y, max(1, before // 4), "silu", "sigmoid")
            y = b.norm(b.conv(y, width // divided, 1))
            x = x + y if block else y
    x = b.act(b.norm(b.conv(x, 1280 // divided, 1)), "silu")
    return b.act(b.dense(b.mean(x), 1000 // divided), "softmax")


def vgg16(b: Any, x: Any, divided: int = 8) -> Any:
    """VGG16, with its dense layers behind a flatten."""
    for repeats, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):
            x = b.act(b.conv(x, width // divided, 3, bias=True))
        x = b.max_pool(x, 2, 2)
    x = b.flatten(x)
    for _ in range(2):
        x = b.act(b.dense(x, 4096 // divided))
    return b.act(b.dense(x, 1000 // divided), "softmax")


def resnet18(b: Any, x: Any, divided: int = 4) -> Any:
    """ResNet-18."""
    x = b.max_pool(b.act(b.norm(b.conv(x, 64 // divided, 7, 2))), 3, 2)
    for stage in range(4):
        for block in range(2):
            width = (64 << stage) // divided
            stride = 2 if stage and not block else 1
            y = b.act(b.norm(b.conv(x, width, 3, stride)))
            y = b.norm(b.conv(y, width, 3))
            if stride > 1:
                x = b.norm(b.conv(x, width, 1, stride))
            x = b.act(x + y)
    return b.act(b.dense(b.mean(x), 1000 // divided), "softmax")


def autoencoder(b: Any, x: Any) -> Any:
    """A convolutional autoencoder with transposed convolutions."""
    for width in (16, 32, 64):
        x = b.act(b.norm(b.conv(x, width, 3, 2)))
    for width in (32, 16):
        x = b.act(b.norm(b.transposed(x, width)))
    return b.act(b.transposed(x, 3), "sigmoid")


class Described(nn.Module):
    """A description, as a network in Flax."""

    description: Callable[[Any, Any], Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, H, W, C)`` to what the network computes."""
        return self.description(FlaxLayers(), x)


class Mlp(nn.Module):
    """Ten dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, 64)`` to the same shape."""
        for _ in range(9):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(64)(x)


class Bert(nn.Module):
    """BERT-tiny: two layers of width 128."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps token ids ``(N, T)`` to pooled features ``(N, 128)``."""
        x = nn.Embed(512, 128)(ids) + nn.Embed(64, 128)(jnp.arange(ids.shape[-1]))
        x = nn.LayerNorm()(x)
        for _ in range(2):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, x))
            y = nn.gelu(nn.Dense(512)(x), approximate=False)
            x = nn.LayerNorm()(x + nn.Dense(128)(y))
        return nn.tanh(nn.Dense(128, name="pooler")(x[:, 0]))


class Convnext(nn.Module):
    """Two stages of a ConvNeXt."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, H, W, 3)`` to ``(N, 10)``."""
        x = nn.LayerNorm()(nn.Conv(32, (4, 4), (4, 4), padding="VALID")(x))
        for width in (32, 64):
            if width > 32:
                x = nn.Conv(width, (2, 2), (2, 2), padding="VALID")(nn.LayerNorm()(x))
            for _ in range(2):
                y = nn.Conv(width, (7, 7), feature_group_count=width)(x)
                y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(y)))
                x = x + nn.Dense(width)(y)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class Yolo(nn.Module):
    """A detector: features at two scales, and a head for each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, H, W, 3)`` to boxes ``(N, B, 8)``."""

        def conv(x: jax.Array, width: int, size: int = 3, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (size, size), (stride, stride), use_bias=False)(x)
            return nn.silu(nn.BatchNorm(use_running_average=True)(x))

        x = conv(conv(x, 16, 3, 2), 32, 3, 2)
        x = x + conv(conv(x, 16, 1), 32)
        fine = conv(x, 64, 3, 2)
        x = conv(fine, 128, 3, 2)
        pools = [x]
        for _ in range(3):
            pools.append(nn.max_pool(pools[-1], window_shape=(5, 5), padding="SAME"))
        coarse = conv(jnp.concatenate(pools, -1), 64, 1)
        n, h, w, c = fine.shape
        up = jax.image.resize(coarse, (n, h, w, c), "nearest")
        fine = conv(jnp.concatenate([up, fine], -1), 64)
        heads = [nn.Conv(8, (1, 1))(each) for each in (fine, coarse)]
        return jnp.concatenate([y.reshape(n, -1, 8) for y in heads], 1)


class PointNet(nn.Module):
    """Layers for each point, and a maximum over points."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps points ``(N, P, 3)`` to ``(N, 10)``."""
        for width in (64, 128, 256):
            x = nn.Dense(width)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.max(1))))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps signals ``(N, T, 1)`` to ``(N, T, 16)``."""
        x, skips = nn.Conv(32, (1,))(x), []
        for dilation in (1, 2, 4, 8):
            options = {"kernel_dilation": (dilation,), "padding": "CAUSAL"}
            a, b = (nn.Conv(32, (2,), **options)(x) for _ in range(2))
            y = nn.Conv(32, (1,))(nn.tanh(a) * nn.sigmoid(b))
            skips.append(y)
            x = x + y
        return nn.Conv(16, (1,))(nn.relu(sum(skips)))


class Siamese(nn.Module):
    """One network on two images, and their cosine."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps pairs ``(N, H, W, 6)`` to ``(N,)``."""
        layers = [nn.Conv(16, (3, 3), (2, 2)), nn.Conv(32, (3, 3), (2, 2))]
        head = nn.Dense(32)

        def embed(x: jax.Array) -> jax.Array:
            for layer in layers:
                x = nn.relu(layer(x))
            y = head(x.reshape(x.shape[0], -1))
            return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

        return (embed(x[..., :3]) * embed(x[..., 3:])).sum(-1)


_IMAGE = (96, 96, 3)
# Those that Keras has, too; the shapes are of one example.
DESCRIPTIONS: Mapping[str, tuple[Callable[[Any, Any], Any], tuple[int, ...]]] = {
    "ds-cnn": (ds_cnn, (49, 10, 1)),
    "mobilenet-v1": (mobilenet_v1, _IMAGE),
    "mobilenet-v2": (mobilenet_v2, _IMAGE),
    "mobilenet-v3": (mobilenet_v3, _IMAGE),
    "efficientnet-b0": (efficientnet_b0, _IMAGE),
    "vgg16": (vgg16, _IMAGE),
    "resnet18": (resnet18, _IMAGE),
    "autoencoder": (autoencoder, (32, 32, 3)),
}
NETWORKS: Mapping[str, tuple[nn.Module, tuple[int, ...]]] = {
    **{name: (Described(make), shape) for name, (make, shape) in DESCRIPTIONS.items()},
    "mlp": (Mlp(), (64,)),
    "bert-tiny": (Bert(), (16,)),
    "vit": (networks.Vit(2, 96), (224, 224, 3)),
    "mixer": (networks.Mixer(2, 64, 8, 32, 256, 10), (64, 64, 3)),
    "convnext": (Convnext(), (64, 64, 3)),
    "unet": (networks.Unet(8), (64, 64, 3)),
    "mae-decoder": (networks.MaeDecoder(1, 64, 4), (8, 8, 64)),
    "encoder": (networks.Encoder(), (16, 768)),
    "yolo": (Yolo(), (64, 64, 3)),
    "pointnet": (PointNet(), (128, 3)),
    "wavenet": (WaveNet(), (64, 1)),
    "siamese": (Siamese(), (32, 32, 6)),
}


def flax_network(name: str) -> tuple[nn.Module, Any, jax.Array]:
    """A network, its variables with statistics of their own, and an example."""
    rng = np.random.default_rng(0)
    model, shape = NETWORKS[name]
    x = jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32)
    if name == "bert-tiny":
        x = jnp.arange(shape[0], dtype=jnp.int32)[None]
    variables = jax.jit(model.init)(jax.random.key(0), x)
    if "batch_stats" not in variables:
        return model, variables, x

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        # Means near those of activations: with others every relu returns zeros.
        if path[-1].key == "mean":
            return jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.uniform(0.3, 1.2, leaf.shape), leaf.dtype)

    stats = jax.tree_util.tree_map_with_path(draw, variables["batch_stats"])
    return model, {**variables, "batch_stats": stats}, x


def examples(name: str, count: int, seed: int) -> np.ndarray:
    """Images that a described network is calibrated on, or compared on."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *DESCRIPTIONS[name][1])).astype(np.float32)


def keras_network(name: str, variables: Any, keras: Any) -> Any:
    """A described network in Keras, with the same weights."""
    description, shape = DESCRIPTIONS[name]
    x = keras.Input(shape, batch_size=1)
    made = keras.Model(x, description(_KerasLayers(keras.layers), x))
    for layer, params in variables["params"].items():
        stats = variables.get("batch_stats", {}).get(layer, {})
        target = made.get_layer(layer)
        kernel = params.get("kernel")
        if isinstance(target, keras.layers.DepthwiseConv2D):
            kernel = kernel.transpose(0, 1, 3, 2)
        elif isinstance(target, keras.layers.Conv2DTranspose):
            kernel = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
        arrays = (params.get("scale"), kernel, params.get("bias"), *stats.values())
        target.set_weights([np.asarray(a) for a in arrays if a is not None])
    return made
