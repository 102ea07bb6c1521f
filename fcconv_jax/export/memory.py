"""Memory that a graph needs for its activations."""

from __future__ import annotations

from .graph import Graph, Value


def peak_bytes(graph: Graph) -> int:
    """Return the most bytes of activations alive at once, in program order.

    Example:
      >>> import numpy as np
      >>> from .graph import Node
      >>> x, y = (Value((4,), np.dtype("float32")) for _ in range(2))
      >>> peak_bytes(Graph([x], [y], [Node("relu", [x], [y])], ["x"], ["y"]))
      32
    """
    last: dict[Value, int] = dict.fromkeys(graph.outputs, len(graph.nodes))
    for number, node in reversed(list(enumerate(graph.nodes))):
        for value in node.inputs:
            if value.data is None:
                last.setdefault(value, number)
    alive = set(graph.inputs)
    peak = 0
    for number, node in enumerate(graph.nodes):
        # A node's inputs stay until its outputs are there.
        alive.update(node.outputs)
        peak = max(peak, sum(v.size * v.dtype.itemsize for v in alive))
        alive = {v for v in alive if last.get(v, -1) > number}
    return peak
