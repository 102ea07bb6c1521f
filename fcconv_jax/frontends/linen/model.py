"""Runs a linen model in its other form: its trace, with planned matmuls replaced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.errors import ScopeParamShapeError
from jaxtyping import PyTree

from ...backends.options import known_options
from ...messages.errors import PlanError
from ...params.leaves import flatten_with_path
from ...params.moves import check_converted, map_leaves
from ...plan import Plan
from ...planning.rewritten import run_rewritten
from ..jitted import Jitted
from .interception import active


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertedLinen:
    """A linen model in its other form, called as the model is called.

    Parameter names, RNG streams, mutable collections and keyword arguments are the
    model's own; only the shapes of the planned parameters differ. ``apply`` is
    jitted, one trace per shape: arrays are traced, everything else in the arguments
    (flags, numbers, functions) is static. Each trace goes the model's own way, with
    its params in the form that its code was written for, and only the planned matmuls
    are replaced.
    """

    model: nn.Module
    plan: Plan

    def init(self, rngs: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Initialize variables as the converted ones of the model, bit for bit."""
        return map_leaves(self.model.init(rngs, *args, **kwargs), self.plan)

    def init_with_output(self, rngs: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Initialises variables and returns them behind the model's output."""
        out, variables = self.model.init_with_output(rngs, *args, **kwargs)
        return out, map_leaves(variables, self.plan)

    def lazy_init(self, rngs: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Initialises variables from shapes, as ``model.lazy_init`` does."""
        return map_leaves(self.model.lazy_init(rngs, *args, **kwargs), self.plan)

    @functools.cached_property
    def apply(self) -> Jitted:
        """Calls the model as its own ``apply`` does; variables in the plan's form.

        Jitted, with ``lower``, ``trace`` and ``eval_shape`` as ``jax.jit`` has them.

        Raises:
          PlanError: planned params are missing, or still in the form that the plan
            comes from.
        """
        name = f"{type(self.model).__name__}.apply"
        return Jitted(
            self._apply, name, active, lambda: known_options(self.plan.options)
        )

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Refused: a linen Module is called with its variables."""
        raise TypeError(
            f"A converted {type(self.model).__name__} has no variables. Call "
            "apply(variables, ...) with converted ones."
        )

    def bind(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Refused: a bound module would run outside of the conversion."""
        raise TypeError(
            "A converted model can't be bound. Call apply(variables, ..., method=f) "
            "with a function of the module."
        )

    def clone(self, **kwargs: PyTree) -> ConvertedLinen:
        """Return a converted copy with other attributes, as ``model.clone`` does."""
        return dataclasses.replace(self, model=self.model.clone(**kwargs))

    def tabulate(self, rngs: PyTree, *args: PyTree, **kwargs: PyTree) -> str:
        """The summary table of ``nn.tabulate``, and how the converted layers run."""
        return f"{self.model.tabulate(rngs, *args, **kwargs)}\n{self.plan}\n"

    def __reduce__(self) -> Any:
        # What a call has compiled does not go along: it holds Flax's interceptors.
        return type(self), (self.model, self.plan)

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask for special methods before the fields are there.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def _apply(
        self, variables: Mapping[str, Any], *args: PyTree, **kwargs: PyTree
    ) -> Any:
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"Expected the variables of {type(self.model).__name__} first, got a "
                f"{type(variables).__name__}. Call apply(variables, *inputs)."
            )
        params = variables.get("params", {})
        shapes = {
            path: nn.meta.unbox(leaf).shape
            for path, leaf in flatten_with_path(params)[0]
        }
        check_converted(shapes, self.plan)
        state = {name: v for name, v in variables.items() if name != "params"}
        try:
            out = run_rewritten(self._run, self.plan, (params, state, args, kwargs), {})
        except ScopeParamShapeError as error:
            inputs = {path: layer.input_shape for path, layer in self.plan.items()}
            raise PlanError(
                f"{str(error).partition(' (https')[0]} The plan was made for other "
                f"inputs, with these shapes at its layers: {inputs}. Call the model on "
                "inputs of that size, or make a plan and params for this one."
            ) from error
        if kwargs.get("mutable", False) is False:
            return out
        y, updated = out
        if "params" in updated:
            updated = map_leaves(updated, self.plan)
        return y, updated

    def _run(self, params: PyTree, state: PyTree, args: PyTree, kwargs: PyTree) -> Any:
        return self.model.apply({**state, "params": params}, *args, **kwargs)
