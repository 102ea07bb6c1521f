"""A program as a small graph of the few operations that edge runtimes have.

One engine for all writers: a trace is lowered to this graph once
(:mod:`fcconv_jax.export.lowering`), and each runtime's writer spells the same
operations in its own way. Images are channel-last, kernels ``(*window, in, out)``.

=============  ====================================================================
``conv``       x, kernel[, bias]; strides, padding, dilation, groups; ``spread`` of a
               transposed one: zeros between inputs, as in ``lhs_dilation``
``dense``      x ``(*lead, in)``, kernel ``(in, out)``[, bias]
``matmul``     a ``(*batch, m, k)``, b ``(*batch, k, n)``; adj_a, adj_b: last axes
               swapped
elementwise    neg, exp, tanh, relu, ..., add, mul, max, ..., select, cast, clip, gelu
``reduce_*``   sum, mean, max, min, prod; axes, keepdims
``pool_*``     max, mean: window, strides, padding of the spatial axes
``resize``     of the spatial axes: mode nearest or linear, half-pixel, or aligned:
               linear, with aligned corners; size
movement       reshape, transpose, broadcast, concat, slice, pad, reverse, gather
``softmax``    over the last axis, and ``log_softmax``, ``l2_normalize``
``one_hot``    of integers, ``depth`` features last; zeros for others
``argmax``     over ``axis``, and ``argmin``, ``cumsum``
``top_k``      values and indices, the last axis
loops          scan, while, cond, see :mod:`fcconv_jax.export.lowering.loops`
=============  ====================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

Step = tuple[str, tuple[Any, ...]]

# Operations on a weight, or on two activations.
LINEAR = ("conv", "dense", "matmul")
UNARY = frozenset(
    """abs ceil cos erf exp floor log logistic neg not relu relu6 round rsqrt sign sin
    sqrt tanh""".split()
)
BINARY = frozenset(
    """add and div eq ge gt le lt max min mul ne or pow rem sub""".split()
)
# Activations that JAX writes in several operations, and runtimes in one.
FUSED = frozenset(
    """celu elu gelu hard_sigmoid hard_swish leaky_relu mish prelu selu silu softplus
    softsign""".split()
)
# What else some runtimes have one operation for.
WHOLE = frozenset(
    "l2_normalize layer_norm log_softmax one_hot resize rms_norm transposed".split()
)
# What holds graphs of its own.
LOOPS = frozenset("cond scan while".split())
ELEMENTWISE = UNARY | BINARY | FUSED | {"cast", "select"}
# Bytes from which equal constants are worth looking for.
_LARGE = 1024
VIEWS = frozenset({"reshape", "transpose"})


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a constant's entries come from: a parameter, moved by these steps.

    Args:
      leaf: the parameter's path.
      steps: reshapes, transposes, slices, reversals, tilings and roundings, in order.
    """

    leaf: str
    steps: tuple[Step, ...] = ()

    def then(self, kind: str, *details: Any) -> Source:
        """Return the same, moved once more."""
        return Source(self.leaf, (*self.steps, (kind, details)))

    def before(self, kind: str) -> Source:
        """Return the same without steps of one kind."""
        steps = tuple(step for step in self.steps if step[0] != kind)
        return Source(self.leaf, steps)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Return the constant's entries, from the parameter's.

        Example:
          >>> moved = Source("w").then("transpose", (1, 0)).then("reshape", (6,))
          >>> moved.apply(np.arange(6).reshape(2, 3))
          array([0, 3, 1, 4, 2, 5])
        """
        for kind, details in self.steps:
            array = _STEPS[kind](array, *details)
        return array


_STEPS: dict[str, Any] = {
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, perm: x.transpose(perm),
    "slice": lambda x, start, stop, step: x[tuple(map(slice, start, stop, step))],
    "reverse": lambda x, axes: np.flip(x, axes),
    "tile": np.tile,
    "round": lambda x, dtype: x.astype(jnp.dtype(dtype)).astype(x.dtype),
}


@dataclasses.dataclass(eq=False)
class Value:
    """An array in a graph.

    Args:
      shape: its shape.
      dtype: its dtype.
      data: its entries, where it is constant.
      source: the parameter that a constant is, but for its arrangement.
      leaves: the parameters that a constant is computed from.
      stored: the dtype that a constant was rounded to, and has in the file.
      dims: its shape, with names for sizes that a file leaves open; None if it has one
        shape only.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    data: np.ndarray | None = None
    source: Source | None = None
    leaves: frozenset[str] = frozenset()
    stored: np.dtype | None = None
    dims: tuple[int | str, ...] | None = None

    @property
    def size(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    def moved(self, kind: str, *details: Any) -> Value:
        """Return a constant, moved by one step."""
        assert self.data is not None
        data = _STEPS[kind](self.data, *details)
        source = self.source and self.source.then(kind, *details)
        known = source, self.leaves, self.stored
        return Value(tuple(data.shape), self.dtype, data, *known)

    def rounded(self, dtype: np.dtype) -> Value:
        """Return a constant, rounded to a dtype that the file has for it."""
        assert self.data is not None
        made = self.moved("round", dtype.name)
        return dataclasses.replace(made, stored=dtype)

    def repeated(self, data: ArrayLike) -> Value:
        """Return a constant with repeated entries: no rearranged parameter any more."""
        data = np.ascontiguousarray(data)
        return Value(tuple(data.shape), self.dtype, data, None, self.leaves)


def same_content(array: np.ndarray) -> object:
    """A key that large arrays of the same entries share, so that they are stored once.

    Small ones are told apart: quantizers give each bias a scale of its own.
    """
    if array.nbytes < _LARGE:
        return None
    # As bytes: hashlib reads no bfloat16.
    content = np.ascontiguousarray(array).view(np.uint8)
    return array.shape, str(array.dtype), hashlib.sha256(content.data).digest()


def constant(data: ArrayLike, dtype: DTypeLike | None = None) -> Value:
    """Return a constant that comes from no parameter."""
    array = np.asarray(data, dtype)
    return Value(tuple(array.shape), array.dtype, array)


@dataclasses.dataclass(frozen=True, eq=False)
class Folded:
    """Affines that were folded into the kernel and the bias of a layer.

    Args:
      rows: ``(2, in)`` in float64: the scale and the shift of the layer's input.
      columns: ``(2, out)``: those of its output.
      leaves: the parameters that they come from.
    """

    rows: np.ndarray
    columns: np.ndarray
    leaves: frozenset[str] = frozenset()

    @classmethod
    def identity(cls, inner: int, features: int) -> Folded:
        """Affines that change nothing."""
        rows, columns = (np.stack([np.ones(n), np.zeros(n)]) for n in (inner, features))
        return cls(rows, columns)

    def then(
        self, behind: bool, scale: np.ndarray, shift: np.ndarray, leaves: frozenset[str]
    ) -> Folded:
        """Return the same, and one more affine behind the layer, or in front of it."""
        leaves = self.leaves | leaves
        if behind:
            old = self.columns
            columns = np.stack([old[0] * scale, old[1] * scale + shift])
            return Folded(self.rows, columns, leaves)
        old = self.rows  # what was folded before is nearer to the layer
        rows = np.stack([scale * old[0], shift * old[0] + old[1]])
        return Folded(rows, self.columns, leaves)

    def with_bias(self, bias: np.ndarray, leaves: frozenset[str]) -> Folded:
        """Return the same for a layer without this bias."""
        shift = self.columns[1] + self.columns[0] * bias.astype(np.float64)
        columns = np.stack([self.columns[0], shift])
        return Folded(self.rows, columns, self.leaves | leaves)

    def narrowed(self, kernel: np.ndarray, bias: np.ndarray | None) -> Folded:
        """Return the same in float32 where that gives a layer the same bits.

        The file's record holds them: half as many bytes.
        """
        rows, columns = (x.astype("f4").astype("f8") for x in (self.rows, self.columns))
        found = Folded(rows, columns, self.leaves)
        pairs = zip(found.apply(kernel, bias), self.apply(kernel, bias))
        return found if all(np.array_equal(*pair) for pair in pairs) else self

    def apply(
        self, kernel: np.ndarray, bias: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel and the bias of the layer, rounded once.

        Example:
          >>> three, ones = np.full(2, 3.0), np.ones(2)
          >>> folded = Folded.identity(1, 2).then(True, three, ones, frozenset())
          >>> folded.apply(np.array([[1, 2]], np.float32), None)[0]
          array([[3., 6.]], dtype=float32)
        """
        exact = kernel.astype(np.float64)
        axes = tuple(range(kernel.ndim - 1))
        added = (exact * self.rows[1][:, None]).sum(axes)
        added = added if bias is None else added + bias
        scale, shift = self.columns
        made = exact * self.rows[0][:, None] * scale
        return made.astype(kernel.dtype), (added * scale + shift).astype(kernel.dtype)


@dataclasses.dataclass(eq=False)
class Node:
    """One operation.

    Args:
      op: its name, see the module.
      inputs: what it takes.
      outputs: what it makes.
      attrs: what else it is told.
      name: of a linear layer, its path; else empty.
      folded: the affines that a linear layer's weights contain.
    """

    op: str
    inputs: list[Value]
    outputs: list[Value]
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""
    folded: Folded | None = None

    @property
    def out(self) -> Value:
        """The output of an operation that has one."""
        return self.outputs[0]

    @property
    def weight(self) -> Value | None:
        """The constant operand of a linear operation, if it has one."""
        if self.op not in LINEAR:
            return None
        return next((v for v in self.inputs[:2] if v.data is not None), None)


@dataclasses.dataclass(eq=False)
class Graph:
    """A program: its inputs, its operations in order, its outputs.

    Args:
      inputs: the program's arguments.
      outputs: what it returns.
      nodes: its operations, each after those whose outputs it takes.
      input_names: one for each input.
      output_names: one for each output.
      notes: what a reader of the report should know.
      leaves: the parameters that its outputs depend on.
    """

    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]
    input_names: list[str]
    output_names: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)
    leaves: list[str] = dataclasses.field(default_factory=list)

    def producers(self) -> dict[Value, Node]:
        """Return the operation that makes each value."""
        return {value: node for node in self.nodes for value in node.outputs}

    def uses(self) -> dict[Value, int]:
        """Return how often each value is read; the program's outputs count."""
        counts: dict[Value, int] = {}
        for value in self.reads():
            counts[value] = counts.get(value, 0) + 1
        return counts

    def reads(self) -> Iterator[Value]:
        """Yield every read of a value."""
        for node in self.nodes:
            yield from node.inputs
        yield from self.outputs

    def replace(self, old: Value, new: Value) -> None:
        """Read one value in the place of another, everywhere."""
        for node in self.nodes:
            node.inputs = [new if v is old else v for v in node.inputs]
        self.outputs = [new if v is old else v for v in self.outputs]

    def rewrite(self, passes: Sequence[Callable[[Graph], bool]]) -> None:
        """Run passes in place, in turns, until none of them changes anything."""
        changed = True
        while changed:
            changed = False
            for each in passes:
                changed |= each(self)
                self.prune()

    def prune(self) -> None:
        """Drop operations whose outputs nothing reads."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]

    def graphs(self) -> Iterator[Graph]:
        """Yield the graph, and before it those that its loops hold."""
        for node in self.nodes:
            for body in node.attrs.get("bodies", ()):
                yield from body.graphs()
        yield self

    def linear(self) -> list[Node]:
        """Return the convolutions and matmuls with a weight, those in loops too."""
        nodes = (node for graph in self.graphs() for node in graph.nodes)
        return [node for node in nodes if node.weight is not None]

    def count(self, *ops: str) -> int:
        """Return how many operations there are of these names."""
        return sum(node.op in ops for node in self.nodes)

    def __str__(self) -> str:
        names = {value: f"%{n}" for n, value in enumerate(self.inputs)}
        lines = []
        for node in self.nodes:
            for value in node.outputs:
                names[value] = f"%{len(names)}"
            args = ", ".join(_shown(v, names) for v in node.inputs)
            outs = ", ".join(f"{names[v]}{list(v.shape)}" for v in node.outputs)
            extra = f" {node.attrs}" if node.attrs else ""
            lines.append(f"{outs} = {node.op}({args}){extra}  {node.name}".rstrip())
        return "\n".join(lines)


def _shown(value: Value, names: dict[Value, str]) -> str:
    if value.data is None:
        return names.get(value, "?")
    if value.source is not None:
        return f"{value.source.leaf}{list(value.shape)}"
    return str(value.data) if value.size == 1 else f"const{list(value.shape)}"
