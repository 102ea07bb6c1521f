"""Run time of typical layers in their dense and conv forms, side by side.

    python benchmarks/forms.py

Medians of interleaved runs in one process, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import fcconv_jax as fc
from fcconv_jax.plan import Layout

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], list[str]]] = {
    "MLP (64, 1024) -> 1024, 1-D": (nn.Dense(1024), (64, 1024), ["*=1"]),
    "MLP (64, 1024) -> 1024, 2-D": (nn.Dense(1024), (64, 1024), ["*=1x1"]),
    "tokens (4, 128, 768) -> 3072": (nn.Dense(3072), (4, 128, 768), []),
    "map (8, 14, 14, 256) -> 512": (nn.Dense(512), (8, 14, 14, 256), []),
    "head (8, 7*7*256) -> 512": (nn.Dense(512), (8, 12544), ["*=7x7"]),
}
LAYOUTS: tuple[Layout, ...] = ("fold", "keep", "flat")


def medians(functions: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    """Prints one line for each layer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    rounds = parser.parse_args().rounds
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    names = "".join(f"{name:>9}" for name in ("dense", *LAYOUTS))
    print(f"{'layer':32}{names}   conv / dense")
    for name, (model, shape, rules) in LAYERS.items():
        x = jax.random.normal(jax.random.key(1), shape, jnp.float32)
        variables = model.init(jax.random.key(0), x)
        functions: dict[str, Any] = {}
        dense = jax.jit(model.apply)
        functions["dense"] = lambda f=dense, v=variables, x=x: f(v, x)
        plan = fc.make_plan(model, x, rules=rules)
        window = plan[""].window
        for layout in LAYOUTS:
            rule = fc.Rule("*", window=window, layout=layout)
            plan = fc.make_plan(model, x, rules=[rule])
            conv = fc.convert_model(model, plan)
            moved = fc.convert_params(variables, plan)
            functions[layout] = lambda f=conv.apply, v=moved, x=x: f(v, x)
        ms = medians(functions, rounds)
        ratios = "  ".join(f"{ms[k] / ms['dense']:.2f}x" for k in LAYOUTS)
        print(f"{name:32}" + "".join(f"{ms[k]:9.2f}" for k in ms) + f"   {ratios}")


if __name__ == "__main__":
    main()
