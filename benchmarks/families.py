"""What ``fc.slide`` gains for families of networks, small ones of each.

    python benchmarks/families.py [NAME ...] --out benchmarks/results

Each runs on 4x4 crops of 96 pixels, its own total stride apart, by ``fc.slide`` and in
one batch. Calls are interleaved in one process; medians of CPU seconds, which other
processes disturb less than the clock; float32. Results go to ``slide.json``, of which
the documentation makes a table.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from running import cpu_seconds, write_row
from slide import Pools, ResNet, crops_of

import fcconv_jax as fc

_CROP, _SIDE, _ROUNDS = 96, 4, 9


def _conv(x: jax.Array, width: int, size: int, step: int = 1, by: int = 1) -> jax.Array:
    layer = nn.Conv(width, (size, size), step, feature_group_count=by, use_bias=False)
    return nn.BatchNorm(use_running_average=True)(layer(x))


def _squeezed(x: jax.Array) -> jax.Array:
    """Squeeze and excite: channels scaled by what a crop has on average."""
    y = nn.relu(nn.Dense(x.shape[-1] // 4)(x.mean((1, 2), keepdims=True)))
    return x * nn.sigmoid(nn.Dense(x.shape[-1])(y))


def _inverted(
    x: jax.Array, width: int, size: int, step: int, squeeze: bool
) -> jax.Array:
    wide = 4 * x.shape[-1]
    y = nn.swish(_conv(nn.swish(_conv(x, wide, 1)), wide, size, step, by=wide))
    y = _conv(_squeezed(y) if squeeze else y, width, 1)
    return x + y if x.shape == y.shape else y


class DenseNet(nn.Module):
    """Dense blocks of three layers, and transitions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        x = nn.max_pool(nn.relu(_conv(x, 24, 7, 2)), (3, 3), (2, 2), "SAME")
        for last in (False, False, True):
            for _ in range(3):
                y = nn.relu(_conv(x, 48, 1))
                x = jnp.concatenate([x, nn.relu(_conv(y, 12, 3))], -1)
            if not last:
                x = nn.avg_pool(_conv(x, x.shape[-1] // 2, 1), (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class Inception(nn.Module):
    """Blocks of four branches."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        x = nn.max_pool(nn.relu(_conv(x, 32, 7, 2)), (3, 3), (2, 2), "SAME")
        for width in (16, 16, 32, 32):
            if width == 32 and x.shape[-1] == 64:
                x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
            branches = [_conv(x, width, 1), _conv(pooled, width, 1)]
            branches += [_conv(nn.relu(_conv(x, width, 1)), width, k) for k in (3, 5)]
            x = nn.relu(jnp.concatenate(branches, -1))
        return nn.Dense(10)(x.mean((1, 2)))


class MobileNetV3(nn.Module):
    """Inverted residuals; those from the third on squeeze and excite."""

    first: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        x = nn.swish(_conv(x, 16, 3, 2))
        blocks = ((16, 3, 2), (24, 3, 1), (24, 5, 2), (40, 5, 1), (40, 3, 2))
        for i, (width, size, step) in enumerate(blocks):
            x = _inverted(x, width, size, step, i >= self.first)
        return nn.Dense(10)(nn.swish(_conv(x, 160, 1)).mean((1, 2)))


class ConvNext(nn.Module):
    """ConvNeXt: norms over channels, depthwise windows of 7x7."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        for width, size in ((32, 4), (64, 2), (128, 2)):
            x = nn.LayerNorm()(nn.Conv(width, (size, size), size, padding="VALID")(x))
            for _ in range(2):
                y = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
                x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
        return nn.Dense(10)(x.mean((1, 2)))


class Vit(nn.Module):
    """A vision transformer; DINO's are the same behind a patch embedding of 8."""

    patch: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        size = (self.patch, self.patch)
        x = nn.Conv(96, size, size, padding="VALID")(x).reshape(x.shape[0], -1, 96)
        place = self.param("place", nn.initializers.normal(), (1, x.shape[1], 96))
        x = x + place
        for _ in range(4):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(y, y)
            y = nn.gelu(nn.Dense(384)(nn.LayerNorm()(x)))
            x = x + nn.Dense(96)(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Swin(nn.Module):
    """Two stages of attention within windows, plain and shifted in turns."""

    window: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        for width, size in ((48, 4), (96, 2)):
            x = nn.Conv(width, (size, size), size, padding="VALID")(x)
            for shift in (0, self.window // 2):
                x = x + self._attention(nn.LayerNorm()(x), shift)
                y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
                x = x + nn.Dense(width)(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean((1, 2)))

    def _attention(self, x: jax.Array, shift: int, heads: int = 3) -> jax.Array:
        batch, rows, columns, width = x.shape
        size, count = self.window, self.window**2
        down, across = rows // size, columns // size

        def windows(x: jax.Array) -> jax.Array:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
            x = x.reshape(x.shape[0], down, size, across, size, -1)
            return x.swapaxes(2, 3).reshape(-1, down * across, count, x.shape[-1])

        joined = nn.Dense(3 * width)(windows(x))
        joined = joined.reshape(batch, down * across, count, 3, heads, -1)
        q, k, v = (joined[:, :, :, i] for i in range(3))
        name, normal = f"place_{width}_{shift}", nn.initializers.normal()
        place = self.param(name, normal, (heads, count, count))
        scores = jnp.einsum("nwqhd,nwkhd->nwhqk", q, k) / q.shape[-1] ** 0.5 + place
        # Pixels that the shift brought together from opposite borders don't meet.
        ids = jnp.arange(rows)[:, None] >= rows - shift
        ids = 2 * ids + (jnp.arange(columns) >= columns - shift)
        ids = windows(jnp.roll(ids, (shift, shift), (0, 1))[None, ..., None])[0, ..., 0]
        apart = ids[:, None, :, None] != ids[:, None, None]
        weights = nn.softmax(jnp.where(apart, -100.0, scores))
        y = jnp.einsum("nwhqk,nwkhd->nwqhd", weights, v)
        y = nn.Dense(width)(y.reshape(batch, down, across, size, size, width))
        y = y.swapaxes(2, 3).reshape(x.shape)
        return jnp.roll(y, (shift, shift), (1, 2))


# Network, and the stride that its crops are apart.
FAMILIES: dict[str, tuple[nn.Module, int]] = {
    "VGG without padding": (Pools("VALID"), 8),
    "VGG": (Pools("SAME"), 8),
    "ResNet-18": (ResNet(4), 32),
    "DenseNet": (DenseNet(), 16),
    "Inception": (Inception(), 8),
    "MobileNetV3 (SE from the third block)": (MobileNetV3(), 16),
    "EfficientNet (SE in every block)": (MobileNetV3(0), 16),
    "ConvNeXt": (ConvNext(), 16),
    "ViT/16": (Vit(), 16),
    "DINO-like ViT/8": (Vit(8), 8),
    "Swin (windows of 4x4 patches of 4)": (Swin(), 32),
}


def measure(name: str) -> dict[str, Any]:
    """Return what is gained, and where crops part."""
    model, step = FAMILIES[name]
    size = _CROP + step * (_SIDE - 1)
    x = jax.random.normal(jax.random.key(0), (1, size, size, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x[:, :_CROP, :_CROP])

    def batch(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, crops_of(x, _CROP, step, _SIDE))

    grid = fc.slide(model, (_CROP, _CROP), step)
    report = grid.report(variables, x)
    functions: dict[str, Callable[..., Any]] = {"slide": grid, "batch": jax.jit(batch)}
    outs = {key: run(variables, x) for key, run in functions.items()}
    want = outs["batch"].reshape(outs["slide"].shape)
    error = float(jnp.abs(outs["slide"] - want).max() / jnp.abs(want).max())
    assert error < 1e-4, (name, error)
    runs = {key: functools.partial(run, variables, x) for key, run in functions.items()}
    medians = cpu_seconds(runs, _ROUNDS)
    return {
        "family": name,
        "stride": step,
        "shares": report.shares,
        "flops": round(report.ratio if report.shares else 1.0, 2),
        "estimate": round(report.gain if report.shares else 1.0, 2),
        "times": round(medians["batch"] / medians["slide"], 2),
        "left": report.left[0][0] if report.left else None,
    }


def main() -> None:
    """Measure the families that are named, or all, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *FAMILIES], metavar="NAME")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name in options.names or FAMILIES:
        found = measure(name)
        print(found, flush=True)
        write_row(options.out / "slide.json", "families", FAMILIES, found)


if __name__ == "__main__":
    main()
