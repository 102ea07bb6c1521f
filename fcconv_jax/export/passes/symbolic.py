"""Replaces the sizes in a graph by what they are for any size of the inputs.

No symbol is traced: the graph is compared, node by node, with graphs of the same model
on inputs of other sizes. What differs must be a shape that a runtime can work out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...messages.errors import ExportError
from ..graph import VIEWS, Graph, Node, Value

# Where a slice ends that takes an axis to its end; runtimes cut it.
END = 2**31 - 1
COPIED, REST = 0, -1
_Places = dict[tuple[int, ...], tuple[Value, int]]


def make_symbolic(graph: Graph, others: Mapping[str, Graph]) -> None:
    """Set the symbolic sizes of values, and the numbers of nodes that follow them.

    Args:
      graph: rewritten in place.
      others: by the name of a size, the same graph with another such size.

    Raises:
      ExportError: a node depends on a size in another way than by its shape.
    """
    names: dict[tuple[int, ...], str] = {}
    for parts in zip(*(each.graphs() for each in (graph, *others.values()))):
        # Nodes are compared by their position: a model that branches on a size has
        # others.
        if len({len(part.nodes) for part in parts}) > 1:
            raise depends("number of operations")
        for values in zip(*(part.inputs for part in parts)):
            _mark(values, [*others], names)
        places = _places(zip(*(part.inputs for part in parts)))
        for nodes in zip(*(part.nodes for part in parts)):
            if len({node.op for node in nodes}) > 1:
                raise depends("sequence of operations")
            for values in zip(*(node.outputs for node in nodes)):
                _mark(values, [*others], names)
            _adapt(nodes, places)
            places |= _places(zip(*(node.outputs for node in nodes)), nodes[0].op)


def depends(operation: str) -> ExportError:
    """Return the error for an operation that is another one for each size."""
    return ExportError(
        f"Expected a model for any size, got one whose {operation} depends on the "
        "size. Drop any_batch=True or any_size=True to export it for one size."
    )


def _mark(
    values: Sequence[Value], changed: Sequence[str], names: dict[tuple[int, ...], str]
) -> None:
    if len({len(value.shape) for value in values}) > 1:
        raise depends("number of axes")
    dims: list[int | str] = []
    for sizes in zip(*(value.shape for value in values)):
        by = [name for name, n in zip(changed, sizes[1:]) if n != sizes[0]]
        if by and sizes not in names:
            # Sizes that follow from one, such as its half, get names of their own.
            used = sum(known.startswith(by[0]) for known in names.values())
            names[sizes] = f"{by[0]}_{used}" if used else by[0]
        dims.append(names[sizes] if by else sizes[0])
    values[0].dims = tuple(dims)


def _places(tuples: Iterable[Sequence[Value]], op: str = "") -> _Places:
    """Where sizes are found when a file runs, by what they are in each graph."""
    if op in VIEWS:  # a writer may drop them
        return {}
    return {
        sizes: (values[0], axis)
        for values in tuples
        for axis, sizes in enumerate(zip(*(value.shape for value in values)))
    }


def _adapt(nodes: Sequence[Node], places: _Places) -> None:
    """Set what one of equal nodes is told about shapes."""
    node = nodes[0]
    for values in zip(*(each.inputs for each in nodes)):
        # A constant that depends on the size has no place in a file for all sizes.
        if not _equal(values):
            raise depends(node.op)
    shapes = [each.out.shape for each in nodes]
    varying = [i for i, sizes in enumerate(zip(*shapes)) if len({*sizes}) > 1]
    if node.op in ("reshape", "broadcast") and varying:
        node.attrs["dims"] = _dims(nodes, varying, places)
    for name, value in list(node.attrs.items()):
        given = [each.attrs.get(name) for each in nodes]
        if name in ("bodies", "dims") or all(other == value for other in given):
            continue
        if node.op == "slice":
            pairs = zip(zip(*given), zip(*(each.inputs[0].shape for each in nodes)))
            node.attrs[name] = tuple(_place(at, sizes) for at, sizes in pairs)
        elif name == "padding" and all(map(_is_same, nodes)):
            node.attrs["same"] = True
        elif name != "size" or len({_scales(each) for each in nodes}) > 1:
            raise depends(node.op)


def _equal(values: Sequence[Value]) -> bool:
    """Whether constants are the same; what is computed always is."""
    first, *others = [value.data for value in values]
    if first is None:
        return all(other is None for other in others)
    return all(
        other is not None
        and other.shape == first.shape
        and (other is first or other.tobytes() == first.tobytes())
        for other in others
    )


def _dims(
    nodes: Sequence[Node], varying: Sequence[int], places: _Places
) -> tuple[Any, ...]:
    """The shape that a reshape or a broadcast is given.

    A size is a number, or a value and its axis.
    """
    sizes = list(zip(*(node.out.shape for node in nodes)))
    inner = list(zip(*(node.inputs[0].shape for node in nodes)))
    dims: list[Any] = [each[0] for each in sizes]
    for i in varying:
        if nodes[0].op == "broadcast":
            if inner[i - len(sizes)] != sizes[i]:
                raise depends("broadcast")
            dims[i] = 1  # the operand's own size
        elif len(varying) > 1 and inner[i : i + 1] == sizes[i : i + 1]:
            dims[i] = COPIED
        elif REST not in dims:
            dims[i] = REST
        elif sizes[i] in places:
            dims[i] = places[sizes[i]]
        else:
            raise depends("reshape")
    return tuple(dims)


def _place(places: Sequence[int], sizes: Sequence[int]) -> int:
    """A place in a slice's axis, of each size: from the start, or from the end."""
    if len({*places}) == 1:
        return places[0]
    behind = {place - size for place, size in zip(places, sizes)}
    if len(behind) > 1:
        raise depends("slice")
    # An end of 0 from behind would be the start.
    return behind.pop() or END


def _is_same(node: Node) -> bool:
    """Whether a convolution or a pool pads as TensorFlow's SAME does."""
    p = node.attrs
    window = p.get("window") or node.inputs[1].shape[:-2]
    spread = p.get("dilation", (1,) * len(window))
    # Images are channel-first here.
    for n, k, s, d, padding in zip(
        node.inputs[0].shape[2:], window, p["strides"], spread, p["padding"]
    ):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        if padding != (total // 2, total - total // 2):
            return False
    return "spread" not in p and "rows" not in p


def _scales(node: Node) -> tuple[float, ...]:
    inner = node.inputs[0].shape[2:]
    return tuple(n / m for n, m in zip(node.attrs["size"], inner))


def rescale(graph: Graph, name: str, size: int, given: int) -> None:
    """Give the values of a graph another size: for files that begin with one."""
    for part in graph.graphs():
        for value in {*part.inputs, *(v for n in part.nodes for v in n.outputs)}:
            dims = value.dims or value.shape
            value.shape = tuple(
                n * given // size if isinstance(d, str) and d.startswith(name) else n
                for n, d in zip(value.shape, dims)
            )
