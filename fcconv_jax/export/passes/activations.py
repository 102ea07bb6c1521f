"""Finds activations, and what else JAX writes in several operations for one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..graph import FUSED, Graph, Node, Value
from .patterns import Makers, behind_views

Match = tuple[Value | list[Value], dict[str, Any]]


def find_fused(graph: Graph, names: frozenset[str] = FUSED) -> bool:
    """The activations that a runtime has as one operation."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        for name, find in _ACTIVATIONS.items():
            # Passes run until nothing changes, so the same must not be found again.
            found = find(node, makers) if name in names and node.op != name else None
            if found is None:
                continue
            inputs = found[0] if isinstance(found[0], list) else [found[0]]
            # Activations don't broadcast; a one-hot code has an axis more than its
            # numbers.
            if inputs[0].shape == node.out.shape or name == "one_hot":
                node.op, node.inputs, node.attrs = name, inputs, found[1]
                graph.notes += [_NOTES[name]] if name in _NOTES else []
                changed = True
                break
    return changed


def _gelu(node: Node, makers: Makers) -> Match | None:
    """``0.5 x (1 - erf(-x / sqrt 2))``, or with the tanh of a cubic."""
    return _gelu_tanh(node, makers) or _gelu_erf(node, makers)


def _gelu_tanh(node: Node, makers: Makers) -> Match | None:
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``."""
    number, values = _factors(node, makers)
    if len(values) != 2 or not _close(number, 0.5):
        return None
    for x, other in (values, values[::-1]):
        tanh = _plus(other, 1, makers)
        tanh = makers.get(tanh) if tanh is not None else None
        if tanh is None or tanh.op != "tanh":
            continue
        inner = makers.get(tanh.inputs[0])
        scaled, sums = _factors(inner, makers) if inner else (1.0, [])
        total = makers.get(sums[0]) if len(sums) == 1 else None
        if (
            total is None
            or total.op != "add"
            or not _close(scaled, (2 / math.pi) ** 0.5)
        ):
            continue
        for first, cubic in (total.inputs, total.inputs[::-1]):
            maker = makers.get(cubic)
            factor, powers = _factors(maker, makers) if maker else (1.0, [])
            alike = [power is x for power in (first, *powers)]
            if alike == [True] * 4 and _close(factor, 0.044715):
                return x, {"approximate": True}
    return None


def _plus(value: Value, number: float, makers: Makers) -> Value | None:
    """The other term of a sum with this number."""
    node = makers.get(value)
    if node is None or node.op != "add":
        return None
    pairs = (node.inputs, node.inputs[::-1])
    return next((x for x, by in pairs if _is(by, number)), None)


def _gelu_erf(node: Node, makers: Makers) -> Match | None:
    if node.op != "mul":
        return None
    half, rest = (makers.get(value) for value in node.inputs)
    if half is None or rest is None or rest.op != "sub" or half.op != "mul":
        return None
    x = _times(half, 0.5)
    erf = makers.get(rest.inputs[1])
    if x is None or erf is None or erf.op != "erf" or not _is(rest.inputs[0], 1):
        return None
    inner = makers.get(erf.inputs[0])
    scaled = _times(inner, math.sqrt(0.5)) if inner is not None else None
    negated = makers.get(scaled) if scaled is not None else None
    if negated is None or negated.op != "neg" or negated.inputs[0] is not x:
        return None
    return x, {"approximate": False}


def _leaky_relu(node: Node, makers: Makers) -> Match | None:
    """``where(x >= 0, x, slope * x)``, its slope a number of the model's code."""
    x = _positive(node, makers)
    if x is None or node.inputs[1] is not x:
        return None
    product = makers.get(node.inputs[2])
    if product is None or product.op != "mul":
        return None
    for value, slope in (product.inputs, product.inputs[::-1]):
        number = _number(slope)
        if value is x and number is not None and not slope.leaves:
            return x, {"alpha": number}
    return None


