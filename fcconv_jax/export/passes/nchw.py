"""Puts images channel-first, for runtimes that have them so, with few transposes.

Each convolution and pool is put between two transposes; these then sink through what
does not care about the order of axes, and vanish where they meet. What is left is no
more than the model has in its dense form: images of one position, as a full window
leaves them, and tokens that are folded into the batch, need a reshape only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from ..graph import ELEMENTWISE, Graph, Node, Value
from ..shipped import channels_first, channels_last
from .tokens import on_tokens
from .views import (
    delay_reshapes,
    delay_views,
    drop_broadcasts,
    join_views,
    keep_dims,
    share_equal,
    turns,
    views_after,
    views_before,
)

_IMAGES = ("conv", "pool_max", "pool_mean", "resize")
# What a transpose may sink through on its way to another one.
_PASSED = ELEMENTWISE | {"concat", "dense", "pad", "reshape", "reverse", "slice"}


def to_nchw(
    graph: Graph, rows: bool = True, columns: bool = False, gemm: bool = False
) -> Graph:
    """Rewrite a graph in place; images of ``conv`` and ``pool_*`` are NCHW then.

    Args:
      graph: what is rewritten.
      rows: whether patches may be rows of pixels, whose number of columns is fixed.
      columns: whether a dense layer may multiply the columns of an NCHW image.
      gemm: whether layers on tokens are to be on rows of a matrix: dense ones as they
        are, pointwise convolutions on an image of one channel.
    """
    passes: tuple[Callable[[Graph], bool], ...] = (
        join_views,
        share_equal,
        functools.partial(sink_transposes, columns=columns),
        delay_views,
        delay_reshapes,
        drop_broadcasts,
        keep_dims,
    )
    for part in graph.graphs():
        _surround(part, rows, gemm)
        _expand_adjoints(part)
        part.rewrite(passes)
        if gemm:
            _on_matrices(part)
            part.rewrite(passes)
    return graph


def _on_matrices(graph: Graph) -> None:
    """Put dense layers with a bias between reshapes: a matrix's product adds it."""
    nodes: list[Node] = []
    for node in graph.nodes:
        x, y = node.inputs[0], node.out
        plain = node.op == "dense" and "columns" not in node.attrs
        if not plain or len(x.shape) == 2 or len(node.inputs) < 3:
            nodes.append(node)
            continue
        count = math.prod(x.shape[:-1])
        flat, made = (Value((count, v.shape[-1]), v.dtype) for v in (x, y))
        nodes.append(Node("reshape", [x], [flat]))
        node.inputs, node.outputs = [flat, *node.inputs[1:]], [made]
        nodes += [node, Node("reshape", [made], [y])]
    graph.nodes = nodes


def _surround(graph: Graph, as_rows: bool, as_matrix: bool) -> None:
    nodes: list[Node] = []
    makers = graph.producers()
    rows = {node for node in graph.nodes if as_rows and _as_rows(node, makers)}
    uses = graph.uses()
    readers = {value: node for node in graph.nodes for value in node.inputs}
    after = functools.partial(views_after, readers=readers, uses=uses)
    columns: dict[Value, int] = {}
    for node in graph.nodes:
        tokens = on_tokens(node, makers, columns, after) if as_matrix else None
        if tokens is not None:
            nodes += tokens
            continue
        if node.op not in _IMAGES:
            nodes.append(node)
            continue
        x, y = node.inputs[0], node.out
        to, back = channels_first(len(x.shape)), channels_last(len(x.shape))
        if node in rows:
            n, h, w, c = x.shape
            inside = Value((n, 1, h, w * c), x.dtype)
            made = Value(_permuted(y.shape, to), y.dtype)
            nodes.append(Node("reshape", [x], [inside]))
            node.inputs = [inside, *node.inputs[1:]]
            node.outputs = [made]
            # A pixel is c steps along a row, which has its channels side by side.
            strides = (node.attrs["strides"][0], node.attrs["strides"][1] * c)
            node.attrs = {**node.attrs, "rows": c, "strides": strides}
            nodes += [node, Node("transpose", [made], [y], {"perm": back})]
            continue
        inside = Value(_permuted(x.shape, to), x.dtype)
        made = Value(_permuted(y.shape, to), y.dtype)
        nodes.append(Node("transpose", [x], [inside], {"perm": to}))
        node.inputs = [inside, *node.inputs[1:]]
        node.outputs = [made]
        nodes += [node, Node("transpose", [made], [y], {"perm": back})]
    graph.nodes = nodes


