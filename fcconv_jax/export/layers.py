"""The linear layers of a file, as its proof needs them: what each is to compute.

A layer says of a convolution or a matmul with a weight which parameter the weight is,
how its entries were moved, and the geometry that the model asks for. How a runtime's
file lays weights out is not in it: that is read off the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..messages.errors import ExportError
from .graph import Folded, Graph, Node, Source, Value


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear operation, as the model asks for it.

    Args:
      name: the path of its kernel's module.
      op: ``"conv"``, ``"dense"`` or ``"matmul"`` (groups of dense layers).
      kernel: where the kernel's entries come from; None where they are computed from
        several parameters or by more than moving them.
      kernel_shape: ``(*window, in, out)``, ``(in, out)``, or ``(*batch, m, k)``.
      bias: likewise; None also for a layer without a bias.
      has_bias: whether there is one.
      input_shape: of the activation, channel-last.
      output_shape: of the result.
      geometry: strides, padding, dilation, groups of a convolution; which operand the
        weight is, and what is swapped, of a matmul.
      made_of: the parameters that a computed kernel or bias comes from.
      folded: the affines that were folded into kernel and bias.
      stored: the dtype that the kernel is rounded to in the file; empty for its own.
    """

    name: str
    op: str
    kernel: Source | None
    kernel_shape: tuple[int, ...]
    bias: Source | None
    has_bias: bool
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    geometry: tuple[tuple[str, Any], ...]
    made_of: tuple[str, ...] = ()
    folded: Folded | None = None
    stored: str = ""

    @property
    def form(self) -> str:
        """``"conv"`` or ``"dense"``."""
        return "conv" if self.op == "conv" else "dense"

    @property
    def constant(self) -> bool:
        """Whether its weight comes from no parameter, as the matrices of a resize."""
        return self.kernel is None and not self.made_of

    @property
    def options(self) -> dict[str, Any]:
        """The geometry by name."""
        return dict(self.geometry)

    @property
    def terms(self) -> int:
        """How many products one output sums."""
        if self.op == "conv":
            return int(np.prod(self.kernel_shape[:-1]))
        if self.op == "dense":
            return self.kernel_shape[0]
        adjoint = self.options["adj_a" if self.options["side"] == 0 else "adj_b"]
        summed = -1 if (self.options["side"] == 0) != adjoint else -2
        return self.kernel_shape[summed]


def layers_of(graph: Graph) -> list[Layer]:
    """Return the layers of a graph, in the order in which they run."""
    return [_layer(node) for node in graph.linear()]


def _layer(node: Node) -> Layer:
    weight = node.weight
    assert weight is not None
    side = node.inputs.index(weight)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    geometry = dict(node.attrs)
    if node.op == "matmul":
        geometry["side"] = side
    computed = [v for v in (weight, bias) if v is not None and v.source is None]
    made_of = frozenset[str]().union(*(value.leaves for value in computed))
    return Layer(
        name=node.name,
        op=node.op,
        # `stored` has the rounding: `expected` does it last, behind what was folded.
        kernel=weight.source and weight.source.before("round"),
        kernel_shape=weight.shape,
        bias=None if bias is None else bias.source,
        has_bias=bias is not None,
        input_shape=node.inputs[1 - side].shape,
        output_shape=node.out.shape,
        geometry=tuple(sorted(geometry.items())),
        made_of=tuple(sorted(made_of)),
        folded=node.folded,
        stored=weight.stored.name if weight.stored else "",
    )


