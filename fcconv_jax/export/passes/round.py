"""Rounds weights to 16 bits, as the file stores them."""

from __future__ import annotations

import numpy as np

from ...messages.errors import ExportError
from ..graph import Graph, Value


def round_weights(graph: Graph, dtype: np.dtype) -> None:
    """Round the weights of linear layers and the tables of embeddings, in place.

    Biases and norms stay as they are: they take little space.

    Raises:
      ExportError: an entry is beyond the dtype's range.
    """
    done: dict[Value, Value] = {}
    for part in graph.graphs():
        for node in part.nodes:
            value = node.inputs[0] if node.op == "gather" else node.weight
            if value is None or value.data is None or value.dtype != np.float32:
                continue
            # The program's own tables, such as a resize's matrix, keep float32.
            if not value.leaves:
                continue
            # Layers that share a weight go on sharing the rounded one.
            if value not in done:
                with np.errstate(over="ignore"):
                    done[value] = value.rounded(dtype)
                rounded = done[value].data
                assert rounded is not None
                # Infinities of the checkpoint's own are not due to the rounding.
                if np.isinf(rounded).sum() > np.isinf(value.data).sum():
                    name = ", ".join(sorted(value.leaves))
                    raise ExportError(
                        f"Expected weights within the range of {dtype.name}, got "
                        f"{np.abs(value.data).max():.3g} in {name}. Drop weights=."
                    )
            node.inputs = [done[value] if v is value else v for v in node.inputs]
