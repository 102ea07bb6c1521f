"""Files for any batch or image size, made from graphs of several sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..frontends.bound import BoundModel
from ..messages.errors import ExportError
from .graph import Graph, Node, Value
from .lowering.builder import Builder
from .passes.symbolic import depends
from .passes.views import BROADCASTING
from .proof import Proof, reference_of, whole_errors
from .shipped import Shipped

# With axes of one, fewer moves would be needed than other sizes need.
BATCHES = (2, 3)
TRIED = (1, 3, 5)
# Networks with strides often take multiples of them only.
STEPS = (1, 2, 4, 8, 16, 32)
# How many steps are added to the height and to the width of the images that are run.
_MORE = ((0, 0, 0), (1, 2, 1), (3, 1, 2))
_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
# Levels of a network, each half as large, at which another size is to be odd if the
# given one is even: SAME pads those differently.
_LEVELS = 5


@dataclasses.dataclass(frozen=True)
class OpenSizes:
    """The sizes that a file leaves open.

    Args:
      batch: whether its inputs may have any first axis.
      axes: the spatial axes of its inputs that may have any size.
      step: the sizes differ from those of the inputs given by multiples of it.
    """

    batch: bool = False
    axes: tuple[int, ...] = ()
    step: int = 1

    def __bool__(self) -> bool:
        return self.batch or bool(self.axes)

    @property
    def names(self) -> dict[str, int]:
        """The spatial axes by the names that files give them."""
        return dict(zip(_NAMES[len(self.axes)], self.axes)) if self.axes else {}

    def variants(self, bound: BoundModel) -> tuple[BoundModel, dict[str, BoundModel]]:
        """Return a call to compare others with, and those of other sizes by name.

        Raises:
          ExportError: no axis of the inputs is the batch.
        """
        base = with_batch(bound, BATCHES[0]) if self.batch else bound
        found = {"batch": with_batch(bound, BATCHES[1])} if self.batch else {}
        for name, axis in self.names.items():
            found[name] = with_axes(base, {axis: _other(bound, axis, self.step)})
        return base, found

    def tried(
        self,
        bound: BoundModel,
        shipped: Shipped,
        names: Sequence[str],
        proof: Proof,
        weights: str | None,
    ) -> Proof:
        """Return a proof to which runs of the file with other sizes are added."""
        failures, notes = [*proof.failures], [*proof.notes]
        outputs = [*proof.outputs]
        sizes: list[tuple[str, BoundModel]] = []
        if self.batch:
            sizes += [(f"batch size {n}", with_batch(bound, n)) for n in TRIED]
            notes.append(f"for any batch size; run with {TRIED}")
        if self.axes:
            given = [size_of_axis(bound, axis) for axis in self.axes]
            made = [
                [n + self.step * more for n, more in zip(given, each)] for each in _MORE
            ]
            shapes = ["x".join(map(str, each)) for each in made]
            for shape, each in zip(shapes, made):
                other = with_axes(bound, dict(zip(self.axes, each)))
                sizes.append((f"image size {shape}", other))
            steps = f"in steps of {self.step}" if self.step > 1 else "of any size"
            notes.append(
                f"for images of {shapes[0]} and larger {steps}; run with "
                f"{', '.join(shapes)}"
            )
        for name, other in sizes:
            reference, _ = reference_of(other, weights)
            if reference is None:
                notes.append(f"{name}: not run, because the reference is missing")
                continue
            try:
                for error in whole_errors(shipped, reference, names):
                    path = f"{error.path}, {name}"
                    outputs.append(dataclasses.replace(error, path=path))
            except (RuntimeError, ValueError) as error:
                first = str(error).strip().partition("\n")[0]
                failures.append(f"{name}: the file does not run: {first}")
        return dataclasses.replace(
            proof,
            outputs=tuple(outputs),
            failures=tuple(failures),
            notes=tuple(notes),
        )


def with_batch(bound: BoundModel, size: int) -> BoundModel:
    """Return the same call on inputs of another batch size, repeated or cut.

    Raises:
      ExportError: the inputs' first axes have several sizes.
    """
    arrays = [np.asarray(x) for x in bound.arrays]
    sizes = {x.shape[0] if x.ndim else None for x in arrays}
    if len(sizes) != 1 or None in sizes:
        raise ExportError(
            "Expected inputs whose first axis is the batch for any_batch=True, got "
            f"{', '.join(str(x.shape) for x in arrays)}. Drop any_batch=True."
        )
    return bound.with_arrays([np.resize(x, (size, *x.shape[1:])) for x in arrays])


def with_axes(bound: BoundModel, sizes: Mapping[int, int]) -> BoundModel:
    """Return the same call on images of other sizes, by axis, repeated or cut."""
    arrays = []
    for x in map(np.asarray, bound.arrays):
        for axis, size in sizes.items() if x.ndim > 2 else ():
            x = x.take(np.arange(size) % x.shape[axis], axis)
        arrays.append(x)
    return bound.with_arrays(arrays)


def image_axes(bound: BoundModel) -> tuple[int, ...]:
    """Return the spatial axes of the inputs.

    Raises:
      ExportError: no input has any, or they are of several ranks.
    """
    ranks = {x.ndim for x in map(np.asarray, bound.arrays) if x.ndim > 2}
    if len(ranks) != 1 or max(ranks) > 5:
        shapes = ", ".join(str(np.shape(x)) for x in bound.arrays)
        raise ExportError(
            "Expected images with a batch and channels for any_size=True, got "
            f"{shapes}. Drop any_size=True."
        )
    first, rank = bound.first_spatial_axis, ranks.pop()
    return tuple(range(first, first + rank - 2))


def size_of_axis(bound: BoundModel, axis: int) -> int:
    """Return the size of a spatial axis of the inputs."""
    return next(x.shape[axis] for x in map(np.asarray, bound.arrays) if x.ndim > 2)


def _other(bound: BoundModel, axis: int, step: int) -> int:
    """Another size, large enough to differ at each level of a network."""
    given = size_of_axis(bound, axis)

    def parities(size: int) -> list[int]:
        return [-(-size >> level) % 2 for level in range(_LEVELS)]

    def alike(size: int) -> int:
        return sum(a == b for a, b in zip(parities(size), parities(given)))

    more = 2**_LEVELS * step
    return min(range(given + more, given + 3 * more, step), key=alike)


def first_step(write: Callable[[int], Any]) -> Any:
    """Return what the least step gives under which a model takes any image size.

    Raises:
      ExportError: there is none; that of the smallest.
    """
    first: ExportError | None = None
    for step in STEPS:
        try:
            return write(step)
        except ExportError as error:
            first = first or error
    assert first is not None
    raise first


def fails_with_others(error: Exception) -> ExportError:
    """Return the error for a model that raises on images of another size."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportError(
        "Expected a model for images of any size, got one that fails on other sizes: "
        f"{why}. Drop any_size=True, or pass fc.slide(model, window=...)."
    )