def _expand_adjoints(graph: Graph) -> None:
    """Express swapped operands of products as transposes, which may cancel."""
    nodes: list[Node] = []
    makers, uses = graph.producers(), graph.uses()
    readers = {value: node for node in graph.nodes for value in node.inputs}
    for node in graph.nodes:
        behind: list[Node] = []
        if node.op == "matmul" and node.weight is None:
            names = ("adj_a", "adj_b")
            swapped = [node.attrs[name] for name in names]
            left = [0, 0]  # as it is, and as the transpose of the swapped product
            for value, flag in zip(node.inputs, swapped):
                root, chain = views_before(value, makers)
                left[not flag] += turns(root, [*chain, _swap(value)])
                left[flag] += turns(root, chain)
            back = _swap(_swap(node.out).out)
            back.outputs = node.outputs
            after = views_after(node.out, readers, uses)
            left[0] += turns(node.out, after)
            left[1] += turns(back.inputs[0], [back, *after])
            if left[1] < left[0]:
                node.inputs = node.inputs[::-1]
                node.attrs |= {n: not s for n, s in zip(names, swapped[::-1])}
                node.outputs = back.inputs
                behind = [back]
        if node.op == "matmul":
            for i, name in enumerate(("adj_a", "adj_b")):
                x = node.inputs[i]
                if not node.attrs[name]:
                    continue
                swap = _swap(x)
                # A constant is transposed here, once, not in the runtime.
                if x.data is not None:
                    node.inputs[i] = x.moved("transpose", swap.attrs["perm"])
                else:
                    nodes.append(swap)
                    node.inputs[i] = swap.out
                node.attrs[name] = False
        nodes += [node, *behind]
    graph.nodes = nodes


def _swap(x: Value) -> Node:
    """Return a transpose of the last two axes."""
    last = len(x.shape) - 1
    perm = (*range(last - 1), last, last - 1)
    out = Value(_permuted(x.shape, perm), x.dtype)
    return Node("transpose", [x], [out], {"perm": perm})


def sink_transposes(graph: Graph, columns: bool = False) -> bool:
    """Move transposes behind the operations that work in any order of axes."""
    makers, changed = graph.producers(), False
    for node in list(graph.nodes):
        perm = _common(node, makers, graph)
        if perm is None:
            continue
        if node.op != "dense":
            moved = _moved(node, perm, makers)
        # Otherwise the transpose would only move from one side of the layer to the
        # other.
        elif columns and _meets(node.out, graph):
            moved = _on_columns(node, perm, makers)
        else:
            continue
        if moved is None:
            continue
        before, inner, order = moved
        at = graph.nodes.index(node)
        outer = Value(node.out.shape, node.out.dtype)
        after = Node("transpose", [inner.out], [outer], {"perm": order})
        graph.nodes[at : at + 1] = [*before, inner, after]
        graph.replace(node.out, outer)
        makers, changed = graph.producers(), True
    return changed


def _common(
    node: Node, makers: dict[Value, Node], graph: Graph
) -> tuple[int, ...] | None:
    """Return the one permutation that all operands of an operation went through."""
    values = [value for value in node.inputs if value.data is None]
    makes = [makers.get(value) for value in values]
    turned_by = [m for m in makes if m is not None and m.op == "transpose"]
    perms = {m.attrs["perm"] for m in turned_by}
    # Operands in two orders: one of them has to be transposed anyway.
    if len(perms) != 1:
        return None
    perm = perms.pop()
    # Other operands are turned to channel-first only: else two would turn each other,
    # for ever.
    images = len(perm) > 3 and perm == channels_last(len(perm))
    if perm in ((1, 0), (0, 2, 1)):  # which undo themselves
        sides = {v: _is_first(v, makers) for v in values}
        sides |= {m.out: _is_first(m.inputs[0], makers) for m in turned_by}
        images = all(sides[v] == (v in {m.out for m in turned_by}) for v in values)
    for value, maker in zip(values, makes):
        if maker is not None and maker.op == "transpose":
            continue
        # A gate (N, 1, 1, C), as of squeeze-and-excite, is (N, C, 1, 1) by a reshape.
        if maker is not None and maker.op == "reshape":
            if _renames(value.shape, perm):
                continue
            # Blocks of pixels are turned as they move.
            moved = makers.get(maker.inputs[0])
            turned = moved is not None and moved.op == "transpose"
            blocks = images and node.op == "concat" and turned
            if blocks and _meets(node.out, graph):
                continue
        # What else a sum or a concatenation takes is turned once, for all that follow.
        beside = node.op in ELEMENTWISE | {"concat"} and len(value.shape) == len(perm)
        if not (images and beside) or not _meets(node.out, graph, every=True):
            return None
    return perm


def _is_first(value: Value, makers: dict[Value, Node]) -> bool:
    """Return whether a layer made a value channel-first, of a signal or its columns."""
    while (maker := makers.get(value)) and maker.op in ELEMENTWISE | {"reshape"}:
        value = next((v for v in maker.inputs if v.data is None), maker.inputs[0])
    return maker is not None and (maker.op == "conv" or "columns" in maker.attrs)


def _renames(shape: Sequence[int], perm: tuple[int, ...]) -> bool:
    """Return whether this permutation of a shape's axes moves axes of one only."""
    places = [perm[i] for i, n in enumerate(shape) if n > 1]
    return len(shape) == len(perm) and places == sorted(places)


