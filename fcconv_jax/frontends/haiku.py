"""Haiku functions after ``hk.transform``, as they are: called with their params."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
from jaxtyping import PyTree

from ..params.moves import map_leaves
from ..plan import Plan
from ..plan.rules import Rule
from .bound import BoundModel, OnCrops
from .function.model import ConvertedFunction
from .function.plan import plan_function


@dataclasses.dataclass(frozen=True, eq=False)
class BoundHaiku(BoundModel):
    """An ``hk.Transformed``; with state, params are the pair ``(params, state)``.

    Its ``apply`` gets the keyword argument ``rng``, or None.
    """

    library = "haiku"
    params_of = "the params that its init returns"
    more_options = ("rng",)

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """What ``hk.transform`` and ``hk.transform_with_state`` return."""
        return hk.Transformed, hk.TransformedWithState

    @classmethod
    def called(cls, model: Any, args: Sequence[Any], kwargs: PyTree) -> BoundModel:
        """The params come first, then the state if there is one; not the ``rng``."""
        n = 2 if isinstance(model, hk.TransformedWithState) else 1
        params = args[0] if n == 1 else tuple(args[:2])
        return cls(model, params, tuple(args[n:]), kwargs)

    @classmethod
    def on_crops(cls, model: Any) -> OnCrops:
        """``apply``, with all that it takes before the crops; outputs alone."""
        if not isinstance(model, hk.TransformedWithState):
            return OnCrops(model.apply)
        return OnCrops(lambda *args, **kwargs: model.apply(*args, **kwargs)[0])

    @classmethod
    def convert_model(cls, model: Any, plan: Plan) -> Any:
        """The pair of ``init`` and ``apply`` in the plan's form."""

        def init(*args: PyTree, **kwargs: PyTree) -> PyTree:
            return map_leaves(model.init(*args, **kwargs), plan)

        return type(model)(init, ConvertedFunction(model.apply, plan))

    def call_of(self) -> Callable[..., Any]:
        """The pair's ``apply``."""
        return getattr(self.model.apply, "function", self.model.apply)

    def _variables(self) -> Mapping[str, Any]:
        return self.shapes if self.params is None else self._named(self.params)

    @functools.cached_property
    def shapes(self) -> Mapping[str, Any]:
        """As ``init`` makes them; nothing is computed."""
        return jax.eval_shape(self._init, jax.random.key(0), *self.args)

    def drawn(self, seed: int) -> BoundModel:
        """The same call with params from ``init``."""
        return self.with_variables(self._init(jax.random.key(seed), *self.args))

    def _init(self, rng: Any, *args: PyTree) -> dict[str, Any]:
        return self._named(self.model.init(rng, *args, **self._options()))

    def _named(self, found: Any) -> dict[str, Any]:
        """The params, or the pair of params and state, by collection."""
        pair = found if isinstance(self.model, hk.TransformedWithState) else (found,)
        return dict(zip(("params", "state"), pair, strict=False))

    def _options(self) -> dict[str, Any]:
        return {name: x for name, x in self.kwargs.items() if name != "rng"}

    def _plan(self, to: Any, rules: Sequence[Rule]) -> Plan:
        lead = self._lead(self.variables, self.kwargs)
        inputs = (*lead, *self.args)
        return plan_function(self.model.apply, inputs, to, rules, self._options())

    def _call(self, variables: PyTree, args: PyTree, kwargs: PyTree) -> Any:
        options = {name: x for name, x in kwargs.items() if name != "rng"}
        return self.model.apply(*self._lead(variables, kwargs), *args, **options)

    def _lead(self, variables: PyTree, kwargs: PyTree) -> list[Any]:
        """What ``apply`` takes before the inputs."""
        lead = [variables[name] for name in ("params", "state") if name in variables]
        # hk.without_apply_rng leaves a function without this argument.
        if "rng" in inspect.signature(self.call_of()).parameters:
            lead.append(kwargs.get("rng"))
        return lead


FRONTEND = BoundHaiku
