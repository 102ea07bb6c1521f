"""Follows the axes of an array through reshapes: each axis as factors of one index.

An array that holds the entries of a parameter, each once, is described by where each
of its axes steps in the parameter's flat (row-major) index. A factor ``(stride, size)``
takes ``size`` steps of ``stride``; an axis is a tuple of factors, slowest first. So
``(6, 4)`` has the axes ``((4, 6),)`` and ``((1, 4),)``, its transpose the same in the
other order, and a reshape only splits and joins them. A reversed axis steps backwards:
its strides are negative.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from ..geometry.kernels import Rearrangement

Factor = tuple[int, int]
Axis = tuple[Factor, ...]


def axes_of(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Return the axes of an array that holds its own entries in order.

    Example:
      >>> axes_of((6, 1, 4))
      (((4, 6),), (), ((1, 4),))
    """
    return tuple(
        ((math.prod(shape[i + 1 :]), size),) if size > 1 else ()
        for i, size in enumerate(shape)
    )


def size(axis: Iterable[Factor]) -> int:
    """Return how many entries an axis has."""
    return math.prod(n for _, n in axis)


def reversed_axis(axis: Axis) -> Axis:
    """Return the same axis from its other end.

    Example:
      >>> reversed_axis(((12, 2), (1, 4)))
      ((-12, 2), (-1, 4))
    """
    return tuple((-stride, n) for stride, n in axis)


def regroup(factors: Iterable[Factor], sizes: Sequence[int]) -> list[Axis] | None:
    """Split and join factors, slowest first, into axes of these sizes.

    Returns:
      None where the sizes cut through a factor unevenly.

    Example:
      >>> regroup([(4, 6), (1, 4)], (2, 12))
      [((12, 2),), ((1, 12),)]
      >>> regroup([(1, 6), (6, 4)], (4, 6)) is None
      True
    """
    rest = list(joined(factors))[::-1]
    axes: list[Axis] = []
    for wanted in sizes:
        axis: list[Factor] = []
        while wanted > 1:
            if not rest:
                return None
            stride, n = rest.pop()
            taken = math.gcd(wanted, n)
            # Six steps of one stride can't end inside an axis of 4.
            if taken != min(wanted, n):
                return None
            axis.append((stride * (n // taken), taken))
            if taken < n:
                rest.append((stride, n // taken))
            wanted //= taken
        axes.append(joined(axis))
    return None if rest else axes


def stacked_axes(shape: Sequence[int], stack: Sequence[Factor]) -> list[int] | None:
    """The axes of a shape that the factors make up; None if they are part of one."""
    axes, stack = [], [(abs(stride), n) for stride, n in stack]
    for i, axis in enumerate(axes_of(shape)):
        if not axis:
            continue
        ((stride, n),) = axis
        inside = [f for f in stack if stride <= f[0] < stride * n]
        if any(step * count > stride * n for step, count in inside):
            return None
        if inside:
            axes.append(i)
    whole = math.prod(shape[i] for i in axes)
    return axes if whole == size(stack) else None


def without(axis: Axis, shape: Sequence[int], dropped: Collection[int]) -> Axis:
    """Return the part of an axis that does not step along some axes of a parameter.

    Example:
      >>> without(((1, 24),), (2, 3, 4), (1,))
      ((12, 2), (1, 4))
    """
    kept: list[Factor] = []
    for signed, n in axis:
        stride, sign = abs(signed), (1 if signed > 0 else -1)
        for number, entries in enumerate(axes_of(shape)):
            for step, count in entries:
                first, end = max(stride, step), min(stride * n, step * count)
                if first < end and number not in dropped:
                    kept.append((sign * first, end // first))
    return tuple(kept)


def rearrangement(
    source: Sequence[int], factors: Sequence[Factor], target: Sequence[int]
) -> Rearrangement:
    """Return the rearrangement of a leaf into the order of ``factors``, slowest first.

    Example:
      >>> rearrangement((5, 3), [(1, 3), (3, 5)], (1, 3, 5)).perm
      (1, 0)
    """
    # Row-major: the largest stride is the outermost axis of the stored array.
    stored = sorted(factors, key=lambda factor: -abs(factor[0]))
    return Rearrangement(
        tuple(source),
        tuple(n for _, n in stored),
        tuple(stored.index(factor) for factor in factors),
        tuple(target),
        tuple(axis for axis, (stride, _) in enumerate(stored) if stride < 0),
    )


def joined(factors: Iterable[Factor]) -> Axis:
    """Join neighbours that step on evenly into one factor.

    Example:
      >>> joined([(4, 6), (1, 4)])
      ((1, 24),)
    """
    joined: list[Factor] = []
    for stride, n in factors:
        if joined and joined[-1][0] == stride * n:
            joined[-1] = (stride, joined[-1][1] * n)
        else:
            joined.append((stride, n))
    return tuple(joined)
