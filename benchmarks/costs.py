"""Costs of planning, tracing, converting, calling and verifying.

    pip install '.[examples]'    # verifying elsewhere: also tpu-aot and cuda-aot

They stand beside those of the model. Steps of tracing and compiling take turns in one
process. Where CPU time counts, it is the least of all rounds: whatever else the machine
does only adds to it. The others are medians of wall time. Memory is measured on Linux
only.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import small_networks as small
from flax import nnx
from networks import Bert
from running import TPUS, Case, MissingError, bound, in_turns, race
from usage import cpu_seconds, descendants, peak, resident, resident_of

import fcconv_jax as fc
from fcconv_jax.backends.resolution import resolve

GPUS = ("cuda:a100", "cuda:h100")
_ROOT = Path(__file__).parents[1]
_SAMPLE = 0.05  # seconds
_ROUNDS = 7
_SECONDS = 5.0  # of a race
_IDS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


def importing() -> dict[str, Any]:
    """Importing the package in a new process, after Flax."""
    statements = ("import flax.linen", "import flax.linen, fcconv_jax")
    seconds = [[_import_seconds(s) for s in statements] for _ in range(_ROUNDS)]
    flax, both = (statistics.median(column) for column in zip(*seconds))
    return {"bounds": [bound("import after flax.linen", both - flax, 0.2, "s")]}


def _import_seconds(statement: str) -> float:
    """Seconds of an import in a new process, the interpreter's start not counted."""
    code = (
        "import time; t = time.perf_counter()\n"
        f"{statement}\nprint(time.perf_counter() - t)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(out.stdout)


def bert_tracing() -> dict[str, Any]:
    """Planning BERT, tracing it and its gradient: medians of wall time."""
    model = Bert()
    variables = jax.eval_shape(model.init, jax.random.key(0), _IDS)
    plan = fc.make_plan(model, _IDS)
    moved = fc.convert_params(variables, plan)
    converted = fc.convert_model(model, plan)
    zeros = jnp.zeros(_IDS.shape, _IDS.dtype)

    def gradient(apply: Callable[..., Any], variables: Any) -> None:
        def loss(variables: Any) -> jax.Array:
            return (apply(variables, zeros) ** 2).mean()

        jax.make_jaxpr(jax.grad(loss))(variables)

    times = in_turns(
        {
            "trace": lambda: jax.make_jaxpr(model.apply)(variables, _IDS),
            "plan": lambda: fc.make_plan(model, _IDS),
            "trace converted": lambda: jax.make_jaxpr(converted.apply)(moved, _IDS),
            # Jitted, as the converted model's apply is.
            "gradient": lambda: gradient(
                jax.jit(lambda v, x: model.apply(v, x)), variables
            ),
            "gradient, not jitted": lambda: gradient(model.apply, variables),
            "gradient converted": lambda: gradient(converted.apply, moved),
        },
        _ROUNDS,
    )
    found = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "seconds_each": found,
        "bounds": [
            bound("plan / trace", found["plan"] / found["trace"], 1.7),
            bound("trace converted", found["trace converted"] / found["trace"], 1.3),
            bound(
                "gradient converted",
                found["gradient converted"] / found["gradient"],
                1.6,
            ),
        ],
    }


