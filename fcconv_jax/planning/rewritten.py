"""Runs a function of params and inputs with its planned matmuls in the other form."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from ..geometry.classify import classify
from ..messages.errors import PlanError
from ..params.moves import map_leaves
from ..plan import LayerPlan, Plan
from ..plan.layer_forms import holds
from ..plan.paths import join_path
from ..versions import InconclusiveDimensionOperation
from .as_layer import (
    conv_arguments,
    form_of,
    groups_of,
    kernel_shape,
    leaf_rearrangement,
    run_other_form,
)
from .matmul import Matmul, rewrite
from .trace import trace


def kernels_of(plan: Plan) -> dict[str, tuple[str, LayerPlan]]:
    """By the path of its kernel: the path of each layer, and its plan."""
    return {
        join_path(path, layer.leaves[0][0]): (path, layer)
        for path, layer in plan.items()
    }


def run_rewritten(
    function: Callable[..., Any],
    plan: Plan,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> PyTree:
    """Traces a function and runs it with the planned matmuls in their other form.

    The function sees its params in the form that it was written for, so whatever else
    it does to them is kept; only the planned matmuls are replaced. A matmul that reads
    a planned kernel in another way, such as a head tied to its transpose, stays.

    Returns:
      The function's results.

    Raises:
      PlanError: a parameter of the plan is missing or has another shape, or a planned
        convolution has an input on which the two forms differ.
    """
    params, *rest = inputs
    traced = trace(function, (map_leaves(params, plan.inverse()), *rest), kwargs)
    kernels = kernels_of(plan)
    known: dict[int, bool] = {}

    def wanted(matmul: Matmul) -> bool:
        if id(matmul) not in known:
            found = kernels.get(matmul.weight.path)
            known[id(matmul)] = found is not None and _is_planned(matmul, *found)
        return known[id(matmul)]

    def replace(matmul: Matmul, operands: Sequence[Any]) -> jax.Array:
        _, layer = kernels[matmul.weight.path]
        return run_other_form(matmul, layer, operands)

    def alike(matmul: Matmul) -> Hashable:
        weight = matmul.weight
        return weight.shape, weight.axes, weight.stack, kernels[weight.path][1]

    outs = rewrite(traced.analysis, traced.operands, wanted, replace, alike)
    return jax.tree.unflatten(traced.out_tree, outs)


def _is_planned(matmul: Matmul, path: str, layer: LayerPlan) -> bool:
    """Whether a matmul with a planned kernel is the one that was planned."""
    if form_of(matmul) == layer.to or matmul.obstacle:
        return False
    if layer.base == "phases" and matmul.backward:
        return False
    if not _same_map(matmul, layer):
        # Its kernel, read elsewhere by the model's own code; or a gradient inside it.
        if not layer.is_matmul or matmul.backward:
            return False
        raise PlanError(
            f"{path!r} was planned as {layer.kernel.source} -> {layer.kernel.target}, "
            "but is now multiplied in another way. Plan this function with these "
            "arguments."
        )
    if form_of(matmul) == "conv":
        geometry = conv_arguments(matmul)
        try:
            found = classify(**geometry)
        except InconclusiveDimensionOperation:
            raise PlanError(
                f"layer {path or '(root)'!r} was planned as {layer.case}. For the "
                f"symbolic sizes {geometry['input_shape']}, that isn't known. Pass "
                "multiples of the window, or skip the layer with a rule."
            ) from None
        if not holds(layer, found):
            now = found.geometry.input_shape
            raise PlanError(
                f"layer {path or '(root)'!r} was planned as {layer.case} on an input "
                f"of shape {layer.input_shape}. With spatial size {now}, its forms "
                f"differ: {found.reason} Plan with that input, or skip the layer with "
                "a rule."
            )
    return True


def _same_map(matmul: Matmul, layer: LayerPlan) -> bool:
    """Whether the kernel goes from the parameter to the matmul as it was planned."""
    if groups_of(matmul) == layer.groups:
        move = leaf_rearrangement(matmul, layer)
        if move is not None and layer.lay_out(move).normal() == layer.kernel.normal():
            return True
    # A stack under vmap is multiplied at once: its matmuls side by side, as groups.
    dense = layer.kernel.source if form_of(matmul) == "conv" else layer.kernel.target
    *inner, _ = layer.channels_last(dense)
    rows = math.prod(kernel_shape(matmul)[:-1])
    if form_of(matmul) == "dense" or layer.transposed:
        rows = kernel_shape(matmul)[-2]
    return bool(layer.stack_axes) and rows == math.prod(inner)
