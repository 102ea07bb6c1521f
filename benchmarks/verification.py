"""What it costs to verify models on the CPU: CPU seconds and memory, against bounds.

    pip install '.[examples]'
    python benchmarks/verification.py [digits vit bert]

Each model is verified in a process of its own, gradients and an optimizer step
included, over all threads. Each line ends with the bound and whether it holds; the exit
status is 1 if one does not.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# CPU seconds.
BOUNDS = {"digits": 5.0, "vit": 30.0, "bert": 90.0}
WORDS = {
    "digits": "the digits model",
    "vit": "a 4-block NNX ViT, 8 images of 64x64",
    "bert": "a BERT-base-size linen model, 12 layers, 2 x 64 tokens",
}


def digits() -> tuple[Any, Any, Any]:
    """The model of ``examples/digits.py`` on four images."""
    import jax

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("digits")
    model: Any = example.Digits()
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    return model, jax.jit(model.init)(jax.random.key(0), x), x


def vit() -> tuple[Any, Any, Any]:
    """Patches of 8x8, four pre-norm blocks of width 192."""
    import jax
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm1, self.norm2 = (nnx.LayerNorm(192, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(4, 192, decode=False, rngs=rngs)
            self.up = nnx.Linear(192, 768, rngs=rngs)
            self.down = nnx.Linear(768, 192, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attention(self.norm1(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Vit(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            size = (8, 8)
            self.patches = nnx.Conv(3, 192, size, size, padding="VALID", rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(4)])
            self.norm = nnx.LayerNorm(192, rngs=rngs)
            self.head = nnx.Linear(192, 10, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.patches(x).reshape(x.shape[0], -1, 192)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    x = jax.random.normal(jax.random.key(1), (8, 64, 64, 3))
    return Vit(nnx.Rngs(0)), None, x


def bert() -> tuple[Any, Any, Any]:
    """The model of ``benchmarks/bert.py``."""
    import jax

    sys.path.insert(0, str(Path(__file__).parent))
    ids = jax.random.randint(jax.random.key(1), (2, 64), 0, 30522)
    model: Any = importlib.import_module("bert").Bert()
    return model, jax.jit(model.init)(jax.random.key(0), ids), ids


MODELS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "digits": digits,
    "vit": vit,
    "bert": bert,
}


def measure(name: str) -> None:
    """Verifies one model and prints digits, CPU seconds, seconds and MiB."""
    import jax

    import fcconv_jax as fc

    model, params, x = MODELS[name]()
    jax.block_until_ready(params)
    before = _peak()
    cpu, wall = time.process_time(), time.perf_counter()
    report = fc.verify(model, params, x)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert report.passed, report.failures
    print(report.digits, cpu, wall, _peak() - before)


def _peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Prints one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *MODELS])
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one)
        return 0
    print(f"{platform.machine()}, Python {platform.python_version()}")
    failed = False
    for name in options.names or MODELS:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        agreed, cpu, wall, memory = map(float, done.stdout.split()[-4:])
        failed |= cpu > BOUNDS[name]
        verdict = "FAIL" if cpu > BOUNDS[name] else "PASS"
        print(
            f"{WORDS[name]}: {agreed:.1f} digits, {cpu:.1f} s of CPU ({wall:.1f} s), "
            f"{memory:,.0f} MiB more; bound {BOUNDS[name]:.0f} s {verdict}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
