"""A function of params on fixed inputs, as functions of its params alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from ...tracing import arguments


def function_variables(params: Any) -> dict[str, Any]:
    """The params, in the ``params`` of a variables dict.

    Raises:
      TypeError: a leaf is no array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not arguments.is_array(leaf):
            raise TypeError(
                f"verify takes params of arrays, got {type(leaf).__name__} at "
                f"{jax.tree_util.keystr(path)}: hand over the arrays alone (as "
                "eqx.partition gives them) and a function that puts in the rest"
            )
    return {"params": params}


class FunctionProgram:
    """Calls a function with given params on inputs that stay."""

    def __init__(
        self, function: Callable[..., Any], inputs: Any, kwargs: Mapping[str, Any]
    ):
        self.function = function
        self.arrays, self.static = arguments.split((inputs, dict(kwargs)))

    def call(self, variables: Mapping[str, Any], arrays: Any = None) -> Any:
        """The output alone; ``arrays`` stand in for those of the inputs."""
        args, kwargs = self.static.merge(self.arrays if arrays is None else arrays)
        return self.function(variables["params"], *args, **kwargs)

    def named(
        self, variables: Mapping[str, Any], arrays: Any, wanted: Callable[[str], bool]
    ) -> Any:
        """The same as :meth:`call`: a function has no modules to be named."""
        del wanted
        return self.call(variables, arrays)
