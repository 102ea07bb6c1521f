"""The conversion of one open checkpoint by a plan, before any data moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..messages.errors import CheckpointError, PlanError
from ..params.leaves import convert_leaf
from ..params.matching import find_moves
from ..params.move import Leaf, Move, stacks_lead
from ..plan import Plan
from .checkpoint import (
    Checkpoint,
    ConversionRecord,
    FolderFiles,
    is_array,
    iter_leaves,
    with_leaves,
)
from .entries import LazyLeaf
from .files import described, merged
from .formats import FORMATS, format_named
from .nesting import key_separator, nested, split_paths


@dataclasses.dataclass(frozen=True)
class Job:
    """One checkpoint to write.

    Args:
      source: the source, with lazy references into its files.
      meant: what is to be written.
      converted: path, shape before and shape after of each leaf that moves.
      nbytes: bytes of all entries.
    """

    source: Checkpoint
    meant: Checkpoint
    converted: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    nbytes: int


def make_job(
    source: Checkpoint,
    plan: Plan,
    keep: bool,
    prefix: str | Sequence[str],
    format: str,
) -> Job:
    """Apply a plan to an open checkpoint, lazily."""
    file = str(source.path)
    leaves = list(iter_leaves(source.tree))
    # The files of a folder aren't a level of the tree.
    lead = 1 if isinstance(source.contents, FolderFiles) else 0
    paths = [parts[lead:] for parts, _ in leaves]
    separator = "/"
    if FORMATS[source.format].flat:
        separator = key_separator([parts[0] for parts in paths])
    split = split_paths(paths, separator, file)
    found = {
        split[parts]: Leaf(
            "/".join(parts), tuple(leaf.shape) if is_array(leaf) else None
        )
        for parts, (_, leaf) in zip(paths, leaves)
    }
    try:
        moves = find_moves(found, plan, prefix=prefix, separator=separator)
    except PlanError as error:
        raise CheckpointError(f"{file}: {error}") from None
    out, converted = [], []
    for parts, (_, leaf) in zip(paths, leaves):
        move = moves.get(split[parts])
        if move is not None:
            name = "/".join(parts)
            try:
                moved = _moved(leaf, move)
            except ValueError as error:
                raise CheckpointError(f"{file}: leaf {name!r}: {error}") from None
            if not move.is_identity:
                converted.append((name, tuple(leaf.shape), moved.shape))
            leaf = moved
        out.append(leaf)
    tree = with_leaves(source.tree, iter(out))
    meant = dataclasses.replace(source, tree=tree, record=None)
    if format != source.format:
        # A folder's files are one checkpoint in any other format.
        meant = merged(meant)
        flat = FORMATS[source.format].flat
        tree = nested(meant.tree, file) if flat else meant.tree
        meant = Checkpoint(format, format_named(format).fit(tree, file))
    nbytes = sum(leaf.nbytes for leaf in out if is_array(leaf))
    if keep:
        meant = dataclasses.replace(
            meant, record=ConversionRecord(plan, shapes_of(meant))
        )
    return Job(source, meant, tuple(converted), nbytes)


def _moved(leaf: Any, move: Move) -> LazyLeaf:
    """Return a leaf with its entries still to be moved.

    Raises:
      ValueError: entries smaller than a byte would have to change places.
    """
    leaf = LazyLeaf.of(leaf)
    n = len(move.stack_axes)
    if not stacks_lead(move.stack_axes):
        # A stack along an inner axis is rearranged separately, in memory.
        return LazyLeaf.of(convert_leaf(move.rearrange, leaf.array(), move.stack_axes))
    whole = move.rearrange.stacked(leaf.shape[:n]) if n else move.rearrange
    if not leaf.itemsize and not whole.is_reshape:
        raise ValueError(
            f"entries of dtype {leaf.dtype} are smaller than a byte and can't be "
            "transposed. Cast them to a wider dtype first."
        )
    return dataclasses.replace(leaf, move=whole)


def shapes_of(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every leaf, by its name."""
    return {leaf.path: leaf.shape for leaf in described(checkpoint).leaves}


def split_tree(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as one flat dict, by the levels of its paths."""
    leaves = dict(iter_leaves(checkpoint.tree))
    separator = "/"
    if FORMATS[checkpoint.format].flat:
        separator = key_separator([parts[0] for parts in leaves])
    tree = {
        "/".join(level for part in parts for level in part.split(separator)): leaf
        for parts, leaf in leaves.items()
    }
    return dataclasses.replace(checkpoint, tree=tree)
