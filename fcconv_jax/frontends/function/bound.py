"""A function of params and inputs, bound to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from ...plan import Form, Plan
from ...plan.rules import Rule
from ...tracing import arguments
from ..bound import BoundModel, OnCrops
from .model import ConvertedFunction
from .plan import plan_function


@dataclasses.dataclass(frozen=True, eq=False)
class BoundFunction(BoundModel):
    """``f(params, *inputs)``; without params, a function of its inputs alone."""

    library = "function"

    @classmethod
    def owns(cls, model: object) -> bool:
        """Accept whatever can be called, classes excepted."""
        return callable(model) and not isinstance(model, type)

    @classmethod
    def planned(cls, model: Any, args: Sequence[Any], kwargs: PyTree) -> BoundModel:
        """Bind the first argument as the params."""
        if not args:
            raise TypeError(
                "Expected the params as the function's first argument, got no "
                "arguments. Call make_plan(f, params, *inputs) with arrays or "
                "jax.ShapeDtypeStruct."
            )
        method = getattr(model, "__name__", "")
        if method in ("apply", "init") and arguments.is_array(args[0]):
            raise TypeError(
                f"Expected params first for the function {method}, got an array. Pass "
                "the model itself: make_plan(model, *inputs)."
            )
        return cls(model, args[0], tuple(args[1:]), kwargs)

    @classmethod
    def on_crops(cls, model: Any) -> OnCrops:
        """Return the function itself; its params are the caller's."""
        return OnCrops(model)

    @classmethod
    def convert_model(cls, model: Any, plan: Plan) -> ConvertedFunction:
        """Return the function in the plan's form."""
        return ConvertedFunction(model, plan)

    @property
    def held(self) -> PyTree:
        """The params: the function runs on their devices."""
        return self.params

    def _variables(self) -> Mapping[str, Any]:
        if self.params is None:
            return {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            if not arguments.is_array(leaf):
                raise TypeError(
                    f"Expected params of arrays, got {type(leaf).__name__} at "
                    f"{jax.tree_util.keystr(path)}. Pass the arrays alone (as "
                    "eqx.partition returns them), and a function that adds the rest."
                )
        return {"params": self.params}

    def _plan(self, to: Form, rules: Sequence[Rule]) -> Plan:
        inputs = (self.params, *self.args)
        return plan_function(self.model, inputs, to, rules, self.kwargs)

    def _call(self, variables: PyTree, args: PyTree, kwargs: PyTree) -> Any:
        return self.model(*variables.values(), *args, **kwargs)


FRONTEND = BoundFunction
