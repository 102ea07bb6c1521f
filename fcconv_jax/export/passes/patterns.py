"""Finds what runtimes have one operation for in what JAX writes for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..graph import FUSED, Graph, Node, Value

Makers = Mapping[Value, Node]
Match = tuple[Value | list[Value], dict[str, Any]]


def find_activations(graph: Graph) -> bool:
    """``max(x, 0)`` and ``min(relu(x), 6)``."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        for x, bound in (node.inputs, node.inputs[::-1]) if _two(node) else ():
            if bound.data is None or bound.size != 1 or x.shape != node.out.shape:
                continue
            number = bound.data.item()
            if node.op == "max" and number == 0 and x.dtype.kind == "f":
                node.op, node.inputs = "relu", [x]
                changed = True
                break
            maker = makers.get(x)
            if node.op == "min" and number == 6 and maker and maker.op == "relu":
                node.op, node.inputs = "relu6", [maker.inputs[0]]
                changed = True
                break
    return changed


def find_means(graph: Graph) -> bool:
    """A sum that is divided by the number of its terms."""
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        if not _two(node) or node.op not in ("div", "mul"):
            continue
        for y, by in (node.inputs, node.inputs[::-1]):
            maker = makers.get(y)
            if by.data is None or maker is None or uses[y] > 1:
                continue
            if node.op == "div" and by is not node.inputs[1]:
                continue
            if maker.op == "reduce_sum" and by.size == 1:
                count = maker.inputs[0].size // max(maker.out.size, 1)
                # Only the reciprocal that the mean itself takes.
                if node.op == "div" and by.data.item() == count:
                    maker.op = "reduce_mean"
                    graph.replace(node.out, maker.out)
                    changed = True
                    break
            pool = makers.get(maker.inputs[0]) if maker.op == "mul" else None
            if pool and pool.op == "pool_mean" and node.op == "div":
                again = maker.inputs[1].data
                if again is not None and np.array_equal(again, by.data):
                    graph.replace(node.out, pool.out)
                elif _counted(pool, by.data):
                    pool.attrs["valid"] = True
                    graph.replace(node.out, pool.out)
                else:
                    continue
                changed = True
                break
    return changed


def _counted(pool: Node, counts: np.ndarray) -> bool:
    """Whether these are the numbers of entries that a pool's windows hold."""
    p, x = pool.attrs, pool.inputs[0]
    held = []
    for axis, (k, s, (low, _)) in enumerate(
        zip(p["window"], p["strides"], p["padding"]), 1
    ):
        first = np.arange(pool.out.shape[axis]) * s - low
        last = np.minimum(first + k, x.shape[axis])
        held.append(last - np.maximum(first, 0))
    want = np.outer(*held)[None, :, :, None]
    alike = counts.ndim == 4 and counts.shape[1:3] == want.shape[1:3]
    return alike and bool((counts == want).all())


def find_softmax(graph: Graph) -> bool:
    """``exp(x - max(x)) / sum(exp(x - max(x)))`` over the last axis."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        if node.op != "div":
            continue
        top = makers.get(node.inputs[0])
        total = behind_views(node.inputs[1], makers)
        if top is None or top.op != "exp" or total is None:
            continue
        last = (len(node.out.shape) - 1,)
        if total.op != "reduce_sum" or total.inputs[0] is not top.out:
            continue
        shifted = makers.get(top.inputs[0])
        if total.attrs["axes"] != last or shifted is None or shifted.op != "sub":
            continue
        x = shifted.inputs[0]
        if _peak(shifted.inputs[1], makers, last) is not x:
            continue
        if shifted.out.shape != node.out.shape:
            continue
        node.op, node.inputs = "softmax", [x]
        changed = True
    return changed


def find_fused(graph: Graph, names: frozenset[str] = FUSED) -> bool:
    """The activations that a runtime has as one operation."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        for name, find in _ACTIVATIONS.items():
            found = find(node, makers) if name in names and node.op != name else None
            if found is None:
                continue
            inputs = found[0] if isinstance(found[0], list) else [found[0]]
            if inputs[0].shape == node.out.shape or name == "one_hot":
                node.op, node.inputs, node.attrs = name, inputs, found[1]
                graph.notes += [_NOTES[name]] if name in _NOTES else []
                changed = True
                break
    return changed


def find_log_softmax(graph: Graph) -> bool:
    """``x - max(x) - log(sum(exp(x - max(x))))`` over the last axis."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        if node.op != "sub":
            continue
        shifted, log = makers.get(node.inputs[0]), behind_views(node.inputs[1], makers)
        if log is None or log.op != "log" or shifted is None or shifted.op != "sub":
            continue
        total = behind_views(log.inputs[0], makers)
        top = (
            makers.get(total.inputs[0]) if total and total.op == "reduce_sum" else None
        )
        last = (len(node.out.shape) - 1,)
        if top is None or top.op != "exp" or top.inputs[0] is not node.inputs[0]:
            continue
        x = shifted.inputs[0]
        if total is None or total.attrs["axes"] != last or x.shape != node.out.shape:
            continue
        if _peak(shifted.inputs[1], makers, last) is x:
            node.op, node.inputs = "log_softmax", [x]
            changed = True
    return changed


def behind_views(value: Value, makers: Makers) -> Node | None:
    """Return what makes a value, seen through reshapes and broadcasts."""
    node = makers.get(value)
    while node is not None and node.op in ("reshape", "broadcast"):
        node = makers.get(node.inputs[0])
    return node


def _peak(value: Value, makers: Makers, axes: tuple[int, ...]) -> Value | None:
    """The x of ``max(x)`` over these axes, or of ``jnp.max(x, initial=-inf)``."""
    node = behind_views(value, makers)
    if node is not None and node.op == "max":
        low = [v for v in node.inputs if v.data is not None]
        rest = [v for v in node.inputs if v.data is None]
        if len(low) != 1 or len(rest) != 1 or not _lowest(low[0]):
            return None
        node = behind_views(rest[0], makers)
    if node is None or node.op != "reduce_max" or node.attrs["axes"] != axes:
        return None
    return node.inputs[0]


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
    if node.op != "mul" or not _two(node):
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
    """``where(x > 0, x, exp(where(x > 0, 0, x)) - 1)``, whose alpha is 1."""
    x = _positive(node, makers)
    if x is None or node.inputs[1] is not x:
        return None
    less = makers.get(node.inputs[2])
    if less is not None and less.op == "mul":
        one = _times(less, 1.0)
        less = makers.get(one) if one is not None else None
    if less is None or less.op != "sub" or not _is(less.inputs[1], 1):
        return None
    power = makers.get(less.inputs[0])
    safe = makers.get(power.inputs[0]) if power and power.op == "exp" else None
    if safe is None or _positive(safe, makers) is not x or safe.inputs[2] is not x:
        return None
    return (x, {}) if _is(safe.inputs[1], 0) else None


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
            natural = maker is not None and maker.op in ("argmax", "argmin")
            return ids, {"depth": depth, "natural": natural}
    return None


# Each is tried only for runtimes that have the operation.
_ACTIVATIONS: dict[str, Callable[[Node, Makers], Match | None]] = {
    "elu": _elu,
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


def _lowest(value: Value) -> bool:
    return value.data is not None and bool(np.isneginf(value.data).all())


def _two(node: Node) -> bool:
    return len(node.inputs) == 2
