"""Whether two programs are one function: ``compare`` and ``assert_same``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..default_settings import default_settings
from ..frontends.bind import bind_called
from ..frontends.bound import BoundModel
from ..progress import Progress, ProgressOption, shown
from ..reports import Report, Table
from ..tracing.jaxprs import opened
from ..tracing.marks import named_outputs
from .agreement import (
    Agreement,
    WorkingError,
    agree,
    magnified_rounding,
    named_leaves,
    working_errors,
)
from .arithmetic import unit_roundoff
from .compiling import BackgroundProgram
from .moved import MOVED, moved_by_an_ulp
from .reference import Reference, Traced

Verdict = Literal[
    "the same bits",
    "rounding",
    "lower precision",
    "different functions",
    "unknown",
]


@dataclasses.dataclass(frozen=True)
class Comparison(Report):
    """What :func:`compare` found.

    Attributes:
      verdict: ``"the same bits"``: nothing differs, in float64 or here; ``"rounding"``:
        one function, whose sums are taken in another order; ``"lower precision"``: one
        function, which the second program computes with a larger error; ``"different
        functions"``; ``"unknown"``: there is no float64 reference to tell by.
      arrays: each output in float64.
      errors: the error of both programs in their own precision against the first in
        float64; of an output of integers there is none.
      differences: the largest difference between the two in their own precision, for
        each output.
      parts_at: for Flax modules that differ, the first module whose output does.
      notes: what could not be compared, and why.
      backend: where they ran.

    Example:
      >>> found = compare(lambda x: x + x, lambda x: 3 * x, [np.ones(3, np.float32)],
      ...                 progress=False)
      >>> found.verdict, found.passed, found.differences
      ('different functions', False, (1.0,))
    """

    verdict: Verdict
    arrays: tuple[Agreement, ...]
    errors: tuple[WorkingError, ...]
    differences: tuple[float, ...]
    parts_at: str | None
    notes: tuple[str, ...]
    backend: str

    @property
    def passed(self) -> bool:
        """Whether the two are one function, computed as well."""
        return self.verdict in ("the same bits", "rounding")

    @property
    def digits(self) -> float | None:
        """To how many digits all outputs agree in float64; None without a reference."""
        return min((array.digits for array in self.arrays), default=None)

    @property
    def failures(self) -> tuple[str, ...]:
        """Each output that differs, with what was expected and what was got."""
        found = [f"{c.path!r}: {c.reason}" for c in self.arrays if not c.passed]
        found += [f"{e.path!r}: {e.reason}" for e in self.errors if not e.passed]
        if self.verdict == "unknown":
            found += self.notes
        if self.parts_at is not None:
            found.append(f"they part at {self.parts_at}")
        return tuple(found)

    def content(self) -> dict[str, object]:
        """What :meth:`to_json` writes."""
        return {**super().content(), "digits": self.digits}

    @property
    def headline(self) -> str:
        """The verdict, and to how many digits."""
        digits = "" if self.digits is None else f", to {self.digits:.1f} digits"
        return f"{self.verdict.upper()}{digits}, on {self.backend}"

    @property
    def tables(self) -> Sequence[Table]:
        """Each output: how far it agrees, and the errors."""
        return [self._rows()] if self.arrays else []

    @property
    def details(self) -> list[str]:
        """Notes and failures."""
        return [*(f"note: {note}" for note in self.notes), *self.failures]

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("output", "float64", "difference here", "error first", "second")]
        errors = {error.path: error for error in self.errors}
        for array, difference in zip(self.arrays, self.differences):
            error = errors.get(array.path)
            mine = "-" if error is None else f"{error.original:.1e}"
            theirs = "-" if error is None else f"{error.converted:.1e}"
            digits, here = f"{array.digits:.1f} digits", f"{difference:.1e}"
            rows.append((array.path, digits, here, mine, theirs))
        return rows


def compare(
    f: Any,
    g: Any,
    f_args: Sequence[Any] = (),
    g_args: Sequence[Any] | None = None,
    *,
    f_kwargs: Mapping[str, Any] | None = None,
    g_kwargs: Mapping[str, Any] | None = None,
    progress: ProgressOption = None,
) -> Comparison:
    """Tells whether two programs that give other numbers are other functions.

    A port from linen to NNX, a model written again by hand, a refactoring: two programs
    of one function round differently, and so their outputs differ. Both are run in
    float64, where forms of one function agree to about 15 digits, and as they are,
    where the second one's error must be no worse than twice the first one's.

    Args:
      f: the first program: a function of arrays, a linen Module or a converted one (its
        arguments are the variables and the inputs), or an NNX model (the inputs).
      g: the second one, of the same or of another kind.
      f_args: what ``f`` is called with. What is no array is static.
      g_args: what ``g`` is called with; as ``f`` if None.
      f_kwargs: keyword arguments of ``f``.
      g_kwargs: those of ``g``; as ``f`` if None.
      progress: called with a phase, the steps done and the steps in all; None for bars
        on stderr, False for none.

    Returns:
      The comparison: ``.verdict``, ``.passed``, ``.digits``, ``.parts_at``; ``print``
      shows it.

    Raises:
      TypeError: something is no program.

    Source:
      A float64 run as the judge of both, as PyTorch's Inductor has it.

    Example:
      >>> x = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
      >>> total = lambda x: x.sum(0)
      >>> other = lambda x: x[::-1].sum(0)
      >>> compare(total, other, [x]).passed
      True
      >>> compare(total, lambda x: x.mean(0), [x]).verdict
      'different functions'
    """
    second_args = f_args if g_args is None else g_args
    second_kwargs = f_kwargs if g_kwargs is None else g_kwargs
    with default_settings(), shown(progress) as tell:
        first = bind_called(f, f_args, f_kwargs or {})
        second = bind_called(g, second_args, second_kwargs or {})
        return _compare(first, second, tell)


def assert_same(f: Any, g: Any, *args: Any, **options: Any) -> None:
    """Asserts that two programs are one function, as :func:`compare` finds it.

    Args:
      f: the first program or Flax module.
      g: the second.
      *args: what :func:`compare` takes next: the arguments of ``f``, and those of
        ``g`` where they are others.
      **options: what else it takes.

    Raises:
      AssertionError: names the output, what was expected and got, and for Flax modules
        the first module at which the two part.

    Source:
      As :func:`compare`.

    Example:
      >>> assert_same(lambda x: x + x, lambda x: 2 * x, [np.ones(3, np.float32)])
    """
    found = compare(f, g, *args, **{"progress": False, **options})
    if not found.passed:
        raise AssertionError(f"{found.verdict}\n" + "\n".join(found.failures))


def _trace(bound: BoundModel) -> Traced:
    """The trace of a call, with its modules named."""

    def named(variables: Any, arrays: Any) -> Any:
        return bound.named(variables, arrays, lambda path: True)

    return Traced.of(named, *bound.program().args)


def _compare(first: BoundModel, second: BoundModel, tell: Progress) -> Comparison:
    backend = jax.default_backend()
    tell("float64: tracing", 0, 1)
    traces = _trace(first), _trace(second)
    shapes = [
        [var.aval.shape for var in opened(trace.jaxpr)[0].outvars] for trace in traces
    ]
    if [np.prod(s) for s in shapes[0]] != [np.prod(s) for s in shapes[1]]:
        why = f"expected outputs of shapes {shapes[0]}, got {shapes[1]}"
        return Comparison("different functions", (), (), (), None, (why,), backend)
    reference = Reference(*traces, "outputs")
    args, other_args = first.program().args, second.program().args
    programs = [
        BackgroundProgram(first.call, *args),
        BackgroundProgram(second.call, *other_args),
    ]
    read = reference.run(tell)
    tell(f"{backend}: running", 0, 1)
    mine = [jax.tree.leaves(programs[0](*args))]
    theirs = jax.tree.leaves(programs[1](*other_args))
    for seed in range(MOVED):
        mine.append(jax.tree.leaves(programs[0](*moved_by_an_ulp(args, seed))))
    differences = tuple(map(_difference, mine[0], theirs))
    tell(f"{backend}: running", 1, 1)
    if read is None:
        notes = tuple(f"no float64 reference: {why}" for why in reference.unread)
        same = not any(differences)
        verdict: Verdict = "the same bits" if same else "unknown"
        return Comparison(verdict, (), (), differences, None, notes, backend)
    want = named_leaves(read[0].outputs, "output")
    got = [
        (path, np.asarray(z).reshape(np.shape(y)))
        for (path, y), z in zip(want, jax.tree.leaves(read[1].outputs))
    ]
    errors = working_errors("outputs", want, mine, theirs)
    by_path = {error.path: error for error in errors}
    units = [unit_roundoff(y.dtype) for y in mine[0]]
    extra = [
        magnified_rounding(by_path[path], unit) if path in by_path else 0.0
        for (path, _), unit in zip(want, units)
    ]
    arrays = agree("outputs", want, got, extra)
    parts_at = None
    if not all(array.passed for array in arrays):
        verdict = "different functions"
        errors = []
        parts_at = _parting(named_outputs(read[0].named), named_outputs(read[1].named))
    elif not all(error.passed for error in errors):
        verdict = "lower precision"
    else:
        same = not any(differences) and all(a.digits == 16 for a in arrays)
        verdict = "the same bits" if same else "rounding"
    return Comparison(
        verdict, tuple(arrays), tuple(errors), differences, parts_at, (), backend
    )


def _difference(a: Any, b: Any) -> float:
    """The largest difference of two arrays; NaN and infinities count where one has."""
    if jnp.issubdtype(a.dtype, jax.dtypes.extended):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(wide), b.astype(wide).reshape(a.shape)
    with np.errstate(invalid="ignore"):
        off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, abs(a - b))
    off = np.where(np.isnan(off), np.inf, off)
    return float(off.max(initial=0.0))


def _parting(want: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    """The first module whose output differs, in the order in which they return.

    Modules of one path are held against each other. Where the two have no path in
    common, as after a port, outputs are matched by their values.
    """
    common = [path for path in want if path in got and path]
    for path in common:
        if len(want[path]) != len(got[path]):
            return f"{path!r}: called {len(want[path])} and {len(got[path])} times"
        if not all(map(_same, want[path], got[path])):
            return repr(path)
    if common or not (want and got):
        return None
    values = [y for ys in got.values() for y in ys]
    matched = [all(_any_same(y, values) for y in ys) for ys in want.values()]
    paths = list(want)
    last = max((n for n, same in enumerate(matched) if same), default=-1)
    if last + 1 == len(paths):
        return None
    before = f", behind {paths[last]!r}" if last >= 0 else ""
    return f"{paths[last + 1] or '(root)'!r} of the first{before}"


def _any_same(y: Any, values: Sequence[Any]) -> bool:
    return any(np.size(y) == np.size(z) and _same(y, z) for z in values)


def _same(y: Any, z: Any) -> bool:
    y, z = np.asarray(y), np.asarray(z)
    if y.size != z.size:
        return False
    return agree("layers", [("", y)], [("", z.reshape(y.shape))])[0].passed
