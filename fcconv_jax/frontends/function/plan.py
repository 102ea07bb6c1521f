"""Plans a function of params and inputs: finds its matmuls with parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...plan import Form, Plan
from ...plan.rules import Rule
from ...planning.from_trace import Own, plan_trace
from ...planning.trace import TracedModel, trace


def plan_function(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    to: Form,
    rules: Sequence[Rule],
    kwargs: Mapping[str, Any],
) -> Plan:
    """The plan of ``function(params, *inputs)``; see :func:`fcconv_jax.make_plan`."""
    if not inputs:
        raise TypeError(
            "Expected the params as the function's first argument, got none. Call "
            "make_plan(f, params, *inputs) with arrays or jax.ShapeDtypeStruct."
        )
    traced = trace(function, inputs, kwargs)
    own = dict.fromkeys(traced.shapes, Own())
    planned, left = plan_trace(traced, to, rules, {}, own)
    left |= _unweighted(traced, to)
    return Plan(to, tuple(planned.items()), tuple(left.items()))


def _unweighted(traced: TracedModel, to: Form) -> dict[str, str]:
    """Return the matmuls of no parameter, numbered in the order of the program."""
    kind = "dot_general" if to == "conv" else "conv_general_dilated"
    left: dict[str, str] = {}
    counts: dict[str, int] = {}
    for eqn, found in traced.analysis.walk():
        name = eqn.primitive.name
        number = counts[name] = counts.get(name, -1) + 1
        if isinstance(found, str) and name == kind:
            left[f"{name}[{number}]"] = found
    return left
