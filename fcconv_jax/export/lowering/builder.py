"""Builds a graph, operation by operation, and holds the rules of the primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from ..graph import Node, Value

LoweringRule = Callable[..., Value | Sequence[Value]]

RULES: dict[str, LoweringRule] = {}


def rule(*names: str) -> Callable[[LoweringRule], LoweringRule]:
    """Register a function as the rule of these primitives."""

    def register(function: LoweringRule) -> LoweringRule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Builder:
    """Collects the operations of a graph."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.notes: list[str] = []

    def add(
        self,
        op: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        dtype: DTypeLike | None = None,
        **attrs: Any,
    ) -> Value:
        """Append an operation and return its output."""
        dtype = np.dtype(inputs[0].dtype if dtype is None else dtype)
        out = Value(tuple(map(int, shape)), dtype)
        self.nodes.append(Node(op, list(inputs), [out], attrs))
        return out

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Append a reshape, unless the shape stays or the value is a constant."""
        shape = tuple(map(int, shape))
        if shape == x.shape:
            return x
        if x.data is not None:
            return x.moved("reshape", shape)
        return self.add("reshape", [x], shape)

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """Append a transpose, unless the order stays or the value is a constant."""
        perm = tuple(map(int, perm))
        if perm == tuple(range(len(perm))):
            return x
        if x.data is not None:
            return x.moved("transpose", perm)
        return self.add("transpose", [x], [x.shape[i] for i in perm], perm=perm)

    def slice(
        self,
        x: Value,
        start: Sequence[int],
        stop: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> Value:
        """Append a slice with a step along each axis."""
        details = tuple(start), tuple(stop), tuple(steps or [1] * len(x.shape))
        if x.data is not None:
            return x.moved("slice", *details)
        shape = [len(range(a, b, s)) for a, b, s in zip(*details)]
        if tuple(shape) == x.shape:
            return x
        names = dict(zip(("start", "stop", "steps"), details))
        return self.add("slice", [x], shape, **names)