def _prelu(node: Node, makers: Makers) -> Match | None:
    """``where(x >= 0, x, slope * x)``, its slope a parameter, one for each feature."""
    x = _positive(node, makers)
    product = makers.get(node.inputs[2]) if x is not None else None
    if x is None or node.inputs[1] is not x or not product or product.op != "mul":
        return None
    for value, slope in (product.inputs, product.inputs[::-1]):
        flat = slope.size == 1 or slope.shape[-1:] == (slope.size,)
        if value is x and slope.data is not None and slope.leaves and flat:
            return [x, slope.moved("reshape", (slope.size,))], {}
    return None


def _elu(node: Node, makers: Makers) -> Match | None:
    """``where(x > 0, x, exp(where(x > 0, 0, x)) - 1)``, and a celu: alpha is 1."""
    found = _exponential(node, makers) or _differentiable(node, makers)
    return (found[0], {}) if found is not None and found[1] == 1 else None


def _exponential(node: Node, makers: Makers) -> tuple[Value, float] | None:
    """The x and the alpha of ``where(x > 0, x, alpha * expm1(where(x > 0, 0, x)))``."""
    x = _positive(node, makers)
    if x is None or node.inputs[1] is not x:
        return None
    less = makers.get(node.inputs[2])
    alpha, values = _factors(less, makers) if less is not None else (1.0, [])
    inner = _expm1(values[0], makers) if len(values) == 1 else None
    safe = makers.get(inner) if inner is not None else None
    if safe is None or _positive(safe, makers) is not x or safe.inputs[2] is not x:
        return None
    return (x, alpha) if _is(safe.inputs[1], 0) else None


def _expm1(value: Value, makers: Makers) -> Value | None:
    """The x of ``exp(x) - 1``."""
    less = makers.get(value)
    if less is None or less.op != "sub" or not _is(less.inputs[1], 1):
        return None
    return _behind(less.inputs[0], ("exp",), makers)


def _selu(node: Node, makers: Makers) -> Match | None:
    """``gamma * where(x > 0, x, alpha * (exp(where(x > 0, 0, x)) - 1))``."""
    found = _exponential(node, makers)
    if found is not None:
        return found[0], {"alpha": found[1], "gamma": 1.0}
    gamma, values = _factors(node, makers)
    inner = makers.get(values[0]) if len(values) == 1 else None
    if inner is None or inner.op != "selu" or inner.attrs["gamma"] != 1:
        return None
    return inner.inputs[0], {**inner.attrs, "gamma": gamma}


def _celu(node: Node, makers: Makers) -> Match | None:
    """``max(x, 0) + alpha * (exp(min(x, 0) / alpha) - 1)``."""
    found = _differentiable(node, makers)
    return (found[0], {"alpha": found[1]}) if found is not None else None


def _differentiable(node: Node, makers: Makers) -> tuple[Value, float] | None:
    """The x and the alpha of a celu."""
    for above, below in (node.inputs, node.inputs[::-1]) if node.op == "add" else ():
        x = _bounded(above, "max", makers)
        product = makers.get(below)
        if x is None or product is None:
            continue
        alpha, values = _factors(product, makers)
        inner = _expm1(values[0], makers) if len(values) == 1 else None
        quotient = makers.get(inner) if inner is not None else None
        if quotient is None or alpha <= 0:
            continue
        by, values = _factors(quotient, makers)
        # The two constants are float32: their product is 1 but for rounding.
        alike = len(values) == 1 and _bounded(values[0], "min", makers) is x
        if alike and abs(alpha * by - 1) < 1e-6:
            return x, alpha
    return None


def _softplus(node: Node, makers: Makers) -> Match | None:
    """``max(x, 0) + log(1 + exp(-|x|))``, or x where it is NaN: ``logaddexp(x, 0)``."""
    if node.op != "select":
        return None
    test, total = makers.get(node.inputs[0]), makers.get(node.inputs[2])
    x = node.inputs[1]
    if test is None or test.op != "ne" or total is None or total.op != "add":
        return None
    for above, below in (total.inputs, total.inputs[::-1]):
        chain = _behind(below, ("log",), makers)
        power = _plus(chain, 1, makers) if chain is not None else None
        inner = _behind(power, ("exp", "neg", "abs"), makers)
        if _bounded(above, "max", makers) is x and inner is x is test.inputs[0]:
            return (x, {}) if test.inputs[1] is x else None
    return None


