"""A checkpoint to the other form and back, as one file to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..plan import Plan, in_words
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointInfo,
    CheckpointReport,
    Format,
    Record,
    is_array,
    iter_leaves,
    with_leaves,
)
from .files import (
    PathLike,
    format_for,
    inspect_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from .formats import change_format
from .matching import find_moves, leaf_name

Progress = Callable[[int, int, str], None]


def convert_checkpoint(
    src: PathLike,
    dst: PathLike,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    format: Format | None = None,
) -> CheckpointReport:
    """Writes a checkpoint in the plan's form, with the plan stored in it.

    Entries are moved, never changed; every other leaf is written as it was read. A
    plain Flax model with the converted layers loads the result without fcconv_jax.

    A checkpoint holds no optimizer, so its state is told from paths and shapes: a leaf
    outside of the params whose path ends in a planned parameter's path (``mu``, ``nu``,
    ``trace``, a running average) moves along when it has the parameter's shape, stays
    when it is a scalar, and is refused otherwise (factored statistics). Optimizers that
    treat a parameter by its number of axes (muon) cannot be told: convert their state
    with :func:`fcconv_jax.convert_opt_state`.

    Args:
      src: Orbax directory (one tree, a step, or a manager's: its latest step), Flax
        msgpack file or safetensors file.
      dst: where to write; must not exist.
      plan: from :func:`fcconv_jax.make_plan`. Its paths are found with or without the
        levels that the checkpoint puts above them.
      overwrite: replace what is at ``dst``; it stays if anything fails.
      progress: called with the number of leaves done, their total, and the path of
        the one just done.
      format: format of ``dst``; by default what its suffix says, else that of ``src``.
        Only nested dicts of arrays travel from one format to another.

    Returns:
      What was converted.

    Raises:
      CheckpointError: ``src`` is damaged, no checkpoint, or converted already; a
        planned leaf is missing or has another shape; ``dst`` exists or cannot be
        written. Nothing has been written then.

    Example:
      >>> import tempfile
      >>> from fcconv_jax.kernels import Rearrangement
      >>> from fcconv_jax.plan import LayerPlan
      >>> kernel = Rearrangement.reshape((8, 3), (2, 2, 2, 3))
      >>> fc = LayerPlan("full_window", "Dense", (2, 2), "HWC", (("kernel", kernel),),
      ...                (1, 8), (1, 1))
      >>> tree = {"fc": {"kernel": np.ones((8, 3), np.float32)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     src, dst = Path(folder, "fc.msgpack"), Path(folder, "conv.msgpack")
      ...     _ = write_checkpoint(src, Checkpoint("msgpack", tree))
      ...     convert_checkpoint(src, dst, Plan("conv", (("fc", fc),))).converted
      (('fc/kernel', (8, 3), (2, 2, 2, 3)),)
    """
    info = _opened(src, dst)
    if info.plan is not None:
        raise CheckpointError(
            f"{src}: converted to {in_words(info.plan.to)} already (it holds the "
            "plan); restore_checkpoint (fcconv restore) takes it back"
        )
    return _rewrite(info, dst, plan, True, overwrite, progress, format)


def restore_checkpoint(
    src: PathLike,
    dst: PathLike,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    format: Format | None = None,
) -> CheckpointReport:
    """Undoes :func:`convert_checkpoint` to the bit, with the plan stored in ``src``.

    Arguments, result and errors are those of :func:`convert_checkpoint`. A checkpoint
    that holds no plan is refused, and so is one whose leaves are no longer those that
    the conversion wrote: a leaf missing, added, or of another shape.
    """
    info = _opened(src, dst)
    if info.record is None:
        beside = " and none lies beside it" if info.format == "msgpack" else ""
        raise CheckpointError(
            f"{src}: holds no plan{beside}: it was not written by convert_checkpoint; "
            "with the plan at hand, convert_checkpoint(src, dst, plan.inverse())"
        )
    found = {leaf.path: leaf.shape for leaf in info.leaves}
    for name, shape in info.record.shapes.items():
        if name not in found:
            raise CheckpointError(
                f"{src}: leaf {name!r} is missing; it was there when the checkpoint "
                "was converted. Restore from the file that convert_checkpoint wrote"
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{src}: leaf {name!r} has shape {found[name]}, it was written with "
                f"{shape}. Restore from the file that convert_checkpoint wrote"
            )
    for name in found.keys() - info.record.shapes.keys():
        raise CheckpointError(
            f"{src}: leaf {name!r} was not there when the checkpoint was converted. "
            "Restore from the file that convert_checkpoint wrote"
        )
    plan = info.record.plan.inverse()
    return _rewrite(info, dst, plan, False, overwrite, progress, format)


def _opened(src: PathLike, dst: PathLike) -> CheckpointInfo:
    """Looks into the source, after checking that the target is another place."""
    source, target = Path(src).resolve(), Path(dst).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise CheckpointError(
            f"{dst}: is {src}, or one lies in the other; a checkpoint is converted to "
            "a new place, never in its own"
        )
    return inspect_checkpoint(src)


def _rewrite(
    info: CheckpointInfo,
    dst: PathLike,
    plan: Plan,
    keep: bool,
    overwrite: bool,
    progress: Progress | None,
    format: Format | None,
) -> CheckpointReport:
    file = str(info.path)
    checkpoint = read_checkpoint(info.path)
    leaves = list(iter_leaves(checkpoint.tree))
    shapes = {
        parts: tuple(leaf.shape) if is_array(leaf) else None for parts, leaf in leaves
    }
    moves = find_moves(shapes, plan, checkpoint.format, file)
    out, converted = [], []
    for done, (parts, leaf) in enumerate(leaves, 1):
        name = leaf_name(parts)
        if parts in moves:
            try:
                moved = moves[parts](leaf)
            except ValueError as error:
                raise CheckpointError(f"{file}: leaf {name!r}: {error}") from None
            if not moves[parts].is_identity:
                converted.append((name, tuple(leaf.shape), tuple(moved.shape)))
            leaf = moved
        out.append(leaf)
        if progress is not None:
            progress(done, len(leaves), name)
    format = format or format_for(dst, checkpoint.format)
    tree = with_leaves(checkpoint.tree, iter(out))
    if format != checkpoint.format:
        tree = change_format(tree, checkpoint.format, format, file)
        checkpoint = Checkpoint(format, tree)
    record = Record(plan, _shapes(tree)) if keep else None
    written = write_checkpoint(
        dst,
        dataclasses.replace(checkpoint, tree=tree, record=record),
        overwrite=overwrite,
    )
    return CheckpointReport(
        info.path,
        written.path,
        format,
        tuple(converted),
        len(written.leaves),
        written.nbytes,
    )


def _shapes(tree: Any) -> Mapping[str, tuple[int, ...]]:
    return {leaf_name(parts): np.shape(leaf) for parts, leaf in iter_leaves(tree)}
