"""Folds per-channel affines, such as BatchNorm at inference, into linear layers.

A norm behind a layer scales the layer's columns; one in front of a layer scales its
rows. Zeros of a padding between keep their value under a scale, not under a shift. The
kernel and the bias are computed in float64 from the graph's constants and rounded once.
"""

from __future__ import annotations

import math

import numpy as np

from ..graph import VIEWS, Folded, Graph, Node, Value

_AFFINE = ("add", "sub", "mul", "div")


def fold_norms(graph: Graph) -> int:
    """Fold what can be folded, in place; return the number of layers that changed."""
    changed: dict[Node, Folded] = {}
    while _fold_one(graph, changed):
        graph.prune()
    for node, folded in changed.items():
        _round(node, folded)
    return len(changed)


def _fold_one(graph: Graph, changed: dict[Node, Folded]) -> bool:
    makers, uses = graph.producers(), graph.uses()
    readers = {value: node for node in graph.nodes for value in node.inputs}
    # Behind a layer first: in front of the next one, padding would be in the way.
    for behind in (True, False):
        for node in graph.nodes:
            found = _affine(node)
            if found is None:
                continue
            x, axis, scale, shift = found
            leaves = frozenset[str]().union(*(v.leaves for v in node.inputs))
            if behind:
                # Attention scales its queries behind their split into heads. Folding
                # that number saves one cheap operation and rounds the whole kernel,
                # which tripled the error of MiniLM: so features must be kept together.
                # A power of two (frexp: 0.5) rounds nothing.
                if axis is None and abs(np.frexp(scale[0])[0]) != 0.5:
                    axis = len(x.shape) - 1
                layer = _layer_before(x, axis, makers, uses)
            else:
                layer = _layer_after(node.out, axis, bool(shift.any()), readers, uses)
            if layer is None or layer.weight is None:
                continue
            inner, features = layer.weight.shape[-2:]
            size = features if behind else inner
            # One number, or one for each of the layer's features; otherwise the axis is
            # another.
            if {scale.size, shift.size} - {1, size}:
                continue
            scale, shift = (np.broadcast_to(a, size) for a in (scale, shift))
            old = changed.get(layer) or Folded.identity(inner, features)
            changed[layer] = old.then(behind, scale, shift, leaves)
            graph.replace(node.out, x)
            node.inputs, node.outputs = [], []
            graph.nodes.remove(node)
            return True
    return False


def _affine(
    node: Node,
) -> tuple[Value, int | None, np.ndarray, np.ndarray] | None:
    """Return x, axis (None of numbers), scale and shift of ``x * scale + shift``."""
    if node.op not in _AFFINE or node.out.dtype.kind != "f":
        return None
    for x, by in (node.inputs, node.inputs[::-1]):
        if by.data is None or x.data is not None or x.shape != node.out.shape:
            continue
        axes = [i - len(by.shape) for i, n in enumerate(by.shape) if n > 1]
        # A factor that varies along two axes isn't a scale of rows or of columns.
        if len(axes) > 1:
            continue
        axis = len(x.shape) + axes[0] if axes else None
        number = by.data.astype(np.float64).reshape(-1)
        one, zero = np.ones(1), np.zeros(1)
        first = x is node.inputs[0]
        if node.op == "add":
            return x, axis, one, number
        if node.op == "sub":
            scaled = (one, -number) if first else (-one, number)
            return x, axis, *scaled
        if node.op == "mul":
            return x, axis, number, zero
        # number / x is not affine, and a zero would put infinities into the kernel.
        if first and number.all():
            return x, axis, 1 / number, zero
    return None


def _layer_before(
    value: Value, axis: int | None, makers: dict[Value, Node], uses: dict[Value, int]
) -> Node | None:
    """Return the layer whose features an axis of a value holds, seen through views."""
    while uses[value] == 1 and (maker := makers.get(value)):
        if maker.op in ("conv", "dense"):
            return maker if axis in (None, _features(maker, maker.out)) else None
        (value, *more), view = maker.inputs, maker
        if view.op not in VIEWS or more:
            break
        if axis is not None and view.op == "transpose":
            axis = view.attrs["perm"][axis]
        elif axis is not None:
            axis = _same_axis(view.out.shape, axis, value.shape)
            if axis is None:
                break
    return None


def _layer_after(
    value: Value,
    axis: int | None,
    shifted: bool,
    readers: dict[Value, Node],
    uses: dict[Value, int],
) -> Node | None:
    """Return the layer that sums over a value's axis, seen through views and pads."""
    while uses[value] == 1 and (reader := readers.get(value)):
        # The value is the second operand, which no layer sums over.
        if reader.inputs[0] is not value:
            break
        if reader.op in ("conv", "dense"):
            # A row of a grouped kernel belongs to several input features, one in each
            # group.
            plain = reader.attrs.get("groups", 1) == 1
            padded = "spread" in reader.attrs
            padded |= any(map(any, reader.attrs.get("padding", ())))
            mine = axis in (None, _features(reader, value))
            # Padding comes behind the shift: in the bias, the shift would count there,
            # too.
            return reader if plain and mine and not (padded and shifted) else None
        if reader.op == "pad":
            # Only zeros keep their value, and only under a scale.
            if shifted or reader.attrs["value"]:
                break
        elif reader.op not in VIEWS:
            break
        elif axis is not None and reader.op == "transpose":
            axis = reader.attrs["perm"].index(axis)
        elif axis is not None:
            axis = _same_axis(value.shape, axis, reader.out.shape)
            if axis is None:
                break
        value = reader.out
    return None


def _features(layer: Node, value: Value) -> int:
    """Return the axis of a layer's features: the last one, except in JAX programs."""
    side = "before" if value is layer.inputs[0] else "after"
    return layer.attrs.get(side, len(value.shape) - 1)


def _same_axis(shape: tuple[int, ...], axis: int, other: tuple[int, ...]) -> int | None:
    """Return where a reshape puts an axis; None if it doesn't keep it."""
    # In row-major order an axis is the same one if as many entries lie in front of it.
    before = math.prod(shape[:axis])
    for i, n in enumerate(other):
        if n == shape[axis] and math.prod(other[:i]) == before:
            return i
    return None


def _round(node: Node, folded: Folded) -> None:
    """Put the folded kernel and bias into a layer."""
    kernel, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert kernel.data is not None
    if bias is not None and bias.source is None:
        # A computed bias is part of what is added: no parameter's entries are it.
        assert bias.data is not None
        folded = folded.with_bias(bias.data, bias.leaves)
        bias = None
    folded = folded.narrowed(kernel.data, None if bias is None else bias.data)
    data, added = folded.apply(kernel.data, None if bias is None else bias.data)
    shape = kernel.shape
    node.inputs[1] = Value(shape, kernel.dtype, data, kernel.source, kernel.leaves)
    source = None if bias is None else bias.source
    made = Value(added.shape, kernel.dtype, added, source)
    node.inputs = [*node.inputs[:2], made]
    node.folded = folded
