"""The two programs of each layer of a plan, compiled, compared, put into words."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..backend import Backend, BackendError
from ..forms import pair_of_forms
from ..plan import Form, LayerPlan, Plan, PlanError
from .backends.compilation import (
    TIMEOUT,
    Compilation,
    Compiling,
    Program,
    compile_present,
)
from .backends.reading import BACKGROUND, Step, read_steps
from .backends.resolution import Resolution, resolve
from .backends.timing import milliseconds
from .function_program import canonical_layer
from .programs import layer_dtypes

Quantity = Literal["milliseconds", "cycles", "bytes"]
FORMS: tuple[Form, ...] = ("dense", "conv")
# Ratios that are called the same: run times are measured, the rest is computed.
_SAME: Mapping[Quantity, float] = {"milliseconds": 0.1, "cycles": 0.01, "bytes": 0.01}
_TAKES: Mapping[Quantity, str] = {
    "milliseconds": "the time",
    "cycles": "the cycles",
    "bytes": "the memory traffic",
}


@dataclasses.dataclass(frozen=True)
class LayerPrograms:
    """What a backend makes of the two forms of one layer.

    Attributes:
      path: of the layer.
      layer: its plan.
      dtype: of input and parameters.
      dense: the compiled dense form.
      conv: the compiled conv form.
      milliseconds: run time of each form, where the device is present.
    """

    path: str
    layer: LayerPlan
    dtype: Any
    dense: Compilation
    conv: Compilation
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def steps(self) -> Mapping[Form, tuple[Step, ...]]:
        """What each form's program does, step by step."""
        return {
            "dense": read_steps(self.dense.text),
            "conv": read_steps(self.conv.text),
        }

    @property
    def quantity(self) -> Quantity:
        """What the forms are compared by: the best that is known of both."""
        if self.milliseconds:
            return "milliseconds"
        if self.dense.cycles is not None and self.conv.cycles is not None:
            return "cycles"
        return "bytes"

    def cost(self, form: Form) -> float:
        """Run time in ms, cycles that XLA estimates, or bytes read and written."""
        if self.quantity == "milliseconds":
            return self.milliseconds[form]
        if self.quantity == "cycles":
            return float(getattr(self, form).cycles)
        return float(sum(step.bytes for step in self.steps[form]))

    @property
    def ratio(self) -> float:
        """Cost of the conv form by that of the dense form."""
        dense, conv = self.cost("dense"), self.cost("conv")
        return conv / dense if dense else (1.0 if not conv else math.inf)

    @property
    def cheaper(self) -> Form | None:
        """The form that costs less; None where the two cost the same."""
        if abs(self.ratio - 1) <= _SAME[self.quantity]:
            return None
        return "conv" if self.ratio < 1 else "dense"

    @property
    def why(self) -> str:
        """What differs between the two programs, in words."""
        products = {form: _products(steps) for form, steps in self.steps.items()}
        if products["dense"] == products["conv"]:
            said = [f"both are {products['dense']}"]
        else:
            said = [f"dense is {products['dense']}, conv is {products['conv']}"]
        moves = {form: _moves(steps) for form, steps in self.steps.items()}
        for form, other in zip(FORMS, reversed(FORMS)):
            if extra := moves[form] - moves[other]:
                copies = [step for step in self.steps[form] if step.relayout]
                # Which of several they are is not known where both forms have some.
                cycles = 0 if moves[other] else sum(s.cycles or 0 for s in copies)
                spent = f", {cycles:,} cycles" if cycles else ""
                said.append(
                    f"the {form} form adds {_count(extra.total(), 'layout copy')} of "
                    f"{mebibytes(sum(extra.elements()))}{spent}"
                )
        if not any(moves.values()):
            said.append("no layout copy in either")
        for form in FORMS:
            if self.quantity == "cycles" and (free := _uncounted(self.steps[form])):
                said.append(f"the {form} form's {free} is not in its cycles")
        scratch = [getattr(self, form).temp_bytes or 0 for form in FORMS]
        if max(scratch) > 2 * min(scratch) + 2**16:
            said.append("scratch memory {} against {}".format(*map(mebibytes, scratch)))
        return "; ".join(said)

    @property
    def verdict(self) -> str:
        """One line: the ratio of the costs, and where it comes from."""
        numbers = f"{self.show_cost('conv')} against {self.show_cost('dense')}"
        return (
            f"conv takes {self.ratio:.2f}x {_TAKES[self.quantity]} of dense "
            f"({numbers}): {self.why}"
        )

    def show_cost(self, form: Form) -> str:
        """The cost of a form with its unit."""
        cost = self.cost(form)
        if self.quantity == "milliseconds":
            return f"{cost:.3g} ms"
        return f"{cost:,.0f} cycles" if self.quantity == "cycles" else mebibytes(cost)

    def to_json(self) -> dict[str, Any]:
        """Both programs' steps and figures, as what JSON knows."""
        return {
            "layer": self.path,
            "case": self.layer.case,
            "dtype": str(jnp.dtype(self.dtype)),
            "backend": str(self.dense.backend),
            "device": self.dense.device,
            "quantity": self.quantity,
            "ratio": self.ratio,
            "cheaper": self.cheaper,
            "verdict": self.verdict,
            "forms": {
                form: {
                    "cost": self.cost(form),
                    "flops": getattr(self, form).flops,
                    "bytes_accessed": getattr(self, form).bytes_accessed,
                    "temp_bytes": getattr(self, form).temp_bytes,
                    "cycles": getattr(self, form).cycles,
                    "steps": [dataclasses.asdict(step) for step in self.steps[form]],
                }
                for form in FORMS
            },
        }