def _moved(
    node: Node, perm: tuple[int, ...], makers: dict[Value, Node]
) -> tuple[list[Node], Node, tuple[int, ...]] | None:
    """Reshapes, the operation before the transpose, and the transpose that follows."""
    rank = len(perm)
    if any(len(v.shape) > rank for v in node.inputs):
        return None
    inverse = [perm.index(i) for i in range(rank)]
    inputs, before = [], []
    for value in node.inputs:
        maker = makers.get(value)
        turned = maker is not None and maker.op == "transpose"
        if value.data is None and not turned:
            inputs.append(Value(_permuted(value.shape, inverse), value.dtype))
            turn = {} if _renames(value.shape, perm) else {"perm": tuple(inverse)}
            op = "transpose" if turn else "reshape"
            before.append(Node(op, [value], [inputs[-1]], turn))
        elif value.data is None:
            assert maker is not None
            inputs.append(maker.inputs[0])
        elif value.size == 1 or node.op == "gather":
            inputs.append(value)
        else:
            # Broadcasting aligns the last axes; the permutation counts all of them.
            wide = value.moved(
                "reshape", (*[1] * (rank - len(value.shape)), *value.shape)
            )
            inputs.append(wide.moved("transpose", tuple(inverse)))
    attrs = dict(node.attrs)
    op, shape = node.op, node.out.shape
    order: Sequence[int] = perm
    if op in ELEMENTWISE:
        if len(shape) != rank:
            return None
    elif op.startswith("reduce_"):
        attrs["axes"] = tuple(sorted(perm[axis] for axis in node.attrs["axes"]))
        if not attrs["keepdims"]:
            left = [p for p in perm if p not in attrs["axes"]]
            order = [sorted(left).index(p) for p in left]
    elif op in ("argmax", "argmin"):
        attrs["axis"] = perm[node.attrs["axis"]]
        left = [p for p in perm if p != attrs["axis"]]
        order = [sorted(left).index(p) for p in left]
    elif op in ("softmax", "log_softmax", "l2_normalize", "concat", "cumsum"):
        attrs["axis"] = perm[attrs.get("axis", rank - 1)]
    elif op == "reverse":
        attrs["axes"] = tuple(perm[axis] for axis in attrs["axes"])
    elif op == "pad":
        attrs["widths"] = tuple(attrs["widths"][i] for i in inverse)
    elif op == "slice":
        for name in ("start", "stop", "steps"):
            attrs[name] = tuple(attrs[name][i] for i in inverse)
    else:
        return None
    back = [list(order).index(i) for i in range(len(order))]
    out = Value(_permuted(shape, back), node.out.dtype)
    return before, Node(op, inputs, [out], attrs, node.name), tuple(order)


def _on_columns(
    node: Node, perm: tuple[int, ...], makers: dict[Value, Node]
) -> tuple[list[Node], Node, tuple[int, ...]] | None:
    """Like :func:`_moved`, of a dense layer: ``kernel.T @ x`` for each example.

    One example is a matrix, whose product has the bias in it.
    """
    x = makers[node.inputs[0]].inputs[0]
    n, inner, *places = x.shape
    if perm != channels_last(len(x.shape)) or "columns" in node.attrs:
        return None
    lead, features = (n,) if n > 1 else (), node.out.shape[-1]
    sizes = inner, features
    flat, made = (Value((*lead, m, math.prod(places)), x.dtype) for m in sizes)
    out = Value((n, features, *places), node.out.dtype)
    inputs, attrs = [flat, *node.inputs[1:]], {"columns": True}
    layer = Node("dense", inputs, [made], attrs, node.name, node.folded)
    return [Node("reshape", [x], [flat]), layer], Node("reshape", [made], [out]), perm


def _meets(value: Value, graph: Graph, every: bool = False) -> bool:
    """Return whether a transpose of a value would meet another one, or vanish.

    Args:
      value: what would be transposed.
      graph: which reads it.
      every: whether it is to vanish in front of everything that reads it.
    """
    reached = {value}
    for node in graph.nodes:
        if reached.isdisjoint(node.inputs):
            continue
        if node.op == "transpose" or node.op.startswith("reduce_"):
            if not every:
                return True
        elif node.op in _PASSED:
            reached.update(node.outputs)
        elif every:
            return False
    return every and reached.isdisjoint(graph.outputs)


def _as_rows(node: Node, makers: dict[Value, Node]) -> bool:
    """Return whether a convolution is better said on rows of pixels than on channels.

    The width and the channels of a row are one axis in memory: a window as wide as its
    stride, or as the image, is the same convolution on one channel with ``k * C``
    columns. On what comes channel-last this saves the transpose; what comes from
    another convolution is channel-first already.
    """
    p, window = node.attrs, node.inputs[1].shape[:-2] if node.op == "conv" else (1, 1)
    if node.op != "conv" or len(window) != 2 or window[1] == 1 or "spread" in p:
        return False
    if p["groups"] > 1:
        return False
    if any(map(any, p["padding"])) or set(p["dilation"]) != {1}:
        return False
    if window[1] not in (p["strides"][1], node.inputs[0].shape[2]):
        return False
    value = node.inputs[0]
    while (maker := makers.get(value)) and maker.op in ELEMENTWISE | {"pad", "slice"}:
        value = next((v for v in maker.inputs if v.data is None), maker.inputs[0])
    return maker is None or maker.op not in _IMAGES


def _permuted(shape: Sequence[int], perm: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[i] for i in perm)
