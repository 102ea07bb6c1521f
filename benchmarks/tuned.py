"""Models as they are, all in one form and tuned, on this device, against bounds.

    python benchmarks/tuned.py [CASE ...] [--out DIRECTORY]
    python benchmarks/tuned.py vit-b-8 --for tpu:v5e

Each case runs in a process of its own: `fc.tune` measures the forms of the model in
turns, and what is printed is what it found, how long it took, and how the tuned plan
compares with the original, measured afresh. The bound stands at the end of each line;
the exit status is 1 if one does not hold. With ``--out``, the figures go to
DIRECTORY/<device>.json. With ``--for``, the figures are cycles that XLA estimates for
a TPU that is not present. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fcconv_jax as fc
from fcconv_jax.tuning.meters import race


class Head(nn.Module):
    """The fully connected head of VGG16."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, 7, 7, 512)`` to ``(N, 1000)``."""
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = nn.relu(nn.Dense(4096, name=name)(x))
        return nn.Dense(1000, name="fc8")(x)


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
    """ResNet-50, at inference."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to ``(N, 1000)``."""

        def conv(x: jax.Array, features: int, size: int, stride: int = 1) -> jax.Array:
            layer = nn.Conv(features, (size, size), (stride, stride), use_bias=False)
            return nn.BatchNorm(use_running_average=True)(layer(x))

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


class Mixer(nn.Module):
    """MLP-Mixer S/16."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to ``(N, 1000)``."""
        x = nn.Conv(512, (16, 16), (16, 16), padding="VALID", name="stem")(x)
        x = x.reshape(x.shape[0], -1, 512)
        for _ in range(8):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(256)(y)))
            x = x + y.swapaxes(1, 2)
            x = x + nn.Dense(512)(nn.gelu(nn.Dense(2048)(nn.LayerNorm()(x))))
        return nn.Dense(1000, name="head")(nn.LayerNorm()(x).mean(1))


def loop(params: Any, x: jax.Array) -> jax.Array:
    """Two 1x1 convolutions ``(N, C, W)`` in a loop (JAX issue 12868)."""

    def step(_: int, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, params["w"], (1,), "VALID", dimension_numbers=("NCW", "OIW", "NCW")
        )

    return lax.fori_loop(0, 2, step, x)


