"""Runs the passes over a graph: fewer operations that compute the same numbers."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ..graph import FUSED, VIEWS, Graph, Node, Value, constant
from .activations import find_fused
from .norms import find_norms
from .patterns import find_activations, find_log_softmax, find_means, find_softmax
from .resizes import find_resizes
from .views import (
    delay_pads,
    delay_reshapes,
    delay_views,
    drop_broadcasts,
    drop_zeros,
    join_views,
    keep_dims,
    share_equal,
)

# Operations that pad themselves, and with what.
_PADDED = {"conv": 0.0, "pool_max": -math.inf, "pool_mean": 0.0}


def simplify(
    graph: Graph, fused: frozenset[str] = FUSED, any_padding: bool = False
) -> Graph:
    """Run all passes, in place, until nothing changes.

    Args:
      graph: what is rewritten.
      fused: what the runtime has as one operation.
      any_padding: whether its convolutions pad by any widths, not only as SAME does.
    """
    fuse = functools.partial(find_fused, names=fused)
    norms = functools.partial(find_norms, names=fused)
    passes: tuple[Callable[[Graph], bool], ...] = (
        join_views,
        drop_zeros,
        drop_broadcasts,
        share_equal,
        keep_dims,
        add_biases,
        functools.partial(absorb_pads, shared=any_padding),
        # Here and at the end: a view moved past one of x * x hides a gelu or a norm.
        fuse,
        find_means,
        norms,
        delay_views,
        delay_pads,
        delay_reshapes,
        find_activations,
        find_means,
        find_softmax,
        fuse,
    )
    if "resize" in fused:
        passes += (find_resizes,)
    if "log_softmax" in fused:
        passes += (find_log_softmax,)
    passes += (norms,)
    for part in graph.graphs():
        part.rewrite(passes)
    _name_layers(graph)
    return graph


def add_biases(graph: Graph) -> bool:
    """Give a layer the constant that is added to its outputs' features."""
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        if node.op != "add":
            continue
        for y, bias in (node.inputs, node.inputs[::-1]):
            # Between them at most views that keep the features, as in heads, or a slice
            # that does, as of a transposed convolution.
            layer, views = makers.get(y), list[Node]()
            while layer and layer.op in VIEWS | {"slice"} and uses[layer.out] == 1:
                views.append(layer)
                layer = makers.get(layer.inputs[0])
            if layer is None or layer.op not in ("conv", "dense"):
                continue
            # A layer has one bias, and a bias does not broadcast the outputs.
            if bias.data is None or len(layer.inputs) > 2 or node.out.shape != y.shape:
                continue
            if uses[layer.out] > 1 or uses[y] > 1:
                continue
            features = layer.out.shape[-1]
            short = not views or (len(views) == 1 and views[0].op != "transpose")
            if short and _covers(bias.shape, y.shape, features):
                flat = bias if bias.shape == (features,) else None
                layer.inputs.append(flat or bias.moved("reshape", (features,)))
            # Transposed convolutions as a dense layer: one bias for all places of a
            # window.
            elif layer.op == "dense" and _repeats(bias, layer, views[::-1]):
                flat = bias.moved("reshape", (bias.size,))
                layer.inputs.append(flat.moved("tile", features // bias.size))
            else:
                continue
            graph.replace(node.out, y)
            node.inputs = []
            node.outputs = []
            changed = True
            break
    graph.nodes = [node for node in graph.nodes if node.outputs]
    return changed


def multiply(graph: Graph) -> None:
    """Multiply by the reciprocals of numbers, for chips that do not divide."""
    for node in graph.nodes:
        by = node.inputs[-1]
        if node.op != "div" or by.data is None or by.leaves or by.dtype != np.float32:
            continue
        if node.inputs[0].data is None and by.data.all():
            # In float64, so that the reciprocal is rounded once.
            inverse = 1 / by.data.astype(np.float64)
            node.op = "mul"
            node.inputs = [node.inputs[0], constant(inverse, np.float32)]


def absorb_pads(graph: Graph, shared: bool = False) -> bool:
    """Give a convolution or a pool the padding of its spatial axes in front of it.

    Args:
      graph: rewritten in place.
      shared: whether several convolutions may each have a pad that is one before them.
    """
    makers, uses, changed = graph.producers(), graph.uses(), False
    convs = Counter(node.inputs[0] for node in graph.nodes if node.op == "conv")
    for node in list(graph.nodes):
        x = node.inputs[0] if node.op in _PADDED else None
        pad = makers.get(x) if x is not None else None
        row: Node | None = None
        if pad is not None and pad.op == "reshape" and shared:  # of one row
            row, pad = pad, makers.get(pad.inputs[0])
        if x is None or pad is None or pad.op != "pad":
            continue
        if uses[x] > (max(convs[x], 1) if shared else 1):
            continue
        first, *widths, last = pad.attrs["widths"]
        # Operations pad the spatial axes alone, and with one value each.
        if any(first + last) or pad.attrs["value"] != _PADDED[node.op]:
            continue
        before = pad.inputs[0]
        if row is not None:
            n, *rest = pad.out.shape
            if uses[pad.out] > 1 or len(rest) != 2 or row.out.shape != (n, 1, *rest):
                continue
            widths = [(0, 0), *widths]
        # A mean over valid entries counts a pad's zeros, but not its own padding.
        if len(widths) != 2 or node.attrs.get("valid"):
            continue
        both = zip(node.attrs["padding"], widths)
        padding = tuple((a + c, b + d) for (a, b), (c, d) in both)
        window = node.attrs.get("window", ())
        if any(max(pair) >= k for pair, k in zip(padding, window)):
            continue  # ONNX Runtime has no window of padding alone
        if row is not None:
            flat = before
            before = Value((flat.shape[0], 1, *flat.shape[1:]), flat.dtype)
            at = graph.nodes.index(node)
            graph.nodes.insert(at, Node("reshape", [flat], [before]))
        node.attrs = {**node.attrs, "padding": padding}
        node.inputs[0] = before
        changed = True
    return changed


def _covers(bias: tuple[int, ...], y: tuple[int, ...], features: int) -> bool:
    """Whether a bias has one entry for each feature, the features' axes last in y."""
    if math.prod(bias) != features or len(bias) > len(y):
        return False
    trimmed = list(bias)
    while trimmed and trimmed[0] == 1 and math.prod(trimmed) == math.prod(trimmed[1:]):
        trimmed = trimmed[1:]
    return features == 1 or tuple(trimmed) == tuple(y[len(y) - len(trimmed) :])


def _repeats(bias: Value, layer: Node, views: Sequence[Node]) -> bool:
    """Whether views move a layer's features so that a bias is added to each block.

    So do those of a transposed convolution, whose window is in the features.
    """
    features = layer.out.shape[-1]
    if bias.size < 2 or features % bias.size or any(v.op == "slice" for v in views):
        return False
    places = np.arange(features, dtype=np.int32) % bias.size
    moved = np.broadcast_to(places, layer.out.shape)
    for view in views:
        turned = view.op == "transpose"
        shape = view.out.shape
        moved = moved.transpose(view.attrs["perm"]) if turned else moved.reshape(shape)
    wanted = np.arange(bias.size, dtype=np.int32).reshape(bias.shape)
    return bool((moved == wanted).all())


def _name_layers(graph: Graph) -> None:
    """Name each layer by the path of its kernel's module; a second use by number."""
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
