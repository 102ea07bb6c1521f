"""Moves the planned leaves of a tree in memory, every copy included."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import PyTree

from ..geometry.meshes import over_mesh
from ..messages.errors import PlanError
from ..plan import Plan
from ..plan.paths import join_path
from ..versions import raw_value
from .leaves import AxisNames, convert_leaf, flatten_with_path, is_leaf_node
from .matching import find_moves, planned_moves
from .move import Leaf, Move, Parts, inner_shape
from .variables import is_variable

_LOG = logging.getLogger(__name__)


def map_leaves(
    tree: PyTree, plan: Plan, strict: bool = True, prefix: str | Sequence[str] = ()
) -> PyTree:
    """Move each planned leaf of a tree; an array held twice moves once."""
    if tree is None or isinstance(tree, str | os.PathLike):
        raise PlanError(
            f"Expected a tree of params, got {tree!r}. Pass the params themselves; "
            "convert_checkpoint(src, dst, plan) converts a file."
        )
    flat, treedef = flatten_with_path(tree)
    moves = tree_moves(flat, plan, strict, prefix)
    _refuse_hidden(flat, moves)
    tied: dict[Any, Any] = {}
    out = []
    for path, leaf in flat:
        move = moves.get(path)
        if move is not None:
            # Tied params stay one array: identity, as equal arrays may be two.
            key = id(leaf), move
            if key not in tied:
                tied[key] = moved(path, leaf, move)
            leaf = tied[key]
        out.append(leaf)
    return jax.tree.unflatten(treedef, out)


def _refuse_hidden(flat: Sequence[tuple[str, Any]], moves: Mapping[str, Move]) -> None:
    """Refuse dataclasses that JAX takes for leaves and that may hold a copy."""
    shapes = {_shape(leaf) for path, leaf in flat if path in moves} - {None}
    for path, leaf in flat:
        if not dataclasses.is_dataclass(leaf) or is_leaf_node(leaf):
            continue
        inside = jax.tree.leaves(vars(leaf))
        if any(getattr(each, "shape", None) in shapes for each in inside):
            raise PlanError(
                f"leaf {path!r} is a {type(leaf).__name__}, which JAX doesn't know as "
                "a tree, and holds arrays like planned ones. Register the class with "
                "jax.tree_util.register_dataclass, or keep it out of the tree."
            )


def tree_moves(
    flat: Sequence[tuple[str, Any]],
    plan: Plan,
    strict: bool = True,
    prefix: str | Sequence[str] = (),
) -> dict[str, Move]:
    """Return how each planned leaf of a tree moves, by its path in the tree."""
    leaves = {_parts(path): Leaf(path, _shape(leaf)) for path, leaf in flat}
    moves = find_moves(leaves, plan, prefix=prefix, strict=strict)
    if len(moves) > len(planned_moves(plan)):
        _LOG.info("converted every copy: %s", sorted(map("/".join, moves)))
    return {leaves[parts].name: move for parts, move in moves.items()}


def _parts(path: str) -> Parts:
    return tuple(path.split("/")) if path else ()


def _shape(leaf: Any) -> Any:
    """Return the shape of a leaf; ``...`` if it has none to show, as a sharding."""
    if is_variable(leaf):
        leaf = raw_value(leaf)
    leaf = meta.unbox(leaf)
    if isinstance(leaf, AxisNames | PartitionSpec | Sharding):
        return ...
    try:
        return tuple(np.shape(leaf))
    except ValueError:  # a ragged list, kept as a leaf by someone's tree
        return None


def moved(path: str, leaf: Any, move: Move) -> Any:
    """Return the leaf in the other form; a PlanError names it if it cannot go."""
    if move.to_grouped_conv and over_mesh(leaf):
        raise PlanError(
            f"leaf {path!r} is sharded as {getattr(leaf, 'sharding', leaf)}, and its "
            "layer becomes a grouped convolution, which XLA partitions wrongly. Skip "
            "the layer with a rule, or convert it on one device."
        )
    try:
        return convert_leaf(move.rearrange, leaf, move.stack_axes)
    except ValueError as error:
        raise PlanError(f"leaf {path!r}: {error}") from None


def check_converted(shapes: Mapping[str, Sequence[int]], plan: Plan) -> None:
    """Refuse params that are still in the form that the plan comes from.

    Raises:
      PlanError: names the first that is not converted, or is another model's.
    """
    kernels = {
        join_path(path, layer.leaves[0][0]): layer
        for path, layer in plan.items()
        if layer.leaves[0][0] not in layer.tied  # may be stored under the owner alone
    }
    # One method of a model may be called with its part of the params.
    if kernels and not kernels.keys() & shapes.keys():
        raise PlanError(
            f"Expected params with {next(iter(kernels))!r}, which the plan converts, "
            f"got {sorted(shapes)[:5]}. Pass this model's own plan, made by "
            "make_plan(model, *inputs), to convert_model."
        )
    for key, layer in kernels.items():
        if key not in shapes:
            continue
        shape = tuple(shapes[key])
        source, target = layer.kernel.source, layer.kernel.target
        if inner_shape(shape, layer.stack_axes, target) == target:
            continue
        if inner_shape(shape, layer.stack_axes, source) == source:
            raise PlanError(
                f"Expected converted params, got {key!r} of shape {shape}. Pass "
                "convert_params(params, plan)."
            )
        raise PlanError(
            f"Expected params {key!r} of shape {target}, got {shape}. Pass this "
            "model's own plan, made by make_plan(model, *inputs), to convert_model."
        )
