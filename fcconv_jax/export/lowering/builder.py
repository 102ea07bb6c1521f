"""Builds a graph, operation by operation, and holds the rules of the primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from ...messages.errors import ExportError
from ...tracing.protocols import Equation
from ..graph import Node, Value

# Primitives that these graphs lack, and what to do instead.
_REFUSED = {
    "while": "a loop whose number of steps is not known. Export the body alone, or "
    "write the loop out in Python",
    "scan": "a loop over steps. Pass unroll=N to write out loops of up to N steps",
    "cond": "a branch that depends on the inputs. Use jnp.where, which runs both sides",
    "sort": "a sort. Return what is to be sorted and sort on the host",
    "random_bits": "random numbers. Call the model as in inference: train=False or "
    "deterministic=True",
    "random_seed": "random numbers. Call the model as in inference: train=False or "
    "deterministic=True",
    "pallas_call": "a kernel of its own. Switch to the model's plain implementation",
    "custom_call": "a kernel of its own. Switch to the model's plain implementation",
    "scatter": "a write into a part of an array. Use jnp.where or jnp.concatenate",
    "fft": "a Fourier transform. Compute it on the host, before or after the model",
}

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


def refusal(eqn: Equation) -> ExportError:
    """Return the error for an equation that no file takes, with a fix."""
    name = eqn.primitive.name
    what = _REFUSED.get(name) or next(
        (text for key, text in _REFUSED.items() if name.startswith(key)), None
    )
    shapes = ", ".join(f"{v.aval.dtype}{list(v.aval.shape)}" for v in eqn.invars[:3])
    if name == "scan" and what:
        what = f"a loop over {eqn.params['length']} steps. Pass unroll={{}} to write it"
        what = what.format(eqn.params["length"]) + " out"
    return ExportError(
        f"the model has {name!r} on {shapes}: "
        + (what or "no edge runtime's file has it. Replace it in the model")
        + "; a .stablehlo file takes whatever JAX does"
    )