@dataclasses.dataclass(frozen=True)
class CompiledLayers(Mapping[str, LayerPrograms]):
    """The programs of the layers of a plan, on one backend: by the layer's path."""

    backend: Backend
    layers: tuple[LayerPrograms, ...]

    @functools.cached_property
    def _by_path(self) -> dict[str, LayerPrograms]:
        return {layer.path: layer for layer in self.layers}

    def __getitem__(self, path: str) -> LayerPrograms:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def answer(self) -> str:
        """Whether conv or dense is quicker on this backend, and why, layer by layer.

        Layers whose programs differ in the same way share a line.
        """
        device = self.layers[0].dense.device if self.layers else ""
        lines = [f"On {self.backend} ({device}), {self._score()}."]
        quantity = self.layers[0].quantity if self.layers else "bytes"
        kinds: dict[tuple[Form | None, str], list[LayerPrograms]] = {}
        for layer in self.layers:
            kinds.setdefault((layer.cheaper, _kind(layer)), []).append(layer)
        for (cheaper, _), alike in kinds.items():
            ratios = sorted(f"{layer.ratio:.2f}" for layer in alike)
            span = " to ".join(dict.fromkeys((ratios[0], ratios[-1])))
            wins = "moves less" if quantity == "bytes" else "wins"
            word = f"{cheaper} {wins}" if cheaper else "no difference"
            names = ", ".join(layer.path or "(root)" for layer in alike)
            first = f" (the sizes are {alike[0].path}'s)" if len(alike) > 1 else ""
            lines.append(f"- {word} ({span}x) in {names}: {alike[0].why}{first}.")
        return "\n".join(lines)

    def _score(self) -> str:
        if not self.layers:
            return "there is no layer to compare"
        won = Counter(layer.cheaper for layer in self.layers)
        quantity = self.layers[0].quantity
        known = {
            "milliseconds": "measured",
            "cycles": "by the cycles that XLA estimates",
            "bytes": "by what they read and write (XLA estimates no cycles here, so "
            "this tells traffic, not time)",
        }[quantity]
        better = "costs less" if quantity != "bytes" else "moves less"
        return (
            f"{known}: conv {better} in {won['conv']} of {len(self.layers)} layers, "
            f"dense in {won['dense']}, they are the same in {won[None]}"
        )


def compile_layers(
    plan: Plan,
    backend: str | Backend,
    *,
    only: Sequence[str] | None = None,
    params: Any = None,
    dtype: Any = None,
    timeout: float = TIMEOUT,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompiledLayers:
    """Compiles both forms of each layer of a plan, each as a program of its own.

    The input has the shape that the layer had when it was planned. Where a device of
    the backend is present both programs are run, and timed.

    Args:
      plan: from :func:`fcconv_jax.make_plan`; ``backend=`` gives it the layouts that
        are quickest there.
      backend: such as ``"cpu"``, ``"tpu:v5e"`` or ``"cuda:h100"``.
      only: the paths of the layers to compile; all of the plan if None.
      params: params or variables of the model in the form that the plan starts from,
        arrays or abstract ones; each layer has the dtype of its kernel.
      dtype: of every layer instead; float32 where neither is given.
      timeout: seconds for compiling ahead of time.
      progress: called with a step, how many are done, and how many there are.

    Returns:
      The programs, by layer; ``print(found.answer)``.

    Raises:
      BackendError: there is no such backend, it cannot be compiled for here, or its
        compiler failed; says what to install.

    Example:
      >>> import flax.linen as nn, fcconv_jax as fc
      >>> plan = fc.make_plan(nn.Dense(3), jnp.ones((2, 4)), backend="cpu")
      >>> found = compile_layers(plan, "cpu")
      >>> found[""].quantity, [step.product for step in found[""].steps["conv"]][:1]
      ('milliseconds', ['dot'])
    """
    chosen = resolve(backend)
    if chosen.how == "lowered":
        raise BackendError(f"{chosen.backend}: {chosen.reason}")
    dtypes = dict.fromkeys(plan, jnp.dtype(dtype or jnp.float32))
    if dtype is None and params is not None:
        dtypes = layer_dtypes(params, plan)
    kinds = {
        path: (dataclasses.replace(plan[path], tied=()), dtypes[path])
        for path in (plan if only is None else only)
    }
    numbers = {
        kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()))
    }
    programs = {
        f"{number}_{form}": program
        for (layer, layer_dtype), number in numbers.items()
        for form, program in layer_forms(layer, plan.to, layer_dtype).items()
    }
    compiled = _compile(programs, chosen, timeout, progress)
    times = {
        number: _measure(programs, compiled, number, chosen)
        for number in numbers.values()
    }
    return CompiledLayers(
        chosen.backend,
        tuple(
            LayerPrograms(
                path,
                plan[path],
                kind[1],
                compiled[f"{numbers[kind]}_dense"],
                compiled[f"{numbers[kind]}_conv"],
                times[numbers[kind]],
            )
            for path, kind in kinds.items()
        ),
    )


