"""Models that hold their params, of libraries without a planner of their own.

An adapter turns a model of its library into a function of its params, which is
planned and rewritten as every function is.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from ..params.moves import map_leaves
from ..plan import Plan
from ..plan.rules import Rule
from .bound import BoundModel, OnCrops
from .function.model import ConvertedFunction
from .function.plan import plan_function


class ConvertedModel:
    """A model in its other form, with its params: called as the model is called."""

    def __init__(
        self,
        frontend: type[BoundHeld],
        function: ConvertedFunction,
        variables: Mapping[str, Any],
        name: str,
    ):
        self.frontend, self.function, self.variables = frontend, function, variables
        self._name = name

    @property
    def params(self) -> PyTree:
        """The converted params; ``fc.restore_params`` takes them back."""
        return self.variables["params"]

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Call the model on its inputs."""
        bound = self.frontend(self, None, args, kwargs)
        return bound._call(bound.variables, bound.args, bound.kwargs)

    def __repr__(self) -> str:
        return repr(self.function).replace(self.function.__name__, self._name)


@dataclasses.dataclass(frozen=True, eq=False)
class BoundHeld(BoundModel):
    """A model that holds its params; ``params`` replaces them."""

    @classmethod
    @abc.abstractmethod
    def split(cls, model: object) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Return a function of params, state and inputs, with ``params`` and ``state``.

        The function must pickle, as converted models do: a closure doesn't.
        """

    @classmethod
    def split_params(cls, model: object, params: PyTree) -> dict[str, Any]:
        """Sort the params that a user passes into ``params`` and ``state``."""
        del model
        return {"params": params}

    @classmethod
    def on_crops(cls, model: object) -> OnCrops:
        """Read the params at each call."""

        def call(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
            return cls(model)._call(variables, args, kwargs)

        def complete(args: tuple[Any, ...]) -> tuple[Any, ...]:
            bound = cls(model, None, args)
            return bound.variables, *bound.args

        def bind(variables: PyTree, *args: Any, **kwargs: Any) -> BoundModel:
            return cls(model, None, args, kwargs, variables)

        call.__name__ = type(model).__name__
        return OnCrops(call, complete, cls.first_spatial_axis, bind)

    @classmethod
    def convert_model(cls, model: object, plan: Plan) -> Any:
        """Return the model in the plan's form, with its params."""
        function, variables = cls.split(model)
        converted = ConvertedFunction(function, plan)
        moved = map_leaves(variables, plan)
        return ConvertedModel(cls, converted, moved, type(model).__name__)

    @functools.cached_property
    def _parts(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        if isinstance(self.model, ConvertedModel):
            return self.model.function, dict(self.model.variables)
        return self.split(self.model)

    @property
    def held(self) -> PyTree:
        """All arrays of the model."""
        return self._parts[1]

    def _variables(self) -> Mapping[str, Any]:
        own = self._parts[1]
        if self.params is None:
            return own
        # Variables as a whole, as a bound model has them.
        if isinstance(self.params, Mapping) and self.params.keys() == own.keys():
            return self.params
        return {**own, **self.split_params(self.model, self.params)}

    def _plan(self, to: Any, rules: Any) -> Plan:
        chosen: list[Rule] = rules
        inputs = (*self._lead(self.variables), *self.args)
        return plan_function(self._parts[0], inputs, to, chosen, self.kwargs)

    def _call(self, variables: PyTree, args: PyTree, kwargs: PyTree) -> Any:
        return self._parts[0](*self._lead(variables), *args, **kwargs)

    def _lead(self, variables: PyTree) -> tuple[Any, Any]:
        return variables["params"], variables["state"]
