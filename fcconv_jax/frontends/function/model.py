"""Runs a function of params and inputs in its other form, matmul by matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from ...backends.options import known_options
from ...params.moves import check_converted
from ...plan import Plan, in_words
from ...planning.rewritten import run_rewritten
from ...planning.trace import parameter_paths
from ..jitted import Jitted


class ConvertedFunction(Jitted):
    """A function in its other form, called as the function is called.

    Jitted, one trace per shape: arrays are traced, everything else in the arguments
    (flags, numbers, functions) is static. Each trace goes the function's own way from
    the parameters to the matmuls, so whatever it does in between is kept. The params,
    which come first, are in the plan's form; others raise PlanError.
    """

    def __init__(self, function: Callable[..., Any], plan: Plan):
        name = getattr(function, "__name__", type(function).__name__)
        super().__init__(self._run, name, options=lambda: known_options(plan.options))
        self.function = function
        self.plan = plan

    def __reduce__(self) -> Any:
        # What a call has compiled belongs to the process.
        return type(self), (self.function, self.plan)

    def __repr__(self) -> str:
        layers = f"{len(self.plan)} layers as {in_words(self.plan.to)}"
        return f"<{self.__name__} with {layers}>"

    def _run(self, params: PyTree, *inputs: PyTree, **kwargs: PyTree) -> Any:
        check_converted(parameter_paths(params), self.plan)
        return run_rewritten(self.function, self.plan, (params, *inputs), kwargs)
