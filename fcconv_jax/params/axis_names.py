"""Axis names and shardings of a parameter, carried along when its entries move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ..geometry.kernels import Rearrangement
from ..geometry.meshes import regroup


def move_names(
    rearrange: Rearrangement, names: Sequence[Any], stack_axes: Sequence[int]
) -> tuple[Any, ...]:
    """Return the rearranged array's axis names, moved as a reshape moves shards.

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
    split = regroup(rearrange.source, inner, rearrange.split)
    moved = [split[p] for p in rearrange.perm]
    sizes = [rearrange.split[p] for p in rearrange.perm]
    out = regroup(sizes, moved, rearrange.target)
    for axis in stack_axes:
        out.insert(axis if axis >= 0 else axis + len(out) + 1, stack.pop())
    return tuple(out)


def move_sharding(
    rearrange: Rearrangement, sharding: Sharding, stack_axes: Sequence[int]
) -> Sharding:
    """Return the sharding of the rearranged array; see :func:`move_names`.

    Raises:
      ValueError: it has no names, or the new shape does not divide by the mesh.
    """
    if not isinstance(sharding, NamedSharding):
        if sharding.is_fully_replicated:  # on one device, as far as names go
            return sharding
        raise ValueError(
            f"expected a NamedSharding, whose axes have names, got {sharding}"
        )
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
