"""Runs a function of params and inputs in its other form, matmul by matmul."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from ...matmuls.run import run_rewritten
from ...matmuls.trace import parameter_paths
from ...params.moves import check_converted
from ...plan import Plan
from ...tracing import arguments


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertedFunction:
    """A function in its other form, called as the function is called.

    Jitted, one trace per shape: arrays are traced, everything else in the arguments
    (flags, numbers, functions) is static. Each trace goes the function's own way from
    the parameters to the matmuls, so whatever it does in between is kept.

    Args:
      function: the function that was planned.
      plan: from :func:`fcconv_jax.make_plan`.
    """

    function: Callable[..., Any]
    plan: Plan

    def __call__(self, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Calls the function; ``params`` are in the plan's form.

        Raises:
          PlanError: planned params are still in the form that the plan comes from.
        """
        arrays, static = arguments.split_hashable(
            ((params, *inputs), kwargs), _name(self.function)
        )
        return self._jitted(static, arrays)

    def __repr__(self) -> str:
        return (
            f"<{_name(self.function)} with {len(self.plan)} layers as {self.plan.to}>"
        )

    @functools.cached_property
    def _jitted(self) -> Any:
        def converted(static: arguments.Static, arrays: Any) -> Any:
            (params, *inputs), kwargs = static.merge(arrays)
            check_converted(parameter_paths(params), self.plan)
            return run_rewritten(self.function, self.plan, (params, *inputs), kwargs)

        converted.__name__ = _name(self.function)
        return jax.jit(converted, static_argnums=0)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
