"""Checkpoints on disk: which format, open, read, look inside, write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..messages.errors import CheckpointError
from .checkpoint import (
    Checkpoint,
    CheckpointInfo,
    FolderFiles,
    LeafInfo,
    OrbaxItems,
    iter_leaves,
    step_number,
    with_leaves,
)
from .detect import PathLike, detect, named
from .entries import LazyLeaf
from .extents import Advance, silent
from .folders import FOLDER
from .formats import FILES, FORMATS, FileFormat, FolderFormat


def open_checkpoint(path: PathLike, step: str | int | None = None) -> Checkpoint:
    """Open a checkpoint: headers are read, entries stay in the files.

    The format is told from the content. No code from the file is run.

    Args:
      path: Orbax directory, Flax msgpack file, safetensors file, or a folder of files
        of weights.
      step: of a directory with several; the latest by default.

    Raises:
      CheckpointError: the path doesn't exist, isn't a checkpoint, is damaged, or it has
        no such step.
    """
    path, format = detect(path)
    with named(path):
        if isinstance(format, FolderFormat):
            return format.open(path, _step_name(format.step_names(path), step))
        if step is not None:
            raise CheckpointError(
                f"{path}: expected a directory of steps for step={step!r}, got a "
                "single file. Drop step=."
            )
        return format.open(path)


def step_names(path: PathLike) -> list[str]:
    """Return the names of the steps in a directory, by number; none of a file."""
    path, format = detect(path)
    with named(path):
        return format.step_names(path) if isinstance(format, FolderFormat) else []


def carried(checkpoint: Checkpoint) -> dict[Path, Path]:
    """Return the files beside a checkpoint that its conversion copies, by path."""
    kept = _container(checkpoint)
    if not isinstance(kept, FolderFormat):
        return {}
    with named(checkpoint.path or Path()):
        return dict(kept.companions(checkpoint))


def _container(checkpoint: Checkpoint) -> FileFormat | FolderFormat:
    """Return the format that keeps a checkpoint: a folder of weights is one, too."""
    if isinstance(checkpoint.contents, FolderFiles):
        return FOLDER
    return FORMATS[checkpoint.format]


def read_checkpoint(path: PathLike, step: str | int | None = None) -> Checkpoint:
    """Read a checkpoint into memory: all of it.

    Damage is found where the format shows it: sizes, headers, indexes, checksums where
    Orbax keeps them. No format has a checksum of every entry: a flipped bit in an
    array passes as another number.

    Raises:
      CheckpointError: the path doesn't exist, isn't a checkpoint, or is damaged.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from flax import serialization
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "model.msgpack")
      ...     tree = {"fc": {"kernel": np.ones((8, 3), np.float32)}}
      ...     _ = path.write_bytes(serialization.msgpack_serialize(tree))
      ...     read_checkpoint(path).tree["fc"]["kernel"].shape
      (8, 3)
    """
    opened = merged(open_checkpoint(path, step))
    out = []
    # Leaf by leaf, so that an error names the one that is damaged or too large.
    for parts, leaf in iter_leaves(opened.tree):
        try:
            out.append(leaf.array() if isinstance(leaf, LazyLeaf) else leaf)
        except (CheckpointError, MemoryError) as error:
            said = "there is not enough memory for it"
            raise CheckpointError(
                f"{path}: leaf {'/'.join(parts)!r}: {str(error) or said}"
            ) from None
    return dataclasses.replace(opened, tree=with_leaves(opened.tree, iter(out)))


def inspect_checkpoint(path: PathLike, step: str | int | None = None) -> CheckpointInfo:
    """Report what is in a checkpoint, from its headers alone.

    Arguments and errors as for :func:`read_checkpoint`.
    """
    return described(open_checkpoint(path, step))


def described(checkpoint: Checkpoint) -> CheckpointInfo:
    """Return the contents of an open checkpoint."""
    leaves = tuple(
        LeafInfo.of("/".join(parts), leaf)
        for parts, leaf in iter_leaves(merged(checkpoint).tree)
    )
    step = getattr(checkpoint.contents, "step", None)
    where = checkpoint.path or Path()
    return CheckpointInfo(where, checkpoint.format, leaves, checkpoint.plan, step)


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """Return a folder's files as one tree; other checkpoints as they are.

    Raises:
      CheckpointError: two files hold a leaf of one name.
    """
    if not isinstance(checkpoint.contents, FolderFiles):
        return checkpoint
    tree: dict[str, Any] = {}
    for name, part in checkpoint.tree.items():
        for key, node in part.items():
            if key in tree:
                raise CheckpointError(
                    f"{checkpoint.path}: {key!r} is in {name} and in another of its "
                    "files. Remove one."
                )
            tree[key] = node
    return dataclasses.replace(
        checkpoint, tree=tree, contents=OrbaxItems(), metadata={}, path=None
    )


def write_one(fresh: Path, checkpoint: Checkpoint, advance: Advance = silent) -> None:
    """Write a checkpoint where nothing is, in its format, with the same file names.

    Raises:
      CheckpointError: a leaf does not fit the format.
    """
    _container(checkpoint).write(fresh, checkpoint, advance)


def step_of(checkpoint: Checkpoint) -> str | None:
    """Return the name of a checkpoint's step, if its directory holds several."""
    contents = checkpoint.contents
    if isinstance(contents, OrbaxItems):
        return contents.step
    (name, *more) = contents.files
    return None if more or Path(name).suffix in FILES else name


def _step_name(names: list[str], step: str | int | None) -> str | None:
    """Return the name of a step that is given by its name or its number."""
    if step is None or (
        isinstance(step, str) and (step in names or not step.isdigit())
    ):
        return step
    # A number may stand for a longer name, as 20 for step_20.
    by_number = {step_number(name): name for name in names}
    return by_number.get(int(step), str(step))


def require_headers(checkpoint: Checkpoint, info: CheckpointInfo) -> None:
    """Check that names, dtypes and shapes that were written are what was meant.

    Raises:
      CheckpointError: one is not.
    """
    meant = {leaf.path: leaf for leaf in described(checkpoint).leaves}
    found = {leaf.path: leaf for leaf in info.leaves}
    for name in [*meant, *(found.keys() - meant.keys())]:
        wrote, got = meant.get(name), found.get(name)
        if wrote and got and not wrote.nbytes:
            continue  # a Python value, which each format describes in its own way
        if not wrote or not got or (wrote.shape, wrote.dtype) != (got.shape, got.dtype):
            raise CheckpointError(
                f"{info.path.name}: leaf {name!r} was written as {wrote} and reads "
                f"back as {got}. Nothing was kept; check the disk."
            )
