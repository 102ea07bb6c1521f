"""Which plan brings a model into a form, for a kind of file and for a chip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from ..frontends.bound import BoundModel
from ..messages.errors import PlanError
from ..plan import LayerPlan, Plan, direction
from ..plan.layer_forms import canonical_layer, output_positions
from ..plan.rules import Rule
from .chips import Chip, LayerPlace
from .layers import Layer

FileForm = Literal["conv", "dense", "mix"]
FORMS: tuple[str, ...] = get_args(FileForm)


def plan_of_form(
    bound: BoundModel,
    form: FileForm,
    rules: Sequence[Rule],
    images: Literal["first", "last"],
    chip: Chip | None,
) -> Plan:
    """Return the plan that brings a model into a form.

    Channel-last files keep tokens as one row of pixels, ``(B, 1, T, C)``, so nothing is
    added but a reshape. Where images are channel-first they are folded into the batch,
    ``(B T, C, 1, 1)``, which needs no transpose either.

    Raises:
      PlanError: a rule matches no layer.
    """
    if form == "dense":
        return _made(bound, "dense", rules)
    layout = "keep" if images == "last" else "fold"
    usual = Rule("*", layout=layout)
    to_conv = _made(bound, "conv", rules, usual)
    if chip is None or (form == "conv" and not chip.rules):
        return to_conv
    ones = _made(bound, "conv", rules, Rule("*", (1, 1), None, layout))
    if form == "conv":
        return _legal(to_conv, ones, chip)
    to_dense = _made(bound, "dense", rules)
    return _mixed(to_conv, ones, to_dense, chip)


def _made(bound: BoundModel, to: Any, rules: Sequence[Rule], *usual: Rule) -> Plan:
    """Return a plan of one direction; of a model without such layers, an empty one."""
    try:
        return bound.plan(to, (*rules, *usual), "any")
    except PlanError as error:
        # The usual rule may match nothing; those of the user must match.
        if usual and "matches no linear layer" in str(error) and "'*'" in str(error):
            return bound.plan(to, rules, "any")
        raise


def _legal(to_conv: Plan, ones: Plan, chip: Chip) -> Plan:
    """Return a plan that has 1x1 for windows that the chip lacks, where both exist."""
    layers = [
        (path, _better_window(path, layer, ones, chip))
        for path, layer in to_conv.layers
    ]
    return dataclasses.replace(to_conv, layers=tuple(layers))


def _better_window(path: str, layer: LayerPlan, ones: Plan, chip: Chip) -> LayerPlan:
    if chip.breaks(as_layer(path, layer, "conv")) and path in ones:
        return ones[path]
    return layer


def _mixed(to_conv: Plan, ones: Plan, to_dense: Plan, chip: Chip) -> Plan:
    """Return each layer in the form that the chip takes and prefers."""
    layers: dict[str, LayerPlan] = {}
    left = {**dict(to_dense.left), **dict(to_conv.left)}
    for path, layer in to_conv.layers:
        best = _better_window(path, layer, ones, chip)
        if _choice(path, best, chip, place_of(layer), "dense") == "conv":
            layers[path] = best
        else:
            left[path] = f"{chip.title} takes it better in dense form"
    for path, layer in to_dense.layers:
        asked = layer.base == "phases"  # by a rule; without one, the file decides
        if asked or _choice(path, layer, chip, place_of(layer), "conv") == "dense":
            layers[path] = layer
        else:
            left[path] = f"{chip.title} takes it better in conv form"
    reasons = tuple((path, why) for path, why in left.items() if path not in layers)
    to = direction(layers) if layers else "mix"
    return Plan(to, tuple(layers.items()), reasons)


def _choice(
    path: str, layer: LayerPlan, chip: Chip, place: LayerPlace, own: Any
) -> str:
    """Return a layer's form for a chip: legal, then preferred, then its own."""
    forms = ("conv", "dense")
    broken = {form: len(chip.breaks(as_layer(path, layer, form))) for form in forms}
    order = [*chip.order(place), own, *forms]
    return min(forms, key=lambda form: (broken[form], order.index(form)))


def place_of(layer: LayerPlan) -> LayerPlace:
    """Where a layer sits: on patches, on the whole of an image, on tokens, or last."""
    if layer.base == "patchify":
        return "patchify"
    if layer.base == "full_window":
        return "full_window"
    *lead, _ = _dense_shapes(layer)[0]
    # Rows beside the batch are tokens, also those of 1x1 convolutions on an image.
    return "tokens" if math.prod(lead[1:]) > 1 else "head"


def as_layer(path: str, layer: LayerPlan, form: str) -> Layer:
    """Return a planned layer in one of its forms, as a chip's rules judge it."""
    if form == "dense":
        x, y = _dense_shapes(layer)
        kernel = (x[-1], y[-1])
        return Layer(path, "dense", None, kernel, None, False, x, y, ())
    x, y = _conv_shapes(layer)
    window = (1,) * (2 - len(layer.window)) + layer.window
    strides = (1,) * (2 - len(layer.strides)) + layer.strides
    kernel = (*window, x[-1] // layer.groups, y[-1])
    geometry = {
        "dilation": (1, 1),
        "groups": layer.groups,
        "padding": ((0, 0), (0, 0)),
        "strides": strides,
    }
    # Chips see it as the graph has it: a stride of 1 over inputs that are spread.
    if layer.transposed:
        geometry |= {"strides": (1, 1), "spread": strides}
    made = tuple(sorted(geometry.items()))
    return Layer(path, "conv", None, kernel, None, False, x, y, made)


def _features(layer: LayerPlan) -> int:
    if layer.to == "conv":
        return layer.canonical_target[-1]
    layer = canonical_layer(layer) if layer.is_matmul else layer
    return layer.channels_last(layer.kernel.source)[-1]


def _dense_shapes(layer: LayerPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of input and output in the dense form."""
    if layer.to == "conv":
        x = layer.dense_input_shape()
        return x, (*x[:-1], _features(layer) // layer.groups)
    rank, taps = len(layer.window), math.prod(layer.window)
    spatial = layer.input_shape[-1 - rank : -1]
    inner, out = layer.input_shape[-1] // layer.groups, _features(layer) // layer.groups
    if layer.transposed:  # a row for each input
        lead = layer.input_shape[:-1]
        return (*lead, inner), (*lead, taps * out)
    lead = (*layer.input_shape[: -1 - rank], *output_positions(layer, spatial))
    return (*lead, taps * inner), (*lead, out)


def _conv_shapes(layer: LayerPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return those of the conv form, with two spatial axes."""
    out = _features(layer)
    if layer.to == "dense":
        rank = len(layer.window)
        spatial = layer.input_shape[-1 - rank : -1]
        places = output_positions(layer, spatial)
        ones = (1,) * (2 - rank)
        batch = (math.prod(layer.input_shape[: -1 - rank]),)
        x = (*batch, *ones, *spatial, layer.input_shape[-1])
        return x, (*batch, *ones, *places, out)
    *lead, features = layer.dense_input_shape()
    if layer.groups > 1:
        lead = lead[:-1]
    if math.prod(layer.window) > 1:
        channels = features * layer.groups // math.prod(layer.window)
        window = (1,) * (2 - len(layer.window)) + layer.window
        batch = math.prod(lead)
        return (batch, *window, channels), (batch, 1, 1, out)
    rows = lead[-1] if len(lead) > 1 and layer.layout == "keep" else 1
    batch = math.prod(lead) // rows
    return (batch, 1, rows, features * layer.groups), (batch, 1, rows, out)
