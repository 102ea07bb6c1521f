"""Fewer moves: reshapes, transposes and broadcasts that compute the same numbers.

A chain of reshapes and transposes becomes one reshape, transpose and reshape at most,
and vanishes if they undo each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...planning.factors import Factor, axes_of, regroup
from ..graph import ELEMENTWISE, FUSED, UNARY, VIEWS, Graph, Node, Value

BROADCASTING = ELEMENTWISE - FUSED - {"cast"}


def join_views(graph: Graph) -> bool:
    """Return each chain of reshapes and transposes, as short as it can be."""
    makers, changed = graph.producers(), False
    uses = graph.uses()
    for node in list(graph.nodes):
        if node.op not in VIEWS:
            continue
        chain = [node]
        while (before := makers.get(chain[-1].inputs[0])) and before.op in VIEWS:
            chain.append(before)
        root = chain[-1].inputs[0]
        short = shortest(root, chain[::-1])
        # A shared beginning stays where others read it: only what is own counts.
        own = next((i for i, n in enumerate(chain[1:], 1) if uses[n.out] > 1), None)
        if short is None or len(short) > len(chain):
            continue
        if len(short) == len(chain) and (own is not None or _alike(short, chain)):
            continue
        at = graph.nodes.index(node)
        value = root
        made: list[Node] = []
        for op, details in short:
            shape = details if op == "reshape" else [value.shape[i] for i in details]
            attrs = {"perm": details} if op == "transpose" else {}
            out = Value(tuple(shape), value.dtype)
            made.append(Node(op, [value], [out], attrs))
            value = out
        graph.nodes[at : at + 1] = made
        graph.replace(node.out, value)
        makers = graph.producers()
        uses = graph.uses()
        changed = True
    return changed


def shortest(
    root: Value, chain: Sequence[Node]
) -> list[tuple[str, tuple[int, ...]]] | None:
    """Return reshapes and transposes with the effect of a chain of them.

    Returns:
      Pairs of the operation and the new shape or the permutation; None where a reshape
      in the chain cuts through what a transpose has taken apart.
    """
    axes = list(axes_of(root.shape))
    for node in chain:
        if node.op == "transpose":
            axes = [axes[i] for i in node.attrs["perm"]]
            continue
        again = regroup([f for axis in axes for f in axis], node.out.shape)
        if again is None:
            return None
        axes = again
    target = chain[-1].out.shape
    joined = regroup([f for axis in axes for f in axis], (math.prod(target),))
    factors = list(joined[0]) if joined else []
    stored = sorted(factors, key=lambda factor: -factor[0])
    if stored == factors:
        return [] if target == root.shape else [("reshape", target)]
    split = tuple(n for _, n in stored)
    perm = tuple(stored.index(factor) for factor in factors)
    # Whole axes of the input, where the transpose moves those.
    steps: list[tuple[str, tuple[int, ...]]] = []
    whole = [a[0] for a in axes_of(root.shape) if a]
    if whole == stored and len(whole) == len(root.shape):
        steps.append(("transpose", perm))
    else:
        # Axes of one of the input may be where the target has them.
        order = _to_ones(root.shape, whole, axes) if whole == stored else None
        if order is not None:
            return [("transpose", order)]
        # Ones of the target are put in before the transpose, if that ends in it.
        moved = _with_ones(axes)
        if moved is not None:
            first, order = moved
            if first != root.shape:
                steps.append(("reshape", first))
            return [*steps, ("transpose", order)]
        if whole == stored:  # axes of one stay where they are
            own = [i for i, n in enumerate(root.shape) if n > 1]
            turned = iter([own[i] for i in perm])
            order = tuple(
                next(turned) if n > 1 else i for i, n in enumerate(root.shape)
            )
            split, perm = root.shape, order
            steps.append(("transpose", order))
        else:
            steps += [("reshape", split), ("transpose", perm)]
    moved_shape = tuple(split[i] for i in perm)
    if moved_shape != target:
        steps.append(("reshape", target))
    return steps


def turns(root: Value, chain: list[Node]) -> int:
    """Return how many transposes are left of a chain of views."""
    steps = shortest(root, chain) if chain else []
    if steps is None:
        return sum(node.op == "transpose" for node in chain)
    return sum(op == "transpose" for op, _ in steps)


def views_before(value: Value, makers: dict[Value, Node]) -> tuple[Value, list[Node]]:
    """Return the views that make a value, and what the first one takes."""
    chain: list[Node] = []
    while (maker := makers.get(value)) and maker.op in VIEWS:
        chain.append(maker)
        value = maker.inputs[0]
    return value, chain[::-1]


def views_after(
    value: Value, readers: dict[Value, Node], uses: dict[Value, int]
) -> list[Node]:
    """Return the views that follow a value, up to one that is read in two places."""
    chain: list[Node] = []
    while uses[value] == 1 and (reader := readers.get(value)) and reader.op in VIEWS:
        chain.append(reader)
        value = reader.out
    return chain


def _to_ones(
    shape: tuple[int, ...], whole: Sequence[Factor], axes: Sequence[Sequence[Factor]]
) -> tuple[int, ...] | None:
    """A permutation of whole axes, those of one with them, that ends in the target."""
    flat = [axis[0] for axis in axes if axis]
    if len(axes) != len(shape) or any(len(axis) > 1 for axis in axes):
        return None
    if sorted(flat) != sorted(whole):
        return None
    ones = iter([i for i, n in enumerate(shape) if n == 1])
    own = [i for i, n in enumerate(shape) if n > 1]
    return tuple(own[whole.index(axis[0])] if axis else next(ones) for axis in axes)


def _with_ones(axes):
    """A shape to reshape to and a permutation that ends in the target at once."""
    if any(len(axis) > 1 for axis in axes):
        return None
    flat = [axis[0] if axis else None for axis in axes]
    stored = sorted((f for f in flat if f is not None), key=lambda factor: -factor[0])
    # The target's axes of one are where they are to be before it is transposed.
    rest = iter(stored)
    placed = [None if factor is None else next(rest) for factor in flat]
    shape = tuple(1 if factor is None else factor[1] for factor in placed)
    order = [i if f is None else placed.index(f) for i, f in enumerate(flat)]
    return shape, tuple(order)


def _alike(short: Sequence[tuple[str, tuple[int, ...]]], chain: list[Node]) -> bool:
    """Return whether a chain is as short as it can be, to the shapes in between."""
    have = [
        (n.op, n.out.shape if n.op == "reshape" else n.attrs["perm"])
        for n in chain[::-1]
    ]
    return list(short) == have


def share_equal(graph: Graph) -> bool:
    """Merge operations that compute the same, such as views of one value."""
    seen: dict[tuple[object, ...], Value] = {}
    changed = False
    for node in list(graph.nodes):
        known = node.op in VIEWS | ELEMENTWISE | {"pad"}
        if not known and not node.op.startswith("reduce_"):
            continue
        inputs = [_number(v) for v in node.inputs]
        about = node.out.shape, node.out.dtype, *sorted(node.attrs.items())
        key = (node.op, *inputs, *about)
        first = seen.setdefault(key, node.out)
        if first is not node.out:
            graph.replace(node.out, first)
            changed = True
    return changed


def _number(value: Value) -> object:
    """A key that equal numbers share; a value itself else."""
    if value.data is None or value.size > 1 or value.leaves:
        return value
    return value.data.item(), value.dtype, value.shape


def delay_views(graph: Graph) -> bool:
    """Put relu and its like before a view: next to the layer that they follow.

    And a norm before a reshape that keeps the axis that it is over, the last one.
    """
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        norm = node.op in ("layer_norm", "rms_norm")
        if not norm and (node.op not in UNARY | FUSED or len(node.inputs) > 1):
            continue
        view = makers.get(node.inputs[0])
        if view is None or view.op not in VIEWS or uses[view.out] > 1:
            continue
        x = view.inputs[0]
        # To a matrix alone, which Gemm takes: else it saves nothing.
        if norm and (view.op != "reshape" or x.shape != _as_matrix(view.out.shape)):
            continue
        # The two nodes swap what they do, so that each stays where it is.
        inner = Value(x.shape, node.out.dtype)
        first = Node(node.op, [x, *node.inputs[1:]], [inner], node.attrs)
        view_out = Value(view.out.shape, node.out.dtype)
        second = Node(view.op, [inner], [view_out], view.attrs)
        at = graph.nodes.index(view)
        graph.nodes[at : at + 1] = [first, second]
        graph.replace(node.out, view_out)
        makers, uses, changed = graph.producers(), graph.uses(), True
        graph.prune()
    return changed


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return math.prod(shape[:-1]), shape[-1]


def delay_reshapes(graph: Graph) -> bool:
    """Put sums and products of reshaped values before the reshape, to meet others.

    Also where an operand isn't reshaped, but is a matrix for another node already.
    """
    makers, uses = graph.producers(), graph.uses()
    known: dict[tuple[Value, tuple[int, ...]], Value] = {}
    for node in graph.nodes:
        if node.op == "reshape":
            known[node.inputs[0], node.out.shape] = node.out
        values = [v for v in node.inputs if v.data is None]
        if node.op not in BROADCASTING or len(values) < 2:
            continue
        views = [m for v in values if (m := makers.get(v)) and m.op == "reshape"]
        shapes = {m.inputs[0].shape for m in views}
        whole = all(v.shape == node.out.shape for v in values)
        numbers = all(v.size == 1 for v in node.inputs if v.data is not None)
        if len(shapes) != 1 or not (whole and numbers):
            continue
        shape = shapes.pop()
        before = {view.out: view.inputs[0] for view in views}
        rest = [v for v in values if v not in before]
        # These reshapes must vanish, or two operands would reshape each other for ever.
        lone = shape == _as_matrix(node.out.shape) and all(uses[v] == 1 for v in before)
        if rest and not (lone and all((v, shape) in known for v in rest)):
            continue
        before |= {v: known[v, shape] for v in rest}
        inner = Value(shape, node.out.dtype)
        inputs = [
            v.moved("reshape", ()) if v.data is not None else before[v]
            for v in node.inputs
        ]
        outer = Value(node.out.shape, node.out.dtype)
        first = Node(node.op, inputs, [inner], node.attrs)
        at = graph.nodes.index(node)
        graph.nodes[at : at + 1] = [first, Node("reshape", [inner], [outer])]
        graph.replace(node.out, outer)
        graph.prune()
        return True
    return False


def delay_pads(graph: Graph) -> bool:
    """Put a pad before a reshape that adds or drops axes of one, to meet others."""
    makers, changed = graph.producers(), False
    for node in list(graph.nodes):
        view = makers.get(node.inputs[0]) if node.op == "pad" else None
        if view is None or view.op != "reshape":
            continue
        before, after = view.inputs[0].shape, view.out.shape
        widths = node.attrs["widths"]
        kept = [pair for n, pair in zip(after, widths) if n > 1]
        lost = any(any(pair) for n, pair in zip(after, widths) if n == 1)
        if lost or [n for n in before if n > 1] != [n for n in after if n > 1]:
            continue
        rest = iter(kept)
        wide = tuple(next(rest) if n > 1 else (0, 0) for n in before)
        shape = [n + sum(pair) for n, pair in zip(before, wide)]
        inner = Value(tuple(shape), node.out.dtype)
        outer = Value(node.out.shape, node.out.dtype)
        attrs = {**node.attrs, "widths": wide}
        at = graph.nodes.index(node)
        first = Node("pad", [view.inputs[0]], [inner], attrs)
        graph.nodes[at : at + 1] = [first, Node("reshape", [inner], [outer])]
        graph.replace(node.out, outer)
        makers, changed = graph.producers(), True
    return changed


def drop_zeros(graph: Graph) -> bool:
    """Drop sums with zeros, as ``sum`` of Python begins with one.

    And differences: a norm without a mean subtracts zeros.
    """
    changed = False
    for node in list(graph.nodes):
        if node.op not in ("add", "sub") or node.out.dtype.kind != "f":
            continue
        pairs = (node.inputs, node.inputs[::-1])
        for x, by in pairs if node.op == "add" else pairs[:1]:
            # A parameter of zeros, such as a new bias, stays: the proof looks for it.
            zero = by.data is not None and not by.leaves and not by.data.any()
            if zero and x.shape == node.out.shape and x.data is None:
                graph.replace(node.out, x)
                graph.nodes.remove(node)
                changed = True
                break
    return changed


def drop_broadcasts(graph: Graph) -> bool:
    """Leave to elementwise operations what they do themselves: to repeat entries."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        if node.op not in BROADCASTING:
            continue
        for i, value in enumerate(node.inputs):
            maker = makers.get(value)
            if maker is None or maker.op != "broadcast":
                continue
            small = maker.inputs[0]
            others = [v.shape for j, v in enumerate(node.inputs) if j != i]
            # Without the broadcast the result must still have its shape.
            if np.broadcast_shapes(small.shape, *others) == node.out.shape:
                node.inputs[i] = small
                changed = True
    return changed


def keep_dims(graph: Graph) -> bool:
    """Return a reduction that keeps its axes, where a reshape puts them back."""
    uses, makers, changed = graph.uses(), graph.producers(), False
    for node in graph.nodes:
        maker = makers.get(node.inputs[0]) if node.op == "reshape" else None
        if maker is None or not maker.op.startswith("reduce_"):
            continue
        axes, before = maker.attrs["axes"], maker.inputs[0].shape
        kept = tuple(1 if i in axes else n for i, n in enumerate(before))
        lone = uses[maker.out] == 1
        if maker.attrs["keepdims"] or node.out.shape != kept or not lone:
            continue
        maker.attrs["keepdims"] = True
        maker.outputs = [Value(kept, maker.out.dtype)]
        graph.replace(node.out, maker.out)
        node.inputs = [maker.out]
        changed = True
    return changed
