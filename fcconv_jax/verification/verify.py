"""Proves a converted model equal to the original: verify and assert_equivalent."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PyTree

from ..backends.compilation import TIMEOUT, Compiling, compile_present
from ..backends.default_settings import default_settings
from ..backends.faults import cpu_notes
from ..backends.name import Backend
from ..backends.report import BackendReport
from ..backends.resolution import Resolution, resolve, resolve_default
from ..backends.timing import milliseconds
from ..frontends.bind import bind
from ..frontends.bound import BothForms, BoundModel
from ..frontends.options import check_concrete, check_options
from ..messages.errors import BackendError
from ..messages.flags import check_flags, check_seconds
from ..messages.progress import Progress, ProgressOption, shown
from ..params.moves import map_leaves
from ..params.opt_state import check_optimizer
from ..plan import Form, Plan
from .bits import different_bits
from .equality import Equality, execute
from .report import Execution, LayerReport, VerifyReport
from .teacher_forcing import ForcedLayer, compare_layers

if TYPE_CHECKING:
    import optax


def assert_equivalent(
    model: object,
    params: PyTree,
    *inputs: PyTree,
    plan: Plan | None = None,
    **options: Any,
) -> None:
    """Assert that a converted model is equivalent to the original.

    Runs the checks of :func:`verify`. Shows no progress unless ``progress=`` is given.

    Args:
      model: the ``flax.linen`` or ``flax.nnx`` Module, or the function of params and
        inputs.
      params: its params or its variables, arrays of any float dtype.
      *inputs: the model's inputs, batch first.
      plan: from :func:`fcconv_jax.make_plan`; None to make one.
      **options: other arguments of :func:`verify`, such as ``backends=["tpu:v5e"]``.

    Raises:
      AssertionError: a check failed; names the layer or leaf, the expected and the
        actual value.

    Source:
      The assertions of ``chex``.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> fc.assert_equivalent(model, params, x)
    """
    report = verify(model, params, *inputs, plan=plan, **{"progress": False, **options})
    if not report.passed:
        raise AssertionError("the two forms differ\n" + "\n".join(report.failures))


def verify(
    model: object,
    params: PyTree | None = None,
    *inputs: PyTree,
    plan: Plan | None = None,
    to: Form = "conv",
    backends: Sequence[str | Backend] | None = None,
    converted_model: object = None,
    converted_params: PyTree | None = None,
    tx: optax.GradientTransformation | None = None,
    gradients: bool = True,
    progress: ProgressOption = None,
    timeout: float = TIMEOUT,
    **kwargs: PyTree,
) -> VerifyReport:
    """Verify that a converted model is equivalent to the original.

    1. Parameters: ``converted_params`` hold the same bits, rearranged by the plan.
    2. Each layer, on every executed backend: both forms are bit-identical on integers
       that leave no rounding (:mod:`fcconv_jax.verification.certificate`).
    3. The whole program on ``inputs``: outputs, the output of every converted layer,
       gradients, and the params after one optimizer step. Both forms run in float64 on
       the CPU (:mod:`fcconv_jax.verification.reading`), where two forms of the same
       function agree to about 15 digits; 12 are required.
    4. On every executed backend, in the precision of the model: the error of each form
       relative to that float64 result. The converted form's error may be at most twice
       the original's, plus a few units in the last place.
    5. The two compiled programs: operations, cost, run time.

    If an operation can't run in float64, such as a Pallas kernel, the report names it.
    Instead of the whole program, the two forms of each layer are then compared, on the
    input that the layer has in the model
    (:mod:`fcconv_jax.verification.teacher_forcing`).

    A backend that is present is *executed*, with checks 2 to 5. For any other backend,
    both programs are *compiled* ahead of time if its compiler is installed; this is
    check 5, without the run time. Otherwise they are *lowered*, and their operations
    are counted before compilation. The report shows what was done for each backend,
    and ``passed`` covers only that.

    Args:
      model: the ``flax.linen`` or ``flax.nnx`` Module, or the function of params and
        inputs.
      params: its params or its variables; for an NNX model an ``nnx.State``, a pure
        dict of its params, or None for the model's own. They may be abstract if nothing
        is executed.
      *inputs: the model's inputs.
      plan: from :func:`fcconv_jax.make_plan`; None to make one from the model and the
        inputs.
      to: the form to convert to, if ``plan`` is None.
      backends: such as ``["cpu", "cuda:h100", "tpu:v5e"]``; None for JAX's default.
      converted_model: the model to compare with, such as your own linen Module written
        with ``nn.Conv``; None for ``convert_model(model, plan)``.
      converted_params: its params or variables; None for
        ``convert_params(params, plan)``.
      tx: the ``optax`` optimizer of the step; SGD with momentum if None.
      gradients: whether to compare gradients and the step.
      progress: called with a phase, the steps done and the steps in all, also from the
        thread that waits for the compilers; None for bars on stderr, False for none.
      timeout: time limit for compiling ahead of time, in seconds per backend.
      **kwargs: keyword arguments of ``model.apply``: ``train=``, ``rngs=``, ...

    Returns:
      A report: ``report.passed`` is the verdict, ``print(report)`` shows the checks.

    Raises:
      BackendError: a backend is unknown.
      PlanError: the params do not fit the plan.

    Source:
      Random probes: Schwartz (1980) and Zippel (1979).

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> report = fc.verify(model, params, x, progress=False)
      >>> report.passed, report.digits > 12
      (True, True)
    """
    check_flags(gradients=gradients)
    check_seconds("timeout=", timeout)
    if tx is not None:
        check_optimizer(tx)
    chosen = _resolve_all(backends)
    with default_settings(), shown(progress) as show:
        bound = bind(model, params, *inputs, **kwargs)
        check_options(verify, bound)
        check_concrete(verify, bound)
        bound.check_library()
        if plan is None:
            show("planning", 0, 1)
            plan = bound.plan(to)
        pair, failures = _both_forms(bound, plan, converted_model, converted_params)
        executed = [r for r in chosen if r.how == "executed"]
        absent = [r for r in chosen if r.how != "executed"]
        trees = (pair.variables, pair.other, bound.arrays)
        abstract = any(
            isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trees)
        )
        if abstract and executed:
            raise TypeError(
                "Expected arrays to execute on "
                f"{', '.join(str(r.backend) for r in executed)}, got abstract ones. "
                "Pass arrays, or backends that are not present."
            )
        # The compilers of absent devices work in processes of their own meanwhile.
        with Compiling(
            pair.by_form(),
            absent,
            timeout=timeout,
            progress=lambda what, done, total: show(f"compilers: {what}", done, total),
        ) as compiling:
            equality, executions, reports = None, [], {}
            forced: dict[str, ForcedLayer] = {}
            if executed:
                equality = Equality(pair, tx, gradients, show)
                if equality.unread:
                    forced = _compare_layers(equality, pair, show)
                for resolution in executed:
                    report, execution = _execute(equality, pair, resolution, show)
                    reports[resolution.backend] = report
                    executions.append(execution)
            compiled = compiling.results() if absent else {}
        for resolution in absent:
            outcome = compiled[resolution.backend]
            reports[resolution.backend] = _absent(resolution, outcome)
        if equality is not None:
            # How much the program magnifies rounding shows where it is executed.
            equality.conclude(executions)
    on_cpu = any(each.backend.platform == "cpu" for each in executed)
    programs = [trace.jaxpr for trace in equality.traces] if equality else []
    known = cpu_notes(programs) if on_cpu else ()
    return VerifyReport(
        to=plan.to,
        failed_params=tuple(failures),
        layers=tuple(_layer_reports(plan, equality, executions, forced)),
        arrays=equality.arrays if equality else (),
        executions=tuple(executions),
        skipped=tuple(plan.skipped.items()),
        notes=(*(equality.notes if equality else ()), *known),
        jax_version=jax.__version__,
        planned=len(plan),
        abstract=abstract,
        backends=tuple(reports[r.backend] for r in chosen),
    )


def _both_forms(
    bound: BoundModel, plan: Plan, converted_model: object, converted_params: Any
) -> tuple[BothForms, list[str]]:
    """Both forms, and the parameters that are not the same bits."""
    changed = bound.convert(plan)
    expected = changed.variables
    if converted_model is not None:
        changed = bind(converted_model, None, *bound.args, **bound.kwargs)
        changed = changed.with_variables(expected)
    if converted_params is not None:
        changed = dataclasses.replace(changed, params=converted_params, given=None)
    failures = different_bits(expected, changed.variables)
    if not failures:
        # Bits that differ already would only be reported twice.
        restored = map_leaves(changed.variables, plan.inverse())
        failures = different_bits(bound.variables, restored)
    return BothForms(plan, bound, changed), failures


def _resolve_all(backends: Sequence[str | Backend] | None) -> list[Resolution]:
    if backends is None:
        return [resolve_default()]
    if isinstance(backends, str | Backend):
        backends = [backends]
    if not backends:
        raise BackendError("Expected a backend, got none. Pass backends=['cpu'].")
    return [resolve(b) for b in dict.fromkeys(map(Backend.parse, backends))]


def _execute(
    equality: Equality, pair: BothForms, resolution: Resolution, show: Progress
) -> tuple[BackendReport, Execution]:
    with contextlib.ExitStack() as stack:
        # On the default backend arrays stay as they are, spread over a mesh or not.
        if resolution.device.platform != jax.default_backend():
            stack.enter_context(jax.default_device(resolution.device))
            pair = pair.on(resolution.device)
        show(f"{resolution.backend}: compiling", 0, 1)
        programs = pair.by_form()
        compiled = {
            form: compile_present(program, resolution)
            for form, program in programs.items()
        }
        calls = [compiled[form].executable for form in ("original", "converted")]
        execution = execute(equality, pair, resolution, calls, show)
        show(f"{resolution.backend}: run times", 0, 1)
        runs: dict[str, Callable[[], Any]] = {
            form: functools.partial(compiled[form].executable, *program.args)
            for form, program in programs.items()
        }
        report = BackendReport(
            str(resolution.backend),
            "executed",
            device=str(resolution.device.device_kind),
            original=compiled["original"],
            converted=compiled["converted"],
            milliseconds=milliseconds(runs),
        )
        show(f"{resolution.backend}: run times", 1, 1)
        return report, execution


def _absent(resolution: Resolution, outcome: Any) -> BackendReport:
    """The report on a backend that was not executed."""
    found: dict[str, Any] = {"error": str(outcome)}
    if not isinstance(outcome, BackendError):
        found = {**outcome, "device": outcome["original"].device}
    return BackendReport(
        str(resolution.backend), resolution.how, resolution.reason, **found
    )


def _compare_layers(
    equality: Equality, pair: BothForms, show: Progress
) -> dict[str, ForcedLayer]:
    """Compare each layer on the input that it has in the original."""
    show("layers: on their own inputs", 0, 1)
    forced, unknown = compare_layers(equality.traces[0], pair.variables, pair.plan)
    if unknown:
        names = ", ".join(unknown)
        equality.notes.append(f"not compared on the model's own input: {names}")
    show("layers: on their own inputs", 1, 1)
    return forced


def _layer_reports(
    plan: Plan,
    equality: Equality | None,
    executions: Sequence[Execution],
    forced: Mapping[str, ForcedLayer],
) -> list[LayerReport]:
    if equality is None:
        return []
    return [
        LayerReport(
            path,
            layer.case,
            layer.layer,
            executions[0].certificates[path],
            tuple(equality.layers.get(path, ())),
            forced.get(path),
        )
        for path, layer in plan.items()
    ]
