"""What linen's room offers; see :class:`fcconv_jax.frontends.kinds.Frontend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...plan import Form, Plan
from ...plan.rules import Rule
from .model import ConvertedLinen
from .plan import plan_linen
from .program import LinenProgram

# Keyword arguments of a Module's apply that its init does not take.
_APPLY_ONLY = ("mutable", "capture_intermediates")


def make_plan(
    model: Any,
    inputs: Sequence[Any],
    to: Form,
    rules: Sequence[Rule],
    rngs: Any,
    method: Any,
    kwargs: Mapping[str, Any],
) -> Plan:
    """The plan of a linen Module.

    Raises:
      TypeError: it is converted already.
    """
    if isinstance(model, ConvertedLinen):
        raise TypeError(
            f"make_plan expected a Module, got a {type(model.model).__name__} that is "
            "converted already. Pass its .model; plan.inverse() leads back"
        )
    try:
        return plan_linen(model, inputs, to, rules, rngs, method, kwargs)
    except TypeError as error:
        if inputs and isinstance(inputs[0], Mapping) and "params" in inputs[0]:
            error.add_note(
                "make_plan takes what the Module is called on, without its variables: "
                "make_plan(model, *inputs)"
            )
        raise


def convert_model(model: Any, plan: Plan, inplace: bool) -> ConvertedLinen:
    """The Module in the plan's form.

    Raises:
      TypeError: ``inplace``: a linen Module holds no parameters.
    """
    if inplace:
        raise TypeError(
            f"{type(model).__name__} holds no parameters: inplace is for NNX models"
        )
    return ConvertedLinen(model, plan)


def model_program(model: Any, inputs: Any, kwargs: Mapping[str, Any]) -> LinenProgram:
    """The Module, original or converted, on inputs that stay."""
    return LinenProgram(model, inputs, kwargs)


def variables(model: Any, params: Any) -> Mapping[str, Any]:
    """The params or variables of a Module, as variables with ``params`` in them."""
    del model
    is_variables = isinstance(params, Mapping) and "params" in params
    return params if is_variables else {"params": params}


def planning_call(
    params: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The inputs, and what ``init`` takes of the keyword arguments of ``apply``."""
    del params
    options = {k: v for k, v in kwargs.items() if k not in _APPLY_ONLY}
    rngs = options.get("rngs")
    if rngs is not None and not isinstance(rngs, Mapping):
        rngs = {"params": rngs}
    if rngs is not None:
        options["rngs"] = {"params": next(iter(rngs.values())), **rngs}
    return inputs, options


def activations(inputs: Sequence[Any]) -> Sequence[Any]:
    """All inputs of a Module's call: its params are none of them."""
    return inputs


def state(model: Any) -> tuple[()]:
    """Nothing: a linen Module holds no arrays."""
    del model
    return ()
