"""Report on one backend: the figures of both forms, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..messages.reports import Report, Table
from .census import OpCounts
from .compilation import Compilation
from .resolution import How

# Quantity, its title in tables, and how a value is written.
_FIGURES = (
    ("dots", "dots"),
    ("convolutions", "convs"),
    ("copies", "copies"),
    ("relayout_bytes", "relayout"),
    ("flops", "flops"),
    ("bytes_accessed", "bytes"),
    ("temp_bytes", "scratch"),
    ("cycles", "cycles"),
    ("compile_seconds", "compile s"),
    ("milliseconds", "run ms"),
)
_COUNTS = ("dots", "convolutions", "copies")


@dataclasses.dataclass(frozen=True)
class BackendReport(Report):
    """Report on one backend: what was checked, and the cost of both forms.

    Attributes:
      backend: its name, as it was passed.
      how: 'executed', 'compiled' ahead of time without being run, or only 'lowered'.
      reason: why it was not executed, or not compiled.
      device: kind of the device.
      original: the original model's program, compiled or lowered for this backend.
      converted: the converted model's program.
      milliseconds: run times of both, if they were executed.
      error: why the programs are missing, such as a compiler that failed.
    """

    backend: str
    how: How
    reason: str = ""
    device: str = ""
    original: Compilation | None = None
    converted: Compilation | None = None
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def failures(self) -> tuple[str, ...]:
        """The compiler's failure, if it failed."""
        return (self.error,) if self.error else ()

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Each quantity as ``{'original': ..., 'converted': ..., 'ratio': ...}``.

        Operations are those of the compiled program, where it was compiled. The ratio
        is converted / original. It is None for counts of operations, and so is what is
        not known.
        """
        before, after = self._figures("original"), self._figures("converted")
        found = {}
        for name in (*(name for name, _ in _FIGURES), "custom_calls"):
            old, new = before.get(name), after.get(name)
            ratio = None
            # A ratio of counts would say nothing: dots become convolutions.
            if name not in (*_COUNTS, "custom_calls") and old and new is not None:
                ratio = new / old
            found[name] = {"original": old, "converted": new, "ratio": ratio}
        return found

    def _figures(self, form: str) -> dict[str, Any]:
        program: Compilation | None = getattr(self, form)
        if program is None:
            return {}
        counts: OpCounts = program.hlo or program.stablehlo
        return {
            "dots": counts.dots,
            "convolutions": counts.convolutions,
            "copies": counts.copies,
            "relayout_bytes": program.relayout_bytes,
            "custom_calls": dict(counts.custom_calls),
            "flops": program.flops,
            "bytes_accessed": program.bytes_accessed,
            "temp_bytes": program.temp_bytes,
            "cycles": program.cycles,
            "compile_seconds": program.seconds,
            "milliseconds": self.milliseconds.get(form),
        }

    def content(self) -> dict[str, object]:
        """Return all but the texts of the programs."""
        return {
            "passed": self.passed,
            "backend": self.backend,
            "how": self.how,
            "reason": self.reason,
            "device": self.device,
            "failures": list(self.failures),
            "figures": self.figures,
        }

    @property
    def headline(self) -> str:
        """Which backend, and what was done about it."""
        done = {
            "executed": f"executed on {self.device}",
            "compiled": f"compiled for {self.device}, not executed",
            "lowered": "lowered to StableHLO, neither compiled nor executed",
        }[self.how]
        if self.failures:
            done = "FAILED"
        return f"{self.backend}: {done}" + (f" ({self.reason})" if self.reason else "")

    @property
    def tables(self) -> Sequence[Table]:
        """The figures of both forms."""
        if self.error:
            return ()
        figures = self.figures
        shown = [
            (name, title)
            for name, title in _FIGURES
            if any(value is not None for value in figures[name].values())
        ]
        # Beside what the program asks for, so that no one takes one for the other.
        whose = "  lowered" if self.how == "lowered" else "  XLA program"
        rows = [(whose, *(title for _, title in shown))]
        for form in ("original", "converted"):
            cells = (_value(name, figures[name][form]) for name, _ in shown)
            rows.append((f"  {form}", *cells))
        ratios = [_ratio(figures[name]["ratio"]) for name, _ in shown]
        if any(ratios):
            rows.append(("  ratio", *ratios))
        return [rows]

    @property
    def details(self) -> list[str]:
        """The calls into libraries."""
        return [f"  {line}" for line in self.calls()]

    def calls(self) -> list[str]:
        """Return the library calls and generated kernels of either form, in words."""
        found = self.figures["custom_calls"]
        return [
            f"{form} calls " + ", ".join(f"{n}x {name}" for name, n in calls.items())
            for form, calls in found.items()
            if calls
        ]


def figures_table(reports: Sequence[BackendReport]) -> Table:
    """Return one table of all backends, a row for each form."""
    rows: list[tuple[str, ...]] = [
        ("backend", "", "form", *(title for _, title in _FIGURES), "calls")
    ]
    for report in reports:
        figures = report.figures
        names = report.backend, "failed" if report.error else report.how
        for form in ("original", "converted", "ratio"):
            calls = figures["custom_calls"][form] or {}
            values = (
                _ratio(figures[name][form])
                if form == "ratio"
                else _value(name, figures[name][form])
                for name, _ in _FIGURES
            )
            listed = ", ".join(f"{n}x {name}" for name, n in calls.items())
            rows.append(
                (*(names if form == "original" else ("", "")), form, *values, listed)
            )
    return rows


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "compile_seconds":
        return f"{value:.1f}"
    if name == "milliseconds":
        return f"{value:.3g}"
    return _thousands(value)


def _thousands(value: float) -> str:
    """Three digits and a unit: 1.23M."""
    power = 0
    while value >= 999.5 and power < 4:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{' kMGT'[power].strip()}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
