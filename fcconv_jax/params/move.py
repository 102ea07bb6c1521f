"""A leaf of a tree, and how it moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import EllipsisType

from ..geometry.kernels import Rearrangement

Parts = tuple[str, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf, as far as matching goes.

    Args:
      name: what errors call it.
      shape: of the array; ``...`` if unknown, as of a sharding; None if it is not one.
    """

    name: str
    shape: Shape | EllipsisType | None

    def like(self, other: Leaf) -> bool:
        """Whether both may have the same shape."""
        return self.shape == other.shape or ... in (self.shape, other.shape)


@dataclasses.dataclass(frozen=True)
class Move:
    """How one leaf moves: a rearrangement below the axes of a scanned stack."""

    rearrange: Rearrangement
    stack_axes: tuple[int, ...] = ()
    to_grouped_conv: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every entry where it is, as for most biases."""
        return self.rearrange.is_reshape and (
            self.rearrange.source == self.rearrange.target
        )

    def fits(self, shape: Shape | EllipsisType | None) -> bool:
        """Whether a leaf of this shape can move."""
        return shape is ... or (
            shape is not None
            and inner_shape(shape, self.stack_axes, self.rearrange.source)
            == self.rearrange.source
        )

    def refusal(self, leaf: Leaf) -> str:
        """Why a leaf of another shape cannot move."""
        source, target = self.rearrange.source, self.rearrange.target
        count = len(self.stack_axes)
        stacked = f" below {count} stacked axes" if count else ""
        done = isinstance(leaf.shape, tuple) and (
            inner_shape(leaf.shape, self.stack_axes, target) == target
            or len(leaf.shape) == len(target) + count != len(source) + count
        )
        why = (
            "It is in this form already, converted before or never. Pass the tree in "
            "the other form, or restore this one (fcconv restore --plan)"
            if done
            else "The plan is of another model, or of inputs of another size. Make it "
            "with the model and the inputs of these params"
        )
        got = "no array" if leaf.shape is None else f"shape {leaf.shape}"
        return f"leaf {leaf.name!r}: expected shape {source}{stacked}, got {got}. {why}"


def inner_shape(
    shape: Sequence[int], stack_axes: Sequence[int], inner: Sequence[int]
) -> tuple[int, ...] | None:
    """Return a shape without the axes of stacks; None if it has another number of axes.

    Args:
      shape: of a stack.
      stack_axes: axes that lifted transforms added, innermost first.
      inner: shape of one layer; only its number of axes counts.

    Example:
      >>> inner_shape((7, 4, 3), (0,), (9, 9)), inner_shape((4, 3), (0,), (9, 9))
      ((4, 3), None)
    """
    if len(shape) != len(inner) + len(stack_axes):
        return None
    out = list(shape)
    for axis in reversed(stack_axes):  # the outermost transform added its axis last
        del out[axis]
    return tuple(out)


def stacks_lead(stack_axes: Sequence[int]) -> bool:
    """Return whether the axes of stacks, innermost first, are a leaf's first ones."""
    # Each new axis is put in among those that were in front by then.
    return all(0 <= axis <= i for i, axis in enumerate(stack_axes))
