"""Reshapes of arrays whose sharding is part of their type, as on explicit meshes.

There JAX infers the sharding of most operations, but not that of a reshape that joins
axes, nor that of a convolution with sharded channels: both want to be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Array = jax.Array
# As `out_sharding` of functions of `jax.lax` takes it.
OutSharding = NamedSharding | PartitionSpec | None


def typed_sharding(array: object) -> NamedSharding | None:
    """Return the sharding that an array carries in its type.

    Returns:
      None where it carries none: on one device, on mesh axes that the compiler shards
      automatically (``Auto``), inside ``shard_map``.

    Example:
      >>> import jax.numpy as jnp
      >>> typed_sharding(jnp.ones(3)) is None
      True
    """
    if not isinstance(array, jax.Array):
        return None
    found = jax.typeof(array).sharding
    if not isinstance(found, NamedSharding) or not found.mesh.explicit_axes:
        return None
    return found


def over_mesh(leaf: object) -> bool:
    """Return whether an array or a sharding spans several devices."""
    if isinstance(leaf, PartitionSpec):
        return any(part is not None for part in leaf)
    sharding = leaf if isinstance(leaf, Sharding) else getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh.size > 1


def with_mesh(out_sharding: OutSharding, *operands: Array) -> NamedSharding | None:
    """Return an ``out_sharding`` with its mesh; None stays None."""
    if out_sharding is None or isinstance(out_sharding, NamedSharding):
        return out_sharding
    known = [found for x in operands if (found := typed_sharding(x)) is not None]
    mesh = known[0].mesh if known else jax.sharding.get_abstract_mesh()
    return NamedSharding(mesh, out_sharding)


def parts(sharding: NamedSharding, ndim: int) -> list[Any]:
    """Return the mesh axes that shard each of ``ndim`` axes, or None."""
    return [*sharding.spec, *[None] * (ndim - len(sharding.spec))]


def reshape(array: Any, shape: Sequence[int], to: OutSharding = None) -> Any:
    """``array.reshape(shape)`` that keeps each device's entries where they are.

    Args:
      array: of any kind; without a sharding in its type it is simply reshaped.
      shape: the new shape, all sizes known.
      to: the ``out_sharding``, where it is known; else it follows.

    Raises:
      ValueError: an axis that is sharded would join another from behind, or its first
        part would not divide by the mesh, so that entries would have to travel.
    """
    shape = tuple(shape)
    found = typed_sharding(array)
    if array.shape == shape:
        return array
    if not isinstance(array, jax.Array):
        return array.reshape(shape)
    if to is None:
        to = respec(found, array.shape, shape)
    return lax.reshape(array, shape, out_sharding=to)


def respec(
    sharding: NamedSharding | None, source: Sequence[int], target: Sequence[int]
) -> NamedSharding | None:
    """Return the sharding after a reshape that moves no entry; None stays None.

    Raises:
      ValueError: as :func:`reshape`.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> mesh = AbstractMesh((2, 4), ("data", "model"))
      >>> sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))
      >>> tuple(respec(sharding, (8, 16, 32), (128, 1, 32)).spec)
      ('data', None, 'model')
    """
    if sharding is None:
        return None
    names = parts(sharding, len(source))
    sizes = dict(sharding.mesh.shape)

    def ways(part: Any) -> int:
        """Into how many pieces an axis is cut."""
        axes = part if isinstance(part, tuple) else (part,)
        return math.prod(sizes.get(axis, 1) for axis in axes)

    for cut in (0, 1):  # with the mesh axes of size 1, if they can follow
        # By number, so that two sharded axes that join show as a tuple.
        axes = [i if p and ways(p) > cut else None for i, p in enumerate(names)]
        try:
            moved = regroup(source, axes, target)
        except ValueError:
            continue
        if any(isinstance(axis, tuple) for axis in moved):
            continue
        found = [None if axis is None else names[axis] for axis in moved]
        if not any(n % ways(part) for n, part in zip(target, found)):
            return NamedSharding(sharding.mesh, PartitionSpec(*found))
    raise ValueError(
        f"an array of shape {tuple(source)}, sharded as {sharding.spec}, cannot become "
        f"{tuple(target)} on a mesh of {sizes} without moving entries between devices. "
        "Give the layer another layout with a rule (layout='keep' if leading axes are "
        "sharded, 'flat' if a window is; make_plan does so if the inputs have "
        "shardings), or reshard the array first"
    )


def permuted(out_sharding: OutSharding, order: Sequence[int]) -> NamedSharding | None:
    """Return the sharding of an array after ``transpose(order)``; None stays None."""
    sharding = with_mesh(out_sharding)
    if sharding is None:
        return None
    names = parts(sharding, len(order))
    spec = PartitionSpec(*(names[axis] for axis in order))
    return NamedSharding(sharding.mesh, spec)


def regroup(
    source: Sequence[int], names: Sequence[Any], target: Sequence[int]
) -> list[Any]:
    """Names of the axes after a row-major reshape from ``source`` to ``target``.

    Raises:
      ValueError: a name would be left on part of an axis.

    Example:
      >>> regroup((12, 5), ("embed", "mlp"), (2, 6, 5))
      ['embed', None, 'mlp']
    """
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
                f"become {[target[j] for j in to_axes]}, where no names give the same "
                "partition; gather or rename the axis first, or skip the layer with a "
                "rule"
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
    """Return the finest groups of axes that a row-major reshape maps to each other.

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