def converting(array: Callable[[Any], Any], more: float) -> dict[str, Any]:
    """Converting BERT's parameters.

    Args:
      array: makes a leaf of an array of NumPy.
      more: the most memory that it may take, as a part of the model's.
    """
    model = Bert()
    variables = jax.eval_shape(model.init, jax.random.key(0), _IDS)
    plan = fc.make_plan(model, _IDS)
    tree = jax.tree.map(lambda s: array(np.ones(s.shape, s.dtype)), variables)
    jax.block_until_ready(tree)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    before = peak()
    found = race({"convert_params": lambda: fc.convert_params(tree, plan)}, 1.0)
    return {
        **found,
        "bounds": [
            bound("convert_params", found["milliseconds"]["convert_params"], 50, "ms"),
            bound("memory / the model's", (peak() - before) / size, more),
        ],
    }


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its twin in the other form, both as functions of abstract inputs.

    Attributes:
      plan: plans it.
      model: a function and its arguments.
      converted: likewise.
    """

    plan: Callable[[], fc.Plan]
    model: tuple[Callable[..., Any], tuple[Any, ...]]
    converted: tuple[Callable[..., Any], tuple[Any, ...]]


def linen(model: Any, x: Any) -> Subject:
    """A linen model."""
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    plan = fc.make_plan(model, x)
    converted = fc.convert_model(model, plan)
    return Subject(
        lambda: fc.make_plan(model, x),
        (model.apply, (variables, x)),
        (converted.apply, (fc.convert_params(variables, plan), x)),
    )


def nnx_model(model: nnx.Module, x: Any) -> Subject:
    """An NNX model, as a function of its state."""
    plan = fc.make_plan(model, x)
    converted = fc.convert_model(model, plan)

    def split(model: nnx.Module) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        graphdef, state = nnx.split(model)
        state = jax.eval_shape(lambda tree: tree, state)
        return lambda state, x: nnx.merge(graphdef, state)(x), (state, x)

    return Subject(lambda: fc.make_plan(model, x), split(model), split(converted))


def function(f: Callable[..., Any], params: Any, x: Any) -> Subject:
    """A function of params and an input."""
    plan = fc.make_plan(f, params, x)
    return Subject(
        lambda: fc.make_plan(f, params, x),
        (f, (params, x)),
        (fc.convert_model(f, plan), (fc.convert_params(params, plan), x)),
    )


def linen_as_function(model: Any, x: Any) -> Subject:
    """The apply of a linen model."""
    return function(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)


_X = jax.ShapeDtypeStruct((8, 64, 256), jnp.float32)
_LAYERS = [
    {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in small.BLOCK.items()
    }
] * 12
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "linen-bert": lambda: linen(Bert(), _IDS),
    "linen-scan": lambda: linen(small.Stack(), _X),
    "linen-own-layers": lambda: linen(small.OwnLayers(), _X),
    "nnx-llama": lambda: nnx_model(small.Llama(6, 128, 256, 4, nnx.Rngs(0)), _IDS),
    "function-bert": lambda: linen_as_function(Bert(), _IDS),
    "function-scan": lambda: linen_as_function(small.Stack(), _X),
    "function-plain": lambda: function(small.chain(small.block), _LAYERS, _X),
    "function-jit": lambda: function(small.chain(jax.jit(small.block)), _LAYERS, _X),
    "function-remat": lambda: function(
        small.chain(jax.checkpoint(small.block)), _LAYERS, _X
    ),
}


def front_end(name: str) -> dict[str, Any]:
    """Planning, tracing and compiling: the least CPU time of all rounds."""
    subject = SUBJECTS[name]()
    (f, args), (g, moved) = subject.model, subject.converted
    steps: dict[str, Callable[[], Any]] = {
        "trace": lambda: jax.make_jaxpr(f)(*args),
        "plan": lambda: subject.plan(),
        "trace converted": lambda: jax.make_jaxpr(g)(*moved),
    }
    # Lowering is done before, so that compiling alone counts.
    steps["compile"] = lambda: jax.jit(f).lower(*args).compile
    steps["compile converted"] = lambda: jax.jit(g).lower(*moved).compile
    compiling = ("compile", "compile converted")
    times = in_turns(steps, _ROUNDS, time.process_time, compiling)
    least = {key: min(taken) for key, taken in times.items()}
    return {
        "seconds_each": least,
        "bounds": [
            bound("plan / trace", least["plan"] / least["trace"], 3),
            bound("trace converted", least["trace converted"] / least["trace"], 2),
            bound(
                "compile converted", least["compile converted"] / least["compile"], 1.2
            ),
        ],
    }


# Models of some hundred MiB, so that what the compiler needs does not count.
IN_PLACE: dict[str, tuple[Callable[[], nnx.Module], jax.ShapeDtypeStruct]] = {
    "llama": (
        lambda: small.Llama(12, 1024, 3072, 8, nnx.Rngs(0)),
        jax.ShapeDtypeStruct((1, 16), jnp.int32),
    ),
    "chw-head": (
        lambda: small.ChwHead(nnx.Rngs(0)),
        jax.ShapeDtypeStruct((1, 7, 7, 256), jnp.float32),
    ),
}


def in_place(name: str) -> dict[str, Any]:
    """The peak of converting an NNX model in place, as a part of its size."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        raise MissingError("the memory of processes is read from /proc: Linux only")
    make, x = IN_PLACE[name]
    model = make()
    plan = fc.make_plan(model, x)
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    size = sum(leaf.nbytes for leaf in leaves)
    del leaves
    other = nnx.Linear(7 * 7 * 2, 3, rngs=nnx.Rngs(0))  # loads what converting needs
    shape = jax.ShapeDtypeStruct((1, 98), jnp.float32)
    rules = [fc.Rule("*", window=(7, 7), order="CHW")]
    fc.convert_model(other, fc.make_plan(other, shape, rules=rules), inplace=True)
    clear.write_text("5", encoding="ascii")  # resets VmHWM
    before = resident("VmRSS")
    fc.convert_model(model, plan, inplace=True)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    grown = resident("VmHWM") - before
    return {
        "bytes": size,
        "bounds": [bound("peak / the model's memory", 1 + grown / size, 1.05)],
    }


