"""What a verification found, as a table, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

from ..backends import report as backend_report
from ..backends.census import Census
from ..backends.report import BackendReport
from ..plan import Case, Form
from ..tables import aligned
from .bounds import LeafComparison
from .certificate import Certificate


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was found about one converted layer.

    Attributes:
      path: its module path.
      case: why its two forms are equal.
      layer: class of the layer as it was found.
      certificate: the exact comparison of its two forms.
      outputs: its output on the user's input, for each call, against the bound; empty
        where Flax does not hand it out, as inside a scan.
    """

    path: str
    case: Case
    layer: str
    certificate: Certificate
    outputs: tuple[LeafComparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every check of this layer passed."""
        return self.certificate.passed and all(c.passed for c in self.outputs)


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`fcconv_jax.verify` found.

    Attributes:
      to: the form that the plan goes to.
      failed_params: leaves that are not the same bits rearranged.
      layers: one entry for each converted layer.
      outputs: the model's outputs against the bound.
      steps: gradients and the parameters after one optimizer step, likewise.
      original: dots, convolutions and collectives of the original program.
      converted: those of the converted program.
      skipped: path and reason of every linear layer left alone.
      notes: what could not be checked, and why.
      device: the kind of device that ran it.
      backend: its platform.
      jax_version: the version of JAX that compiled it.
      planned: number of planned layers.
      abstract: whether the parameters were abstract: no bits to compare.
      backends: what each backend showed. The fields above tell of the first that was
        executed; where none was, ``layers``, ``outputs`` and ``steps`` are empty.
    """

    to: Form
    failed_params: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    outputs: tuple[LeafComparison, ...]
    steps: tuple[LeafComparison, ...]
    original: Census
    converted: Census
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    device: str
    backend: str
    jax_version: str
    planned: int
    abstract: bool
    backends: tuple[BackendReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed of those that were made.

        What was not executed was not compared: ``backends`` says how far each was.
        """
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Each failed check, by layer or leaf, with what was got and the bound."""
        return tuple(self._failures())

    def _failures(self) -> Iterator[str]:
        yield from self.failed_params
        for layer in self.layers:
            name = layer.path or "(root)"
            if not layer.certificate.passed:
                yield f"layer {name!r}: {layer.certificate}"
            for call in layer.outputs:
                if not call.passed:
                    yield f"layer {name!r}: its output {call.reason}"
        for leaf in (*self.outputs, *self.steps):
            if not leaf.passed:
                yield f"{leaf.path!r} {leaf.reason}"
        for found in self.backends:
            yield from found.failures
            if found.execution is not None:
                for failure in found.execution.failures:
                    yield f"{found.backend}: {failure}"

    @property
    def executed(self) -> bool:
        """Whether anything was executed."""
        return any(found.how == "executed" for found in self.backends)

    def to_json(self) -> str:
        """The report as JSON text; bounds that do not exist are null."""
        return json.dumps(self._content(), default=str)

    def _content(self) -> dict[str, object]:
        backends = []
        for found in self.backends:
            nested = found.execution and found.execution._content()
            backends.append({**found.to_json(), "execution": nested})
        fields = {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }
        return {
            "passed": self.passed,
            "failures": self.failures,
            **fields,
            "backends": backends,
        }

    def to_markdown(self) -> str:
        """The report as Markdown: a verdict, the table of layers, and the rest."""
        lines = [f"**{self._verdict()}**", ""]
        if self.layers:
            head, *rows = self._layer_rows()
            table = [head, tuple("---" for _ in head), *rows]
            lines += ["| " + " | ".join(row) + " |" for row in table]
            lines.append("")
        lines += [f"- {line}" for line in self._details()]
        if self.backends:
            lines += ["", *backend_report.markdown(self.backends), ""]
            lines += [f"- {found.headline()}" for found in self.backends]
        for found in self.backends:
            if found.execution is not None:
                lines += ["", found.execution.to_markdown().rstrip()]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        table = aligned(self._layer_rows()) if self.layers else []
        lines = [self._verdict(), *table, *self._details()]
        for found in self.backends:
            lines += found.lines()
            if found.execution is not None:
                lines += ["  " + line for line in str(found.execution).splitlines()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        count = f"{self.planned} layer{'s' * (self.planned != 1)} to {self.to}"
        done = {
            how: ", ".join(found.backend for found in self.backends if found.how == how)
            for how in ("executed", "compiled", "lowered")
        }
        verdict = "EQUIVALENT" if self.passed else "DIFFERENT"
        if self.layers:
            where = f"on {self.backend} ({self.device}), jax {self.jax_version}"
        else:
            best = "compiled" if done["compiled"] else "lowered"
            verdict = f"{best.upper()}, NOT EXECUTED" if self.passed else "FAILED"
            where = f"for {done.pop(best)}, jax {self.jax_version}"
        rest = [f"{how}: {names}" for how, names in done.items() if names]
        more = f" ({'; '.join(rest)})" if len(self.backends) > 1 and rest else ""
        return f"{verdict}: {count}, {where}{more}"

    def _layer_rows(self) -> list[tuple[str, ...]]:
        rows = [
            (
                "layer",
                "case",
                "exact",
                "miss probability",
                "max error",
                "bound",
                "slack",
            )
        ]
        for layer in self.layers:
            proof = layer.certificate
            worst = _worst(layer.outputs)
            exact = "proved" if proof.proved else "equal"
            rows.append(
                (
                    layer.path or "(root)",
                    layer.case,
                    exact if proof.passed else "DIFFERENT",
                    f"{proof.miss_probability:.0e}",
                    f"{worst.max_abs_error:.1e}" if worst else "-",
                    f"{worst.bound:.1e}" if worst else "-",
                    _slack(worst) if worst else "-",
                )
            )
        return rows

    def _details(self) -> list[str]:
        lines = []
        if not self.failed_params and not self.abstract:
            lines.append("parameters: the same bits, rearranged; the way back too")
        for title, leaves in (
            ("outputs", self.outputs),
            ("gradients", [c for c in self.steps if c.path.startswith("gradient")]),
            ("one step", [c for c in self.steps if c.path.startswith("params")]),
        ):
            worst = _worst(leaves)
            if worst:
                verdict = "" if all(c.passed for c in leaves) else " FAILED"
                lines.append(
                    f"{title}: max error {worst.max_abs_error:.1e} at {worst.path}, "
                    f"bound {worst.bound:.1e}, slack {_slack(worst)}{verdict}"
                )
        lines.append(f"program: {_counts(self.original)} -> {_counts(self.converted)}")
        before, after = _exchanges(self.original), _exchanges(self.converted)
        if before or after:
            lines.append(f"between devices: {before or 'none'} -> {after or 'none'}")
        lines += [f"left alone: {path}: {why}" for path, why in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAILED: {failure}" for failure in self.failures]
        return lines


def _worst(leaves: Sequence[LeafComparison]) -> LeafComparison | None:
    """The comparison that comes closest to its bound."""
    return min(leaves, key=lambda c: (c.passed, c.tightness), default=None)


def _slack(leaf: LeafComparison) -> str:
    """Bound over error: of the worst case, and of independent errors."""
    if not leaf.max_abs_error:
        return "-"
    return f"{leaf.tightness:.0f}x ({leaf.likely_tightness:.0f}x likely)"


def _counts(census: Census) -> str:
    found = census.stablehlo
    if found is None:
        return "-"
    return f"{found.dots} dots, {found.convolutions} convolutions"


def _exchanges(census: Census) -> str:
    """The collectives of a compiled program, with what they make on one device."""
    found = census.hlo
    if found is None:
        return ""
    size = sum(found.collective_bytes.values())
    kinds = [f"{count} {kind}" for kind, count in found.collectives.items()]
    return f"{', '.join(kinds)} ({size:,} bytes)" if kinds else ""


def _plain(value: object) -> object:
    """Dataclasses to dictionaries, floats that JSON lacks to None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
        if isinstance(value, LeafComparison):
            fields["tightness"] = _plain(value.tightness)
            fields["likely_tightness"] = _plain(value.likely_tightness)
        passed = getattr(value, "passed", None)
        return fields if passed is None else {**fields, "passed": passed}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
