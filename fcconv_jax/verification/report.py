"""Report on a conversion: its layers, its arrays and what each backend computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence

from ..backends.census import OpCounts
from ..backends.report import BackendReport, figures_table
from ..messages.reports import Report, Table, markdown_table, plain
from ..plan import Case, Direction, in_words
from .agreement import Agreement, Quantity, WorkingError
from .certificate import Certificate
from .teacher_forcing import ForcedLayer

_QUANTITIES: tuple[Quantity, ...] = ("outputs", "gradients", "one step")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Checks of one converted layer.

    Attributes:
      path: its module path.
      case: why its two forms are equal.
      layer: class of the layer as it was found.
      certificate: the exact comparison of its two forms, on the first backend.
      outputs: its output on the user's input in float64, for each call; empty if the
        trace doesn't show it, as for a layer of a function.
      forced: both forms on the input that the model gives it, if the float64
        reference is missing.
    """

    path: str
    case: Case
    layer: str
    certificate: Certificate
    outputs: tuple[Agreement, ...]
    forced: ForcedLayer | None = None

    @property
    def passed(self) -> bool:
        """Whether every check of this layer passed."""
        forced = self.forced is None or self.forced.passed
        return (
            self.certificate.passed and forced and all(c.passed for c in self.outputs)
        )


@dataclasses.dataclass(frozen=True)
class Execution:
    """Results of one executed backend.

    Attributes:
      backend: its name.
      device: the kind of device.
      certificates: by layer, the exact comparison of its two forms.
      errors: the error of each form against the float64 reference.
      unit: the unit roundoff of the model's precision.
    """

    backend: str
    device: str
    certificates: Mapping[str, Certificate]
    errors: tuple[WorkingError, ...]
    unit: float

    def failures(self, different: Container[str] = ()) -> Iterator[str]:
        """Each failed check, by layer or array.

        Args:
          different: arrays that are other functions already, of whose errors there is
            nothing to say.
        """
        for path, certificate in self.certificates.items():
            if not certificate.passed:
                yield f"layer {path or '(root)'!r}: {certificate}"
        for error in self.errors:
            if not error.passed and error.path not in different:
                yield f"{error.path!r}: {error.reason}"


