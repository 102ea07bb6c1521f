"""Proves a converted model equal to the original: verify and assert_equivalent."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..backends.census import Census
from ..backends.compilation import TIMEOUT, Compiling, compile_present
from ..backends.name import Backend, BackendError
from ..backends.report import BackendReport
from ..backends.resolution import Resolution, resolve, resolve_default
from ..backends.timing import milliseconds
from ..frontends.convert_model import convert_model
from ..frontends.kinds import frontend_of
from ..frontends.programs import BothForms
from ..params.leaves import leaf_path
from ..params.trees import convert_params, restore_params
from ..plan import Plan
from .bounds import LeafComparison
from .layer_certificates import layer_certificates
from .pair import Pair
from .report import LayerReport, Report
from .training_step import pair_of_steps

Progress = Callable[[str, int, int], None]


def assert_equivalent(
    model: Any, params: Any, *inputs: Any, plan: Plan, **options: Any
) -> None:
    """Asserts that a model and its converted form are the same.

    In the spirit of chex: silent when it holds, else an error that says where it does
    not. Takes what :func:`verify` takes.

    Raises:
      AssertionError: names the layer or leaf, what was got and the bound.

    Example:
      >>> import flax.linen as nn
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> fc.assert_equivalent(model, params, x, plan=fc.make_plan(model, x))
    """
    report = verify(model, params, *inputs, plan=plan, **options)
    if not report.passed:
        raise AssertionError("the two forms differ\n" + "\n".join(report.failures))


def verify(
    model: Any,
    params: Any,
    *inputs: Any,
    plan: Plan,
    backends: Sequence[str | Backend] | None = None,
    converted_model: Any = None,
    converted_params: Any = None,
    tx: Any = None,
    gradients: bool = True,
    progress: Progress | None = None,
    timeout: float = TIMEOUT,
    **kwargs: Any,
) -> Report:
    """Checks every claim that a conversion makes, on the devices at hand.

    1. Parameters: ``converted_params`` hold the same bits, rearranged by the plan.
    2. Each layer: both forms agree to the bit on integers that leave no rounding
       (:mod:`fcconv_jax.verification.certificate`).
    3. The model on ``inputs``: outputs, and the outputs of every converted layer, lie
       within the rounding-error bound derived for this model, these parameters and
       this input (:mod:`fcconv_jax.verification.bounds`).
    4. Gradients, and the parameters after one optimizer step, likewise.
    5. The two compiled programs: operations, cost, run time.

    A backend that is present is *executed*: 2 to 5. For another the two programs are
    *compiled* ahead of time if its compiler is installed, which gives 5 but no run
    time, else *lowered*, which counts the operations that a compiler would be handed.
    The report says which, and ``passed`` claims no more.

    Args:
      model: the ``flax.linen`` or ``flax.nnx`` Module, or the function of params and
        inputs, that was planned.
      params: its params or its variables; for an NNX model an ``nnx.State``, a pure
        dict of its params, or None for the model's own. The outputs of the layers in
        between are then not compared, only the model's. Where nothing is executed,
        abstract ones will do.
      *inputs: what it is called with.
      plan: from :func:`fcconv_jax.make_plan`.
      backends: such as ``["cpu", "cuda:h100", "tpu:v5e"]``; None is JAX's default.
      converted_model: what to compare with; ``convert_model(model, plan)`` if None. A
        linen Module of your own, say one written with ``nn.Conv``.
      converted_params: its params or variables; ``convert_params(params, plan)`` if
        None.
      tx: the ``optax`` optimizer of the step; SGD with momentum if None.
      gradients: whether to do 4.
      progress: called with a phase, the steps done and the steps in all; also from the
        thread that waits for the compilers.
      timeout: seconds for each backend that is compiled ahead of time.
      **kwargs: keyword arguments of ``model.apply``: ``train=``, ``rngs=``, ...

    Returns:
      A report; ``report.passed`` tells, ``print(report)`` shows.

    Raises:
      BackendError: there is no such backend.
    """
    tell = progress or (lambda phase, done, total: None)
    chosen = _resolve_all(backends)
    if converted_model is None:
        converted_model = convert_model(model, plan)
    room = frontend_of(model, "verify")
    variables = room.variables(model, params)
    expected = convert_params(variables, plan)
    other = expected
    if converted_params is not None:
        other = room.variables(converted_model, converted_params)
    abstract = _is_abstract((variables, other, inputs, kwargs))
    if abstract and any(resolution.how == "executed" for resolution in chosen):
        raise TypeError(
            "verify needs arrays to execute on "
            f"{', '.join(str(r.backend) for r in chosen if r.how == 'executed')}, got "
            "abstract ones: hand over arrays, or name backends that are not present"
        )
    failures = _check_params(expected, other)
    if not failures:
        failures = _check_params(variables, restore_params(other, plan))

    original = room.model_program(model, plan, inputs, kwargs)
    changed = room.model_program(converted_model, plan, inputs, kwargs)
    pair = BothForms(plan, original, changed, variables, other)
    absent = [resolution for resolution in chosen if resolution.how != "executed"]
    with Compiling(
        pair.by_form(),
        absent,
        timeout=timeout,
        progress=lambda what, done, total: tell(f"compilers: {what}", done, total),
    ) as compiling:
        executed = {
            resolution.backend: _execute(pair, resolution, tx, gradients, tell)
            for resolution in chosen
            if resolution.how == "executed"
        }
        compiled = compiling.results() if absent else {}
    return _report(pair, chosen, failures, abstract, executed, compiled)


@dataclasses.dataclass(frozen=True)
class _Execution:
    """What one device showed."""

    report: BackendReport
    layers: tuple[LayerReport, ...]
    outputs: tuple[LeafComparison, ...]
    steps: tuple[LeafComparison, ...]
    notes: tuple[str, ...]


def _resolve_all(backends: Sequence[str | Backend] | None) -> list[Resolution]:
    if backends is None:
        return [resolve_default()]
    if isinstance(backends, str | Backend):
        backends = [backends]
    if not backends:
        raise BackendError("no backend to verify on: name one, such as 'cpu'")
    return [resolve(b) for b in dict.fromkeys(map(Backend.parse, backends))]


def _execute(
    pair: BothForms, resolution: Resolution, tx: Any, gradients: bool, tell: Progress
) -> _Execution:
    """Runs both forms on a device that is present, and compares."""
    with contextlib.ExitStack() as stack:
        if resolution.device.platform != jax.default_backend():
            stack.enter_context(jax.default_device(resolution.device))
            pair = pair.on(resolution.device)
        return _execute_here(pair, resolution, tx, gradients, tell)


def _execute_here(
    pair: BothForms, resolution: Resolution, tx: Any, gradients: bool, tell: Progress
) -> _Execution:
    plan, name = pair.plan, resolution.backend
    notes: list[str] = []
    # All is traced before anything runs: XLA compiles it meanwhile.
    tell(f"{name}: tracing", 0, 2 + gradients)
    proofs = layer_certificates(pair.variables, plan)
    tell(f"{name}: tracing", 1, 2 + gradients)
    forward = Pair(
        pair.original.run, pair.changed.run, pair.variables, pair.other, notes
    )
    step = None
    if gradients:
        tell(f"{name}: tracing", 2, 2 + gradients)
        step = pair_of_steps(pair, tx, notes)
    certificates = {}
    for done, (path, proof) in enumerate(proofs.items()):
        tell(f"{name}: certificates", done, len(proofs))
        certificates[path] = proof()
    tell(f"{name}: model on the input", 0, 1)
    comparisons = forward.compare()
    layers = tuple(
        LayerReport(
            path,
            layer.case,
            layer.layer,
            certificates[path],
            tuple(c for c in comparisons if c.path.startswith(f"layers/{path}/")),
        )
        for path, layer in plan.items()
    )
    outputs = tuple(c for c in comparisons if not c.path.startswith("layers/"))
    steps: tuple[LeafComparison, ...] = ()
    if step is not None:
        tell(f"{name}: gradients and a step", 0, 1)
        steps = tuple(step.compare())
    tell(f"{name}: run times", 0, 1)
    return _Execution(
        _compare_programs(pair, resolution), layers, outputs, steps, tuple(notes)
    )


def _compare_programs(pair: BothForms, resolution: Resolution) -> BackendReport:
    """The cost and the run time of both forms on a present device."""
    programs = pair.by_form()
    compiled = {
        form: compile_present(program, resolution) for form, program in programs.items()
    }
    runs = {
        form: functools.partial(compiled[form].executable, *program.args)
        for form, program in programs.items()
    }
    return BackendReport(
        str(resolution.backend),
        "executed",
        device=str(resolution.device.device_kind),
        dense=compiled["dense"],
        conv=compiled["conv"],
        milliseconds=milliseconds(runs),
    )


def _report(
    pair: BothForms,
    chosen: Sequence[Resolution],
    failed_params: Sequence[str],
    abstract: bool,
    executed: Mapping[Backend, _Execution],
    compiled: Mapping[Backend, Any],
) -> Report:
    """The report on the first backend that was executed, with all others in it."""
    plan = pair.plan

    def of_one(execution: _Execution | None, failed: Any, backends: Any) -> Report:
        shown = execution.report if execution else backends[0]
        forms = {
            form: Census(program.stablehlo, program.hlo)
            for form, program in (("dense", shown.dense), ("conv", shown.conv))
            if program
        }
        nothing = Census(None, None)
        return Report(
            to=plan.to,
            failed_params=tuple(failed),
            layers=execution.layers if execution else (),
            outputs=execution.outputs if execution else (),
            steps=execution.steps if execution else (),
            original=forms.get("dense" if plan.to == "conv" else "conv", nothing),
            converted=forms.get(plan.to, nothing),
            skipped=tuple(plan.skipped.items()),
            notes=execution.notes if execution else (),
            device=shown.device,
            backend=shown.backend,
            jax_version=jax.__version__,
            planned=len(plan),
            abstract=abstract,
            backends=tuple(backends),
        )

    main = next(iter(executed.values()), None)
    backends = []
    for resolution in chosen:
        execution = executed.get(resolution.backend)
        if execution is None:
            backends.append(_absent(resolution, compiled[resolution.backend]))
        elif execution is main:
            backends.append(execution.report)
        else:
            nested = of_one(execution, (), ())
            backends.append(dataclasses.replace(execution.report, execution=nested))
    return of_one(main, failed_params, backends)


def _absent(resolution: Resolution, outcome: Any) -> BackendReport:
    """The report on a backend that was not executed."""
    found: dict[str, Any] = {"failures": (str(outcome),)}
    if not isinstance(outcome, BackendError):
        found = {**outcome, "device": outcome["dense"].device}
    return BackendReport(
        str(resolution.backend), resolution.how, resolution.reason, **found
    )


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _check_params(want: Any, got: Any) -> list[str]:
    """Names each leaf of two trees that is not the same to the bit."""
    import chex

    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(want, got)
    except AssertionError as error:
        return [f"parameters: {error}"]
    failures = []
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got)
    ):
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            continue
        if _is_abstract((a, b)):
            continue
        a, b = np.asarray(a), np.asarray(b)
        differ = _bits(a) != _bits(b)
        if differ.any():
            index = tuple(int(i) for i in np.argwhere(differ)[0][: a.ndim])
            failures.append(
                f"parameters: {leaf_path(path)!r} is {b[index]!r} at {index}, expected "
                f"{a[index]!r} (the same bits, rearranged)"
            )
    return failures


def _bits(array: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat.reshape(*array.shape, -1) if array.size else flat
