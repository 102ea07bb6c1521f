"""Report of a comparison of two programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ..messages.reports import Report, Table
from .agreement import Agreement, WorkingError
from .rounding import LIMIT

Verdict = Literal[
    "the same bits",
    "rounding",
    "rounded constants",
    "lower precision",
    "different functions",
    "unknown",
]


@dataclasses.dataclass(frozen=True)
class Comparison(Report):
    """Report of :func:`compare`: the verdict and its evidence.

    Attributes:
      verdict: ``"the same bits"``: nothing differs, in float64 or in the working
        precision; ``"rounding"``: the same function, with sums in another order;
        ``"rounded constants"``: the same function, with constants rounded in different
        places; ``"lower precision"``: the same function, but the second program has a
        larger error; ``"different functions"``; ``"unknown"``: the float64
        reference is missing, or no entry is finite.
      arrays: each output and gradient in float64, without the differences that rounded
        constants explain.
      errors: the error of both programs in their own precision against float64; none
        for an output of integers.
      differences: for each output, the largest difference between both programs in
        their own precision.
      parts_at: for Flax modules that differ, the first module whose output differs.
      notes: what could not be compared, and why.
      backend: the backend that ran both.
      constants: the constants that must change for both to agree: dtype, value, and
        change in half ulps.
      distance: the norm of these changes, even if it is too large for rounding; None if
        nothing must change, or no change helps.
      rounded_tables: whether arrays of constants differ by their rounding.

    Example:
      >>> import fcconv_jax as fc, numpy as np
      >>> x = np.ones(3, np.float32)
      >>> found = fc.compare(lambda x: x + x, lambda x: 3 * x, [x], progress=False)
      >>> found.verdict, found.passed, found.differences
      ('different functions', False, (1.0,))
    """

    verdict: Verdict
    arrays: tuple[Agreement, ...] = ()
    errors: tuple[WorkingError, ...] = ()
    differences: tuple[float, ...] = ()
    parts_at: str | None = None
    notes: tuple[str, ...] = ()
    backend: str = ""
    constants: tuple[tuple[str, float, float], ...] = ()
    distance: float | None = None
    rounded_tables: bool = False

    @property
    def passed(self) -> bool:
        """Whether the two are one function, computed as well."""
        return self.verdict in ("the same bits", "rounding", "rounded constants")

    @property
    def outputs(self) -> tuple[Agreement, ...]:
        """The outputs in float64."""
        return tuple(array for array in self.arrays if array.quantity == "outputs")

    @property
    def gradients(self) -> tuple[Agreement, ...]:
        """The gradients in float64; empty where they were not compared."""
        return tuple(array for array in self.arrays if array.quantity == "gradients")

    @property
    def digits(self) -> float | None:
        """To how many digits all arrays agree in float64; None without a reference."""
        return min((array.digits for array in self.arrays), default=None)

    @property
    def failures(self) -> tuple[str, ...]:
        """Each array that differs, with what was expected and what was got."""
        if self.passed:
            return ()
        found = [f"{c.path!r}: {c.reason}" for c in self.arrays if not c.passed]
        found += [f"{e.path!r}: {e.reason}" for e in self.errors if not e.passed]
        if self.verdict == "unknown" or not found:
            found += [note for note in self.notes if note not in found]
        if self.parts_at is not None:
            found.append(f"they first differ at {self.parts_at}")
        return tuple(found)

    def content(self) -> dict[str, object]:
        """Return the content of :meth:`to_json`."""
        return {**super().content(), "digits": self.digits}

    @property
    def headline(self) -> str:
        """The verdict, to how many digits, and what was compared."""
        digits = "" if self.digits is None else f", to {self.digits:.1f} digits"
        return f"{self.verdict.upper()}{digits}: {self._compared()}, on {self.backend}"

    def _compared(self) -> str:
        if not self.arrays:
            count = len(self.differences)
            if not count:
                return "structure, shapes and dtypes of the outputs"
            return f"{_count(count, 'output')} in the working precision alone"
        parts = [_count(len(self.outputs), "output")]
        if self.gradients:
            parts.append(_count(len(self.gradients), "gradient"))
        return " and ".join(parts) + " on these inputs"

    @property
    def tables(self) -> Sequence[Table]:
        """Each output and gradient: how far it agrees, and the errors."""
        return [self._rows()] if self.arrays else []

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("array", "float64", "difference", "first's error", "second's error")]
        errors = {error.path: error for error in self.errors}
        here = dict(zip((array.path for array in self.outputs), self.differences))
        for array in self.arrays:
            error, difference = errors.get(array.path), here.get(array.path)
            rows.append(
                (
                    array.path,
                    f"{array.digits:.1f} digits",
                    _short(difference),
                    _short(error and error.original),
                    _short(error and error.converted),
                )
            )
        return rows

    @property
    def details(self) -> list[str]:
        """Constants, notes and failures."""
        lines = [
            f"constant: {value:.9g} ({dtype}) moves by {abs(step):.2g} half ulps"
            for dtype, value, step in self.constants
        ]
        if self.rounded_tables:
            lines.append("constant: tables differ by their rounding")
        if self.distance is not None and not self.constants:
            lines.append(
                f"note: the two agree if constants move by {self.distance:.3g} half "
                f"ulps; up to {LIMIT:g} is rounding"
            )
        failures = self.failures
        lines += [f"note: {note}" for note in self.notes if note not in failures]
        return [*lines, *failures]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
