"""Paths of leaves, and shapes of leaves that are stacked."""

from __future__ import annotations

from collections.abc import Sequence


def join_path(*parts: str) -> str:
    """Return the path of a leaf; a root has no name, so empty parts vanish.

    Example:
      >>> join_path("encoder", "kernel"), join_path("", "kernel")
      ('encoder/kernel', 'kernel')
    """
    return "/".join(filter(None, parts))


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
