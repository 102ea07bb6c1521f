"""Passes over a graph: fewer operations that compute the same numbers.

Chains of reshapes and transposes become one reshape, transpose and reshape at most, and
vanish where they undo each other; biases join their layers; relu, softmax, gelu, means
and average pools are found in what JAX writes for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..planning.factors import axes_of, regroup
from .graph import ELEMENTWISE, UNARY, VIEWS, Graph, Node, Value

_BROADCASTING = ELEMENTWISE - {"cast", "gelu"}


def simplify(graph: Graph) -> Graph:
    """Runs all passes, in place, until nothing changes."""
    passes: tuple[Callable[[Graph], bool], ...] = (
        join_views,
        drop_broadcasts,
        share_views,
        keep_dims,
        add_biases,
        delay_views,
        find_activations,
        find_means,
        find_softmax,
        find_gelu,
    )
    changed = True
    while changed:
        changed = False
        for each in passes:
            changed |= each(graph)
            graph.prune()
    _name_layers(graph)
    return graph


def join_views(graph: Graph) -> bool:
    """Each chain of reshapes and transposes, as short as it can be."""
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
    """Reshapes and transposes that do what a chain of them does to its first input.

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
        # Ones of the target are put in before the transpose, if that ends in it.
        moved = _with_ones(stored, factors, axes)
        if moved is not None:
            first, order = moved
            if first != root.shape:
                steps.append(("reshape", first))
            return [*steps, ("transpose", order)]
        steps += [("reshape", split), ("transpose", perm)]
    moved_shape = tuple(split[i] for i in perm)
    if moved_shape != target:
        steps.append(("reshape", target))
    return steps


def _with_ones(stored, factors, axes):
    """A shape to reshape to and a permutation that ends in the target at once."""
    if any(len(axis) > 1 for axis in axes):
        return None
    flat = [axis[0] if axis else None for axis in axes]
    if [f for f in flat if f is not None] != factors:
        return None
    # The target's axes of one come last in the reshaped input, in their order.
    shape = [n for _, n in stored] + [1] * flat.count(None)
    ones = iter(range(len(stored), len(shape)))
    order = [next(ones) if f is None else stored.index(f) for f in flat]
    return tuple(shape), tuple(order)


def _alike(short: Sequence[tuple[str, tuple[int, ...]]], chain: list[Node]) -> bool:
    """Whether a chain is as short as it can be, to the shapes in between."""
    have = [
        (n.op, n.out.shape if n.op == "reshape" else n.attrs["perm"])
        for n in chain[::-1]
    ]
    return list(short) == have


def share_views(graph: Graph) -> bool:
    """One view where there are several alike of the same value."""
    seen: dict[tuple[object, ...], Value] = {}
    changed = False
    for node in list(graph.nodes):
        if node.op not in VIEWS:
            continue
        key = (node.inputs[0], node.op, node.out.shape, node.attrs.get("perm"))
        first = seen.setdefault(key, node.out)
        if first is not node.out:
            graph.replace(node.out, first)
            changed = True
    return changed


def delay_views(graph: Graph) -> bool:
    """Puts relu and its like before a view: next to the layer that they follow."""
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        if node.op not in UNARY | {"gelu"}:
            continue
        view = makers.get(node.inputs[0])
        if view is None or view.op not in VIEWS or uses[view.out] > 1:
            continue
        x = view.inputs[0]
        # The two nodes swap what they do, so that each stays where it is.
        inner = Value(x.shape, node.out.dtype)
        first = Node(node.op, [x], [inner], node.attrs)
        view_out = Value(view.out.shape, node.out.dtype)
        second = Node(view.op, [inner], [view_out], view.attrs)
        at = graph.nodes.index(view)
        graph.nodes[at : at + 1] = [first, second]
        graph.replace(node.out, view_out)
        makers, uses, changed = graph.producers(), graph.uses(), True
        graph.prune()
    return changed


def drop_broadcasts(graph: Graph) -> bool:
    """Leaves to elementwise operations what they do themselves: to repeat entries."""
    makers, changed = graph.producers(), False
    for node in graph.nodes:
        if node.op not in _BROADCASTING:
            continue
        for i, value in enumerate(node.inputs):
            maker = makers.get(value)
            if maker is None or maker.op != "broadcast":
                continue
            small = maker.inputs[0]
            others = [v.shape for j, v in enumerate(node.inputs) if j != i]
            if np.broadcast_shapes(small.shape, *others) == node.out.shape:
                node.inputs[i] = small
                changed = True
    return changed


def keep_dims(graph: Graph) -> bool:
    """A reduction that keeps its axes, where a reshape puts them back."""
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


def add_biases(graph: Graph) -> bool:
    """Gives a layer the constant that is added to each of its outputs' features."""
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        if node.op != "add":
            continue
        for y, bias in (node.inputs, node.inputs[::-1]):
            # Between them at most a reshape that keeps the features, as in heads.
            layer = makers.get(y)
            if layer is not None and layer.op == "reshape" and uses[y] == 1:
                layer = makers.get(layer.inputs[0])
            if layer is None or layer.op not in ("conv", "dense"):
                continue
            features = layer.out.shape[-1]
            ends = bias.data is not None and _covers(bias.shape, y.shape, features)
            if len(layer.inputs) > 2 or not ends or uses[layer.out] > 1 or uses[y] > 1:
                continue
            if node.out.shape != y.shape:
                continue
            flat = bias if bias.shape == (features,) else None
            layer.inputs.append(flat or bias.moved("reshape", (features,)))
            graph.replace(node.out, y)
            node.inputs = []
            node.outputs = []
            changed = True
            break
    graph.nodes = [node for node in graph.nodes if node.outputs]
    return changed


def _covers(bias: tuple[int, ...], y: tuple[int, ...], features: int) -> bool:
    """Whether a bias has one entry for each feature, the features' axes last in y."""
    if math.prod(bias) != features or len(bias) > len(y):
        return False
    trimmed = list(bias)
    while trimmed and trimmed[0] == 1 and math.prod(trimmed) == math.prod(trimmed[1:]):
        trimmed = trimmed[1:]
    return features == 1 or tuple(trimmed) == tuple(y[len(y) - len(trimmed) :])


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


def _name_layers(graph: Graph) -> None:
    """Names each layer by the path of its kernel's module; a second use by number."""
    seen: dict[str, int] = {}
    for node in graph.linear():
        weight = node.weight
        assert weight is not None
        if weight.source is not None:
            path = weight.source.leaf
        else:
            path = "+".join(sorted(weight.leaves)) or "constant"
        path = path.removeprefix("params/").removesuffix("/kernel")
        # These set a name apart from its number, here and in the files.
        path = path.translate(dict.fromkeys(map(ord, "#;@"), "_"))
        seen[path] = seen.get(path, 0) + 1
        node.name = path if seen[path] == 1 else f"{path}#{seen[path]}"