def digits() -> tuple[Any, Any, Any]:
    """The model of ``examples/digits.py`` on four images."""
    sys.path.insert(0, str(_ROOT / "examples"))
    model: Any = importlib.import_module("digits").Digits()
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    return model, jax.jit(model.init)(jax.random.key(0), x), x


class Stack(nn.Module):
    """Dense layers of 4 features: calling it costs more than computing it."""

    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, 4)`` to ``(N, 4)``."""
        for _ in range(self.layers):
            x = nn.Dense(4)(x)
        return x


class NnxStack(nnx.Module):
    """The same in NNX."""

    def __init__(self, layers: int):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, 4)`` to ``(N, 4)``."""
        for layer in self.layers:
            x = layer(x)
        return x


def stack(params: Any, x: jax.Array) -> jax.Array:
    """The same as a function."""
    for layer in params:
        x = x @ layer["w"] + layer["b"]
    return x


def calling(kind: str, layers: int) -> dict[str, Any]:
    """A call of a converted model, beside one of the original's through ``jax.jit``.

    An NNX model is called in a function under ``nnx.jit``, in both forms.
    """
    x = jnp.ones((1, 4))
    if kind == "linen":
        model = Stack(layers)
        params = model.init(jax.random.key(0), x)
        plan = fc.make_plan(model, x)
        original, converted = jax.jit(model.apply), fc.convert_model(model, plan).apply
        moved = fc.convert_params(params, plan)
    elif kind == "function":
        params = [{"w": jnp.ones((4, 4)), "b": jnp.ones(4)} for _ in range(layers)]
        plan = fc.make_plan(stack, params, x)
        original, converted = jax.jit(stack), fc.convert_model(stack, plan)
        moved = fc.convert_params(params, plan)
    else:
        params = NnxStack(layers)
        plan = fc.make_plan(params, x)
        moved = fc.convert_model(params, plan)
        original, converted = (nnx.jit(lambda m, x: m(x)) for _ in range(2))
    count = max(400 // layers, 4)

    def calls(function: Callable[..., Any], params: Any) -> Callable[[], Any]:
        def run() -> Any:
            for _ in range(count - 1):
                function(params, x)
            return function(params, x)

        return run

    both = {"original": calls(original, params), "converted": calls(converted, moved)}
    found = race(both, _SECONDS)
    found["milliseconds"] = {k: v / count for k, v in found["milliseconds"].items()}
    found["quartiles"] = {
        name: [value / count for value in values]
        for name, values in found["quartiles"].items()
    }
    ms = found["milliseconds"]
    ratio = ms["converted"] / ms["original"]
    return {**found, "bounds": [bound("call / jax.jit's", ratio, 1.1)]}


def vit() -> tuple[Any, Any, Any]:
    """A 4-block NNX ViT on 8 images of 64x64."""
    x = jax.random.normal(jax.random.key(1), (8, 64, 64, 3))
    return small.Vit(nnx.Rngs(0)), None, x


def bert() -> tuple[Any, Any, Any]:
    """BERT, in linen, on 2 x 64 tokens."""
    ids = jax.random.randint(jax.random.key(1), (2, 64), 0, 30522)
    return Bert(), jax.jit(Bert().init)(jax.random.key(0), ids), ids


# A model with its input, and the most CPU seconds.
VERIFIED: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], float]] = {
    "digits": (digits, 5.0),
    "vit": (vit, 30.0),
    "bert": (bert, 90.0),
}


