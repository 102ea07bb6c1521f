"""Whether two programs are one function: ``compare`` and ``assert_same``."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..backends.default_settings import default_settings
from ..frontends.bind import bind_called
from ..frontends.bound import BoundModel
from ..messages.flags import check_flags
from ..messages.progress import Progress, ProgressOption, shown
from ..tracing.jaxprs import opened
from ..tracing.marks import named_outputs
from .agreement import (
    Agreement,
    Quantity,
    largest,
    named_leaves,
    off_by,
    unseen,
    working_errors,
)
from .arithmetic import unit_roundoff
from .comparison import Comparison
from .compiling import BackgroundProgram
from .gradients import Gradients, trace_gradients
from .interface import interface_differences
from .parting import parting, porting_mistakes
from .perturbed import PERTURBED, perturbed_by_an_ulp
from .reference import Read, Reference, TracedProgram, float64_seconds
from .rounding import ByQuantity, Pair, agreements, all_passed, explain, key_bits

Arrays = tuple[list[np.ndarray], list[np.ndarray]]
# Gradients in float64 are compared unasked if they take no more seconds than this.
_CHEAP = 10.0
# A pass backwards takes about twice the forward one, which it repeats.
_BACKWARD = 3.0


def compare(
    f: object,
    g: object,
    f_args: Sequence[PyTree] = (),
    g_args: Sequence[PyTree] | None = None,
    *,
    f_kwargs: Mapping[str, PyTree] | None = None,
    g_kwargs: Mapping[str, PyTree] | None = None,
    gradients: bool | None = None,
    values_only: bool = False,
    progress: ProgressOption = None,
) -> Comparison:
    """Compare two programs in float64: do they compute the same function?

    Use it to check a port from linen to NNX, a reimplementation, or a refactoring. Two
    programs of the same function round differently, so their outputs differ in the
    working precision. The structure, names, shapes and dtypes of the outputs are
    compared first. Then both programs run in float64, where programs of the same
    function agree to about 15 digits, and in their own precision, where the second
    program's error may be at most twice the first's.

    A difference in float64 counts as rounding if rounding in float64 causes one as
    large, or if it vanishes when constants change by a few half ulps of their own dtype
    (:mod:`fcconv_jax.verification.rounding`).

    Args:
      f: the first program: a function of arrays, a linen Module or a converted one
        (called with variables and inputs), or an NNX model (called with inputs).
      g: the second program, of the same or of another kind.
      f_args: arguments of ``f``, as a list or tuple. Arguments other than arrays are
        static.
      g_args: arguments of ``g``; None for those of ``f``.
      f_kwargs: keyword arguments of ``f``.
      g_kwargs: keyword arguments of ``g``; None for those of ``f``.
      gradients: whether to compare the gradients of a random projection of the float
        outputs, in float64, with respect to all float arrays that both programs take.
        None compares them if that takes only seconds; the report lists what was
        compared.
      values_only: accept outputs of another structure, shape or dtype, if their numbers
        agree.
      progress: a callable, as for :func:`fcconv_jax.verify`; True or None for bars,
        False for none.

    Returns:
      A comparison, with ``.verdict``, ``.passed``, ``.digits`` and ``.parts_at`` (the
      first module that differs); ``print`` shows it.

    Raises:
      TypeError: a program or the arguments are of another type.

    Source:
      PyTorch's Inductor also judges two programs by a run in float64.

    Example:
      >>> x = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
      >>> total = lambda x: x.sum(0)
      >>> other = lambda x: x[::-1].sum(0)
      >>> compare(total, other, [x], progress=False).passed
      True
      >>> compare(lambda x: x / 3, lambda x: x * (1 / 3), [x], progress=False).verdict
      'rounded constants'
      >>> compare(total, lambda x: x.mean(0), [x], progress=False).verdict
      'different functions'
    """
    check_flags(values_only=values_only)
    if gradients is not None:  # where they cost little
        check_flags(gradients=gradients)
    second_args = f_args if g_args is None else g_args
    second_kwargs = f_kwargs if g_kwargs is None else g_kwargs
    for name, given in (("f_args", f_args), ("g_args", second_args)):
        if not isinstance(given, list | tuple):
            raise TypeError(
                f"Expected {name} as a list or tuple of arguments, got "
                f"{type(given).__name__}. Pass compare(f, g, [params, x])."
            )
    with default_settings(), shown(progress) as show:
        first = bind_called(f, f_args, f_kwargs or {})
        second = bind_called(g, second_args, second_kwargs or {})
        for each in (first, second):
            each.check_library()
        return _compare(first, second, gradients, values_only, show)


def assert_same(
    f: object,
    g: object,
    f_args: Sequence[PyTree] = (),
    g_args: Sequence[PyTree] | None = None,
    *,
    f_kwargs: Mapping[str, PyTree] | None = None,
    g_kwargs: Mapping[str, PyTree] | None = None,
    gradients: bool | None = None,
    values_only: bool = False,
    progress: ProgressOption = False,
) -> None:
    """Assert that two programs compute the same function, by :func:`compare`.

    Args:
      f: the first program or Flax module.
      g: the second.
      f_args: as for :func:`compare`, like all that follows.
      g_args: likewise.
      f_kwargs: likewise.
      g_kwargs: likewise.
      gradients: likewise.
      values_only: likewise.
      progress: likewise; none by default.

    Raises:
      AssertionError: they differ; names the output, the expected and the actual value,
        and for Flax modules the first module that differs.

    Source:
      As :func:`compare`.

    Example:
      >>> assert_same(lambda x: x + x, lambda x: 2 * x, [np.ones(3, np.float32)])
    """
    found = compare(
        *(f, g, f_args, g_args),
        f_kwargs=f_kwargs,
        g_kwargs=g_kwargs,
        gradients=gradients,
        values_only=values_only,
        progress=progress,
    )
    if not found.passed:
        raise AssertionError(f"{found.verdict}\n" + "\n".join(found.failures))


def _trace(bound: BoundModel) -> TracedProgram:
    """Return the trace of a call, with its modules named."""

    def named(variables: PyTree, arrays: PyTree) -> PyTree:
        return bound.named(variables, arrays, lambda path: True)

    return TracedProgram.of(named, *bound.program().args)


def _compare(
    first: BoundModel,
    second: BoundModel,
    gradients: bool | None,
    values_only: bool,
    show: Progress,
) -> Comparison:
    backend = jax.default_backend()
    show("float64: tracing", 0, 2)
    traces = _trace(first), _trace(second)
    # Before anything runs: outputs of other shapes have no difference to report.
    notes = interface_differences(*traces, values_only=values_only)
    if notes:
        return Comparison("different functions", notes=tuple(notes), backend=backend)
    show("float64: tracing", 1, 2)
    slopes, notes = _trace_gradients(first, second, traces[0], gradients)
    outputs = Reference(*traces, "outputs")
    backward = Reference(*slopes.traces, "gradients") if slopes.traces else None
    args, other_args = first.program().args, second.program().args
    programs = [
        BackgroundProgram(first.call, *args),
        BackgroundProgram(second.call, *other_args),
    ]
    show("float64: tracing", 2, 2)
    read = outputs.run(show)
    show(f"{backend}: running", 0, 1)
    mine = [_leaves(programs[0](*args))]
    theirs = _leaves(programs[1](*other_args))
    for seed in range(PERTURBED):
        # An ulp in the arguments shows a typical error of the first, where its own may
        # be a lucky one.
        mine.append(_leaves(programs[0](*perturbed_by_an_ulp(args, seed))))
    differences = tuple(map(_difference, mine[0], theirs))
    show(f"{backend}: running", 1, 1)
    if read is None:
        return _unread(outputs.unread, mine[0], differences, notes, backend)
    results: dict[Quantity, Arrays] = {"outputs": _arrays(read)}
    names = [path for path, _ in named_leaves(read[0].outputs, "output")]
    pairs = [Pair("outputs", traces, names)]
    if backward is not None and slopes.traces is not None:
        below = backward.run(show)
        if below is None:
            notes += [f"no float64 gradients: {why}" for why in backward.unread]
        else:
            results["gradients"] = _arrays(below)
            pairs.append(Pair("gradients", slopes.traces, slopes.names))
    arrays = agreements(pairs, results)
    explained = None
    if not all_passed(arrays):
        magnified = _magnified(names, results["outputs"], mine, theirs)
        explained = explain(pairs, results, magnified, show)
        arrays = explained.arrays
        failed = [array for array in arrays if not array.passed]
        if backward and failed and all(a.quantity == "gradients" for a in failed):
            arrays, kinks = _beside_kinks(pairs[1], backward, arrays, magnified, show)
            notes += kinks
    want, got = results["outputs"]
    if explained is not None and explained.moves:
        # Of the second's own constants: how well it computes what it is.
        theirs = [z - (b.reshape(a.shape) - a) for z, a, b in zip(theirs, want, got)]
    errors = working_errors("outputs", list(zip(names, want)), mine, theirs)
    notes += [array.note for array in arrays if array.note]
    found = Comparison(
        "rounding",
        tuple(arrays),
        tuple(errors),
        differences,
        notes=tuple(notes),
        backend=backend,
    )
    if explained is not None:
        constants = [(*each, step) for each, step in explained.moves.items()]
        found = dataclasses.replace(
            found,
            constants=tuple(constants),
            distance=explained.distance,
            rounded_tables=explained.tables,
        )
    return _judged(found, read, gradients, (first, second), outputs)


def _judged(
    found: Comparison,
    read: tuple[Read, Read],
    gradients: bool | None,
    models: tuple[BoundModel, BoundModel],
    reference: Reference,
) -> Comparison:
    failed = [array for array in found.arrays if not array.passed]
    if any(not array.unseen for array in failed):
        parts_at = None
        if any(array.quantity == "outputs" for array in failed):
            want, got = (named_outputs(each.named) for each in read)
            ported = models[0].library != models[1].library
            parts_at = parting(want, got, reference, ported)
            if mistakes := porting_mistakes(*models):
                parts_at = ": ".join(filter(None, (parts_at, "; ".join(mistakes))))
        return dataclasses.replace(
            found, verdict="different functions", errors=(), parts_at=parts_at
        )
    if failed or not any(array.size for array in found.outputs):
        note = () if failed else ("nothing was compared: the outputs have no entries",)
        return dataclasses.replace(
            found, verdict="unknown", notes=(*found.notes, *note)
        )
    # They were asked for: agreement of the outputs alone isn't an answer.
    if gradients and not found.gradients:
        return dataclasses.replace(found, verdict="unknown")
    if not all(error.passed for error in found.errors):
        return dataclasses.replace(found, verdict="lower precision")
    if found.constants or found.rounded_tables:
        return dataclasses.replace(found, verdict="rounded constants")
    alike = not any(found.differences) and all(a.digits == 16 for a in found.arrays)
    return dataclasses.replace(found, verdict="the same bits") if alike else found


def _unread(
    why: Sequence[str],
    outputs: Sequence[Any],
    differences: tuple[float, ...],
    notes: Sequence[str],
    backend: str,
) -> Comparison:
    """Return the comparison of programs that float64 cannot read."""
    size = max((largest(y) for y in outputs), default=0.0)
    worst = max(differences, default=0.0)
    part = f", {worst / size:.1e} of the largest value" if size and worst else ""
    instead = (
        f"compared instead: the outputs on {backend}, which differ by at most "
        f"{worst:.1e}{part}"
    )
    reasons = (f"no float64 reference: {reason}" for reason in why)
    seen = any(y.size for y in outputs) and not any(unseen(y) for y in outputs)
    same = seen and not any(differences)
    return Comparison(
        "the same bits" if same else "unknown",
        differences=differences,
        notes=(*reasons, instead, *notes),
        backend=backend,
    )


def _trace_gradients(
    first: BoundModel, second: BoundModel, trace: TracedProgram, wanted: bool | None
) -> tuple[Gradients, list[str]]:
    """Both programs' gradients, if they are wanted or cheap."""
    none = Gradients(None, (), ())
    if wanted is False:
        return none, ["no gradients: gradients=False"]
    seconds = 2 * _BACKWARD * float64_seconds(trace.jaxpr)
    if wanted is None and seconds > _CHEAP:
        return none, [
            f"no gradients: they take about {seconds:.0f} s in float64. "
            "Pass gradients=True"
        ]
    outputs = [var.aval for var in opened(trace.jaxpr)[0].outvars]
    found = trace_gradients(
        (first.call, second.call),
        (first.program().args, second.program().args),
        outputs,
    )
    return found, list(found.notes)


