"""Structure, names, shapes and dtypes of what two programs return."""

from __future__ import annotations

import math
from typing import Any

import jax

from ..tracing.jaxprs import opened
from .agreement import named_leaves
from .reference import TracedProgram

_LISTED = 4  # names in a message


def interface_differences(
    first: TracedProgram, second: TracedProgram, values_only: bool = False
) -> list[str]:
    """Name what differs between the outputs of two traces before any is computed.

    Returns:
      A sentence for each difference; empty where the outputs have one interface.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((2, 3))
      >>> row = TracedProgram.of(lambda x: {"y": x.sum(0)}, x)
      >>> kept = TracedProgram.of(lambda x: {"y": x.sum(0, keepdims=True)}, x)
      >>> interface_differences(row, kept)
      ["'output/y': expected float32 of shape (3,), got float32 of shape (1, 3)"]
      >>> interface_differences(row, kept, values_only=True)
      []
    """
    mine, theirs = _outputs(first), _outputs(second)
    if values_only:
        sizes = [[math.prod(a.shape) for _, a in each] for each in (mine, theirs)]
        if sizes[0] == sizes[1]:
            return []
        return [f"expected outputs of {sizes[0]} entries, got {sizes[1]}"]
    if first.treedef != second.treedef:
        names = [path for path, _ in mine], [path for path, _ in theirs]
        if names[0] == names[1]:  # such as a list for a tuple
            return [f"expected outputs {first.treedef}, got {second.treedef}"]
        lacks = [path for path in names[0] if path not in names[1]]
        new = [path for path in names[1] if path not in names[0]]
        return [f"expected outputs {_listed(lacks)}, got {_listed(new)} in their place"]
    return [
        f"{path!r}: expected {_described(a)}, got {_described(b)}"
        for (path, a), (_, b) in zip(mine, theirs)
        if (a.shape, a.dtype) != (b.shape, b.dtype)
    ]


def _outputs(trace: TracedProgram) -> list[tuple[str, Any]]:
    avals = [var.aval for var in opened(trace.jaxpr)[0].outvars]
    return named_leaves(jax.tree.unflatten(trace.treedef, avals), "output")


def _described(aval: Any) -> str:
    return f"{aval.dtype} of shape {aval.shape}"


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
