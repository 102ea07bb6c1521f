"""Traces ``f(params, *inputs)`` and finds the parameters among its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..params.leaves import flatten_with_path
from ..tracing import arguments
from .find import analyse
from .matmul import ACTIVE, Analysis, Matmul, Tag, Weight


@dataclasses.dataclass(frozen=True, eq=False)
class TracedModel:
    """A function's trace.

    Args:
      analysis: what was found in it.
      operands: one array for each input of the trace, params first.
      out_tree: the structure of what the function returns.
      shapes: of the params, by path.
    """

    analysis: Analysis
    operands: list[Any]
    out_tree: Any
    shapes: Mapping[str, tuple[int, ...]]

    def matmuls(self) -> dict[str, list[Matmul]]:
        """By the path of the parameter, its matmuls in program order."""
        found: dict[str, list[Matmul]] = {}
        for _, matmul in self.analysis.walk():
            if isinstance(matmul, Matmul):
                found.setdefault(matmul.weight.path, []).append(matmul)
        return found


def trace(
    function: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> TracedModel:
    """Trace a function once, on arrays or abstract arrays.

    Args:
      function: takes params and inputs.
      inputs: the params, then the inputs. Everything but arrays is static.
      kwargs: further inputs.

    Raises:
      PlanError: two parameters have the same path.
    """
    params, *rest = inputs
    arrays, static = arguments.split((params, rest, dict(kwargs)))

    def run(arrays: Sequence[Any]) -> PyTree:
        params, rest, kwargs = static.merge(arrays)
        return function(params, *rest, **kwargs)

    jaxpr, out = jax.make_jaxpr(run, return_shape=True)(arrays)
    shapes = parameter_paths(params)
    tags: list[Tag] = [Weight.leaf(path, shape) for path, shape in shapes.items()]
    tags += [ACTIVE] * (len(arrays) - len(shapes))
    return TracedModel(analyse(jaxpr, tags), arrays, jax.tree.structure(out), shapes)


def parameter_paths(params: PyTree) -> dict[str, tuple[int, ...]]:
    """Path and shape of each array among the params, in the order of the tree.

    Example:
      >>> import numpy as np
      >>> parameter_paths({"fc": {"w": np.ones((2, 3)), "act": "relu"}})
      {'fc/w': (2, 3)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for path, node in flatten_with_path(params)[0]:
        for leaf in jax.tree.leaves(node):
            if not arguments.is_array(leaf):
                continue
            if path in found:
                raise PlanError(
                    f"Expected one parameter per path, got two at {path!r}. Rename one."
                )
            found[path] = tuple(leaf.shape)
    return found
