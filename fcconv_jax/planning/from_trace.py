"""Plans a model from its trace: the layers of a library, and matmuls of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from ..plan import UNCALLED_REASON, Form, LayerPlan
from ..plan.rules import Rule, match_rules, module_of
from ..tracing.frames import Frame
from .as_layer import (
    channels_first,
    conv_arguments,
    dense_axes,
    form_of,
    input_shape,
    kernel_shape,
    leaf_rearrangement,
    stack_axes,
)
from .decide import LayerCall, LeftError, plan_layers
from .flatten import LayerInput
from .layers import LibraryLayer, layer_call
from .matmul import Analysis, Matmul
from .trace import TracedModel

_TWO_ROLES = (
    "it is multiplied in two roles: what is input features in one matmul is output "
    "features in another, so no one kernel serves both"
)


@dataclasses.dataclass(frozen=True)
class Own:
    """A parameter that is planned by its matmuls, not as a layer's.

    Args:
      words: beginning of the reason, if it is left.
      embed: whether it is the table of an Embed.
      layers: the layers that it is the kernel of and that do not convert as layers,
        with the reason of each.
    """

    words: str = ""
    embed: bool = False
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)


def plan_trace(
    traced: TracedModel,
    to: Form,
    rules: Sequence[Rule],
    layers: Mapping[str, LibraryLayer],
    own: Mapping[str, Own],
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """Plan each layer and each matmul of a trace, or give the reason to skip it.

    Args:
      traced: the model, as a function of its params.
      to: the form to go to.
      rules: the user's.
      layers: by path, the layers that the model calls, in either form.
      own: by path, the parameters to plan by their matmuls.

    Returns:
      The plans, and the reasons, by the path of the layer or the parameter. A parameter
      that comes near no matmul, such as an embedding of positions that is added, has
      neither.

    Raises:
      PlanError: a rule matches nothing, or requests an impossible conversion.
    """
    found = traced.matmuls()
    numbers = {
        id(matmul): number
        for number, matmul in enumerate(m for each in found.values() for m in each)
    }
    layers = {path: layer for path, layer in layers.items() if layer.form != to}
    of_layers = {
        path: [
            call
            for matmul in found.get(layer.kernel, ())
            if matmul.weight.reader in (None, path)
            and (call := layer_call(layer, matmul, numbers[id(matmul)])) is not None
        ]
        for path, layer in layers.items()
    }
    tables = _tables(traced, own)
    matmuls = {
        path: _forward([matmul for matmul in found[path] if form_of(matmul) != to])
        for path in found
        if path in own and path not in tables
    }
    matmuls = {path: each for path, each in matmuls.items() if each}
    chosen = _chosen(rules, layers, matmuls, own)
    # A parameter has one shape: what else reads it expects the one that it has.
    elsewhere = _other_uses(traced, matmuls, to)
    calls, left = {}, {}
    for path, layer in layers.items():
        rule = chosen[path]
        if rule is not None and rule.skip:
            left[path] = f"excluded by rule {str(rule)!r}"
        elif layer.obstacle is not None:
            left[path] = layer.obstacle
        elif not of_layers[path]:
            left[path] = _why_not_seen(traced, layer)
        else:
            calls[path] = of_layers[path]
    # Plans list layers in the order in which the trace calls them.
    calls = dict(sorted(calls.items(), key=lambda item: item[1][0].number))
    calls |= {
        path: [as_call(m, numbers[id(m)], elsewhere.get(path)) for m in each]
        for path, each in matmuls.items()
    }
    mapped = {call.number: call.mapped for each in calls.values() for call in each}
    inputs = _inputs(traced.analysis, Frame.of(traced.analysis.jaxpr), numbers, mapped)

    def stacked(path: str, _: LayerCall) -> tuple[int, ...]:
        if path in layers:
            return layers[path].stack
        return _stack_axes(matmuls[path])

    planned, reasons = plan_layers(inputs, calls, to, chosen, stacked)
    for path in matmuls.keys() & planned.keys():
        try:
            planned[path] = on_leaf(planned[path], matmuls[path])
        except LeftError as reason:
            del planned[path]
            reasons[path] = str(reason)
    reasons = {**_untouched(traced, matmuls, own), **reasons}
    left |= {path: why for path, why in reasons.items() if path in layers}
    for path, each in own.items():
        why = tables.get(path) or reasons.get(path)
        if why is not None and path not in tables and each.words:
            why = f"{each.words}: {why}"
        if not each.layers:
            left |= {path: why} if why is not None else {}
        elif path not in planned:
            left |= each.layers
            # What is said of a layer's kernel is said of the layer.
            left |= {next(iter(each.layers)): why} if why is not None else {}
    return planned, left


def as_call(matmul: Matmul, number: int, elsewhere: str | None = None) -> LayerCall:
    """Return one matmul of no layer's, as a call of a layer."""
    obstacle = matmul.obstacle or elsewhere
    dense = form_of(matmul) == "dense"
    readable = dense or matmul.obstacle is None
    return LayerCall(
        kind=matmul.eqn.primitive.name,
        number=number,
        shape=input_shape(matmul) if readable else (),
        kernel=kernel_shape(matmul) if readable else (),
        bias=None,
        axes=dense_axes(matmul) if dense else None,
        geometry=None if dense or not readable else conv_arguments(matmul),
        obstacle=obstacle and f"it is {obstacle}",
        channels_first=not dense and channels_first(matmul),
    )