def layer_forms(layer: LayerPlan, to: Form, dtype: Any) -> dict[Form, Program]:
    """The two forms of a layer as programs of input, kernel and bias.

    Args:
      layer: the layer's plan.
      to: the form that it goes to.
      dtype: of input and parameters.

    Example:
      >>> import flax.linen as nn, fcconv_jax as fc
      >>> plan = fc.make_plan(nn.Dense(3), jnp.ones((2, 4)))
      >>> [x.shape for x in layer_forms(plan[""], "conv", jnp.float32)["conv"].args]
      [(2, 4), (1, 4, 3), (3,)]
    """
    if layer.is_product:
        layer = canonical_layer(layer, to)
    moves = [move for _, move in layer.leaves]
    shape = layer.input_shape if to == "dense" else layer.dense_input_shape()
    x = _abstract(shape, dtype)
    bias = [] if layer.bias else [None]
    found: dict[Form, Program] = {}
    source: Form = "dense" if to == "conv" else "conv"
    for form, function, shapes in zip(
        (source, to),
        pair_of_forms(layer, to),
        ([move.source for move in moves], [move.target for move in moves]),
    ):
        args = (x, *(_abstract(shape, dtype) for shape in shapes), *bias)
        found[form] = Program(function, args)
    return found


def find_layer(plan: Plan, path: str) -> str:
    """The path of a layer of a plan, as a user wrote it.

    Raises:
      PlanError: there is no such layer; lists near misses, or says why it was left.
    """
    import difflib

    path = "" if path == "(root)" else path
    if path in plan:
        return path
    if path in plan.skipped:
        raise PlanError(
            f"{path!r} is left alone, so that it has one form: {plan.skipped[path]}"
        )
    paths = [known or "(root)" for known in plan]
    close = difflib.get_close_matches(path, paths, n=3, cutoff=0.3)
    hint = f"close to it: {', '.join(close)}" if close else f"there are: {paths[:10]}"
    raise PlanError(f"no layer {path!r} converts to {plan.to}; {hint}")


def mebibytes(number: float) -> str:
    """Bytes with three digits and a unit.

    Example:
      >>> mebibytes(3211264), mebibytes(512)
      ('3.06 MiB', '512 B')
    """
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def _abstract(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _compile(
    programs: Mapping[str, Program],
    chosen: Resolution,
    timeout: float,
    progress: Callable[[str, int, int], None] | None,
) -> Mapping[str, Compilation]:
    tell = progress or (lambda what, done, total: None)
    if chosen.how == "executed":
        found = {}
        for name, program in programs.items():
            tell("compiling", len(found), len(programs))
            found[name] = compile_present(program, chosen)
        return found
    tell("compiling", 0, 1)
    with Compiling(programs, [chosen], timeout=timeout) as compiling:
        (outcome,) = compiling.results().values()
    if isinstance(outcome, BackendError):
        raise outcome
    return outcome


def _measure(
    programs: Mapping[str, Program],
    compiled: Mapping[str, Compilation],
    number: int,
    chosen: Resolution,
) -> Mapping[str, float]:
    """Run times of the two forms on random numbers, where the device is present."""
    if chosen.how != "executed":
        return {}
    rng = np.random.default_rng(0)
    runs: dict[str, Callable[[], Any]] = {}
    for form in FORMS:
        name = f"{number}_{form}"
        args = jax.tree.map(
            lambda leaf: jax.device_put(
                rng.standard_normal(leaf.shape).astype(leaf.dtype), chosen.device
            ),
            programs[name].args,
        )
        runs[form] = functools.partial(compiled[name].executable, *args)
    return milliseconds(runs)


def _products(steps: tuple[Step, ...]) -> str:
    """What multiplies, counted, in words."""
    found = Counter(step.product for step in steps if step.product)
    return " and ".join(f"{n} {name}" for name, n in found.items()) or "nothing"


def _uncounted(steps: tuple[Step, ...]) -> str:
    """Steps that XLA estimates no cycles for, and that others wait for."""
    return " and ".join(
        f"{step.op} of {mebibytes(step.bytes)}"
        for step in steps
        if step.cycles is None and step.detail != BACKGROUND
    )


def _moves(steps: tuple[Step, ...]) -> Counter[int]:
    return Counter(step.relayout for step in steps if step.relayout)


def _kind(layer: LayerPrograms) -> str:
    """How the two programs differ, whatever their sizes."""
    return str(
        {
            form: (_products(steps), _moves(steps).total())
            for form, steps in layer.steps.items()
        }
    )


def _count(number: int, what: str) -> str:
    plural = what[:-1] + "ies" if number > 1 else what
    return f"{number} {plural}"
