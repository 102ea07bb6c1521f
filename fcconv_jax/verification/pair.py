"""Two programs for one function: compiled side by side, compared within the bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .bounds import ErrorModel, LeafComparison, compare, error_bounds
from .compiling import BackgroundProgram
from .perturbation import UnboundedError


class Pair:
    """An original and a changed program, traced at once, compiled in the background.

    Args:
      original: a function of its variables; the bound is derived from it.
      changed: the same in its other form.
      variables: what the original takes.
      other: what the changed one takes.
      notes: what cannot be checked is added here.
    """

    def __init__(
        self,
        original: Callable[[Any], Any],
        changed: Callable[[Any], Any],
        variables: Any,
        other: Any,
        notes: list[str],
    ):
        self._other, self._notes = other, notes
        self._changed = BackgroundProgram(changed, other)
        self._model: ErrorModel | None = None
        try:
            self._model = error_bounds(original, variables)
        except UnboundedError as error:
            notes.append(f"no bound could be derived: {error}")
            return
        if self._model.unmodelled:
            names = ", ".join(self._model.unmodelled)
            notes.append(f"rounding not modelled in: {names}")

    def compare(self) -> list[LeafComparison]:
        """Runs both and compares; nothing where no bound could be derived."""
        got = self._changed(self._other)
        if self._model is None:
            return []
        want = self._model.outputs
        found = compare(self._model, _shaped_like(want, got))
        for leaf in found:
            if leaf.nonfinite:
                self._notes.append(
                    f"{leaf.path!r}: {leaf.nonfinite} of its entries are NaN or "
                    "infinite, in both forms alike, and tell nothing"
                )
        return found


def _shaped_like(want: Any, got: Any) -> Any:
    """Gives layer outputs the shape of the original's: a conv's has axes of size 1."""
    if not isinstance(got, Mapping) or "layers" not in got:
        return got
    layers = {}
    for path, calls in want["layers"].items():
        layers[path] = {}
        for number, y in calls.items():
            z = got["layers"][path].get(number)
            if z is not None and z.size == y.size:
                z = z.reshape(y.shape)
            layers[path][number] = z
    return {**got, "layers": layers}