def _magnified(
    names: Sequence[str], read: Arrays, mine: Sequence[Any], theirs: Sequence[Any]
) -> float:
    """The larger error of the two in their own precision, in units of its roundoff."""
    want, got = (list(zip(names, each)) for each in read)
    errors = [
        *working_errors("outputs", want, mine[:1], mine[0]),
        *working_errors("outputs", got, [theirs], theirs),
    ]
    units = [unit_roundoff(y.dtype) for y in (*mine[0], *theirs)]
    worst = max((error.original for error in errors), default=0.0)
    return max(1.0, worst / min((unit for unit in units if unit), default=1.0))


def _beside_kinks(
    pair: Pair,
    backward: Reference,
    arrays: list[Agreement],
    magnified: float,
    show: Progress,
) -> tuple[list[Agreement], list[str]]:
    """Gradients that differ, compared again where all arrays are moved a little.

    At the kink of a relu, at the largest of equal entries, one function has several
    gradients, and two programs may return different ones.
    """
    first, second = (
        dataclasses.replace(trace, operands=[_moved(x) for x in trace.operands])
        for trace in pair.traces
    )
    near = dataclasses.replace(pair, traces=(first, second))
    results: ByQuantity = {"gradients": _arrays(backward.rerun(first, second))}
    again = explain([near], results, magnified, show)
    if not again.passed:
        return arrays, []
    outputs = [array for array in arrays if array.quantity == "outputs"]
    note = (
        "gradients differ at these inputs, and agree where they are moved by 0.1%: a "
        "kink, such as a relu at 0"
    )
    return [*outputs, *again.arrays], [note]


def _moved(array: Any) -> Any:
    """Return an array moved by a thousandth; the same array always by the same."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    wide = np.asarray(array).astype(np.float64)
    rng = np.random.default_rng(zlib.crc32(wide.tobytes()))
    near = 1e-3 * rng.uniform(0.5, 1.0, (2, *wide.shape))
    near *= rng.choice([-1, 1], near.shape)
    return wide * (1 + near[0]) + near[1] * (largest(wide) or 1.0)


def _arrays(read: tuple[Read, Read]) -> Arrays:
    first, second = (_leaves(each.outputs) for each in read)
    return first, second


def _leaves(tree: PyTree) -> list[np.ndarray]:
    return [key_bits(leaf) for leaf in jax.tree.leaves(tree)]


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays; NaN and infinities count where one has."""
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    off, _ = off_by(a.astype(wide), b.astype(wide).reshape(a.shape))
    return float(off.max(initial=0.0))
