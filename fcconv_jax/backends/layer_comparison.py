"""The two programs of each layer of a plan, compared and put into words."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ..plan import Form, LayerPlan
from .compilation import Compilation
from .name import Backend
from .steps import BACKGROUND, Step, read_steps

Quantity = Literal["milliseconds", "cycles", "bytes"]
FORMS: tuple[Form, ...] = ("dense", "conv")
# Ratios that are called the same: run times are measured, the rest is computed.
_SAME: Mapping[Quantity, float] = {"milliseconds": 0.1, "cycles": 0.01, "bytes": 0.01}


@dataclasses.dataclass(frozen=True)
class LayerPrograms:
    """Two forms of one layer, compiled for a backend.

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
        """The steps of each form's program."""
        return {
            "dense": read_steps(self.dense.text),
            "conv": read_steps(self.conv.text),
        }

    @property
    def quantity(self) -> Quantity:
        """The quantity to compare the forms by: the best that both have."""
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
            return "the plan has no layers"
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