def verifying(name: str) -> dict[str, Any]:
    """Verifying on the CPU, gradients and an optimizer step included: CPU time."""
    make, most = VERIFIED[name]
    model, params, x = make()
    jax.block_until_ready(params)
    before = peak()
    cpu, wall = time.process_time(), time.perf_counter()
    report = fc.verify(model, params, x)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert report.passed, report.failures
    return {
        "digits": report.digits,
        "wall_seconds": wall,
        "bytes": peak() - before,
        "bounds": [bound("CPU time", cpu, most, "s")],
    }


def verifying_elsewhere(
    model: str, shape: str, backends: tuple[str, ...], most: float
) -> dict[str, Any]:
    """``fcconv verify`` on backends that are not present: wall time, and memory.

    Args:
      model: a file and a class in it.
      shape: of the input.
      backends: all of them.
      most: the most seconds.
    """
    if not Path("/proc/self/statm").exists():
        raise MissingError("the memory of processes is read from /proc: Linux only")
    for chosen in map(resolve, backends):
        if chosen.how == "lowered":
            raise MissingError(f"{chosen.backend}: {chosen.reason}")
    named = [word for backend in backends for word in ("--backend", backend)]
    command = [sys.executable, "-m", "fcconv_jax", "verify", model, "--input", shape]
    start, cpu, held = time.perf_counter(), cpu_seconds(), 0
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [*command, *named], stdout=said, stderr=subprocess.STDOUT
        ) as process,
    ):
        while process.poll() is None:
            held = max(held, sum(map(resident_of, descendants(process.pid))))
            time.sleep(_SAMPLE)
        seconds = time.perf_counter() - start
        said.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{said.read()[-3000:]}")
    return {
        "cpu_seconds": cpu_seconds() - cpu,
        "load": os.getloadavg()[0],
        "bounds": [
            bound("wall time", seconds, most, "s"),
            bound("memory of all processes", held / 2**30, 4, "GiB"),
        ],
    }


CASES: dict[str, Case] = {
    "import": importing,
    "bert-tracing": bert_tracing,
    # Memory is shared, at most a copy is made.
    "convert-numpy": functools.partial(converting, np.asarray, 0.01),
    "convert-jax": functools.partial(converting, jnp.asarray, 1.0),
    **{f"trace-{name}": functools.partial(front_end, name) for name in SUBJECTS},
    **{f"in-place-{name}": functools.partial(in_place, name) for name in IN_PLACE},
    **{
        f"call-{kind}-{layers}": functools.partial(calling, kind, layers)
        for kind in ("linen", "function", "nnx")
        for layers in (2, 50)
    },
    **{f"verify-{name}": functools.partial(verifying, name) for name in VERIFIED},
    "verify-digits-everywhere": functools.partial(
        verifying_elsewhere,
        *(f"{_ROOT / 'examples' / 'digits.py'}:Digits", "4,8,8,1"),
        *(("cpu", *TPUS, *GPUS), 60.0),
    ),
    "verify-vit-b-tpu": functools.partial(
        verifying_elsewhere,
        *(f"{_ROOT / 'benchmarks' / 'networks.py'}:Vit", "8,224,224,3"),
        *(("tpu:v5e",), 120.0),
    ),
}
