"""Plans the matmuls with parameters that are found in a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from ..plan import Form, LayerPlan
from ..plan.rules import Rule
from ..tracing.marks import Frame, LayerInput
from .as_layer import (
    conv_arguments,
    dense_axes,
    form_of,
    input_shape,
    kernel_shape,
    leaf_rearrangement,
    stack_axes,
)
from .decide import Call, LeftError, plan_layers
from .matmul import Matmul, Program
from .trace import Traced

_TWO_ROLES = (
    "it is multiplied in two roles: what is input features in one matmul is output "
    "features in another, so no one kernel serves both"
)


def find_layers(
    traced: Traced, to: Form, known: Container[str] = ()
) -> dict[str, list[Matmul]]:
    """The matmuls in a trace that may go to the other form.

    Args:
      traced: the function's trace.
      to: the form to go to.
      known: parameters that another front end has decided about.

    Returns:
      By the path of the parameter, its matmuls.
    """
    layers: dict[str, list[Matmul]] = {}
    for _, found in traced.program.walk():
        if isinstance(found, Matmul) and form_of(found) != to:
            layers.setdefault(found.weight.path, []).append(found)
    return {path: matmuls for path, matmuls in layers.items() if path not in known}


def matmul_sizes(layers: Mapping[str, Sequence[Matmul]]) -> dict[str, int]:
    """The number of entries of each parameter, as one matmul sees it."""
    kernels = {path: p[0].eqn.invars[p[0].side] for path, p in layers.items()}
    return {path: kernel.aval.size for path, kernel in kernels.items()}


def plan_matmuls(
    traced: Traced,
    layers: Mapping[str, Sequence[Matmul]],
    to: Form,
    chosen: Mapping[str, Rule | None],
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """Plans the matmuls of each parameter, or says why it is left alone.

    Args:
      traced: the function's trace.
      layers: from :func:`find_layers`.
      to: the form to go to.
      chosen: the user's rule for each parameter, if any.

    Returns:
      The plans, and the reasons, by the path of the parameter; reasons also for
      parameters that come near a matmul without being a layer's.
    """
    numbers = {
        id(matmul): number
        for number, matmul in enumerate(p for each in layers.values() for p in each)
    }
    elsewhere = _other_uses(traced, layers, to)
    calls = {
        path: [as_call(p, numbers[id(p)], elsewhere.get(path)) for p in matmuls]
        for path, matmuls in layers.items()
    }
    inputs = _inputs(traced.program, Frame.of(traced.program.jaxpr), numbers)
    planned, reasons = plan_layers(
        inputs, calls, to, chosen, lambda path, _: _stack_axes(layers[path])
    )
    for path, plan in list(planned.items()):
        try:
            planned[path] = on_leaf(plan, layers[path])
        except LeftError as reason:
            del planned[path]
            reasons[path] = str(reason)
    return planned, {**reasons, **_untouched(traced, layers)}


def as_call(matmul: Matmul, number: int, elsewhere: str | None = None) -> Call:
    """One matmul, as a call of a layer."""
    obstacle = matmul.obstacle or elsewhere
    dense = form_of(matmul) == "dense"
    readable = dense or matmul.obstacle is None
    return Call(
        kind=matmul.eqn.primitive.name,
        number=number,
        shape=input_shape(matmul) if readable else (),
        kernel=kernel_shape(matmul) if readable else (),
        bias=None,
        axes=dense_axes(matmul) if dense else None,
        geometry=None if dense or not readable else conv_arguments(matmul),
        obstacle=obstacle and f"it is {obstacle}",
    )


def _other_uses(
    traced: Traced, layers: Mapping[str, Sequence[Matmul]], to: Form
) -> dict[str, str]:
    """For each parameter of a layer, what else happens to it."""
    reasons = {}
    for use in traced.program.uses:
        if use.path in layers:
            reasons[use.path] = f"also {use.reason}"
    for eqn, found in traced.program.walk():
        if (
            isinstance(found, Matmul)
            and found.weight.path in layers
            and form_of(found) == to
        ):
            reasons[found.weight.path] = f"also multiplied in a {eqn.primitive.name}"
    return reasons


def _untouched(traced: Traced, layers: Mapping[str, Any]) -> dict[str, str]:
    """Parameters that come near a matmul, or are tables, without being a layer's."""
    return {
        use.path: f"it is {use.reason}"
        for use in traced.program.uses
        if use.telling and use.path not in layers
    }


def _inputs(
    program: Program, frame: Frame, numbers: Mapping[int, int]
) -> Iterator[LayerInput]:
    """Where the activations of matmuls are in a trace.

    Args:
      program: what was found in a trace.
      frame: the trace.
      numbers: by the identity of the matmul.
    """
    for eqn in frame.jaxpr.eqns:
        matmul = program.matmuls.get(id(eqn))
        if matmul is not None and id(matmul) in numbers and not matmul.obstacle:
            var = eqn.invars[1 - matmul.side]
            yield LayerInput(numbers[id(matmul)], frame, var, var)
        for inner in program.inner.get(id(eqn), ()):
            yield from _inputs(inner, frame.enter(eqn, inner.jaxpr), numbers)


def _stack_axes(matmuls: Sequence[Matmul]) -> tuple[int, ...]:
    """The parameter's axes of which each matmul sees one step."""
    readable = [p for p in matmuls if p.obstacle is None]
    if len({kernel_shape(matmul) for matmul in readable}) > 1:
        raise LeftError(_TWO_ROLES)
    found = [stack_axes(matmul) for matmul in matmuls]
    for matmul, axes in zip(matmuls, found):
        if axes is None:
            raise LeftError(
                f"it is scanned over a part of one of its axes {matmul.weight.shape}: "
                "give each scan an axis of its own"
            )
        if axes != found[0]:
            raise LeftError(
                f"it is stacked on axes {found[0]} in one matmul, on {axes} in another"
            )
    assert found[0] is not None
    return found[0]


def on_leaf(plan: LayerPlan, matmuls: Sequence[Matmul]) -> LayerPlan:
    """The plan with the move of the parameter itself, through all that lies between."""
    moves = [
        leaf_rearrangement(p, plan.window, plan.order, plan.groups) for p in matmuls
    ]
    for move in moves:
        if move is None:
            raise LeftError(
                f"its axes are joined and split so that the window {plan.window} in "
                f"order {plan.order} cuts through one of them"
            )
        if move != moves[0]:
            raise LeftError(_TWO_ROLES)
    assert moves[0] is not None
    return dataclasses.replace(
        plan, layer=matmuls[0].eqn.primitive.name, leaves=(("", moves[0]),)
    )
