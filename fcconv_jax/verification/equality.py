"""The whole program in both forms: in float64, and as each backend computes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..backends.resolution import Resolution
from ..frontends.bound import BothForms
from ..messages.progress import Progress
from ..plan import Plan
from ..tracing.marks import named_outputs
from .agreement import (
    Agreement,
    Quantity,
    WorkingError,
    agree,
    magnified_rounding,
    named_leaves,
    working_errors,
)
from .arithmetic import unit_roundoff
from .compiling import BackgroundProgram
from .layer_certificates import layer_certificates
from .perturbed import PERTURBED, perturbed_by_an_ulp
from .reference import Reference, TracedProgram
from .report import Execution
from .training_step import TrainingStep, has_gradients

if TYPE_CHECKING:
    import optax


class Equality:
    """Both forms of a model in float64.

    Attributes:
      arrays: what was compared, once :meth:`conclude` has been called.
      layers: outputs of converted layers, by path, likewise.
      notes: what could not be compared, and why.
      training: the training step, if it is compared.
      unread: why the forward passes have no reference; empty if they have one.
      traces: of both forward passes, the original's first.
      references: by quantity, path and array of the original form in float64.
    """

    def __init__(
        self,
        pair: BothForms,
        tx: optax.GradientTransformation | None,
        gradients: bool,
        show: Progress,
    ):
        self.notes: list[str] = []
        self.arrays: tuple[Agreement, ...] = ()
        self.layers: dict[str, list[Agreement]] = {}
        self.references: dict[Quantity, list[tuple[str, Any]]] = {}
        self._found: dict[Quantity, list[tuple[str, Any]]] = {}
        self.training: TrainingStep | None = None
        plan, original, changed = pair.plan, pair.original, pair.changed
        # All is traced before anything runs: XLA compiles it meanwhile.
        show("float64: tracing", 0, 2)
        # Other modules stay unnamed: what has a name is returned, and kept in memory.
        wanted = set(plan).__contains__
        self.traces = [
            TracedProgram.of(
                functools.partial(program.named, wanted=wanted), v, p.arrays
            )
            for program, v, p in (
                (original, pair.variables, original),
                (changed, pair.other, changed),
            )
        ]
        outputs = Reference(self.traces[0], self.traces[1], "outputs")
        backward = None
        if gradients and not has_gradients(pair.variables["params"]):
            self.notes.append("no gradients: some params are not floats")
        elif gradients:
            show("float64: tracing", 1, 2)
            self.training = TrainingStep(pair, tx)
            forward, other = self.training.gradients
            backward = Reference(
                TracedProgram.of(forward, pair.variables, original.arrays),
                TracedProgram.of(other, pair.other, changed.arrays),
                "gradients",
            )
        show("float64: tracing", 2, 2)
        read = outputs.run(show)
        self.unread = outputs.unread
        self.notes += [f"no float64 reference: {why}" for why in self.unread]
        if read is not None:
            want, got = read
            self._keep("outputs", named_leaves(want.outputs, "output"), got.outputs)
            self._keep_layers(plan, want.named, got.named)
        if backward is not None and self.training is not None:
            self._train(pair, backward, show)

    def _train(self, pair: BothForms, backward: Reference, show: Progress) -> None:
        assert self.training is not None
        read = backward.run(show)
        if read is None:
            self.notes += [f"no float64 gradients: {why}" for why in backward.unread]
            return
        want, got = (found.outputs for found in read)
        self._keep("gradients", named_leaves(want, "gradient"), got)
        # The step gets gradients of the params' own dtypes, as in training.
        self.given = jax.tree.map(
            lambda g, p: jnp.asarray(g.astype(jnp.result_type(p))),
            want,
            pair.variables["params"],
        )
        mine, theirs = self.training.steps
        step = Reference(
            TracedProgram.of(
                mine, pair.variables["params"], self.training.state, self.given
            ),
            TracedProgram.of(
                theirs, pair.other["params"], self.training.other_state, self.given
            ),
            "one step",
        )
        after = step.run(show)
        if after is None:
            self.notes += [f"no float64 step: {why}" for why in step.unread]
            return
        want, got = (found.outputs for found in after)
        self._keep("one step", named_leaves(want, "params"), got)

    def _keep(self, quantity: Quantity, want: list[tuple[str, Any]], got: Any) -> None:
        self.references[quantity] = want
        self._found[quantity] = named_leaves(got, "")
        if len(self._found[quantity]) != len(want):
            raise ValueError(
                f"expected {len(want)} {quantity} of the converted model, got "
                f"{len(self._found[quantity])}: {[path for path, _ in want]}"
            )

    def _keep_layers(self, plan: Plan, want: Any, got: Any) -> None:
        mine, theirs = named_outputs(want), named_outputs(got)
        pairs = []
        for path in plan:
            ys, zs = mine.get(path, []), theirs.get(path, [])
            # A path that is called another number of times has no pairs to compare.
            if ys and len(ys) == len(zs):
                pairs += [(path, y, _shaped_like(y, z)) for y, z in zip(ys, zs)]
        self.references["layers"] = [(path, y) for path, y, _ in pairs]
        self._found["layers"] = [(path, z) for path, _, z in pairs]

    def conclude(self, executions: Sequence[Execution]) -> None:
        """Compare, given how the program magnified rounding where it was run."""
        arrays = []
        for quantity, want in self.references.items():
            extra = None
            # The first backend: how much a program magnifies rounding is its own
            # property.
            for execution in executions[:1]:
                errors = {e.path: e for e in execution.errors if e.quantity == quantity}
                extra = [
                    magnified_rounding(errors[path], execution.unit)
                    if path in errors
                    else 0.0
                    for path, _ in want
                ]
            found = agree(quantity, want, self._found[quantity], extra)
            if quantity == "layers":
                for each in found:
                    self.layers.setdefault(each.path, []).append(each)
            else:
                arrays += found
        for each in arrays:
            if each.note:
                self.notes.append(each.note)
        self.arrays = tuple(arrays)


def execute(
    equality: Equality,
    pair: BothForms,
    resolution: Resolution,
    calls: Sequence[Callable[..., Any]],
    show: Progress,
) -> Execution:
    """Run both forms on a device, in the precision of the model."""
    name = resolution.backend
    proofs = layer_certificates(pair.plan, pair.original.layer_dtypes(pair.plan))
    training = equality.training if "gradients" in equality.references else None
    backward = None
    if training is not None:
        backward = [
            BackgroundProgram(function, variables, program.arrays)
            for function, variables, program in zip(
                training.gradients,
                (pair.variables, pair.other),
                (pair.original, pair.changed),
            )
        ]
    certificates = {}
    for done, (path, proof) in enumerate(proofs.items()):
        show(f"{name}: exact layers", done, len(proofs))
        certificates[path] = proof()
    show(f"{name}: exact layers", len(proofs), len(proofs))
    errors: list[WorkingError] = []
    programs: dict[Quantity, Sequence[Callable[..., Any]]] = {"outputs": calls}
    if backward is not None:
        programs["gradients"] = backward
    for done, (quantity, forms) in enumerate(programs.items()):
        show(f"{name}: {quantity}", done, len(programs))
        if quantity in equality.references:
            errors += _errors(equality.references[quantity], quantity, forms, pair)
    show(f"{name}: errors", len(programs), len(programs))
    if training is not None and "one step" in equality.references:
        errors += _step_errors(equality, training, pair)
    # Mixed precision is as good as its narrowest dtype.
    dtypes = {jnp.result_type(x) for x in jax.tree.leaves(pair.variables)}
    floats = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)] or [jnp.float32]
    unit = max(map(unit_roundoff, floats))
    return Execution(
        str(name),
        str(resolution.device.device_kind),
        certificates,
        tuple(errors),
        unit,
    )


def _errors(
    reference: Sequence[tuple[str, Any]],
    quantity: Quantity,
    forms: Sequence[Callable[..., Any]],
    pair: BothForms,
) -> list[WorkingError]:
    original, changed = forms
    arrays = pair.original.arrays
    runs = [original(pair.variables, arrays)]
    for seed in range(PERTURBED):
        params = perturbed_by_an_ulp(pair.variables["params"], seed)
        runs.append(original({**pair.variables, "params": params}, arrays))
    got = changed(pair.other, pair.changed.arrays)
    leaves = [jax.tree.leaves(run) for run in runs]
    return working_errors(quantity, reference, leaves, jax.tree.leaves(got))


def _step_errors(
    equality: Equality, training: TrainingStep, pair: BothForms
) -> list[WorkingError]:
    mine, theirs = map(jax.jit, training.steps)
    want = mine(pair.variables["params"], training.state, equality.given)
    got = theirs(pair.other["params"], training.other_state, equality.given)
    return working_errors(
        "one step",
        equality.references["one step"],
        [jax.tree.leaves(want)],
        jax.tree.leaves(got),
    )


def _shaped_like(want: Any, got: Any) -> Any:
    """A layer's output in the shape of the original's: a conv's has axes of size 1."""
    want, got = np.asarray(want), np.asarray(got)
    return got.reshape(want.shape) if got.size == want.size else got
