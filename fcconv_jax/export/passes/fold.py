"""Folds per-channel affines, such as BatchNorm at inference, into linear layers.

A norm behind a layer scales the layer's columns; one in front of a layer scales its
rows, where no padding is between. The kernel and the bias are computed in float64 from
the graph's constants and rounded once.
"""

from __future__ import annotations

import numpy as np

from ..graph import Folded, Graph, Node, Value

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
            x, scale, shift = found
            leaves = frozenset[str]().union(*(v.leaves for v in node.inputs))
            if behind:
                layer = _layer_before(x, scale.size == shift.size == 1, makers, uses)
            else:
                layer = _layer_after(node.out, readers, uses)
            if layer is None or layer.weight is None:
                continue
            inner, features = layer.weight.shape[-2:]
            size = features if behind else inner
            if {scale.size, shift.size} - {1, size}:
                continue
            padded = layer.op == "conv" and any(map(any, layer.attrs["padding"]))
            if not behind and padded and shift.any():
                continue
            scale, shift = (np.broadcast_to(a, size) for a in (scale, shift))
            old = changed.get(layer) or Folded.identity(inner, features)
            changed[layer] = old.then(behind, scale, shift, leaves)
            graph.replace(node.out, x)
            node.inputs, node.outputs = [], []
            graph.nodes.remove(node)
            return True
    return False


def _affine(node: Node) -> tuple[Value, np.ndarray, np.ndarray] | None:
    """The operand, scale and shift of ``x * scale + shift``, along the last axis."""
    if node.op not in _AFFINE or node.out.dtype.kind != "f":
        return None
    for x, by in (node.inputs, node.inputs[::-1]):
        if by.data is None or x.data is not None or x.shape != node.out.shape:
            continue
        if by.size != 1 and by.shape[-1:] != (by.size,):
            continue
        number = by.data.astype(np.float64).reshape(-1)
        one, zero = np.ones(1), np.zeros(1)
        first = x is node.inputs[0]
        if node.op == "add":
            return x, one, number
        if node.op == "sub":
            return (x, one, -number) if first else (x, -one, number)
        if node.op == "mul":
            return x, number, zero
        if first and number.all():
            return x, 1 / number, zero
    return None


def _layer_before(
    value: Value, scalar: bool, makers: dict[Value, Node], uses: dict[Value, int]
) -> Node | None:
    """The layer whose output a value is, but for views that keep its last axis."""
    while uses[value] == 1 and (maker := makers.get(value)):
        if maker.op in ("conv", "dense"):
            return maker
        if maker.op == "reshape" and (scalar or _same_last(maker)):
            value = maker.inputs[0]
        else:
            break
    return None


def _layer_after(
    value: Value, readers: dict[Value, Node], uses: dict[Value, int]
) -> Node | None:
    while uses[value] == 1 and (reader := readers.get(value)):
        if reader.op == "dense" and reader.inputs[0] is value:
            return reader
        if reader.op == "conv" and reader.inputs[0] is value:
            return reader if reader.attrs["groups"] == 1 else None
        if reader.op != "reshape" or not _same_last(reader):
            break
        value = reader.out
    return None


def _same_last(view: Node) -> bool:
    return view.inputs[0].shape[-1:] == view.out.shape[-1:]


def _round(node: Node, folded: Folded) -> None:
    """Put the folded kernel and bias into a layer."""
    kernel, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert kernel.data is not None
    if bias is not None and bias.source is None:
        # A computed bias is part of what is added: no parameter's entries are it.
        assert bias.data is not None
        folded = folded.with_bias(bias.data, bias.leaves)
        bias = None
    data, added = folded.apply(kernel.data, None if bias is None else bias.data)
    shape = kernel.shape
    node.inputs[1] = Value(shape, kernel.dtype, data, kernel.source, kernel.leaves)
    source = None if bias is None else bias.source
    made = Value(added.shape, kernel.dtype, added, source)
    node.inputs = [*node.inputs[:2], made]
    node.folded = folded
