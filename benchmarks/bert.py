"""Costs of planning, converting and tracing a BERT-base-size model, side by side.

    python benchmarks/bert.py

Medians over interleaved rounds in one process; the bounds are the project's own.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fcconv_jax as fc


class Block(nn.Module):
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
            x = Block()(x)
        return nn.tanh(nn.Dense(768, name="pooler")(x[:, 0]))


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, run in turns after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.block_until_ready(function())
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def import_seconds(statement: str) -> float:
    """Seconds of an import in a new process, the interpreter's start not counted."""
    code = (
        "import time; t = time.perf_counter()\n"
        f"{statement}\nprint(time.perf_counter() - t)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(out.stdout)


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints one line for each bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    rounds = parser.parse_args().rounds
    model = Bert()
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    plan = fc.make_plan(model, ids)
    moved = fc.convert_params(variables, plan)
    converted = fc.convert_model(model, plan)

    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {len(plan)} layers")
    tracing = medians(
        {
            "make_jaxpr of the model": lambda: jax.make_jaxpr(model.apply)(
                variables, ids
            ),
            "make_plan": lambda: fc.make_plan(model, ids) and None,
            "make_jaxpr, converted": lambda: jax.make_jaxpr(converted.apply)(
                moved, ids
            ),
        },
        rounds,
    )
    base = tracing["make_jaxpr of the model"]
    for name, seconds in tracing.items():
        print(f"{name:28} {seconds:8.3f} s  {seconds / base:5.2f}x")
    print("bounds: planning < 1.7x, tracing the converted model < 1.3x\n")

    def gradient(apply: Callable[..., Any], variables: Any) -> Any:
        def loss(variables: Any) -> jax.Array:
            return (apply(variables, ids_of_zeros) ** 2).mean()

        return jax.make_jaxpr(jax.grad(loss))(variables)

    ids_of_zeros = jnp.zeros(ids.shape, ids.dtype)
    gradients = medians(
        {
            # Jitted, as the converted model's apply is.
            "gradient of the model": lambda: (
                gradient(jax.jit(lambda v, x: model.apply(v, x)), variables) and None
            ),
            "gradient, converted": lambda: gradient(converted.apply, moved) and None,
            "gradient, not jitted": lambda: gradient(model.apply, variables) and None,
        },
        rounds,
    )
    base = gradients["gradient of the model"]
    for name, seconds in gradients.items():
        print(f"{name:28} {seconds:8.3f} s  {seconds / base:5.2f}x")
    print("bound: < 1.6x\n")

    trees = {"NumPy": jax.tree.map(lambda s: np.ones(s.shape, s.dtype), variables)}
    trees["jax"] = jax.tree.map(jnp.asarray, trees["NumPy"])
    jax.block_until_ready(trees["jax"])
    for name, tree in trees.items():
        before = peak_mib()
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(fc.convert_params(tree, plan))
            times.append(time.perf_counter() - start)
        grown = peak_mib() - before
        print(
            f"convert_params, {name:5} leaves  first {times[0] * 1e3:6.1f} ms  median "
            f"{statistics.median(times[1:]) * 1e3:6.1f} ms  peak +{grown:.0f} MiB"
        )
    print("bounds: < 50 ms, no more memory than one copy (NumPy: none)\n")

    statements = ("import flax.linen", "import flax.linen, fcconv_jax")
    seconds = [[import_seconds(s) for s in statements] for _ in range(rounds)]
    flax, both = (statistics.median(column) for column in zip(*seconds))
    print(
        f"import flax.linen {flax:.2f} s, with fcconv_jax {both:.2f} s: "
        f"+{both - flax:.2f} s"
    )
    print("bound: < 0.2 s more")


if __name__ == "__main__":
    main()
