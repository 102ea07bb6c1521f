"""Finds what runtimes have one operation for in what JAX writes for it."""

from __future__ import annotations

import math

import numpy as np

from ..graph import Graph, Node, Value


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
            if by.data is None or by.size != 1 or maker is None or uses[y] > 1:
                continue
            if node.op == "div" and by is not node.inputs[1]:
                continue
            if maker.op == "reduce_sum":
                count = maker.inputs[0].size // max(maker.out.size, 1)
                # Only the reciprocal that the mean itself takes.
                if node.op == "div" and by.data.item() == count:
                    maker.op = "reduce_mean"
                    graph.replace(node.out, maker.out)
                    changed = True
                    break
            if maker.op == "mul" and node.op == "div":  # an average pool
                pool, again = makers.get(maker.inputs[0]), maker.inputs[1].data
                alike = again is not None and np.array_equal(again, by.data)
                if pool and pool.op == "pool_mean" and alike:
                    graph.replace(node.out, pool.out)
                    changed = True
                    break
    return changed


def find_softmax(graph: Graph) -> bool:
    """``exp(x - max(x)) / sum(exp(x - max(x)))`` over the last axis."""
    makers, changed = graph.producers(), False

    def made(value: Value, op: str) -> Node | None:
        node = makers.get(value)
        while (
            node is not None and node.op in ("reshape", "broadcast") and op != node.op
        ):
            node = makers.get(node.inputs[0])
        return node if node is not None and node.op == op else None

    for node in graph.nodes:
        if node.op != "div":
            continue
        top, total = makers.get(node.inputs[0]), made(node.inputs[1], "reduce_sum")
        if top is None or top.op != "exp" or total is None:
            continue
        last = len(node.out.shape) - 1
        if total.inputs[0] is not top.out or total.attrs["axes"] != (last,):
            continue
        shifted = makers.get(top.inputs[0])
        if shifted is None or shifted.op != "sub":
            continue
        x = shifted.inputs[0]
        peak = made(shifted.inputs[1], "reduce_max")
        floor = made(shifted.inputs[1], "max")  # jnp.max(..., initial=-inf)
        if peak is None and floor is not None:
            low = [v for v in floor.inputs if v.data is not None]
            rest = [v for v in floor.inputs if v.data is None]
            if len(low) == 1 and len(rest) == 1 and _lowest(low[0]):
                peak = made(rest[0], "reduce_max")
        if peak is None or peak.inputs[0] is not x or peak.attrs["axes"] != (last,):
            continue
        if shifted.out.shape != node.out.shape:
            continue
        node.op, node.inputs = "softmax", [x]
        changed = True
    return changed


def find_gelu(graph: Graph) -> bool:
    """``0.5 x (1 - erf(-x / sqrt 2))``, which LiteRT has as one operation."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        if node.op != "mul" or not _two(node):
            continue
        half, rest = (makers.get(value) for value in node.inputs)
        if half is None or rest is None or rest.op != "sub" or half.op != "mul":
            continue
        x = _times(half, 0.5)
        erf = makers.get(rest.inputs[1])
        one = rest.inputs[0].data
        if x is None or erf is None or erf.op != "erf" or one is None:
            continue
        inner = makers.get(erf.inputs[0])
        scaled = _times(inner, math.sqrt(0.5)) if inner is not None else None
        negated = makers.get(scaled) if scaled is not None else None
        if one.size != 1 or one.item() != 1 or negated is None or negated.op != "neg":
            continue
        if negated.inputs[0] is x:
            node.op, node.inputs = "gelu", [x]
            node.attrs = {"approximate": False}
            changed = True
    return changed


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
