"""Finds depth-to-space and space-to-depth in reshapes and transposes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..graph import VIEWS, Graph, Node, Value


def find_blocks(graph: Graph, images: Literal["first", "last"]) -> bool:
    """Replace chains of views that move blocks of pixels to channels, or back."""
    makers, uses, changed = graph.producers(), graph.uses(), False
    for node in graph.nodes:
        if node.op != "reshape" or len(node.out.shape) != 4:
            continue
        chain = [node]
        while (before := makers.get(chain[-1].inputs[0])) and before.op in VIEWS:
            # Something else reads the value in between, so it has to stay.
            if uses[before.out] > 1:
                break
            chain.append(before)
        x = chain[-1].inputs[0]
        # Moving blocks takes a reshape, a transpose and a reshape at least.
        if len(chain) < 3:
            continue
        if images == "first" and len(x.shape) in (2, 3):
            changed |= _from_columns(graph, node, x, chain[::-1])
            continue
        found = _block(x.shape, chain[::-1], images) if len(x.shape) == 4 else None
        if found is not None:
            node.op, node.inputs, node.attrs = found[0], [x], found[1]
            changed = True
    graph.prune()
    return changed


def _from_columns(graph: Graph, node: Node, x: Value, chain: list[Node]) -> bool:
    """Replace a chain that begins with columns, which are the pixels of images."""
    n, c, h, w = node.out.shape
    # Columns don't show the image's sides, so every size that divides both is tried.
    for size in range(2, min(h, w) + 1):
        shape = (n, c * size**2, h // size, w // size)
        if h % size or w % size or x.shape[-2] != shape[1]:
            continue
        whole = Value(shape, x.dtype)
        view = Node("reshape", [x], [whole])
        found = _block(shape, chain, "first")
        if found is not None:
            graph.nodes.insert(graph.nodes.index(node), view)
            node.op, node.inputs, node.attrs = found[0], [whole], found[1]
            return True
    return False


def _block(
    shape: tuple[int, ...], chain: list[Node], images: str
) -> tuple[str, dict[str, Any]] | None:
    """Return the operation with the effect of a chain of views, if there is one."""
    made = chain[-1].out.shape
    axes = (1, 2) if images == "last" else (2, 3)
    grown = [made[axis] / shape[axis] for axis in axes]
    size = max(grown[0], 1 / grown[0])
    if grown[0] != grown[1] or size < 2 or not size.is_integer():
        return None
    # Where each entry goes shows the effect of a chain, however it is written.
    x = y = np.arange(np.prod(shape)).reshape(shape)
    for node in chain:
        moved = node.op == "transpose"
        y = y.transpose(node.attrs["perm"]) if moved else y.reshape(node.out.shape)
    small, large, name = x, y, "depth_to_space"
    if grown[0] < 1:
        small, large, name = y, x, "space_to_depth"
    options: dict[str, Any] = {"blocksize": int(size)}
    if images == "last":
        small, large = small.transpose(0, 3, 1, 2), large.transpose(0, 3, 1, 2)
    modes = ("DCR", "CRD") if images == "first" and small is x else ("DCR",)
    for mode in modes:
        if np.array_equal(_to_space(small, int(size), mode), large):
            more = {"mode": mode} if images == "first" and small is x else {}
            return name, {**options, **more}
    return None


def _to_space(x: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Depth-to-space of channel-first images, as ONNX defines it."""
    n, c, h, w = x.shape
    # No blocks of this size: x itself has another shape than the larger image.
    if c % size**2:
        return x
    if mode == "DCR":
        split, order = (n, size, size, -1, h, w), (0, 3, 4, 1, 5, 2)
    else:
        split, order = (n, -1, size, size, h, w), (0, 1, 4, 2, 5, 3)
    return x.reshape(split).transpose(order).reshape(n, -1, h * size, w * size)
