"""Finds means, softmax and bounds of 0 and 6 in what JAX writes for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..graph import Graph, Node, Value

Makers = Mapping[Value, Node]


def find_activations(graph: Graph) -> bool:
    """``max(x, 0)`` and ``min(relu(x), 6)``."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        for x, bound in (node.inputs, node.inputs[::-1]) if _two(node) else ():
            # A bound of more axes than x broadcasts it, which an activation doesn't.
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
            # What also reads the sum still needs it.
            if by.data is None or maker is None or uses[y] > 1:
                continue
            # `div` doesn't commute: the number over the sum isn't a mean.
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
        # The sum has lost the last axis, so views bring it back to the shape of the
        # entries.
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


def _lowest(value: Value) -> bool:
    return value.data is not None and bool(np.isneginf(value.data).all())


def _two(node: Node) -> bool:
    return len(node.inputs) == 2
