"""Costs of the front ends, linen, NNX and functions, side by side with their models.

    python benchmarks/front_ends.py

Planning, tracing and compiling run in one process, in turns, and count the least CPU
time of all rounds: whatever else the machine does only adds to it. The garbage
collector runs between the steps and not in them, as in ``timeit``. The memory of
converting in place is measured in processes of their own. Each line ends with the bound
and whether it holds; the exit status is 1 if one does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from bert import Bert
from flax import nnx

import fcconv_jax as fc


class LlamaBlock(nnx.Module):
    """A decoder layer with a gated feed-forward, as in Llama."""

    def __init__(self, width: int, hidden: int, heads: int, rngs: nnx.Rngs):
        bias = {"use_bias": False, "rngs": rngs}
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, deterministic=True, **bias
        )
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, **bias)
        self.up = nnx.Linear(width, hidden, **bias)
        self.down = nnx.Linear(hidden, width, **bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, width)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """A small Llama: token ids to logits."""

    def __init__(
        self, layers: int, width: int, hidden: int, heads: int, rngs: nnx.Rngs
    ):
        self.embed = nnx.Embed(1000, width, rngs=rngs)
        self.blocks = nnx.List(
            LlamaBlock(width, hidden, heads, rngs) for _ in range(layers)
        )
        self.head = nnx.Linear(width, 1000, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ``(N, T)`` to ``(N, T, 1000)``."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Torch(nnx.Module):
    """VGG's classifier as PyTorch flattens it: one kernel is nine tenths of it."""

    def __init__(self, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(7 * 7 * 256, 2048, rngs=rngs)
        self.fc2 = nnx.Linear(2048, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, 7, 7, 256)`` to ``(N, 1000)``."""
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.fc2(nnx.relu(self.fc1(x)))


class Stack(nn.Module):
    """Twelve feed-forward blocks under one scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, 256)`` to the same shape."""

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                h = nn.gelu(nn.Dense(1024)(nn.LayerNorm()(x)))
                return x + nn.Dense(x.shape[-1])(h), None

        scanned = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=12
        )
        return scanned()(x, None)[0]


class OwnDense(nn.Module):
    """A linear layer as many repositories write their own."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the last axis to ``features``."""
        init = nn.initializers.lecun_normal()
        kernel = self.param("w", init, (x.shape[-1], self.features))
        bias = self.param("b", nn.initializers.zeros, (self.features,))
        return jnp.einsum("...d,df->...f", x, kernel) + bias


class OwnLayers(nn.Module):
    """Twelve feed-forward blocks, each with one layer of Flax and one of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, 256)`` to the same shape."""
        for _ in range(12):
            h = nn.gelu(OwnDense(1024)(nn.LayerNorm()(x)))
            x = x + nn.Dense(x.shape[-1])(h)
        return x


def block(p: Any, x: jax.Array) -> jax.Array:
    """A pre-norm block of attention and an MLP, in plain JAX."""
    h = jax.nn.standardize(x)
    q, k, v = (jnp.einsum("ntd,dhk->nthk", h, p[name]) for name in "qkv")
    attended = jax.nn.dot_product_attention(q, k, v)
    x = x + jnp.einsum("nthk,hkd->ntd", attended, p["o"])
    return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"]


