"""Checks of every model of the zoo, in one pass."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

import fcconv_jax as fc
from fcconv_jax.planning.as_layer import form_of
from fcconv_jax.planning.matmul import Matmul
from fcconv_jax.planning.trace import parameter_paths, trace
from fcconv_jax.verification.comparison import Comparison

from .entry import Subject


@dataclasses.dataclass(frozen=True)
class Findings:
    """Outcome of the checks.

    Args:
      plan: made with no hints.
      found: number of weight matmuls in the model's trace.
      left: for each weight matmul of the converted model's trace, the parameter's path
        and the reason in ``plan.skipped``, or None where the plan does not say.
      round_trip: whether the restored params are the original's, every bit.
      comparison: both forms in float64, and as they are.
    """

    plan: fc.Plan
    found: int
    left: tuple[tuple[str, str | None], ...]
    round_trip: bool
    comparison: Comparison

    @property
    def kinds(self) -> Mapping[str, int]:
        """How many layers of each kind convert."""
        return collections.Counter(layer.layer for layer in self.plan.values())

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, one text each."""
        lost = () if self.round_trip else ("params do not come back to the bit",)
        return (
            *lost,
            *(
                f"{p} is multiplied, the plan is silent"
                for p, why in self.left
                if not why
            ),
            *(() if self.comparison.passed else self.comparison.failures),
        )


def examine(subject: Subject) -> Findings:
    """Plans, converts and compares one model."""
    model, inputs, kwargs = subject.model, subject.inputs, dict(subject.kwargs)
    planned_with = inputs
    if not isinstance(model, nn.Module | nnx.Module):
        planned_with = (subject.variables, *inputs)
    plan = fc.make_plan(model, *planned_with, **kwargs)
    converted = fc.convert_model(model, plan)
    params, run = as_function(model, subject.variables)
    moved = fc.convert_params(params, plan)
    _, run_converted = as_function(converted, subject.variables)
    comparison = fc.compare(
        lambda p: run(p, *inputs, **kwargs),
        lambda p: run_converted(p, *inputs, **kwargs),
        [params],
        [moved],
        progress=False,
    )
    return Findings(
        plan=plan,
        found=len(weight_matmuls(run, params, inputs, kwargs)),
        left=tuple(
            (path, reason(plan, path))
            for path in weight_matmuls(run_converted, moved, inputs, kwargs)
        ),
        round_trip=same_bits(fc.restore_params(moved, plan), params),
        comparison=comparison,
    )


def as_function(model: Any, variables: Any) -> tuple[Any, Callable[..., Any]]:
    """The params of a model of any kind, and the model as a function of them."""
    if isinstance(model, nnx.Module):
        graphdef, state, rest = nnx.split(model, nnx.Param, ..., graph=True)

        def run(params: Any, *inputs: Any, **kwargs: Any) -> Any:
            return nnx.merge(graphdef, params, rest, copy=True)(*inputs, **kwargs)

        return state, run
    if not hasattr(model, "apply"):
        return variables, model
    others = {name: tree for name, tree in variables.items() if name != "params"}

    def apply(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params, **others}, *inputs, **kwargs)

    return variables["params"], apply


def weight_matmuls(
    run: Callable[..., Any], params: Any, inputs: Any, kwargs: Mapping[str, Any]
) -> list[str]:
    """The parameter of each matmul of an activation with a weight, in program order.

    Also a parameter that is changed on its way to one. Matmuls of two activations,
    such as attention scores, do not count.
    """
    analysis = trace(run, (params, *inputs), kwargs).analysis
    paths = [
        found.weight.path
        for _, found in analysis.walk()
        if isinstance(found, Matmul) and form_of(found) == "dense"
    ]
    shapes = parameter_paths(params)
    changed = [
        use.path
        for use in analysis.uses
        # A vector on the way, such as the scale of a weight norm, is not a matrix.
        if use.reason.endswith("to its matmul") and len(shapes[use.path]) > 1
    ]
    return paths + changed


def reason(plan: fc.Plan, path: str) -> str | None:
    """Why a parameter is not converted: the plan names it or its layer."""
    while path:
        if path in plan.skipped:
            return plan.skipped[path]
        path = path.rpartition("/")[0]
    return None


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays, bit by bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )
