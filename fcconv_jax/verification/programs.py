"""A model of any kind on fixed inputs, as functions of its variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..functions.trace import is_function
from ..plan import Plan
from ..variables import is_nnx_module
from .backends.compilation import Program
from .function_program import FunctionProgram, function_variables
from .linen_program import LinenProgram


def program_of(model: Any, plan: Plan, inputs: Any, kwargs: Mapping[str, Any]) -> Any:
    """A model of any kind on fixed inputs.

    Args:
      model: a linen or NNX Module, a converted one, or a function.
      plan: names the layers whose outputs are wanted.
      inputs: what it is called with.
      kwargs: its keyword arguments.

    Returns:
      What has ``.call(variables)`` and ``.run(variables)``, see
      :class:`.linen_program.LinenProgram`.
    """
    if is_nnx_module(model):
        from .nnx_program import NnxProgram

        return NnxProgram(model, inputs, kwargs)
    if is_function(model):
        return FunctionProgram(model, inputs, kwargs)
    return LinenProgram(model, plan, inputs, kwargs)


def variables_of(model: Any, params: Any) -> Mapping[str, Any]:
    """The params or variables of a model, as variables with ``params`` in them."""
    if is_nnx_module(model):
        from .nnx_program import nnx_variables

        return nnx_variables(model, params)
    if is_function(model):
        return function_variables(params)
    is_variables = isinstance(params, Mapping) and "params" in params
    return params if is_variables else {"params": params}


def compilable(program: Any, variables: Any) -> Program:
    """A model's call as it is compiled: with its inputs as arguments, not constants."""
    return Program(program.call, (variables, program.arrays))
