"""Typical layers in every layout, on each backend: what the defaults are chosen by.

    pip install '.[tpu-aot,cuda-aot]'
    python benchmarks/layouts.py                  # all TPU generations, two GPUs
    python benchmarks/layouts.py --backend cpu    # run times

A backend that is present runs the layers: medians of interleaved runs. Another compiles
them ahead of time, which gives the cycles that XLA estimates (TPU) or scratch memory
and library calls (CUDA). ``*`` marks the best layout, brackets the default. The exit
status is 1 if, by cycles, a default costs more than the dense form and another layout
does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from running import TPUS, race

import fcconv_jax as fc
from fcconv_jax.backends.compilation import (
    Compilation,
    Compiling,
    Program,
    compile_present,
)
from fcconv_jax.backends.resolution import Resolution, resolve
from fcconv_jax.messages.errors import BackendError
from fcconv_jax.messages.progress import shown
from fcconv_jax.messages.reports import aligned
from fcconv_jax.plan import KernelLayout, Layout
from fcconv_jax.tuning.layer_programs import layer_forms

BACKENDS = (*TPUS, "cuda:a100", "cuda:h100")
# A model of one layer, the shape of its input, and the rules that it is planned with.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], list[str]]] = {
    "MLP (64, 1024) -> 1024": (nn.Dense(1024), (64, 1024), ["*=1x1"]),
    "tokens (4, 128, 768) -> 3072": (nn.Dense(3072), (4, 128, 768), []),
    "patches (8, 197, 768) -> 768": (nn.Dense(768), (8, 197, 768), []),
    "map (8, 14, 14, 256) -> 512": (nn.Dense(512), (8, 14, 14, 256), []),
    "head (8, 7*7*256) -> 512": (nn.Dense(512), (8, 12544), ["*=7x7"]),
}
LAYOUTS = [
    f"{layout} {kernel_layout}"
    for kernel_layout, layout in itertools.product(
        get_args(KernelLayout), get_args(Layout)
    )
]
# Of a race between the layouts of one layer.
_SECONDS = 3.0
# Costs within two hundredths are the same.
SAME = 1.02


@dataclasses.dataclass(frozen=True)
class Found:
    """Cost of one layer in one layout on a backend.

    Attributes:
      program: as it was compiled.
      milliseconds: median run time, where it was run.
    """

    program: Compilation
    milliseconds: float | None = None

    @property
    def cost(self) -> float:
        """Milliseconds, else cycles, else bytes of scratch memory."""
        if self.milliseconds is not None:
            return self.milliseconds
        cycles, scratch = self.program.cycles, self.program.temp_bytes
        return float(scratch or 0) if cycles is None else float(cycles)

    @property
    def quantity(self) -> str:
        """The cost in words."""
        if self.milliseconds is not None:
            return "milliseconds"
        return "scratch memory" if self.program.cycles is None else "cycles"

    def show(self, dense: Found) -> str:
        """The cost, with its ratio to the dense form's."""
        if self.quantity == "scratch memory":
            return f"{self.cost / 2**20:.3g} MiB"
        known = f"{self.cost:,.3g}" if self.quantity[0] == "m" else f"{self.cost:,.0f}"
        return known if self is dense else f"{known} ({self.cost / dense.cost:.2f}x)"


def forms(layer: str) -> dict[str, Program]:
    """The dense form of a layer, and its conv form in every layout."""
    model, shape, rules = LAYERS[layer]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    window = fc.make_plan(model, x, rules=rules)[""].window
    found: dict[str, Program] = {}
    for name in LAYOUTS:
        layout, kernel_layout = name.split()
        rule: Any = fc.Rule(
            "*",
            window=window,
            layout=layout,  # pyright: ignore
            kernel_layout=kernel_layout,  # pyright: ignore
        )
        pair = layer_forms(fc.make_plan(model, x, rules=[rule])[""], jnp.float32)
        found |= {"dense": pair["dense"], name: pair["conv"]}
    return found


def default(layer: str, backend: str) -> str:
    """The layout that a plan chooses for a backend."""
    model, shape, rules = LAYERS[layer]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    plan = fc.make_plan(model, x, rules=rules, backend=backend)[""]
    return f"{plan.layout} {plan.kernel_layout}"


