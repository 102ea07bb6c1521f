"""A function of params on fixed inputs, as functions of its params alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ...kernels import kernel_rearrangement
from ...plan import Form, LayerPlan
from ...tracing import arguments


def function_variables(params: Any) -> dict[str, Any]:
    """The params, in the ``params`` of a variables dict.

    Raises:
      TypeError: a leaf is no array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not arguments.is_array(leaf):
            raise TypeError(
                f"verify takes params of arrays, got {type(leaf).__name__} at "
                f"{jax.tree_util.keystr(path)}: hand over the arrays alone (as "
                "eqx.partition gives them) and a function that puts in the rest"
            )
    return {"params": params}


def canonical_layer(layer: LayerPlan, to: Form) -> LayerPlan:
    """A function's layer with its kernel as the forms take it.

    The plan moves the parameter as it is stored, such as ``(out, in)``; the product
    sees it in the canonical order, whatever lies between.
    """
    *window, rows, out = layer.channels_last(layer.kernel.target)
    if to == "conv":
        rows, out = math.prod(window) * rows, out // layer.groups
    shape = (layer.groups, rows, out)[layer.groups == 1 :]
    kernel = kernel_rearrangement(
        shape, layer.window, order=layer.order, groups=layer.groups
    )
    kernel = layer.lay_out(kernel) if to == "conv" else kernel.inverse()
    return dataclasses.replace(layer, leaves=(("kernel", kernel),))


class FunctionProgram:
    """Calls a function with given params on inputs that stay."""

    def __init__(
        self, function: Callable[..., Any], inputs: Any, kwargs: Mapping[str, Any]
    ):
        self.function = function
        self.arrays, self.static = arguments.split((inputs, dict(kwargs)))

    def call(self, variables: Mapping[str, Any], arrays: Any = None) -> Any:
        """The output alone; ``arrays`` stand in for those of the inputs."""
        args, kwargs = self.static.merge(self.arrays if arrays is None else arrays)
        return self.function(variables["params"], *args, **kwargs)

    def run(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The output; the results of single products are not captured."""
        return {"output": self.call(variables), "updated": {}, "layers": {}}
