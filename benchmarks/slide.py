"""How much quicker one pass is than crops, on this machine, against bounds.

    python benchmarks/slide.py [NAME ...]
    python benchmarks/slide.py large [--size 40000] [--quick] [--out benchmarks/results]
    python benchmarks/slide.py borders

Each network runs on every crop of an image by ``fc.slide``, and crop by crop in three
ways: all in one batch, ten at a time, and one at a time (``jax.lax.map``). Calls are
interleaved in one process; medians; float32. Each line ends with the bound on the gain
over the quickest of the three, and whether it holds; the exit status is 1 if one does
not. ``borders`` compares exact results of padded networks with those of zeros around
the image alone, which is another function: in FLOPs, and in time.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import scans
from running import race

import fcconv_jax as fc


class Pools(nn.Module):
    """Three times two convolutions 3x3 and a pool; a head behind a flatten."""

    padding: str
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        for i in range(3):
            for _ in range(2):
                conv = nn.Conv(self.width * 2**i, (3, 3), padding=self.padding)
                x = nn.relu(conv(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1))))


class Stages(nn.Module):
    """Padded convolutions 3x3, a pool behind each stage, and a head."""

    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, n, n, 3)`` to scores ``(N, 10)``."""
        for i, count in enumerate(self.stages):
            for _ in range(count):
                x = nn.relu(nn.Conv(min(16 * 2**i, 64), (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    """A residual block of ResNet18."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, n, n, C)`` to ``(N, m, m, width)``."""

        def conv(size: int, stride: int, x: jax.Array) -> jax.Array:
            x = nn.Conv(self.width, (size, size), (stride, stride), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        y = conv(3, 1, nn.relu(conv(3, self.stride, x)))
        return nn.relu(y + (x if x.shape == y.shape else conv(1, self.stride, x)))


class ResNet(nn.Module):
    """ResNet18, its widths divided."""

    divided: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, 224, 224, 3)`` to scores ``(N, 1000)``."""
        x = nn.Conv(64 // self.divided, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, width in enumerate((64, 128, 256, 512)):
            for j in range(2):
                x = Block(width // self.divided, 2 if j == 0 and i else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class AlexNet(nn.Module):
    """A network of the size of AlexNet: the case of Long et al. (2015), table 1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, 227, 227, 3)`` to scores ``(N, 1000)``."""
        x = nn.relu(nn.Conv(96, (11, 11), (4, 4), padding="VALID")(x))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = nn.relu(nn.Conv(256, (5, 5), feature_group_count=2)(x))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = nn.relu(nn.Conv(384, (3, 3))(x))
        x = nn.relu(nn.Conv(384, (3, 3), feature_group_count=2)(x))
        x = nn.relu(nn.Conv(256, (3, 3), feature_group_count=2)(x))
        x = nn.max_pool(x, (3, 3), (2, 2)).reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(4096)(x))
        return nn.Dense(1000)(x)


# Network, crop, step, positions a side, and the bound on the gain.
CASES: dict[str, tuple[nn.Module, int, int, int, float]] = {
    "valid": (Pools("VALID"), 128, 8, 10, 20),
    "valid-20x20": (Pools("VALID"), 128, 8, 20, 40),
    "valid-step1": (Pools("VALID"), 128, 1, 32, 100),
    "same": (Pools("SAME"), 128, 8, 10, 11),
    "vgg16-quarter": (networks.Vgg(4), 224, 32, 10, 4),
    "vgg16": (networks.Vgg(), 224, 32, 10, 3),
    "resnet18-quarter": (ResNet(4), 224, 32, 10, 3),
    "resnet18": (ResNet(1), 224, 32, 10, 1.8),
    # The paper has 22 ms for a grid of 10x10 from 500x500, and 1.2 ms a crop: 5.5x.
    "alexnet": (AlexNet(), 227, 30, 10, 1),
    "apart": (Pools("SAME"), 64, 64, 4, 0.95),
    "same-gradients": (Pools("SAME"), 128, 8, 10, 3),
}
# Each timed run follows one of the same program, in seconds after what ran before.
_APART = 0.005
# Of a race; each way that is about as quick as the others runs five times at least.
_SECONDS = 5.0
# Crops in one batch take this much memory at most, in bytes of their first layers.
_BATCH = 4e9


def crops_of(x: jax.Array, crop: int, step: int, side: int) -> jax.Array:
    """All crops of an image, ``(side * side, crop, crop, 3)``."""
    places = jnp.arange(side) * step

    def at(i: jax.Array, j: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (0, i, j, 0), (1, crop, crop, 3))[0]

    rows = jax.vmap(lambda i: jax.vmap(lambda j: at(i, j))(places))(places)
    return rows.reshape(side * side, crop, crop, 3)


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the mean square of a function's outputs, jitted."""

    def loss(variables: Any, x: jax.Array) -> Any:
        return (function(variables, x) ** 2).mean()

    def run(variables: Any, x: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(jax.grad(loss)(variables, x))
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    return jax.jit(run)


def ways(
    model: nn.Module, crop: int, step: int, side: int
) -> dict[str, Callable[..., Any]]:
    """The ways to run a model on every crop."""
    found: dict[str, Callable[..., Any]] = {
        "slide": fc.slide(model, (crop, crop), step)
    }
    if side * side * crop * crop * 16 * 4 * 2 < _BATCH:
        found["batch"] = jax.jit(
            lambda v, x: model.apply(v, crops_of(x, crop, step, side))
        )
    each = 10 if side * side % 10 == 0 else 8

    def by(count: int) -> Callable[..., Any]:
        def run(variables: Any, x: jax.Array) -> Any:
            crops = crops_of(x, crop, step, side).reshape(-1, count, crop, crop, 3)
            return jax.lax.map(lambda c: model.apply(variables, c), crops)

        return jax.jit(run)

    return {**found, f"by {each}": by(each), "by 1": by(1)}


def measure(name: str) -> bool:
    """Prints one line; whether the bound holds."""
    model, crop, step, side, bound = CASES[name]
    size = crop + step * (side - 1)
    x = jax.random.normal(jax.random.key(0), (1, size, size, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x[:, :crop, :crop])
    functions = ways(model, crop, step, side)
    if name.endswith("gradients"):
        # Gradients of convolutions in a loop take XLA's CPU backend minutes.
        functions = {key: gradient(functions[key]) for key in ("slide", "batch")}
    start = time.perf_counter()
    report = fc.slide(model, (crop, crop), step).report(variables, x)
    planning = time.perf_counter() - start
    outs = {k: jax.block_until_ready(f(variables, x)) for k, f in functions.items()}
    want = list(outs.values())[-1].reshape(-1)
    error = float(jnp.abs(outs["slide"].reshape(-1) - want).max() / jnp.abs(want).max())
    runs = {k: functools.partial(f, variables, x) for k, f in functions.items()}
    medians = race(runs, _SECONDS, _APART)["milliseconds"]
    gain = min(v for k, v in medians.items() if k != "slide") / medians["slide"]
    holds = gain >= bound
    shown = ", ".join(f"{key} {value:.0f} ms" for key, value in medians.items())
    print(
        f"{name}: {side}x{side} crops of {crop}, {step} apart: {gain:.2f}x ({shown}; "
        f"FLOPs {report.ratio:.1f}x less; traced in {planning:.2f} s; largest error "
        f"{error:.0e}); bound {bound}x: {'holds' if holds else 'MISSED'}",
        flush=True,
    )
    return holds


# Of windows of 64, 16 apart: at most so many times the time of padding="image".
_BORDERS = {"four convolutions": ((2, 2), 2.5), "VGG of ten": ((2, 2, 3, 3), None)}


def borders() -> bool:
    """Print what the borders of crops cost; return whether bounds hold."""
    every = True
    for name, (stages, most) in _BORDERS.items():
        model = Stages(stages)
        x = jax.random.normal(jax.random.key(0), (1, 256, 256, 3))
        variables = jax.jit(model.init)(jax.random.key(1), x[:, :64, :64])
        exact = fc.slide(model, (64, 64), 16)
        around = fc.slide(model, (64, 64), 16, padding="image")
        runs = {
            key: functools.partial(grid, variables, x)
            for key, grid in (("exact", exact), ("image", around))
        }
        for run in runs.values():
            jax.block_until_ready(run())  # compiles
        medians = race(runs, _SECONDS, _APART)["milliseconds"]
        report = exact.report(variables, x)
        arithmetic = report.flops / (report.image_flops or 1.0)
        times = medians["exact"] / medians["image"]
        holds = times <= 1.3 * arithmetic and times <= (most or times)
        every &= holds
        print(
            f"{name}: exact {medians['exact']:.0f} ms, image {medians['image']:.0f} "
            f"ms: {times:.2f}x, of which FLOPs {arithmetic:.2f}x and execution "
            f"{times / arithmetic:.2f}x; {'holds' if holds else 'MISSED'}",
            flush=True,
        )
    return every


def main() -> int:
    """Measures the cases that are named; all but the slowest without names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", choices=[[], "large", "borders", *CASES], metavar="NAME"
    )
    parser.add_argument("--size", type=int, default=40_000, help="side of the scan")
    parser.add_argument("--width", type=int, default=16, help="of the scan's network")
    parser.add_argument(
        "--quick", action="store_true", help="few FLOPs on the whole scan"
    )
    parser.add_argument("--out", type=Path, help="a folder for the scan's results")
    options = parser.parse_args()
    names = options.names or [n for n in CASES if n not in ("vgg16", "valid-step1")]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    results = []
    for name in names:
        if name == "large":
            model = Pools("VALID", options.width)
            whole = scans.Patches() if options.quick else model
            found = scans.large(model, options.size, whole)
            print(found, flush=True)
            results.append(scans.holds(found))
            if options.out is not None:
                file = options.out / "slide.json"
                kept = json.loads(file.read_text(encoding="utf-8")) | {"scan": found}
                file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        else:
            results.append(borders() if name == "borders" else measure(name))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