def chain(block: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """A function that runs one block after the other."""

    def run(params: Any, x: jax.Array) -> jax.Array:
        for p in params:
            x = block(p, x)
        return x

    return run


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its twin in the other form, both as functions of abstract inputs.

    Args:
      name: what it is.
      plan: plans it.
      model: a function and its arguments.
      converted: likewise.
    """

    name: str
    plan: Callable[[], fc.Plan]
    model: tuple[Callable[..., Any], tuple[Any, ...]]
    converted: tuple[Callable[..., Any], tuple[Any, ...]]


def linen(name: str, model: nn.Module, x: Any) -> Subject:
    """A linen model."""
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    plan = fc.make_plan(model, x)
    converted = fc.convert_model(model, plan)
    return Subject(
        name,
        lambda: fc.make_plan(model, x),
        (model.apply, (variables, x)),
        (converted.apply, (fc.convert_params(variables, plan), x)),
    )


def nnx_model(name: str, model: nnx.Module, x: Any) -> Subject:
    """An NNX model, as a function of its state."""
    plan = fc.make_plan(model, x)
    converted = fc.convert_model(model, plan)

    def split(model: nnx.Module) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        graphdef, state = nnx.split(model)
        state = jax.eval_shape(lambda tree: tree, state)
        return lambda state, x: nnx.merge(graphdef, state)(x), (state, x)

    return Subject(name, lambda: fc.make_plan(model, x), split(model), split(converted))


def function(name: str, f: Callable[..., Any], params: Any, x: Any) -> Subject:
    """A function of params and an input."""
    plan = fc.make_plan(f, params, x)
    return Subject(
        name,
        lambda: fc.make_plan(f, params, x),
        (f, (params, x)),
        (fc.convert_model(f, plan), (fc.convert_params(params, plan), x)),
    )


def subjects() -> list[Subject]:
    """Models of each front end; those of linen also as functions."""
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    x = jax.ShapeDtypeStruct((8, 64, 256), jnp.float32)
    shapes = {
        **dict.fromkeys("qkv", (256, 4, 64)),
        "o": (4, 64, 256),
        "up": (256, 1024),
        "down": (1024, 256),
    }
    layer = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    bert, stack = Bert(), Stack()
    params = jax.eval_shape(bert.init, jax.random.key(0), ids)
    stacked = jax.eval_shape(stack.init, jax.random.key(0), x)
    llama = Llama(6, 128, 256, 4, nnx.Rngs(0))
    return [
        linen("linen BERT", bert, ids),
        linen("linen scan stack", stack, x),
        linen("linen with own layers", OwnLayers(), x),
        nnx_model("NNX Llama", llama, ids),
        function("function: BERT", bert.apply, params, ids),
        function("function: scan stack", stack.apply, stacked, x),
        function("function: plain JAX", chain(block), [layer] * 12, x),
        function("function: one jit", chain(jax.jit(block)), [layer] * 12, x),
        function("function: one remat", chain(jax.checkpoint(block)), [layer] * 12, x),
    ]


def times(subject: Subject, rounds: int) -> dict[str, float]:
    """Least CPU seconds to plan, and to trace and compile in either form."""
    (f, args), (g, moved) = subject.model, subject.converted
    steps: dict[str, Callable[[], Any]] = {
        "trace": lambda: jax.make_jaxpr(f)(*args),
        "plan": subject.plan,
        "trace converted": lambda: jax.make_jaxpr(g)(*moved),
    }
    least: dict[str, float] = {}

    def measure(name: str, step: Callable[[], Any]) -> None:
        gc.collect()
        gc.disable()
        start = time.process_time()
        step()
        seconds = time.process_time() - start
        gc.enable()
        least[name] = min(seconds, least.get(name, seconds))

    for _ in range(rounds):
        for name, step in steps.items():
            jax.clear_caches()
            measure(name, step)
        for name, call, inputs in (
            ("compile", f, args),
            ("compile converted", g, moved),
        ):
            jax.clear_caches()
            measure(name, jax.jit(call).lower(*inputs).compile)
    return least


# Models of some hundred MiB, so that what the compiler needs does not count.
MEMORY = {
    "Llama": (
        lambda: Llama(12, 1024, 3072, 8, nnx.Rngs(0)),
        jax.ShapeDtypeStruct((1, 16), jnp.int32),
    ),
    "CHW head": (
        lambda: Torch(nnx.Rngs(0)),
        jax.ShapeDtypeStruct((1, 7, 7, 256), jnp.float32),
    ),
}


def resident(field: str) -> int:
    """Resident bytes of this process now (``VmRSS``) or at most (``VmHWM``)."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in text.splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure_memory(name: str) -> None:
    """Prints bytes: of the model, and of what the process grew by at most."""
    make, x = MEMORY[name]
    model = make()
    plan = fc.make_plan(model, x)
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    size = sum(leaf.nbytes for leaf in leaves)
    del leaves
    small = nnx.Linear(7 * 7 * 2, 3, rngs=nnx.Rngs(0))  # loads what converting needs
    shape = jax.ShapeDtypeStruct((1, 98), jnp.float32)
    rules = [fc.Rule("*", window=(7, 7), order="CHW")]
    fc.convert_model(small, fc.make_plan(small, shape, rules=rules), inplace=True)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = resident("VmRSS")
    fc.convert_model(model, plan, inplace=True)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    print(size, resident("VmHWM") - before)


def memory(name: str) -> tuple[int, int]:
    """:func:`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, grown = map(int, done.stdout.split())
    return size, grown


def main() -> None:
    """Prints one line for each bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--memory", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.memory)
        return
    failed = False

    def line(text: str, ratio: float, bound: float) -> None:
        nonlocal failed
        failed |= ratio >= bound
        verdict = "PASS" if ratio < bound else "FAIL"
        print(f"{text:46} {ratio:5.2f}x  < {bound:.4g}x  {verdict}", flush=True)

    print(f"jax {jax.__version__}, Python {platform.python_version()}")
    for subject in subjects():
        t = times(subject, options.rounds)
        base = f"{subject.name}: "
        line(f"{base}planning / own trace", t["plan"] / t["trace"], 3)
        line(f"{base}trace, converted", t["trace converted"] / t["trace"], 2)
        line(f"{base}compile, converted", t["compile converted"] / t["compile"], 1.2)
    if not Path("/proc/self/clear_refs").exists():
        print("memory: measured on Linux only")
    else:
        for name in MEMORY:
            size, grown = memory(name)
            line(f"{name}, {size >> 20} MiB: peak in place", 1 + grown / size, 1.05)
    sys.exit(failed)


if __name__ == "__main__":
    main()