@dataclasses.dataclass(frozen=True)
class VerifyReport(Report):
    """Report of :func:`fcconv_jax.verify`.

    Attributes:
      to: the form that the plan converts to.
      failed_params: leaves that are not the same bits rearranged.
      layers: one entry for each converted layer.
      arrays: outputs, gradients and the params after a step, in float64.
      executions: what each executed backend computed.
      skipped: path and reason of every linear layer that was not converted.
      notes: what could not be checked, and why.
      jax_version: the version of JAX that compiled it.
      planned: number of planned layers.
      abstract: whether the parameters were abstract: no bits to compare.
      backends: operations and cost of both forms on each backend: FLOPs and bytes of
        one call, milliseconds of a run, seconds of a compilation. If none was
        executed, ``layers``, ``arrays`` and ``executions`` are empty.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> report = fc.verify(model, params, x, gradients=False, progress=False)
      >>> print(str(report).splitlines()[0].partition(",")[0])
      EQUIVALENT: 1 layer to conv
      >>> report.failures
      ()
    """

    to: Direction
    failed_params: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    arrays: tuple[Agreement, ...]
    executions: tuple[Execution, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    jax_version: str
    planned: int
    abstract: bool
    backends: tuple[BackendReport, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """Each failed check, by layer or array, with what was expected and got."""
        return tuple(self._failures())

    def _failures(self) -> Iterator[str]:
        yield from self.failed_params
        for layer in self.layers:
            name = repr(layer.path or "(root)")
            for call in layer.outputs:
                if not call.passed:
                    yield f"layer {name}: its output: {call.reason}"
            if layer.forced is not None and not layer.forced.passed:
                yield f"layer {name}: {layer.forced.reason}"
        for array in self.arrays:
            if not array.passed:
                yield f"{array.path!r}: {array.reason}"
        different = {array.path for array in self.arrays if not array.passed}
        for execution in self.executions:
            for why in execution.failures(different):
                yield f"{execution.backend}: {why}"
        for found in self.backends:
            yield from found.failures

    @property
    def executed(self) -> bool:
        """Whether anything was executed."""
        return bool(self.executions)

    @property
    def outputs(self) -> tuple[Agreement, ...]:
        """The model's outputs in float64."""
        return self._of("outputs")

    @property
    def gradients(self) -> tuple[Agreement, ...]:
        """The gradients of the params in float64."""
        return self._of("gradients")

    @property
    def step(self) -> tuple[Agreement, ...]:
        """The params after one optimizer step in float64."""
        return self._of("one step")

    def _of(self, quantity: Quantity) -> tuple[Agreement, ...]:
        return tuple(array for array in self.arrays if array.quantity == quantity)

    @property
    def digits(self) -> float | None:
        """Number of digits to which all arrays of both forms agree in float64."""
        found = [c.digits for c in self.arrays]
        found += [c.digits for layer in self.layers for c in layer.outputs]
        return min(found, default=None)

    @property
    def original(self) -> OpCounts | None:
        """Operations of the original form, before compilation."""
        return self._asked("original")

    @property
    def converted(self) -> OpCounts | None:
        """Operations of the converted form, before compilation."""
        return self._asked("converted")

    def _asked(self, which: str) -> OpCounts | None:
        programs = (getattr(found, which) for found in self.backends)
        return next((p.stablehlo for p in programs if p is not None), None)

    def content(self) -> dict[str, object]:
        """Return the content of :meth:`to_json`."""
        return {
            **super().content(),
            "digits": self.digits,
            "original": plain(self.original),
            "converted": plain(self.converted),
            "backends": [found.content() for found in self.backends],
        }

    def to_markdown(self) -> str:
        """Return the report as Markdown, with all backends in one table."""
        text = super().to_markdown()
        if not self.backends:
            return text
        table = "\n".join(markdown_table(figures_table(self.backends)))
        rest = "\n".join(f"- {found.headline}" for found in self.backends)
        return f"{text}\n{table}\n\n{rest}\n"

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *map(str, self.backends)])

    @property
    def tables(self) -> Sequence[Table]:
        """The converted layers."""
        return [self._layer_rows()] if self.layers else []

    @property
    def headline(self) -> str:
        """The verdict, what was converted, and where it ran."""
        count = (
            f"{self.planned} layer{'s' * (self.planned != 1)} to {in_words(self.to)}"
        )
        done = {
            how: ", ".join(found.backend for found in self.backends if found.how == how)
            for how in ("executed", "compiled", "lowered")
        }
        verdict = "EQUIVALENT" if self.passed else self._failed()
        if self.passed and not self.planned:
            verdict = "NOTHING CONVERTED"
        if self.executions:
            first = self.executions[0]
            where = f"on {first.backend} ({first.device}), jax {self.jax_version}"
        else:
            best = "compiled" if done["compiled"] else "lowered"
            verdict = f"{best.upper()}, NOT EXECUTED" if self.passed else "FAILED"
            where = f"for {done.pop(best)}, jax {self.jax_version}"
        rest = [f"{how}: {names}" for how, names in done.items() if names]
        more = f" ({'; '.join(rest)})" if len(self.backends) > 1 and rest else ""
        return f"{verdict}: {count}, {where}{more}"

    def _failed(self) -> str:
        """The verdict where a check failed, if only for want of finite numbers."""
        calls = [call for layer in self.layers for call in layer.outputs]
        unseen = [array for array in (*self.arrays, *calls) if not array.passed]
        only = len(self.failures) == len(unseen) and all(a.unseen for a in unseen)
        return "UNDECIDED" if only else "DIFFERENT"

    def _layer_rows(self) -> list[tuple[str, ...]]:
        rows = [("layer", "case", "exact", "false-pass bound", "float64")]
        for layer in self.layers:
            proof = layer.certificate
            exact = "proved" if proof.proved else "equal"
            rows.append(
                (
                    layer.path or "(root)",
                    layer.case,
                    exact if proof.passed else "DIFFERENT",
                    f"{proof.miss_probability:.0e}",
                    _layer_agreement(layer),
                )
            )
        return rows

    @property
    def details(self) -> list[str]:
        """Arrays, operations, layers that were not converted, notes and failures."""
        lines = []
        if not self.failed_params and not self.abstract:
            lines.append("parameters: the same bits, rearranged; restored bit for bit")
        for quantity in _QUANTITIES:
            found = self._of(quantity)
            if not found:
                continue
            verdict = "" if all(c.passed for c in found) else " FAILED"
            lines.append(f"{quantity}: {_agreement(found)}{verdict}")
            lines += [
                f"  {execution.backend}: {_errors(errors)}"
                for execution in self.executions
                if (errors := [e for e in execution.errors if e.quantity == quantity])
            ]
        for execution in self.executions[1:]:
            proofs = execution.certificates.values()
            exact = sum(proof.passed for proof in proofs)
            lines.append(f"{execution.backend}: {exact} of {len(proofs)} layers exact")
        lines.append(
            f"before compilation: {_counts(self.original)} -> {_counts(self.converted)}"
        )
        lines += self._exchanges()
        lines += [f"not converted: {path}: {why}" for path, why in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAILED: {failure}" for failure in self.failures]
        return lines

    def _exchanges(self) -> list[str]:
        for found in self.backends[:1]:
            before, after = map(_collectives, (found.original, found.converted))
            if before or after:
                return [f"between devices: {before or 'none'} -> {after or 'none'}"]
        return []


def _layer_agreement(layer: LayerReport) -> str:
    if layer.outputs:
        return _agreement(layer.outputs)
    if layer.forced is not None:
        forced = layer.forced
        return f"none; alone {forced.difference:.1e} of {forced.allowed:.1e} allowed"
    return "-"


def _agreement(found: Sequence[Agreement]) -> str:
    """The worst of several comparisons, in digits."""
    digits = min(c.digits for c in found)
    return "the same bits" if digits == 16 else f"agree to {digits:.1f} digits"


def _errors(errors: Sequence[WorkingError]) -> str:
    """The errors of both forms, where the converted form's comes closest to failing."""
    worst = max(errors, key=lambda e: (not e.passed, e.converted / e.allowed))
    verdict = "" if worst.passed else ", FAILED"
    return (
        f"error {worst.original:.1e} original, {worst.converted:.1e} converted "
        f"({worst.allowed:.1e} allowed) at {worst.path}{verdict}"
    )


def _counts(found: OpCounts | None) -> str:
    if found is None:
        return "-"
    return f"{found.dots} dots, {found.convolutions} convolutions"


def _collectives(program: object) -> str:
    """The collectives of a compiled program, with what they make on one device."""
    found: OpCounts | None = getattr(program, "hlo", None)
    if found is None:
        return ""
    size = sum(found.collective_bytes.values())
    kinds = [f"{count} {kind}" for kind, count in found.collectives.items()]
    return f"{', '.join(kinds)} ({size:,} bytes)" if kinds else ""
