"""Runs a model in its other form without touching its code: ``convert_model``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import flax.linen as nn
from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..messages.flags import check_flags
from ..plan import Plan, check_plan
from .bind import frontend_of
from .function.model import ConvertedFunction
from .linen.model import ConvertedLinen

if TYPE_CHECKING:
    from flax import nnx

NnxModel = TypeVar("NnxModel", bound="nnx.Module")


@overload
def convert_model(  # pyright: ignore[reportOverlappingOverload]: a Module is callable
    model: nn.Module, plan: Plan, *, inplace: Literal[False] = ...
) -> ConvertedLinen: ...
@overload
def convert_model(model: NnxModel, plan: Plan, *, inplace: bool = ...) -> NnxModel: ...
@overload
def convert_model(
    model: Callable[..., PyTree], plan: Plan, *, inplace: Literal[False] = ...
) -> ConvertedFunction: ...
def convert_model(model: object, plan: Plan, *, inplace: bool = False) -> object:
    """Return the model in the plan's form, with the same calls and the same results.

    Args:
      model: the ``flax.linen`` or ``flax.nnx`` Module that was planned, or the
        function of params and inputs.
      plan: from :func:`fcconv_jax.make_plan`.
      inplace: for an NNX model, modify the model itself, layer by layer, without a
        second copy of its parameters in memory. Large kernels whose entries change
        their order are donated, unless something else holds the array. By default, a
        clone is converted, which shares unchanged arrays with the original.

    Returns:
      For a linen Module, an object with its ``init`` and ``apply`` (same arguments),
      jitted.
      For an NNX model, a model of the same class with converted parameters, in which
      each planned layer is an ``nnx.Conv`` (or ``nnx.Linear``, ``nnx.LinearGeneral``)
      with the inputs of the original layer; ``plan.inverse()`` converts it back.
      Modules whose own code has planned matmuls become instances of a subclass, whose
      methods are traced, rewritten and jitted.
      For a function ``f(params, *inputs)``, a function of the same arguments, jitted.

    Raises:
      PlanError: the model is converted already, or an NNX model is not the one that
        was planned.
      TypeError: the model is of another kind, or ``inplace`` is passed with a model
        other than NNX.

    Source:
      ``flax.linen.intercept_methods``, and JAX's guide to interpreters of jaxprs.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.arange(8.0).reshape(2, 4)
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = fc.make_plan(model, x)
      >>> conv = fc.convert_model(model, plan)
      >>> y = conv.apply(fc.convert_params(variables, plan), x)
      >>> bool((y == model.apply(variables, x)).all())
      True
    """
    check_flags(inplace=inplace)
    check_plan(plan)
    done = getattr(model, "plan", None)
    # A plan that was made of the converted model leads back, and is another one.
    both = [
        path
        for path, layer in (done.items() if isinstance(done, Plan) else ())
        if path in plan and plan[path] in (layer, layer.inverse())
    ]
    if both:
        raise PlanError(
            f"Expected a model that isn't converted yet, got one with {both[0]!r} in "
            "the plan's form. Pass the planned model; restore_params(params, plan) "
            "returns its params."
        )
    frontend = frontend_of(model)
    if inplace:
        return frontend.convert_in_place(model, plan)
    return frontend.convert_model(model, plan)