def linen(model: nn.Module, *shape: int) -> tuple[Any, Any, jax.Array]:
    """A linen model, its variables, and an input."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0), x), x


def looped(size: int) -> tuple[Any, Any, jax.Array]:
    """The loop on ``(1, size, 1024)``."""
    return loop, {"w": jnp.ones((size, size, 1)) / size}, jnp.ones((1, size, 1024))


# What makes the model, and by how much the tuned one is to be quicker.
CASES: dict[str, tuple[Callable[[], tuple[Any, Any, jax.Array]], float]] = {
    "vgg16-head-8": (lambda: linen(Head(), 8, 7, 7, 512), 0.80),
    "vgg16-head-1": (lambda: linen(Head(), 1, 7, 7, 512), 1.02),
    "vit-b-8": (lambda: linen(Vit(), 8, 224, 224, 3), 0.80),
    "vit-b-1": (lambda: linen(Vit(), 1, 224, 224, 3), 1.02),
    "resnet50-8": (lambda: linen(Resnet(), 8, 224, 224, 3), 0.80),
    "resnet50-1": (lambda: linen(Resnet(), 1, 224, 224, 3), 1.02),
    "mixer-s-8": (lambda: linen(Mixer(), 8, 224, 224, 3), 1.02),
    "loop-1000": (lambda: looped(1000), 0.01),
}


# The same for TPUs that are not present, by estimated cycles.
CYCLES = {"tpu:v5e": 0.92, "tpu:v5p": 0.95, "tpu:v6e": 0.95}


def estimate(case: str, backend: str) -> dict[str, Any]:
    """Tunes a case for a TPU that is not present."""

    def shapes() -> Any:
        model, *arrays = CASES[case][0]()
        made.append(model)
        return arrays

    made: list[Any] = []
    params, x = jax.eval_shape(shapes)
    start = time.perf_counter()
    plan = fc.tune(made[0], params, x, backend=backend)
    assert plan.tuning is not None
    print(plan.tuning, file=sys.stderr)
    return {
        "case": f"{case} for {backend}",
        "cycles": {name: figure.median for name, figure in plan.tuning.programs},
        "ratio": plan.tuning.ratio,
        "bound": CYCLES.get(backend, 1.0),
        "tuning_seconds": time.perf_counter() - start,
        "tuning": plan.tuning.content(),
    }


def measure(case: str) -> dict[str, Any]:
    """Tunes a case, and measures the plan against the original and all to conv."""
    make, bound = CASES[case]
    model, params, x = make()
    start = time.perf_counter()
    plan = fc.tune(model, params, x)
    seconds = time.perf_counter() - start
    assert plan.tuning is not None
    print(plan.tuning, file=sys.stderr)
    apply = model.apply if isinstance(model, nn.Module) else model
    original = jax.jit(apply)
    runs = {"original": lambda: original(params, x)}
    plans = {"tuned": plan}
    if isinstance(model, nn.Module):
        plans["all to conv"] = fc.make_plan(model, x)
    for name, each in plans.items():
        runs[name] = _call(model, params, x, each)
    want = np.asarray(original(params, x))
    error = np.abs(np.asarray(runs["tuned"]()) - want).max() / np.abs(want).max()
    found = {name: figure.median for name, figure in race(runs, 20.0).items()}
    return {
        "case": case,
        "milliseconds": found,
        "ratio": found["tuned"] / found["original"],
        "bound": bound,
        "error": float(error),
        "tuning_seconds": seconds,
        "options": dict(plan.options),
        "tuning": plan.tuning.content(),
    }


def _call(model: Any, params: Any, x: jax.Array, plan: fc.Plan) -> Callable[[], Any]:
    converted: Any = fc.convert_model(model, plan)
    moved = fc.convert_params(params, plan)
    call = converted.apply if isinstance(model, nn.Module) else converted
    return lambda: call(moved, x)


def show(found: dict[str, Any]) -> str:
    """A case in one line."""
    if "cycles" in found:
        what = ", ".join(
            f"{name} {n:,.0f} cycles" for name, n in found["cycles"].items()
        )
    else:
        times = found["milliseconds"].items()
        what = ", ".join(f"{name} {ms:.4g} ms" for name, ms in times)
        what += f"; error {found['error']:.0e}"
    holds = "holds" if found["ratio"] <= found["bound"] else "MISSED"
    return (
        f"{found['case']}: {found['ratio']:.3f}x ({what}; "
        f"tuned in {found['tuning_seconds']:.0f} s); bound {found['bound']}x: {holds}"
    )


def write(file: Path, device: str, found: dict[str, Any]) -> None:
    """Puts a case into the file of its device, in the place of an earlier run."""
    known = json.loads(file.read_text())["results"] if file.exists() else []
    results = [each for each in known if each["case"] != found["case"]] + [found]
    content = {"device": device, "jax": jax.__version__, "results": results}
    file.write_text(json.dumps(content, indent=1) + "\n")


def table(file: Path) -> str:
    """The rows of the table in the documentation."""
    titles = ("model, batch", "original", "all to conv", "tuned", "tuned / original")
    rows = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for found in json.loads(file.read_text())["results"]:
        ms = found["milliseconds"]
        names = ("original", "all to conv", "tuned")
        cells = [f"{ms[name]:,.4g} ms" if name in ms else "-" for name in names]
        cells.append(f"{found['ratio']:.3f}x")
        rows.append(f"| {found['case']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> int:
    """Runs the cases, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--for", dest="backend", metavar="BACKEND")
    parser.add_argument("--table", type=Path, help="print a results file as Markdown")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        case, backend = args.alone, args.backend
        print(json.dumps(estimate(case, backend) if backend else measure(case)))
        return 0
    if args.table:
        print(table(args.table))
        return 0
    results = []
    for case in args.cases or CASES:
        command = [sys.executable, __file__, "--alone", case]
        command += ["--for", args.backend] if args.backend else []
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        results.append(json.loads(done.stdout))
        print(show(results[-1]), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            device = args.backend or jax.devices()[0].device_kind
            device = device.replace(" ", "-").replace(":", "-").lower()
            write(args.out / f"{device}.json", device, results[-1])
    return int(any(found["ratio"] > found["bound"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