def _mish(node: Node, makers: Makers) -> Match | None:
    """``x * tanh(softplus(x))``."""
    for x, gate in (node.inputs, node.inputs[::-1]) if node.op == "mul" else ():
        if _behind(gate, ("tanh", "softplus"), makers) is x:
            return x, {}
    return None


def _silu(node: Node, makers: Makers) -> Match | None:
    """``x * logistic(x)``."""
    for x, gate in (node.inputs, node.inputs[::-1]) if node.op == "mul" else ():
        if _behind(gate, ("logistic",), makers) is x:
            return x, {}
    return None


def _softsign(node: Node, makers: Makers) -> Match | None:
    """``x / (|x| + 1)``."""
    below = _plus(node.inputs[1], 1, makers) if node.op == "div" else None
    x = node.inputs[0]
    return (x, {}) if _behind(below, ("abs",), makers) is x else None


def _hard_sigmoid(node: Node, makers: Makers) -> Match | None:
    """``relu6(x + 3) / 6``."""
    number, values = _factors(node, makers)
    x = _shifted_relu6(values[0], makers) if len(values) == 1 else None
    return (x, {}) if x is not None and _close(number, 1 / 6) else None


def _hard_swish(node: Node, makers: Makers) -> Match | None:
    """``x * relu6(x + 3) / 6``."""
    number, values = _factors(node, makers)
    if len(values) != 2:
        return None
    for x, other in (values, values[::-1]):
        maker = makers.get(other)
        # Found before, it has the 1/6 in it.
        gate = maker is not None and maker.op == "hard_sigmoid"
        if maker is not None and gate and maker.inputs[0] is x and number == 1:
            return x, {}
        if _shifted_relu6(other, makers) is x and _close(number, 1 / 6):
            return x, {}
    return None


def _l2_normalize(node: Node, makers: Makers) -> Match | None:
    """``x / sqrt(sum(x * x))`` over the last axis, or with ``rsqrt``.

    The norm may be kept from 0 by a bound of at most 1e-6, LiteRT's own.
    """
    root = {"div": "sqrt", "mul": "rsqrt"}.get(node.op)
    if root is None:
        return None
    for x, by in (node.inputs, node.inputs[::-1])[: 1 if node.op == "div" else 2]:
        norm = _behind_bound(by, 1e-6, makers)
        if norm is None or norm.op != root or not 2 <= len(x.shape) <= 4:
            continue
        total = _behind_bound(norm.inputs[0], 1e-12, makers)
        if total is None or total.op != "reduce_sum":
            continue
        square = makers.get(total.inputs[0])
        last = (len(x.shape) - 1,)
        if square is None or square.op != "mul" or total.attrs["axes"] != last:
            continue
        if square.inputs[0] is square.inputs[1] is x and x.dtype == np.float32:
            return x, {}
    return None


def _behind_bound(value: Value, most: float, makers: Makers) -> Node | None:
    """The node of a value, or of one that is bounded below by so much at most."""
    node = behind_views(value, makers)
    if node is None or node.op != "max":
        return node
    bounds = [v for v in node.inputs if v.data is not None]
    inner = [v for v in node.inputs if v.data is None]
    if len(bounds) != 1 or bounds[0].data is None or (bounds[0].data > most).any():
        return None
    return behind_views(inner[0], makers)


