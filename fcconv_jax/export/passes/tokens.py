"""Puts layers on tokens where ONNX Runtime runs convolutions fast.

It runs a 1x1 convolution of images of one pixel as products with a vector, 2 to 14
times as slowly as one on *rows*: an image of one channel whose rows are the tokens, and
a window as wide as a row. That takes tokens without a transpose and gives a *column* of
places, channel-first, for layers that follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..graph import ELEMENTWISE, Graph, Node, Value
from .views import turns, views_before


def flatten_windows(graph: Graph) -> None:
    """Make windows as large as their images pointwise, where that saves a transpose.

    A layer that mixes tokens, as of an MLP-Mixer, has a window over the tokens of each
    feature, which a transpose has made an image. With the tokens as channels of a
    column of features, it takes what the layer before gave.
    """
    for part in graph.graphs():
        makers, nodes = part.producers(), list[Node]()
        for node in part.nodes:
            if _is_whole(node) and _columns(node.inputs[0], makers):
                x, kernel = node.inputs[:2]
                flat = Value((x.shape[0], 1, 1, x.size // x.shape[0]), x.dtype)
                shape = (1, 1, flat.shape[-1], kernel.shape[-1])
                node.inputs[:2] = [flat, kernel.moved("reshape", shape)]
                node.attrs = {**node.attrs, "strides": (1, 1), "dilation": (1, 1)}
                nodes.append(Node("reshape", [x], [flat]))
            nodes.append(node)
        part.nodes = nodes


def _is_whole(node: Node) -> bool:
    """Return whether a convolution gives one place of each image, seen as a whole."""
    if node.op != "conv" or node.attrs["groups"] > 1 or "spread" in node.attrs:
        return False
    x, kernel = node.inputs[:2]
    whole = len(x.shape) == 4 and kernel.shape[:-2] == x.shape[1:-1]
    return whole and not any(map(any, node.attrs["padding"])) and node.folded is None


def on_tokens(
    node: Node,
    makers: dict[Value, Node],
    columns: dict[Value, int],
    after: Callable[[Value], list[Node]],
) -> list[Node] | None:
    """Return a pointwise convolution with its views, if it is on tokens; else None.

    Args:
      node: the convolution.
      makers: of the graph.
      columns: the outputs of those before, and how many images each is.
      after: returns the views that follow a value.
    """
    p = node.attrs
    if node.op != "conv" or node.inputs[1].shape[:-2] != (1, 1) or p["groups"] > 1:
        return None
    if set(p["strides"]) != {1} or any(map(any, p["padding"])) or "spread" in p:
        return None
    x, y = node.inputs[0], node.out
    *places, c = x.shape
    value, maker = x, makers.get(x)
    while value not in columns and maker and maker.op in ELEMENTWISE | {"reshape"}:
        value = next((v for v in maker.inputs if v.data is None), maker.inputs[0])
        maker = makers.get(value)
    # What no norm is in front of may have come channel-first.
    norm = maker is not None and maker.op in ("layer_norm", "rms_norm")
    folded = math.prod(places[1:]) == 1
    swapped = _columns(x, makers) if folded else None
    last = norm or (folded and maker is None and len(value.shape) > 2)
    n = 1 if folded else places[0]
    if value in columns:
        n = columns[value]
    elif swapped:
        n = swapped
    elif last and value.shape[-1:] == (c,) and value.size == x.size:
        n = value.shape[0] if len(value.shape) > 2 else 1
    if math.prod(places) % n:  # repeated between the two layers
        return None
    count, features = math.prod(places) // n, y.shape[-1]
    image, back = (Value((n, 1, count, k), x.dtype) for k in (c, features))
    made = Value((n, features, count, 1), y.dtype)
    turn = Node("transpose", [made], [back], {"perm": (0, 3, 2, 1)})
    views = [turn, Node("reshape", [back], [y])]
    inside, nodes = image, [Node("reshape", [x], [image])]
    if value in columns or swapped:
        inside = Value((n, c, count, 1), x.dtype)
        nodes.append(Node("transpose", [image], [inside], {"perm": (0, 3, 2, 1)}))
    else:
        fewer = turns(made, [*views, *after(y)]) < turns(y, after(y))
        if c == 1 or count == 1 or not (last or (folded and fewer)):
            return None
        node.attrs = {**p, "rows": c}
    node.inputs, node.outputs = [inside, *node.inputs[1:]], [made]
    columns[y] = n
    return [*nodes, node, *views]


def _columns(x: Value, makers: dict[Value, Node]) -> int | None:
    """Return how many images tokens are that a transpose has made the features of.

    Only where a column of places, channel-first, needs no transpose; else None.
    """
    count, c = x.shape[0], x.size // x.shape[0]
    root, chain = views_before(x, makers)
    if count == 1 or all(node.op == "reshape" for node in chain):
        return None
    for n in (1, root.shape[0]):
        if count % n:
            continue
        rows, column = (n, count // n, c, 1), (n, c, count // n, 1)
        image, turned = Value(rows, x.dtype), Value(column, x.dtype)
        turn = Node("transpose", [image], [turned], {"perm": (0, 2, 1, 3)})
        if not turns(root, [*chain, Node("reshape", [x], [image]), turn]):
            return n
    return None
