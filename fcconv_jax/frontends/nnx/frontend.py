"""What NNX's room offers; see :class:`fcconv_jax.frontends.kinds.Frontend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from ...plan import Form, Plan
from ...plan.rules import Rule
from .model import convert_nnx
from .plan import plan_nnx
from .program import NnxProgram, nnx_variables


def make_plan(
    model: Any,
    inputs: Sequence[Any],
    to: Form,
    rules: Sequence[Rule],
    rngs: Any,
    method: Any,
    kwargs: Mapping[str, Any],
) -> Plan:
    """The plan of an NNX model, whose own call may take ``rngs``."""
    options = kwargs if rngs is None else {**kwargs, "rngs": rngs}
    return plan_nnx(model, inputs, to, rules, method, options)


def convert_model(model: Any, plan: Plan, inplace: bool) -> Any:
    """The model in the plan's form: a new one, or itself."""
    return convert_nnx(model, plan, inplace=inplace)


def model_program(model: Any, inputs: Any, kwargs: Mapping[str, Any]) -> NnxProgram:
    """The model, original or converted, on inputs that stay."""
    return NnxProgram(model, inputs, kwargs)


def variables(model: Any, params: Any) -> Mapping[str, Any]:
    """The parameters of a model, as variables with ``params`` in them."""
    return nnx_variables(model, params)


def planning_call(
    params: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The inputs: a model holds its params."""
    del params
    return inputs, kwargs


def activations(inputs: Sequence[Any]) -> Sequence[Any]:
    """All inputs of a model's call: it holds its params itself."""
    return inputs


def state(model: Any) -> Any:
    """The arrays that a model holds."""
    return nnx.split(model, graph=True)[1]
