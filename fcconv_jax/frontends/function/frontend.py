"""What the room of functions offers; see :mod:`fcconv_jax.frontends.kinds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...plan import Form, Plan
from ...plan.rules import Rule
from .model import ConvertedFunction
from .plan import plan_function
from .program import FunctionProgram, function_variables


def make_plan(
    model: Any,
    inputs: Sequence[Any],
    to: Form,
    rules: Sequence[Rule],
    rngs: Any,
    method: Any,
    kwargs: Mapping[str, Any],
) -> Plan:
    """The plan of ``f(params, *inputs)``, which may take ``rngs`` and ``method``."""
    own = {"rngs": rngs, "method": method}
    given = {name: value for name, value in own.items() if value is not None}
    return plan_function(model, inputs, to, rules, {**kwargs, **given})


def convert_model(model: Any, plan: Plan, inplace: bool) -> ConvertedFunction:
    """The function in the plan's form.

    Raises:
      TypeError: ``inplace``: a function holds no parameters.
    """
    if inplace:
        raise TypeError(
            f"{type(model).__name__} holds no parameters: inplace is for NNX models"
        )
    return ConvertedFunction(model, plan)


def model_program(
    model: Any, inputs: Any, kwargs: Mapping[str, Any]
) -> FunctionProgram:
    """The function, original or converted, on inputs that stay."""
    return FunctionProgram(model, inputs, kwargs)


def variables(model: Any, params: Any) -> Mapping[str, Any]:
    """The params, as variables with ``params`` in them."""
    del model
    return function_variables(params)


def planning_call(
    params: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The params, then the inputs."""
    return (params, *inputs), kwargs


def activations(inputs: Sequence[Any]) -> Sequence[Any]:
    """All inputs but the params, which come first."""
    return inputs[1:]


def state(model: Any) -> tuple[()]:
    """Nothing: a function holds no arrays that are its params."""
    del model
    return ()
