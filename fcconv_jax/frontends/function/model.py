"""Runs a function of params and inputs in its other form, product by product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ...geometry.classify import classify
from ...layer_forms import holds
from ...matmuls.as_layer import (
    conv_arguments,
    form_of,
    leaf_rearrangement,
    run_other_form,
)
from ...matmuls.matmul import Product, rewrite
from ...matmuls.trace import parameter_paths, trace
from ...params.moves import check_converted
from ...params.trees import restore_params
from ...plan import LayerPlan, Plan, PlanError
from ...tracing import arguments


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertedFunction:
    """A function in its other form, called as the function is called.

    Jitted, one trace per shape: arrays are traced, everything else in the arguments
    (flags, numbers, functions) is static. Each trace goes the function's own way from
    the parameters to the products, so whatever it does in between is kept.

    Args:
      function: the function that was planned.
      plan: from :func:`fcconv_jax.make_plan`.
    """

    function: Callable[..., Any]
    plan: Plan

    def __call__(self, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Calls the function; ``params`` are in the plan's form.

        Raises:
          PlanError: planned params are still in the form that the plan comes from.
        """
        arrays, static = arguments.split_hashable(
            ((params, *inputs), kwargs), _name(self.function)
        )
        return self._jitted(static, arrays)

    def __repr__(self) -> str:
        return (
            f"<{_name(self.function)} with {len(self.plan)} layers as {self.plan.to}>"
        )

    @functools.cached_property
    def _jitted(self) -> Any:
        def converted(static: arguments.Static, arrays: Any) -> Any:
            (params, *inputs), kwargs = static.merge(arrays)
            check_converted(parameter_paths(params), self.plan)
            return run_rewritten(self.function, self.plan, (params, *inputs), kwargs)

        converted.__name__ = _name(self.function)
        return jax.jit(converted, static_argnums=0)


def run_rewritten(
    function: Callable[..., Any],
    plan: Plan,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Traces a function and runs it with the planned products in their other form.

    Args:
      function: takes params and inputs.
      plan: of its products.
      inputs: the params, in the plan's form, then the inputs.
      kwargs: further inputs.

    Returns:
      What the function returns.

    Raises:
      PlanError: the function multiplies a parameter in another way than planned.
    """
    params, *rest = inputs
    traced = trace(function, (restore_params(params, plan), *rest), kwargs)

    def wanted(product: Product) -> bool:
        planned = product.weight.path in plan
        return planned and form_of(product) != plan.to and not product.obstacle

    def replace(product: Product, operands: Sequence[Any]) -> Any:
        path = product.weight.path
        _check_product(path, product, plan[path])
        return run_other_form(product, plan[path], operands)

    def alike(product: Product) -> Any:
        weight = product.weight
        return weight.shape, weight.axes, weight.stack, plan[weight.path]

    outs = rewrite(traced.program, traced.operands, wanted, replace, alike)
    return jax.tree.unflatten(traced.out_tree, outs)


def _check_product(path: str, product: Product, layer: LayerPlan) -> None:
    """Refuses to run a product that is not the one that was planned."""
    move = leaf_rearrangement(product, layer.window, layer.order, layer.groups)
    if move is None or layer.lay_out(move) != layer.kernel:
        raise PlanError(
            f"{path!r} was planned as {layer.kernel.source} -> {layer.kernel.target} "
            "and is now multiplied in another way: make the plan from this function "
            "with these arguments"
        )
    if form_of(product) == "conv":
        found = classify(**conv_arguments(product))
        if not holds(layer, found):
            raise PlanError(
                f"{path!r} was planned as {layer.base}; on this input it is "
                f"{found.base}: {found.geometry}"
            )


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
