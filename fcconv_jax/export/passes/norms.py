"""Norms as the one operation that a runtime has for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..graph import Graph, Node, Value, constant
from .patterns import behind_views

_NORMS = ("layer_norm", "rms_norm")


def find_batch_norms(graph: Graph) -> bool:
    """``(x - mean) * scale + shift`` of channel-first images, in three operations."""
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        chain: list[Value] = []
        value, rank = node.out, len(node.out.shape)
        for op in ("add", "mul", "sub"):
            found = makers.get(value)
            if found is None or found.op != op or (chain and uses[value] > 1):
                break
            x, by = found.inputs
            # JAX writes a constant on either side of a sum or a product.
            if op != "sub" and x.data is not None:
                x, by = by, x
            axes = [i - len(by.shape) + rank for i, n in enumerate(by.shape) if n > 1]
            if by.data is None or axes != [1] or x.shape != node.out.shape:
                break
            chain.append(by.moved("reshape", (by.size,)))
            value = x
        if len(chain) < 3 or node.out.dtype != np.float32:
            continue
        shift, scale, mean = chain
        # The scale already contains the variance, which is 1 then.
        ones = constant(np.ones(mean.size, np.float32))
        node.op, node.inputs, node.attrs = (
            "batch_norm",
            [value, scale, shift, mean, ones],
            {},
        )
        changed = True
    graph.prune()
    return changed


def find_norms(graph: Graph, names: frozenset[str]) -> bool:
    """Layer norms and RMS norms over the last axis, with their scale and shift."""
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        before = makers.get(node.inputs[0])
        if before is not None and before.op in _NORMS and uses[before.out] == 1:
            changed |= _with_vector(node, before)
        if node.op not in ("mul", "div") or node.out.dtype != np.float32:
            continue
        found = _norm(node, makers, uses)
        if found is not None and found[0] in names:
            op, x, scale, epsilon = found
            ones = np.ones(x.shape[-1], np.float32)
            node.op, node.inputs = op, [x, scale or constant(ones)]
            node.attrs = {"epsilon": epsilon}
            changed = True
    return changed


def _with_vector(node: Node, norm: Node) -> bool:
    """Turn a factor or a term behind a norm into its scale or its shift."""
    ops = ("mul", "add") if norm.op == "layer_norm" else ("mul",)
    if node.op not in ops or node.inputs[1].data is None:
        return False
    vector, features = node.inputs[1], norm.out.shape[-1]
    plain = norm.inputs[1].source is None and (norm.inputs[1].data == 1).all()
    if vector.size != features or vector.shape[-1:] != (features,):
        return False
    if len(norm.inputs) > 2 or (node.op == "mul" and not plain):
        return False
    x, scale = norm.inputs
    flat = vector.moved("reshape", (features,)) if len(vector.shape) > 1 else vector
    node.inputs = [x, flat] if node.op == "mul" else [x, scale, flat]
    node.op, node.attrs = norm.op, dict(norm.attrs)
    return True


def _norm(
    node: Node, makers: Mapping[Value, Node], uses: Mapping[Value, int]
) -> tuple[str, Value, Value | None, float] | None:
    """Return the operation that a product is, its x, its scale, and its epsilon.

    ``(x - mean) / sqrt(variance + epsilon) * scale``, or with x itself and its mean
    square.
    """
    above, below = _product(node, makers, uses)
    vectors = [value for value in above if value.data is not None]
    rest = [value for value in above if value.data is None]
    if len(vectors) > 1 or len(rest) + len(below) != 2:
        return None
    for numerator in rest:
        roots = [value for value in rest if value is not numerator]
        if not roots + below:  # a square
            return None
        root = makers.get((roots or below)[0])
        if root is None or root.op != ("rsqrt" if roots else "sqrt"):
            continue
        total = makers.get(root.inputs[0])
        if total is None or total.op != "add" or total.inputs[1].size != 1:
            continue
        variance, epsilon = total.inputs
        x, op = numerator, "rms_norm"
        shifted = makers.get(numerator)
        if shifted is not None and shifted.op == "sub":
            inner, mean = shifted.inputs
            if _mean(mean, makers) is inner:
                x, op = inner, "layer_norm"
        if op == "layer_norm":
            alike = _is_variance(variance, x, makers)
        else:
            alike = _square(_mean(variance, makers), makers) is x
        if epsilon.data is None or not alike or x.shape != node.out.shape:
            continue
        features = x.shape[-1]
        if any(v.size != features or v.shape[-1:] != (features,) for v in vectors):
            return None
        scale = vectors[0].moved("reshape", (features,)) if vectors else None
        return op, x, scale, float(epsilon.data.item())
    return None


def _product(
    node: Node, makers: Mapping[Value, Node], uses: Mapping[Value, int]
) -> tuple[list[Value], list[Value]]:
    """Return the factors of a product, and the divisors.

    A factor that others read, too, is one: the x of a norm may be a product.
    """
    above: list[Value] = []
    below: list[Value] = []
    for place, value in enumerate(node.inputs):
        maker = makers.get(value)
        while maker is not None and maker.op in ("reshape", "broadcast"):
            value, maker = maker.inputs[0], makers.get(maker.inputs[0])
        ups, downs = [value], list[Value]()
        if maker is not None and maker.op in ("mul", "div") and uses[value] == 1:
            ups, downs = _product(maker, makers, uses)
        if node.op == "div" and place == 1:
            ups, downs = downs, ups
        above, below = above + ups, below + downs
    ones = [v for v in above if v.data is not None and v.size == 1 and v.data == 1]
    return [v for v in above if v not in ones], below


def _mean(value: Value, makers: Mapping[Value, Node]) -> Value | None:
    """Return the x of a mean over the last axis."""
    node = behind_views(value, makers)
    if node is None or node.op != "reduce_mean":
        return None
    x = node.inputs[0]
    return x if node.attrs["axes"] == (len(x.shape) - 1,) else None


def _square(value: Value | None, makers: Mapping[Value, Node]) -> Value | None:
    node = behind_views(value, makers) if value is not None else None
    if node is None or node.op != "mul" or node.inputs[0] is not node.inputs[1]:
        return None
    return node.inputs[0]


def _is_variance(value: Value, x: Value, makers: Mapping[Value, Node]) -> bool:
    """Return whether a value is the variance of x, in one pass over it or in two."""
    node = behind_views(value, makers)
    if node is not None and node.op in ("max", "relu"):  # against rounding below 0
        bounds = [v for v in node.inputs if v.data is not None]
        if any((v.data != 0).any() for v in bounds if v.data is not None):
            return False
        value = next(v for v in node.inputs if v.data is None)
        node = behind_views(value, makers)
    if node is None:
        return False
    # One pass: the mean of squares less the square of the mean, as Flax's norms have
    # it.
    if node.op == "sub":
        squares, squared = node.inputs
        mean = _square(squared, makers)
        alike = mean is not None and _mean(mean, makers) is x
        return alike and _square(_mean(squares, makers), makers) is x
    centred = _square(_mean(value, makers), makers)
    maker = makers.get(centred) if centred is not None else None
    if maker is None or maker.op != "sub" or maker.inputs[0] is not x:
        return False
    return _mean(maker.inputs[1], makers) is x