def execute(programs: Mapping[str, Program], there: Resolution) -> dict[str, Found]:
    """Compiles and times the forms of one layer on a device that is present."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, there.device)

    compiled, runs = {}, {}
    for name, program in programs.items():
        compiled[name] = compile_present(program, there)
        args = jax.tree.map(fill, program.args)
        runs[name] = functools.partial(compiled[name].executable, *args)
    taken = race(runs, _SECONDS)["milliseconds"]
    return {name: Found(compiled[name], taken[name]) for name in programs}


def measure(backends: Sequence[str]) -> dict[str, dict[str, dict[str, Found]]]:
    """Costs of each layer in each layout, by backend.

    Raises:
      BackendError: one cannot be compiled for.
    """
    chosen = [resolve(backend) for backend in backends]
    for resolution in chosen:
        if resolution.how == "lowered":
            raise BackendError(f"{resolution.backend}: {resolution.reason}")
    # Layouts that come to the same program are compiled and run once.
    names: dict[str, str] = {}
    programs: dict[str, dict[str, Program]] = {}
    alike: dict[tuple[str, str], str] = {}
    for layer in LAYERS:
        programs[layer] = {}
        for form, program in forms(layer).items():
            text = str(jax.make_jaxpr(program.function)(*program.args))
            name = names.setdefault(layer + text, form)
            programs[layer].setdefault(name, program)
            alike[layer, form] = name
    numbers = {layer: number for number, layer in enumerate(LAYERS)}
    flat = {
        f"{numbers[layer]} {name}": program
        for layer in LAYERS
        for name, program in programs[layer].items()
    }
    found: dict[str, dict[str, dict[str, Found]]] = {}
    with shown(None) as show:
        absent = [r for r in chosen if r.how == "compiled"]
        with Compiling(flat, absent, progress=show) as compiling:
            outcomes = compiling.results()
        for backend, there in zip(backends, chosen):
            found[backend] = {}
            for number, layer in enumerate(LAYERS):
                if there.how == "executed":
                    show(f"{backend}: {layer}", number, len(LAYERS))
                    by_name = execute(programs[layer], there)
                else:
                    outcome = outcomes[there.backend]
                    if isinstance(outcome, BackendError):
                        raise outcome
                    by_name = {
                        name: Found(outcome[f"{number} {name}"])
                        for name in programs[layer]
                    }
                found[backend][layer] = {
                    form: by_name[alike[layer, form]] for form in ("dense", *LAYOUTS)
                }
    return found


def table(backend: str, layers: Mapping[str, Mapping[str, Found]]) -> list[str]:
    """The costs of all layers on one backend."""
    first = next(iter(layers.values()))["dense"]
    rows: list[tuple[str, ...]] = [("layer", "dense", *LAYOUTS)]
    notes = []
    for layer, found in layers.items():
        least = min(found[name].cost for name in LAYOUTS)
        chosen = default(layer, backend)
        cells = [layer, found["dense"].show(found["dense"])]
        for name in LAYOUTS:
            cell = found[name].show(found["dense"])
            cell += "*" * (found[name].cost <= SAME * least)
            cells.append(f"[{cell}]" if name == chosen else cell)
        rows.append(tuple(cells))
        calls = {form: found[form].program.hlo for form in ("dense", chosen)}
        for form, counts in calls.items():
            if counts and counts.custom_calls:
                named = ", ".join(f"{n}x {c}" for c, n in counts.custom_calls.items())
                notes.append(f"{layer}: {form} calls {named}")
    title = f"{backend} ({first.program.device}): {first.quantity}"
    return [title, *("  " + line for line in (*aligned(rows), *notes))]


def worse(backend: str, layers: Mapping[str, Mapping[str, Found]]) -> list[str]:
    """The layers whose default costs more cycles than the dense form, needlessly."""
    failures = []
    for layer, found in layers.items():
        limit = SAME * found["dense"].cost
        cost, least = (
            found[default(layer, backend)].cost,
            min(found[name].cost for name in LAYOUTS),
        )
        if found["dense"].quantity == "cycles" and least <= limit < cost:
            failures.append(
                f"{backend}: {layer} takes {cost:,.0f} cycles by default, the dense "
                f"form {found['dense'].cost:,.0f}, the best layout {least:,.0f}"
            )
    return failures


def main() -> None:
    """Prints a table for each backend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--backend",
        action="append",
        help=f"may be repeated; default: {' '.join(BACKENDS)}",
    )
    options = parser.parse_args()
    try:
        found = measure(options.backend or BACKENDS)
    except BackendError as error:
        sys.exit(str(error))
    print(f"jax {jax.__version__}; * is the best layout, [ ] the default")
    failures = []
    for backend, layers in found.items():
        print("\n" + "\n".join(table(backend, layers)))
        failures += worse(backend, layers)
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
