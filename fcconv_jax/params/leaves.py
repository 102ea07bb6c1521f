"""One leaf of a tree: an array, an abstract array, a box, or a sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax.core import meta
from flax.linen.partitioning import AxisMetadata as AxisNames
from jax.core import Tracer
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import PyTree

from ..geometry.kernels import Rearrangement
from ..geometry.meshes import over_mesh
from ..versions import SHARDING_KEYS, raw_value
from .axis_names import move_names, move_sharding
from .tensors import is_tensor, move_tensor
from .variables import is_variable


def convert_leaf(
    rearrange: Rearrangement, leaf: Any, stack_axes: Sequence[int] = ()
) -> Any:
    """Rearranges one leaf: an array, an abstract array, a box, or a sharding.

    Args:
      rearrange: how the entries of one layer move.
      leaf: array-like of shape ``rearrange.source``, with the stack axes added.
      stack_axes: axes that lifted transforms added, innermost first.

    Raises:
      ValueError: the shape does not fit, or the names of two axes would have to merge.
    """
    if is_tensor(leaf):
        return move_tensor(lambda x: _on_stack(rearrange, x, stack_axes), leaf)
    if is_variable(leaf):
        value = convert_leaf(rearrange, raw_value(leaf), stack_axes)
        return leaf.replace(value, **move_metadata(rearrange, leaf, stack_axes))
    if isinstance(leaf, meta.AxisMetadata):
        boxed: Any = leaf
        if hasattr(boxed, "names"):
            names = move_names(rearrange, boxed.names, stack_axes)
            boxed = boxed.replace(names=names)
        inner = convert_leaf(rearrange, boxed.value, stack_axes)
        return boxed.replace(value=inner)
    if isinstance(leaf, PartitionSpec):
        return PartitionSpec(*move_names(rearrange, tuple(leaf), stack_axes))
    if isinstance(leaf, AxisNames):
        names: Any = leaf.names
        moved = PartitionSpec(*move_names(rearrange, tuple(names), stack_axes))
        return leaf.replace(names=moved)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(leaf, Sharding):
        return move_sharding(rearrange, leaf, stack_axes)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        out = jax.eval_shape(
            lambda a: _on_stack(rearrange, a, stack_axes),
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type),
        )
        if leaf.sharding is None:
            return out
        return out.update(sharding=convert_leaf(rearrange, leaf.sharding, stack_axes))
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if concrete and over_mesh(leaf):
        # Left to itself, XLA may gather what it reshapes.
        there = move_sharding(rearrange, leaf.sharding, stack_axes)
        move = jax.jit(_on_stack, static_argnums=(0, 2), out_shardings=there)
        return move(rearrange, leaf, tuple(stack_axes))
    return _on_stack(rearrange, leaf, stack_axes)


def _on_stack(rearrange: Rearrangement, array: Any, stack_axes: Sequence[int]) -> Any:
    """Applies the rearrangement below the axes that lifted transforms added."""
    if not stack_axes:
        return rearrange(array)
    source = list(range(len(rearrange.source)))
    target = list(range(len(rearrange.target)))
    for label, axis in enumerate(stack_axes):
        for axes in (source, target):
            axes.insert(axis if axis >= 0 else axis + len(axes) + 1, -1 - label)
    if array.ndim != len(source):
        raise ValueError(
            f"expected {len(source)} axes (a stack of {rearrange.source}), got shape "
            f"{tuple(array.shape)}"
        )
    n = len(stack_axes)
    lead = tuple(array.shape[source.index(-1 - label)] for label in range(n))
    to_front = [source.index(-1 - label) for label in range(n)]
    to_front += [source.index(i) for i in range(len(rearrange.source))]
    back = [n + label if label >= 0 else -1 - label for label in target]
    stacked = rearrange.stacked(lead)
    return stacked(array.transpose(to_front)).transpose(back)


def move_metadata(
    rearrange: Rearrangement, variable: Any, stack_axes: Sequence[int] = ()
) -> dict[str, Any]:
    """What changes in the metadata of an ``nnx.Variable`` when its entries move.

    Raises:
      ValueError: the names of two axes would have to merge.
    """
    updates: dict[str, Any] = {}
    metadata = variable.get_metadata()
    for key in SHARDING_KEYS:
        if names := metadata.get(key):
            moved = move_names(rearrange, tuple(names), stack_axes)
            spec = isinstance(names, PartitionSpec)
            updates[key] = PartitionSpec(*moved) if spec else moved
    return updates


def leaf_path(path: Sequence[Any]) -> str:
    """A key path as text: ``"params/encoder/kernel"``."""
    levels = []
    for key in path:
        name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
        # The keys of flax.traverse_util.flatten_dict are tuples of levels.
        levels += name if isinstance(name, tuple) else (name,)
    return "/".join(map(str, levels))


def flatten_with_path(tree: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves with their paths as text, and the structure; boxes count as leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf_node)
    return [(leaf_path(path), leaf) for path, leaf in leaves], treedef


def is_leaf_node(node: object) -> bool:
    """Whether a node counts as a leaf: a box, a sharding or an NNX Variable."""
    boxes = meta.AxisMetadata | AxisNames | PartitionSpec | Sharding
    return isinstance(node, boxes) or is_variable(node)