def _one_hot(node: Node, makers: Makers) -> Match | None:
    """``(ids[..., None] == arange(depth)).astype(float)``."""
    test = makers.get(node.inputs[0]) if node.op == "cast" else None
    if test is None or test.op != "eq" or node.out.dtype != np.float32:
        return None
    *lead, depth = node.out.shape
    for ids, row in (test.inputs, test.inputs[::-1]):
        if row.data is None or row.dtype != np.int32 or row.shape[-1:] != (depth,):
            continue
        maker = makers.get(ids)
        while ids.shape != tuple(lead) and maker and maker.op in _VIEWED:
            ids = maker.inputs[0]
            maker = makers.get(ids)
        if ids.shape == tuple(lead) and bool((row.data == np.arange(depth)).all()):
            # Never negative: ONNX's own operation counts such from the end.
            natural = maker is not None and maker.op in ("argmax", "argmin")
            return ids, {"depth": depth, "natural": natural}
    return None


# Each is tried only for runtimes that have the operation.
_ACTIVATIONS: dict[str, Callable[[Node, Makers], Match | None]] = {
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "softplus": _softplus,
    "mish": _mish,
    "silu": _silu,
    "softsign": _softsign,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    "hard_swish": _hard_swish,
    "hard_sigmoid": _hard_sigmoid,
    "l2_normalize": _l2_normalize,
    "one_hot": _one_hot,
}
_NOTES = {
    "l2_normalize": "L2 norms: vectors of zeros stay zeros in the runtimes, and LiteRT "
    "takes norms below 1e-6 as 1e-6"
}
_VIEWED = ("reshape", "broadcast")


def _positive(node: Node, makers: Makers) -> Value | None:
    """The value that a select compares with 0: ``x > 0`` or ``x >= 0``."""
    if node.op != "select":
        return None
    test = makers.get(node.inputs[0])
    if test is None or test.op not in ("gt", "ge") or not _is(test.inputs[1], 0):
        return None
    return test.inputs[0]


def _behind(value: Value | None, ops: Sequence[str], makers: Makers) -> Value | None:
    """The x of these operations, the last one first, each of one value."""
    for op in ops:
        node = makers.get(value) if value is not None else None
        value = node.inputs[0] if node is not None and node.op == op else None
    return value


def _bounded(value: Value, op: str, makers: Makers) -> Value | None:
    """The x of ``max(x, 0)`` or ``min(x, 0)``."""
    node = makers.get(value)
    if node is not None and (op, node.op) == ("max", "relu"):
        return node.inputs[0]
    if node is None or node.op != op:
        return None
    pairs = (node.inputs, node.inputs[::-1])
    return next((x for x, by in pairs if _is(by, 0)), None)


def _shifted_relu6(value: Value, makers: Makers) -> Value | None:
    """The x of ``relu6(x + 3)``."""
    relu6 = makers.get(value)
    if relu6 is None or relu6.op != "relu6":
        return None
    return _plus(relu6.inputs[0], 3, makers)


def _factors(node: Node, makers: Makers) -> tuple[float, list[Value]]:
    """Return a node's factors, a number and values, with nested products expanded."""
    number, values = 1.0, []
    if node.op not in ("mul", "div"):
        return number, [node.out]
    for i, value in enumerate(node.inputs):
        constant = _number(value)
        if constant is not None and not value.leaves:
            number = number / constant if node.op == "div" and i else number * constant
        elif node.op == "div" and i:
            return 1.0, [node.out]
        elif (maker := makers.get(value)) and maker.op in ("mul", "div"):
            inner, more = _factors(maker, makers)
            number, values = number * inner, [*values, *more]
        else:
            values.append(value)
    return number, values


def _number(value: Value) -> float | None:
    if value.data is None or value.size != 1 or value.dtype.kind != "f":
        return None
    number = float(value.data.item())
    return number if number else None


def _is(value: Value, number: float) -> bool:
    return value.data is not None and bool((value.data == number).all())


def _close(one: float, other: float) -> bool:
    # A constant of float16 or float32 is the number, rounded.
    return abs(one / other - 1) < 1e-3


def _times(node: Node, number: float) -> Value | None:
    """The other factor of a product with this number."""
    if node.op != "mul":
        return None
    for x, by in (node.inputs, node.inputs[::-1]):
        if by.data is not None and by.size == 1 and x.data is None:
            exact = np.asarray(number, by.dtype).item()
            return x if abs(by.data.item() - exact) < 1e-6 else None
    return None