def expected(
    layer: Layer, leaves: Mapping[str, np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Kernel and bias of a layer, from the parameters; None where not one's entries.

    Raises:
      ExportError: a parameter is missing or has another shape.
    """
    found = []
    for source in (layer.kernel, layer.bias):
        if source is None:
            found.append(None)
            continue
        if source.leaf not in leaves:
            near = ", ".join(sorted(leaves)[:6])
            raise ExportError(
                f"layer {layer.name!r} has the parameter {source.leaf!r}, which the "
                f"checkpoint lacks; it has {near}, ... Pass the params that were "
                "exported."
            )
        try:
            found.append(source.apply(np.asarray(leaves[source.leaf])))
        except ValueError as error:
            shape = np.shape(leaves[source.leaf])
            raise ExportError(
                f"parameter {source.leaf!r} has the shape {shape}, which does not fit "
                f"layer {layer.name!r}: {error}. Pass the params that were exported."
            ) from None
    kernel, bias = found
    if layer.folded is not None:
        # A computed kernel is compared with what was computed for the file.
        if kernel is None:
            return None, None
        kernel, bias = layer.folded.apply(kernel, bias)
    if kernel is not None and layer.stored:
        kernel = Source("").then("round", layer.stored).apply(kernel)
    return kernel, bias


def compute(
    layer: Layer, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Compute a layer on integers, exactly.

    In float64, whose sums of integers are exact to 2**53: as int64 has it, and as
    fast as a matrix product.

    Example:
      >>> layer = Layer("fc", "dense", None, (2, 1), None, False, (1, 2), (1, 1), ())
      >>> compute(layer, np.array([[1, 2]]), np.array([[3], [4]]), None)
      array([[11]])
    """
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    if layer.op == "conv":
        y = _convolve(x, kernel, layer.options)
    elif layer.op == "dense":
        y = x @ kernel
    else:
        options = layer.options
        a, b = (kernel, x) if options["side"] == 0 else (x, kernel)
        a = a.swapaxes(-1, -2) if options["adj_a"] else a
        b = b.swapaxes(-1, -2) if options["adj_b"] else b
        y = a @ b
    if bias is not None:
        y = y + bias
    return y.astype(np.int64)


def _convolve(
    x: np.ndarray, kernel: np.ndarray, options: Mapping[str, Any]
) -> np.ndarray:
    """A convolution as patches times a matrix for each group."""
    *window, inner, features = kernel.shape
    rank = len(window)
    if "spread" in options:
        (n, h, w, c), (sy, sx) = x.shape, options["spread"]
        spread = np.zeros((n, (h - 1) * sy + 1, (w - 1) * sx + 1, c))
        spread[:, ::sy, ::sx] = x
        x = spread
    pads: Sequence[Any] = ((0, 0), *options["padding"], (0, 0))
    x = np.pad(x, pads)
    spans = [(k - 1) * d + 1 for k, d in zip(window, options["dilation"])]
    axes = tuple(range(1, 1 + rank))
    views = np.lib.stride_tricks.sliding_window_view(x, spans, axis=axes)
    steps, spread = (
        tuple(slice(None, None, n) for n in options[name])
        for name in ("strides", "dilation")
    )
    every = slice(None)
    views = np.moveaxis(views[(every, *steps, every, *spread)], 1 + rank, -1)
    *places, _ = views.shape[: 2 + rank]  # (N, *out, *window, C)
    groups = options["groups"]
    made = []
    for g in range(groups):
        part = views[..., g * inner : (g + 1) * inner]
        columns = features // groups
        matrix = kernel[..., g * columns : (g + 1) * columns]
        rows = part.reshape(math.prod(places), math.prod(window) * inner)
        made.append(rows @ matrix.reshape(-1, columns))
    return np.concatenate(made, axis=-1).reshape(*places, features)


def constants_of(graph: Graph) -> tuple[Source, ...]:
    """The parameters that a graph reads besides the kernels and biases of layers."""
    linear = {id(v) for node in graph.linear() for v in node.inputs}
    reads = [v for part in graph.graphs() for v in part.reads()]
    found = [v.source for v in reads if v.source and id(v) not in linear]
    return tuple(dict.fromkeys(found))


def leaves_read(graph: Graph) -> list[str]:
    """Return the parameters that a graph reads, each once."""
    reads = [v for part in graph.graphs() for v in part.reads()]
    found = [leaf for value in reads for leaf in sorted(value.leaves)]
    return list(dict.fromkeys(found))


def unplaced_leaves(graph: Graph) -> list[str]:
    """Return the parameters besides those that are a layer's kernel or bias.

    Such as those that a norm folded into a layer, or a computed constant, comes from.
    """
    nodes = [node for part in graph.graphs() for node in part.linear()]
    weights = [v for node in nodes for v in node.inputs if v.data is not None]
    placed = {value.source.leaf for value in weights if value.source}
    reads = [v for part in graph.graphs() for v in part.reads() if v.source is None]
    computed = frozenset[str]().union(*(value.leaves for value in reads))
    folded = frozenset[str]().union(*(n.folded.leaves for n in nodes if n.folded))
    return sorted((set(graph.leaves) - placed) | computed | folded)


def computed_values(graph: Graph) -> dict[str, Value]:
    """The kernels that are computed from parameters, by the name of their layer."""
    return {
        node.name: node.weight
        for node in graph.linear()
        if node.weight is not None and node.weight.source is None
    }
