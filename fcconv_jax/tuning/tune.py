"""The quickest mix of forms, layouts and compiler options: ``tune``."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jaxlib.version
from jaxtyping import PyTree

from ..backends.compilation import TIMEOUT
from ..backends.default_settings import default_settings
from ..backends.name import Backend
from ..backends.options import convolution_options
from ..backends.resolution import Resolution, resolve, resolve_default
from ..frontends.bind import bind
from ..frontends.bound import BoundModel
from ..frontends.options import check_concrete, check_options
from ..messages.errors import BackendError, PlanError
from ..messages.flags import check_kind, check_seconds
from ..messages.progress import Progress, ProgressOption, shown
from ..plan import Form, LayerPlan, Options, Plan, direction
from ..plan.rules import Rule, as_rules, match_rules, phases_rules
from ..plan.tuning import Figure, Objective, Tuning
from .layers import AlikeLayers, choose_alone
from .meters import AS_GOOD, Candidate, Meter
from .timings import Timings
from .training import Loss, model_step

_FORMS: tuple[Form, ...] = ("conv", "dense")
# Layers alike that gain less of the whole model stay as they are.
_WORTH = 1.001
_NOTHING_BETTER = "the original model: nothing is better beyond the noise"


@dataclasses.dataclass(frozen=True)
class _Variant:
    """A form of the whole model: a plan, and options to compile it with."""

    plan: Plan
    options: Options

    @property
    def plainness(self) -> tuple[int, int]:
        """The plainer of two forms has the smaller."""
        return len(self.options), len(self.plan)


def tune(
    model: object,
    params: PyTree | None = None,
    *inputs: PyTree,
    backend: str | Backend | None = None,
    objective: Objective | Literal["training"] | None = None,
    loss: Loss | None = None,
    budget: float = 120.0,
    timings: str | Path | None = None,
    rules: Iterable[Rule | str] = (),
    progress: ProgressOption = None,
    timeout: float = TIMEOUT,
    **kwargs: PyTree,
) -> Plan:
    """Find the plan with which a model runs fastest, by measuring.

    First, every layer that has two forms is measured alone, in each form and layout
    (once for a group of equal layers, and in a loop if its parameters are scanned).
    Then the whole model is measured: unchanged, with all layers in one form, and with
    each layer in the form that was fastest alone, with and without compiler options
    that change how matmuls and convolutions are compiled. Starting from the fastest of
    these, each group of equal layers is tried in its other forms within the model, and
    keeps a form that is faster.

    A plan must be faster than the original by 2 %, round by round and beyond the
    noise, and again in a second measurement. If none is, the returned plan is empty,
    and ``plan.tuning.why`` explains why. So a plan never makes the model slower.

    Args:
      model: the ``flax.linen`` or ``flax.nnx`` Module, or a function of params and
        inputs.
      params: its params or variables; None for an NNX model's own.
      *inputs: the model's inputs, in the sizes to tune for: arrays, or abstract arrays
        if the backend is not present.
      backend: such as ``"cpu"`` or ``"tpu:v5e"``; None for JAX's default.
      objective: what to minimize. ``"latency"`` is the default if the device is
        present. ``"memory"`` is scratch memory, without parameters and results.
        ``"cycles"`` is XLA's estimate for TPUs that are not present (it counts the
        body of a loop once). ``"training"`` is the latency or the cycles of the loss
        with its gradient with respect to the params. It doesn't include the
        optimizer's update, which costs the same in every form. A layer has the same
        form in both passes.
      loss: for ``"training"``, a function of the model's output (with the state that
        the model changes, if any) that returns a float scalar; the default is the sum
        of the squared outputs.
      budget: approximate time for measurements, in seconds, without compiling the forms
        of the whole model. A quarter is for single layers, and a quarter for layers
        within the model, including their compilation; the most expensive layers come
        first.
      timings: path of a JSON file with measurements of this device. They aren't
        repeated, so that later runs return the same plan; new ones are added. Several
        runs may share the file, and no measurement is lost if a run is killed or the
        disk is full.
      rules: as for :func:`fcconv_jax.make_plan`; ``"head=skip"`` excludes a layer.
      progress: called with a phase, the steps done and the steps in all; None for bars
        on stderr, False for none.
      timeout: time limit for compiling ahead of time, in seconds.
      **kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
      A plan, which may convert some layers to conv and others to dense.
      ``print(plan.tuning)`` shows what was measured. ``plan.options`` are the fastest
      compiler options. A converted linen model or function applies them in its own
      jit. If you call it inside your own jit, pass them to that:
      ``jax.jit(step, compiler_options=dict(plan.options))``. NNX models, which you jit
      yourself, are tuned without options.

    Raises:
      BackendError: the backend is unknown, or can't be measured on this machine.
      PlanError: a rule matches nothing; the budget is negative; the file of timings is
        damaged, is from another device, or cannot be written; the loss is not a float
        scalar.
      TypeError: the params or inputs are abstract, but the device is present.

    Source:
      Search by measurement, as in ATLAS (Whaley and Dongarra, 1998).

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> plan = tune(model, params, x, objective="memory", progress=False)
      >>> plan.tuning.ratio <= 1
      True
    """
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not (number and budget >= 0):  # NaN, too
        raise PlanError(
            f"Expected a budget of seconds, 0 or more, got {budget!r}. Pass budget=60."
        )
    check_seconds("timeout=", timeout)
    if timings is not None:
        kinds = (str, os.PathLike)
        check_kind("timings=", timings, kinds, "the path of a file", "'timings.json'")
    chosen = resolve_default() if backend is None else resolve(backend)
    if chosen.how == "lowered":
        raise BackendError(f"{chosen.backend}: {chosen.reason}")
    training = objective == "training"
    if loss is not None and not training:
        raise PlanError(
            f'Expected objective="training" for a loss=, got {objective!r}. Pass '
            'objective="training".'
        )
    goal = _objective(None if objective == "training" else objective, chosen)
    device = _device(chosen)
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.version.__version__}"
    file = None if timings is None else Path(timings)
    known = Timings(file, goal, f"{device}{', training' * training}, {versions}")
    with default_settings(), shown(progress) as show:
        show("planning", 0, 1)
        bound = bind(model, params, *inputs, **kwargs)
        check_options(tune, bound)
        check_concrete(tune, bound)
        bound.check_library()
        _check_arrays(chosen, (bound.variables, bound.arrays))
        named = None if backend is None else str(chosen.backend)
        every, ties = _both_ways(bound, rules, named)
        meter = Meter(chosen, goal, known, timeout)
        # Scratch memory and cycles ahead of time know of no options.
        sets: list[Options] = [()]
        if chosen.how == "executed" and bound.takes_options:
            sets += _options(chosen)
        dtypes = bound.layer_dtypes(every)
        forms, kinds = {}, {}
        end = time.monotonic() + budget / 4
        for number, each in enumerate(sets):
            seconds = (end - time.monotonic()) / (len(sets) - number)
            kinds[each] = choose_alone(
                *(every, ties, dtypes, meter, each, seconds, show, training)
            )
            forms |= _whole_forms(every, kinds[each], each)

        def program(form: _Variant) -> Candidate:
            # Without layers the model's own, as it is: not even its jit is another.
            changed = bound.convert(form.plan) if form.plan else bound
            return Candidate(changed.program(), form.options)

        def step(form: _Variant) -> Candidate:
            each = program(form)
            return Candidate(model_step(each.program, loss), each.options)

        race = _Race(forms, step if training else program, meter, show)
        race.choose(budget / 3)
        alike = kinds[race.forms[race.choice].options]
        race.refine(every, alike, budget / 4)
        race.confirm(budget / 6)
        forward: dict[str, Figure] = {}
        if training:
            show("whole model: forward passes", 0, 1)
            shown_forms = {name: program(race.forms[name]) for name in race.figures}
            forward = meter.measure(shown_forms, budget / 6)
    taken = race.forms[race.choice]
    tuning = Tuning(
        backend=str(chosen.backend),
        device=device,
        objective=goal,
        versions=versions,
        programs=tuple(race.figures.items()),
        choice=race.choice,
        layers=tuple(
            dataclasses.replace(kind.row, choice=kind.way_in(taken.plan))
            for kind in kinds[taken.options]
        ),
        left=tuple(every.left),
        why="" if race.choice != race.original else _NOTHING_BETTER,
        training=training,
        forward=tuple(forward.items()),
    )
    return dataclasses.replace(taken.plan, options=taken.options, tuning=tuning)


def _objective(objective: Objective | None, chosen: Resolution) -> Objective:
    present = chosen.how == "executed"
    if objective is None:
        return "latency" if present else "cycles"
    if objective not in ("latency", "memory", "cycles"):
        raise PlanError(
            "Expected objective='latency', 'memory', 'cycles' or 'training', got "
            f"{objective!r}. Pass one of them."
        )
    if objective == "latency" and not present:
        raise BackendError(
            f"{chosen.backend}: {chosen.reason}, so no run can be timed. Pass "
            'objective="cycles" or "memory".'
        )
    if objective == "cycles" and present:
        raise BackendError(
            f"{chosen.backend} is present, but cycles are estimated only for TPUs you "
            'don\'t have. Pass objective="latency".'
        )
    return objective


def _device(chosen: Resolution) -> str:
    if chosen.how != "executed":
        return str(chosen.backend.target)
    kind = chosen.device.device_kind
    name = str(chosen.backend)
    return name if kind == name else f"{name} ({kind})"


def _check_arrays(chosen: Resolution, trees: PyTree) -> None:
    abstract = any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trees)
    )
    if abstract and chosen.how == "executed":
        raise TypeError(
            f"Expected arrays to run on {chosen.backend}, got abstract ones. Pass "
            "arrays, or a backend that isn't present."
        )


def _both_ways(
    bound: BoundModel, rules: Iterable[Rule | str], backend: str | None
) -> tuple[Plan, list[set[str]]]:
    """Plan every layer that has another form, and find those that share params.

    Raises:
      PlanError: a rule matches no layer in either direction.
    """

    def planned(form: Form, rules: Sequence[Rule]) -> Plan:
        return bound.plan(form, rules, backend)

    plans = {form: planned(form, ()) for form in _FORMS}
    # What has no dense form may still run in phases.
    own: dict[Form, list[Rule]] = {form: [] for form in _FORMS}
    own["dense"] = phases_rules(plans["dense"].skipped)
    if chosen := as_rules(rules):
        paths = {form: {*plan, *plan.skipped} for form, plan in plans.items()}
        match_rules(chosen, dict.fromkeys(set().union(*paths.values()), 1))
        for form in _FORMS:  # a rule may match layers that have one direction
            mine = [r for r in chosen if any(r.matches(p, 0) for p in paths[form])]
            own[form] = mine + own[form]
    plans |= {form: planned(form, own[form]) for form in _FORMS if own[form]}
    every = plans["conv"] | plans["dense"]
    ties = []
    for path, layer in every.items():
        if layer.tied:  # What is left with it is tied to it.
            skip = Rule(glob.escape(path), skip=True)
            rest = planned(layer.to, [skip, *own[layer.to]])
            ties.append({p for p in plans[layer.to] if p not in rest})
    return every, ties


def _options(chosen: Resolution) -> list[Options]:
    found = tuple(convolution_options(chosen.device.platform).items())
    return [found] if found else []


def _whole_forms(
    every: Plan, kinds: Sequence[AlikeLayers], options: Options
) -> dict[str, _Variant]:
    """Forms of the whole model that are tried, by name."""
    found: dict[str, Any] = {"as it is": {}}
    for form in _FORMS:
        layers = {path: layer for path, layer in every.items() if layer.to == form}
        found[f"all to {form}"] = layers
    best = [kind.run_by(kind.row.choice) for kind in kinds]
    alone = {path: layer for layers in best for path, layer in layers.items()}
    found["layer by layer"] = alone
    forms: dict[str, _Variant] = {}
    for name, layers in found.items():
        form = _form(every, layers, options)
        if all(form.plan.layers != f.plan.layers for f in forms.values()):
            forms[name + _suffix(options)] = form
    return forms


def _suffix(options: Options) -> str:
    return "".join(f", {name}={value!r}" for name, value in options)


def _form(every: Plan, layers: Mapping[str, LayerPlan], options: Options) -> _Variant:
    """Return the form of the whole model that converts some layers."""
    ordered = tuple((path, layers[path]) for path in every if path in layers)
    left = tuple(
        (p, "its original form is as good or better") for p in every if p not in layers
    )
    return _Variant(Plan(direction(layers), ordered, (*every.left, *left)), options)


class _Race:
    """Forms of the whole model against each other.

    Attributes:
      forms: those given, and the refined one.
      figures: of those that were measured.
      original: name of the first.
      choice: name of the best one so far.
    """

    def __init__(
        self,
        forms: Mapping[str, _Variant],
        program: Callable[[_Variant], Candidate],
        meter: Meter,
        show: Progress,
    ):
        self.forms = dict(forms)
        self.figures: dict[str, Figure] = {}
        self.original = self.choice = next(iter(forms))
        self._program, self._meter, self._show = program, meter, show

    def _measure(
        self, forms: Mapping[str, _Variant], seconds: float, again: str = ""
    ) -> dict[str, Figure]:
        candidates = {name: self._program(form) for name, form in forms.items()}
        return self._meter.measure(candidates, seconds, again)

    def _settled(
        self, choice: str, seconds: float, again: str
    ) -> dict[str, Figure] | None:
        """Measure a form against the original; None unless it wins by 2 %."""
        last = {
            name: self._program(self.forms[name]) for name in (self.original, choice)
        }
        figures = self._meter.measure(last, seconds, again, settle=True)
        found, before = figures[choice], figures[self.original]
        wins = found.beats(before) and before.median > AS_GOOD * found.median
        return figures if wins else None

    def choose(self, seconds: float) -> None:
        """Measure all forms, for some seconds."""
        self._show(f"whole model: compiling {len(self.forms)} forms", 0, 1)
        self.figures |= self._measure(self.forms, seconds)
        best = min(figure.median for figure in self.figures.values())
        near = [n for n in self.forms if self.figures[n].median <= AS_GOOD * best]
        choice = min(near, key=lambda name: self.forms[name].plainness)
        before = self.figures[self.original]
        # Among many slow forms there were too few rounds to see a gain of some percent.
        if self.figures[choice].beats(before) or (
            before.median > AS_GOOD * self.figures[choice].median
            and self._settled(choice, seconds / 2, "alone")
        ):
            self.choice = choice

    def refine(self, every: Plan, kinds: Sequence[AlikeLayers], seconds: float) -> None:
        """Run layers that are alike in other ways, in the company of all others.

        Ways that gain more than the noise are kept. The most expensive layers come
        first, as many as time allows, compilation included.

        Args:
          every: plan of all layers that have another form.
          kinds: of layers, measured with the options of the choice.
          seconds: for all.
        """
        end = time.monotonic() + seconds
        for number, kind in enumerate(kinds):
            now = self.forms[self.choice]
            tried = {}
            for way in kind.others(kind.way_in(now.plan)):
                others = {p: v for p, v in now.plan.items() if p not in kind.layers}
                form = _form(every, others | kind.run_by(way), now.options)
                if form not in self.forms.values():
                    tried[way] = form
            if not tried:
                continue
            path = kind.row.paths[0]
            about = repr((now.plan.layers, self.figures[self.choice], path))
            known = hashlib.sha256(about.encode()).hexdigest()
            left = end - time.monotonic()
            self._show(f"in the model: {left:.0f} s left, {path}", number, len(kinds))
            if self._meter.timings.passes_over(known, left):
                continue
            share = max(left, 0) / (2 * (len(kinds) - number))
            figures = self._measure({"": now} | tried, share, again=f"beside {path}")
            self._meter.timings.finish(known)
            best = min(tried, key=lambda way: figures[way].median)
            found, before = figures[best], figures[""]
            if found.beats(before) and before.median >= _WORTH * found.median:
                self.choice = "refined" + _suffix(now.options)
                self.forms[self.choice] = tried[best]
                self.figures[self.choice] = found

    def confirm(self, seconds: float) -> None:
        """Measure the choice against the original once more."""
        if self.choice == self.original:
            return
        self._show("whole model: once more", 0, 1)
        again = self._settled(self.choice, seconds, "again")
        if again is None:
            self.choice = self.original
        else:
            self.figures |= again