def _chosen(
    rules: Sequence[Rule],
    layers: Mapping[str, LibraryLayer],
    matmuls: Mapping[str, Sequence[Matmul]],
    own: Mapping[str, Own],
) -> dict[str, Rule | None]:
    """Return the user's rule for each path; one for a kernel may name the layer."""
    sizes = {path: math.prod(layer.own_shape) for path, layer in layers.items()}
    for path, each in matmuls.items():
        kernel: int = each[0].eqn.invars[each[0].side].aval.size
        sizes |= dict.fromkeys((path, module_of(path), *own[path].layers), kernel)
    chosen = dict(match_rules(rules, sizes))
    for path in matmuls:
        named = [chosen[p] for p in (path, module_of(path), *own[path].layers)]
        # The first rule that matches any name of the parameter wins.
        chosen[path] = min(filter(None, named), key=rules.index, default=None)
    return chosen


def _forward(matmuls: list[Matmul]) -> list[Matmul]:
    """Return the matmuls that a gradient inside the program does not make, if any."""
    return [matmul for matmul in matmuls if not matmul.backward] or matmuls


def _tables(traced: TracedModel, own: Mapping[str, Own]) -> dict[str, str]:
    """Return the tables of Embeds that are looked up by index, with the reason."""
    tables = {}
    for use in traced.analysis.uses:
        if use.how == "gather" and use.path in own and own[use.path].embed:
            tables[use.path] = (
                f"the table of an Embed, {traced.shapes[use.path]}: looked up by "
                "index; a head tied to it (attend) multiplies by the same array"
            )
    return tables


def _why_not_seen(traced: TracedModel, layer: LibraryLayer) -> str:
    """Return why a layer makes no matmul that reads its kernel as it is stored."""
    uses = [use for use in traced.analysis.uses if use.path == layer.kernel]
    for use in uses:
        if use.reported:
            return f"its kernel is {use.reason}"
    if uses or layer.kernel in traced.matmuls():
        return "its kernel is transformed on the way to the layer"
    return UNCALLED_REASON


def _other_uses(
    traced: TracedModel, matmuls: Mapping[str, Sequence[Matmul]], to: Form
) -> dict[str, str]:
    """For each parameter, what else happens to it than its matmuls."""
    reasons = {}
    for use in traced.analysis.uses:
        # A gradient inside the program sees the parameter in the program's own form.
        if use.path in matmuls and not use.gradient:
            reasons[use.path] = f"also {use.reason}"
    for path, each in traced.matmuls().items():
        for matmul in each:
            if path in matmuls and form_of(matmul) == to and not matmul.backward:
                reasons[path] = f"also multiplied in a {matmul.eqn.primitive.name}"
    return reasons


def _untouched(
    traced: TracedModel, matmuls: Mapping[str, object], own: Mapping[str, Own]
) -> dict[str, str]:
    """Parameters that come near a matmul, or are tables, without being a layer's."""
    return {
        use.path: f"it is {use.reason}"
        for use in traced.analysis.uses
        if use.reported and use.path in own and use.path not in matmuls
    }


def _inputs(
    analysis: Analysis,
    frame: Frame,
    numbers: Mapping[int, int],
    mapped: Mapping[int, int],
) -> Iterator[LayerInput]:
    """Yield where the activations of matmuls are in a trace.

    Args:
      analysis: what was found in a trace.
      frame: the trace.
      numbers: by the identity of the matmul.
      mapped: by the number of the calls that are planned, the axes that they don't see.
    """
    for eqn in frame.jaxpr.eqns:
        matmul = analysis.matmuls.get(id(eqn))
        number = -1 if matmul is None else numbers[id(matmul)]
        if matmul is not None and number in mapped and form_of(matmul) == "dense":
            axes = dense_axes(matmul)
            var = eqn.invars[1 - matmul.side]
            lead = len(axes.lead)
            yield LayerInput(number, frame, var, axes.contracted, lead, mapped[number])
        for inner in analysis.inner.get(id(eqn), ()):
            yield from _inputs(inner, frame.enter(eqn, inner.jaxpr), numbers, mapped)


def _stack_axes(matmuls: Sequence[Matmul]) -> tuple[int, ...]:
    """Return the parameter's axes of which each matmul sees one step."""
    readable = [p for p in matmuls if p.obstacle is None]
    # One kernel can't be rearranged into two shapes at once.
    if len({kernel_shape(matmul) for matmul in readable}) > 1:
        raise LeftError(_TWO_ROLES)
    # A parameter that two loops scan is converted once, so both must see it alike.
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
    moves = [leaf_rearrangement(matmul, plan) for matmul in matmuls]
    for move in moves:
        if move is None:
            raise LeftError(
                f"its axes are joined and split so that the window {plan.window} in "
                f"order {plan.order} cuts through one of them"
            )
        if move != moves[0]:
            raise LeftError(_TWO_ROLES)
    assert moves[0] is not None
    # No layer's class is known: the plan shows the operation in its place.
    name = "conv_transpose" if plan.transposed else matmuls[0].eqn.primitive.name
    return dataclasses.replace(plan, layer=name, leaves=(("", moves[0]),))
