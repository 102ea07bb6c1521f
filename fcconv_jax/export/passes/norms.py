"""Norms that no layer can take, as the one operation that a runtime has for them."""

from __future__ import annotations

import numpy as np

from ..graph import Graph, Value, constant


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
        ones = constant(np.ones(mean.size, np.float32))
        node.op, node.inputs, node.attrs = (
            "batch_norm",
            [value, scale, shift, mean, ones],
            {},
        )
        changed = True
    graph.prune()
    return changed
