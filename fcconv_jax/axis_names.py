"""Axis names and shardings of a parameter, carried along when its entries move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .kernels import Rearrangement


def move_names(
    rearrange: Rearrangement, names: Sequence[Any], stack_axes: Sequence[int]
) -> tuple[Any, ...]:
    """Axis names of the rearranged array, as a reshape of a sharded array moves them.

    An axis that splits leaves its name on its largest-stride factor; of axes that
    merge, names are joined where the leading ones have all the names, else refused.

    Args:
      rearrange: how the entries of one layer move.
      names: one per axis, outermost first; missing ones at the end are None.
      stack_axes: axes that lifted transforms added, innermost first; they keep theirs.

    Raises:
      ValueError: a name would be left on part of an axis.

    Example:
      >>> flat_to_map = Rearrangement.reshape((12, 5), (2, 2, 3, 5))
      >>> move_names(flat_to_map, ("embed", "mlp"), ())
      ('embed', None, None, 'mlp')
    """
    names = tuple(names) + (None,) * (
        len(rearrange.source) + len(stack_axes) - len(names)
    )
    inner, stack = list(names), []
    for axis in reversed(stack_axes):
        stack.append(inner.pop(axis))
    split = _regroup(rearrange.source, inner, rearrange.split)
    moved = [split[p] for p in rearrange.perm]
    sizes = [rearrange.split[p] for p in rearrange.perm]
    out = _regroup(sizes, moved, rearrange.target)
    for axis in stack_axes:
        out.insert(axis if axis >= 0 else axis + len(out) + 1, stack.pop())
    return tuple(out)


def move_sharding(
    rearrange: Rearrangement, sharding: Sharding, stack_axes: Sequence[int]
) -> Sharding:
    """The sharding of the rearranged array, with the names as :func:`move_names`.

    Raises:
      ValueError: it has no names, or the new shape does not divide by the mesh.
    """
    if not isinstance(sharding, NamedSharding):
        if sharding.is_fully_replicated:  # on one device, as far as names go
            return sharding
        raise ValueError(f"no NamedSharding, so its axes cannot follow: {sharding}")
    spec = PartitionSpec(*move_names(rearrange, tuple(sharding.spec), stack_axes))
    moved = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    shape = list(rearrange.target)
    for axis in stack_axes:  # they stay as they are, of whatever size
        shape.insert(axis if axis >= 0 else axis + len(shape) + 1, 0)
    try:
        moved.shard_shape(tuple(shape))
    except ValueError as error:
        raise ValueError(
            f"its sharding {sharding.spec} would become {spec}, which does not divide "
            f"the new shape ({error}); gather the leaf first"
        ) from None
    return moved


def _regroup(
    source: Sequence[int], names: Sequence[Any], target: Sequence[int]
) -> list[Any]:
    """Names of the axes after a row-major reshape from ``source`` to ``target``."""
    out: list[Any] = [None] * len(target)
    for from_axes, to_axes in _blocks(source, target):
        named = [(i, names[i]) for i in from_axes if names[i] is not None]
        if not named:
            continue
        if len(to_axes) == len(from_axes):
            for i, j in zip(from_axes, to_axes):
                out[j] = names[i]
            continue
        lead = from_axes[: len(named)]
        if [i for i, _ in named] != lead or len(to_axes) > 1 < len(from_axes):
            sizes = [source[i] for i in from_axes]
            raise ValueError(
                f"the axes of sizes {sizes}, named {[names[i] for i in from_axes]}, "
                f"become {[target[j] for j in to_axes]}: that partition has no name "
                "there; gather or rename the axis first, or leave the layer out with "
                "a rule"
            )
        if len(from_axes) == 1:
            parts = named[0][1] if isinstance(named[0][1], tuple) else (named[0][1],)
            if len(parts) == len(to_axes):
                for j, part in zip(to_axes, parts):
                    out[j] = part
            else:
                out[to_axes[0]] = named[0][1]
        else:
            flat = tuple(
                part
                for _, name in named
                for part in (name if isinstance(name, tuple) else (name,))
            )
            out[to_axes[0]] = flat[0] if len(flat) == 1 else flat
    return out


def _blocks(
    source: Sequence[int], target: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The finest aligned groups of axes that a row-major reshape maps to each other.

    Axes of size 1 carry no partition; they pair with each other where the groups
    are otherwise equal, else belong to no group.
    """
    if tuple(source) == tuple(target):
        return [([i], [i]) for i in range(len(source))]
    a = [i for i, size in enumerate(source) if size != 1]
    b = [j for j, size in enumerate(target) if size != 1]
    blocks = []
    while a and b:
        left, right = [a.pop(0)], [b.pop(0)]
        p, q = source[left[0]], target[right[0]]
        while p != q:
            if p < q:
                left.append(a.pop(0))
                p *= source[left[-1]]
            else:
                right.append(b.pop(0))
                q *= target[right[-1]]
        blocks.append((left, right))
    return blocks