def repeat_rows(graphs: Sequence[Graph]) -> None:
    """Repeat constants of equal rows in the file, not before: as the batch decides.

    Such are the zeros that a recurrent network starts from, or a token that is put in
    front of each example. Constants that differ in another way stay, to be refused.

    Args:
      graphs: rewritten in place: the first for the first of :data:`BATCHES`, the second
        for the second, others, of other image sizes, for the first.
    """
    for parts in zip(*(graph.graphs() for graph in graphs)):
        if len({len(part.nodes) for part in parts}) > 1:
            continue
        for nodes in list(zip(*(part.nodes for part in parts))):
            if len({node.op for node in nodes}) > 1:
                continue
            for place, values in enumerate(zip(*(node.inputs for node in nodes))):
                rows, axis = _rows(values)
                if not rows:
                    continue
                sources = _sources(parts)
                for part, node, row, source in zip(parts, nodes, rows, sources):
                    others = [v.shape for i, v in enumerate(node.inputs) if i != place]
                    if node.op not in BROADCASTING or node.out.shape != (
                        np.broadcast_shapes(row.shape, *others)
                    ):
                        row = _repeated(part, node, row, axis, *source)
                    node.inputs[place] = row


def _rows(values: Sequence[Value]) -> tuple[list[Value], int]:
    """One row of each of several constants that repeat it, and along which axis."""
    one, two, *_ = values
    off = [i for i, (a, b) in enumerate(zip(one.shape, two.shape)) if a != b]
    if len(off) != 1:
        return [], 0
    (axis,) = off
    found, first = list[Value](), np.zeros(0)
    for number, value in enumerate(values):
        if value.data is None or value.shape[axis] != BATCHES[number == 1]:
            return [], 0
        row = value.data.take([0], axis)
        whole = np.broadcast_to(row, value.shape).tobytes() == value.data.tobytes()
        found.append(value.repeated(row))
        if not whole or (number == 1 and row.tobytes() != first.tobytes()):
            return [], 0
        first = row
    return found, axis


def _sources(parts: Sequence[Graph]) -> list[tuple[Value, int]]:
    """An input of each of several graphs that has the batch, and along which axis."""
    for values in zip(*(part.inputs for part in parts)):
        for axis, sizes in enumerate(zip(*(value.shape for value in values))):
            if sizes[:2] == BATCHES:
                return [(value, axis) for value in values]
    raise depends("loop")


def _repeated(
    graph: Graph, node: Node, row: Value, axis: int, x: Value, batch_axis: int
) -> Value:
    """Repeat a row in front of a node, as often as an input has examples."""
    low = Builder()
    count = x.shape[batch_axis]
    ends = [count if i == batch_axis else 1 for i in range(len(x.shape))]
    shape = [count if i == axis else 1 for i in range(len(row.shape))]
    column = low.reshape(low.slice(x, [0] * len(ends), ends), shape)
    # False of every number, NaN too; LiteRT's shapes stay known, unlike those of SHAPE.
    never = low.add("lt", [column, column], shape, np.bool_)
    whole = [count if i == axis else n for i, n in enumerate(row.shape)]
    if row.dtype == np.bool_:
        made = low.add("or", [never, row], whole)
    else:
        zeros = low.add("cast", [never], shape, row.dtype)
        made = low.add("add", [zeros, row], whole)
    at = graph.nodes.index(node)
    graph.nodes[at:at] = low.nodes
    return made
