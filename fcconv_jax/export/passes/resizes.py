"""Finds resizes with aligned corners in the products with matrices that JAX writes."""

from __future__ import annotations

import numpy as np

from ..graph import Graph, Node, Value


def find_resizes(graph: Graph) -> bool:
    """Two products along two axes of an image, as of ``scale_and_translate``.

    ``jax.image.resize``, whose pixels have their corners elsewhere, is found as a call.
    """
    uses, makers = graph.uses(), graph.producers()
    for second in graph.nodes:
        before = makers.get(second.inputs[0])
        perm: tuple[int, ...] = (0, 1, 2, 3)
        first = before
        if before is not None and before.op == "transpose":
            perm, first = before.attrs["perm"], makers.get(before.inputs[0])
        if first is None or not _aligned(first) or not _aligned(second):
            continue
        # The axes of the first product's input; it goes over the last.
        kept = sorted({0, 1, 2} - {perm[3]})
        # Values that others read stay; a resize goes along two different axes.
        if uses[second.inputs[0]] > 1 or uses[first.out] > 1 or perm[3] == 3:
            continue
        x = first.inputs[0]
        maker = makers.get(x)
        place = maker.attrs["perm"] if maker and maker.op == "transpose" else range(4)
        kept.sort(key=lambda axis: place[axis])
        rows, columns = sorted((3, perm[3]), key=lambda axis: place[axis])
        order = (kept[0], rows, columns, kept[1])
        sizes = {3: first.out.shape[3], perm[3]: second.out.shape[3]}
        size = sizes[rows], sizes[columns]
        image = Value(tuple(x.shape[i] for i in order), x.dtype)
        wide = Value((image.shape[0], *size, image.shape[3]), x.dtype)
        back = tuple(order.index(i) for i in perm)
        out = Value(second.out.shape, x.dtype)
        at = graph.nodes.index(second)
        graph.nodes[at : at + 1] = [
            Node("transpose", [x], [image], {"perm": order}),
            Node("resize", [image], [wide], {"mode": "aligned", "size": size}),
            Node("transpose", [wide], [out], {"perm": back}),
        ]
        graph.replace(second.out, out)
        # The graph has changed under the loop: rewrite calls again.
        return True
    return False


def _aligned(node: Node) -> bool:
    """Return whether a node interpolates along the last of four axes."""
    weight = node.weight
    if node.op != "dense" or len(node.inputs) > 2 or weight is None or weight.leaves:
        return False
    inner, outer = weight.shape
    if weight.data is None or len(node.out.shape) != 4 or min(inner, outer) < 2:
        return False
    # Aligned corners: the first and the last pixel stay where they are.
    places = np.arange(outer) * (inner - 1) / (outer - 1)
    first = np.minimum(places.astype(int), inner - 2)
    share = (places - first)[:, None]
    eye = np.eye(inner)
    want = (1 - share) * eye[first] + share * eye[first + 1]
    # Float32 rounds shares by 1e-7 or so; pixels placed otherwise differ by far more.
    return bool(np.abs(weight.data.T - want).max() < 1e-5)
