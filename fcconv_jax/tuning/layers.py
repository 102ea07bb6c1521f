"""Layers on their own: every way to run each, and which one is the quickest."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..backends.compilation import Program
from ..plan import LayerPlan, Layout, Options, Plan, other_form
from ..plan.layer_forms import canonical_layer
from ..plan.tuning import Figure, TunedLayer
from .layer_programs import layer_forms
from .meters import Candidate, Meter
from .training import layer_step

# Steps of the loop in which a layer is timed that runs in one.
_STEPS = 2
# A way this much slower than the best alone isn't faster in a model either.
_TOO_SLOW = 1.5


@dataclasses.dataclass(frozen=True)
class AlikeLayers:
    """Layers that are alike, measured alone.

    Attributes:
      layers: by path, as the plan has them that takes each to its other form.
      ways: the ways to run them, by name: a layout, None for the original. Empty if
        time ran out before measuring them.
      row: what was measured; its choice is the way that is best alone.
    """

    layers: Mapping[str, LayerPlan]
    ways: Mapping[str, Layout | None]
    row: TunedLayer

    def run_by(self, way: str) -> dict[str, LayerPlan]:
        """Return the layers of a plan that runs these in one way."""
        layout = self.ways.get(way)
        if layout is None:
            return {}
        return {
            path: dataclasses.replace(layer, layout=layout)
            for path, layer in self.layers.items()
        }

    def way_in(self, plan: Mapping[str, LayerPlan]) -> str:
        """Return the way in which a plan runs them, or why there was only one."""
        found = {path: plan[path] for path in self.layers if path in plan}
        ways = (way for way in self.ways if self.run_by(way) == found)
        return next(ways, self.row.choice)

    def others(self, way: str) -> list[str]:
        """Other ways that may be as good in a model, the best ones alone first."""
        medians = {name: figure.median for name, figure in self.row.figures}
        most = _TOO_SLOW * min(medians.values(), default=0.0)
        best = sorted(
            (name for name in medians if name != way), key=medians.__getitem__
        )
        return [name for name in best if medians[name] <= most]


def choose_alone(
    plan: Plan,
    ties: Iterable[Collection[str]],
    dtypes: Mapping[str, Any],
    meter: Meter,
    options: Options,
    seconds: float,
    show: Callable[[str, int, int], None],
    training: bool = False,
) -> list[AlikeLayers]:
    """Measure each layer of a plan in both forms; layers that are alike once.

    Args:
      plan: of all layers that have another form, each to that form.
      ties: paths of layers that share parameters. Those that are not alike are not
        measured: one form must do for all.
      dtypes: of the layers.
      meter: measures.
      options: that everything is compiled with.
      seconds: for all layers; the costly ones come first, the rest stays as it is.
      show: called with a step, how many are done, how many there are.
      training: whether to measure value and gradient, and the forward pass beside it.

    Returns:
      The kinds of layers, the costly ones first.
    """
    alike = {
        path: (dataclasses.replace(layer, tied=()), dtypes[path])
        for path, layer in plan.items()
    }
    bound = {p for tied in ties if len({alike[p] for p in tied}) > 1 for p in tied}
    kinds: dict[Any, list[str]] = {}
    for path in plan:
        if path not in bound:
            kinds.setdefault(alike[path], []).append(path)
    costly = sorted(
        kinds.items(), key=lambda kind: -products_in(kind[0][0]) * len(kind[1])
    )
    end = time.monotonic() + seconds

    def passed(paths: Sequence[str], why: str) -> AlikeLayers:
        row = TunedLayer(tuple(paths), _in_words(*alike[paths[0]]), (), why)
        return AlikeLayers({path: plan[path] for path in paths}, {}, row)

    found = [passed([path], "tied to a layer unlike it") for path in sorted(bound)]
    for number, ((layer, dtype), paths) in enumerate(costly):
        left = end - time.monotonic()
        show(f"layers: {left:.0f} s left, {paths[0] or '(root)'}", number, len(costly))
        known = f"{hashlib.sha256(repr((layer, dtype)).encode()).hexdigest()} {options}"
        known += " training" * training
        if meter.timings.passes_over(known, left):
            found.append(passed(paths, "no time to measure it"))
            continue
        ways = _ways(layer, dtype)
        candidates = {name: Candidate(way[1], options) for name, way in ways.items()}
        share = min(1.0, max(left, 0) / (len(costly) - number))
        forward: dict[str, Figure] = {}
        if training:
            share /= 2
            forward = meter.measure(candidates, share)
            candidates = {
                name: Candidate(layer_step(each.program), options)
                for name, each in candidates.items()
            }
        figures = meter.measure(candidates, share)
        meter.timings.finish(known)
        what, best = _in_words(layer, dtype), _best(figures)
        row = TunedLayer(
            tuple(paths), what, tuple(figures.items()), best, tuple(forward.items())
        )
        layouts: dict[str, Layout | None] = {
            n: layout for n, (layout, _) in ways.items()
        }
        found.append(AlikeLayers({path: plan[path] for path in paths}, layouts, row))
    return found


def _best(figures: Mapping[str, Figure]) -> str:
    """Return the best way, unless the original is as good within the noise."""
    names = list(figures)
    best = min(names, key=lambda name: figures[name].median)
    return best if figures[best].beats(figures[names[0]]) else names[0]


def _ways(
    layer: LayerPlan, dtype: DTypeLike
) -> dict[str, tuple[Layout | None, Program]]:
    """Return the ways to run a layer: name to layout, None for the original."""
    source = other_form(layer.to)
    layouts: tuple[Layout, ...] = (layer.layout,)
    if layer.to == "conv":
        layouts = (layer.layout, "fold", "keep")
        if layer.groups == 1 or math.prod(layer.window) == 1:
            # Flattened, a group's channels aren't adjacent, as grouped convs need.
            layouts = (*layouts, "flat")
    ways: dict[str, tuple[Layout | None, Program]] = {}
    for layout in dict.fromkeys(layouts):
        laid = dataclasses.replace(layer, layout=layout)
        forms = layer_forms(laid, dtype)
        ways.setdefault(source, (None, _in_context(forms[source], layer)))
        name = f"{layer.to} {layout}" if layer.to == "conv" else layer.to
        name = layer.base if layer.base == "phases" else name
        ways[name] = (layout, _in_context(forms[layer.to], layer))
    return ways


def _in_context(program: Program, layer: LayerPlan) -> Program:
    """Return the program as it runs: in a loop if the layer's params are scanned."""
    if not layer.stack_axes:
        return program

    def looped(x: jax.Array, *parameters: Any) -> PyTree:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            y = program.function(x, *parameters)
            # The next step depends on this one, so that none is moved out of the loop.
            return x + y.ravel()[0].astype(x.dtype) * jnp.zeros((), x.dtype), y

        return lax.scan(step, x, None, length=_STEPS)[1][-1]

    return Program(looped, program.args)


def products_in(layer: LayerPlan) -> float:
    """Return how many products one call of a layer sums."""
    entries = math.prod(layer.kernel.source)
    rows = math.prod(layer.input_shape) / layer.groups
    if layer.base == "pointwise":  # the others skip no inputs
        rows /= math.prod(layer.strides)
    *window, channels, _ = (
        layer.canonical_target
        if layer.to == "conv"
        else (canonical_layer(layer) if layer.is_matmul else layer).kernel.source
    )
    # Each input of a transposed convolution meets every tap.
    read = channels if layer.transposed else math.prod(window) * channels
    return rows / max(read, 1) * entries


def _in_words(layer: LayerPlan, dtype: DTypeLike) -> str:
    """Return the layer's class, sizes and dtype."""
    where = " in a loop" if layer.stack_axes else ""
    shape = "x".join(map(str, layer.input_shape))
    kernel = "x".join(map(str, layer.kernel.source))
    return f"{layer.layer} {shape} by {kernel} {jnp.dtype(dtype).name}{where}"
