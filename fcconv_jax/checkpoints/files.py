"""Checkpoints on disk: which format, open, read, look inside, write."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..install import install, sync, workspace
from . import folders, msgpack, orbax, safetensors
from .checkpoint import (
    Checkpoint,
    CheckpointInfo,
    FolderLayout,
    Format,
    LeafInfo,
    OrbaxLayout,
    iter_leaves,
    with_leaves,
)
from .entries import Moved
from .extents import Tell, silent

PathLike = str | os.PathLike[str]

_SUFFIXES: dict[str, Format] = {".safetensors": "safetensors", ".msgpack": "msgpack"}
_MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"PK\x03\x04": "a zip archive, as NumPy (.npz) and PyTorch write",
    b"\x93NUMPY": "a NumPy array file",
    b"\x1f\x8b": "a gzip file",
    b"\xff\xd8\xff": "a JPEG image",
}


def open_checkpoint(path: PathLike, step: str | int | None = None) -> Checkpoint:
    """Opens a checkpoint: headers are read, entries stay in the files.

    The format is told from the content. No code from the file is run.

    Args:
      path: Orbax directory, Flax msgpack file, safetensors file, or a folder of files
        of weights.
      step: of a directory that holds several; the latest unless said.

    Raises:
      CheckpointError: nothing is there, it is no checkpoint, it is damaged, or it has
        no such step.
    """
    path, format = _detect(path)
    with named(path):
        if path.is_dir():
            name = None if step is None else _step_name(path, step)
            open_ = orbax.open_ if format == "orbax" else folders.open_
            return open_(path, name)
        if step is not None:
            raise CheckpointError(f"{path}: is one file, and has no step {step!r}")
        return msgpack.open_(path) if format == "msgpack" else safetensors.open_(path)


def step_names(path: PathLike) -> list[str]:
    """Names of the steps in a directory that holds several, by number; else none."""
    path, format = _detect(path)
    if not path.is_dir():
        return []
    with named(path):
        return (orbax if format == "orbax" else folders).step_names(path)


def read_checkpoint(path: PathLike, step: str | int | None = None) -> Checkpoint:
    """Reads a checkpoint into memory: all of it.

    Damage is found where the format shows it: sizes, headers, indexes, checksums where
    Orbax keeps them. No format has a checksum of every entry: a flipped bit in an
    array passes as another number.

    Args:
      path: Orbax directory, Flax msgpack file, safetensors file, or a folder of files
        of weights, which are read as one tree.
      step: of a directory that holds several; the latest unless said.

    Raises:
      CheckpointError: nothing is there, it is no checkpoint, or it is damaged.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "model.safetensors")
      ...     tree = {"fc.kernel": np.ones((8, 3), np.float32)}
      ...     _ = write_checkpoint(path, Checkpoint("safetensors", tree))
      ...     read_checkpoint(path).tree["fc.kernel"].shape
      (8, 3)
    """
    opened = merged(open_checkpoint(path, step))
    out = []
    for parts, leaf in iter_leaves(opened.tree):
        try:
            out.append(leaf.array() if isinstance(leaf, Moved) else leaf)
        except (CheckpointError, MemoryError) as error:
            said = "there is not enough memory for it"
            raise CheckpointError(
                f"{path}: leaf {'/'.join(parts)!r}: {str(error) or said}"
            ) from None
    return dataclasses.replace(opened, tree=with_leaves(opened.tree, iter(out)))


def inspect_checkpoint(path: PathLike, step: str | int | None = None) -> CheckpointInfo:
    """Says what is in a checkpoint, from its headers alone.

    Arguments and errors as for :func:`read_checkpoint`.
    """
    return described(open_checkpoint(path, step))


def described(checkpoint: Checkpoint) -> CheckpointInfo:
    """What is in a checkpoint that is open or in memory."""
    leaves = tuple(
        LeafInfo.of("/".join(parts), leaf)
        for parts, leaf in iter_leaves(merged(checkpoint).tree)
    )
    return CheckpointInfo(
        checkpoint.path or Path(),
        checkpoint.format,
        leaves,
        checkpoint.record,
        checkpoint.metadata,
        checkpoint.layout,
    )


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """A folder's files as one tree; other checkpoints as they are.

    Raises:
      CheckpointError: two files hold a leaf of one name.
    """
    if not isinstance(checkpoint.layout, FolderLayout):
        return checkpoint
    tree: dict[str, Any] = {}
    for name, part in checkpoint.tree.items():
        for key, node in part.items():
            if key in tree:
                raise CheckpointError(
                    f"{checkpoint.path}: {key!r} is in {name} and in another of its "
                    "files; remove one"
                )
            tree[key] = node
    return dataclasses.replace(
        checkpoint, tree=tree, layout=OrbaxLayout(), metadata={}, path=None
    )


def write_checkpoint(
    path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False
) -> CheckpointInfo:
    """Writes a checkpoint whole, or leaves everything as it was.

    It is written beside the place it goes to, its leaves are looked up there and
    compared, and only then it is put in its place, in one step.

    Args:
      path: file, or for Orbax directory, to write; its folder is made where missing.
      checkpoint: what to write, in its own format.
      overwrite: replace the checkpoint that is there; it stays if the writing fails.

    Returns:
      What was written.

    Raises:
      CheckpointError: something is there already, a leaf does not fit the format, or
        what was written does not read back.
    """
    path = Path(path).absolute()
    check_free(path, overwrite)
    with named(path), fresh_place(path) as fresh:
        write_one(fresh, checkpoint)
        info = described(open_checkpoint(fresh, step_of(checkpoint)))
        require_headers(checkpoint, info)
        put(fresh, path, overwrite)
    return dataclasses.replace(info, path=path)


def write_one(fresh: Path, checkpoint: Checkpoint, tell: Tell = silent) -> None:
    """Writes a checkpoint where nothing is, in its format and layout.

    Raises:
      CheckpointError: a leaf does not fit the format.
    """
    if isinstance(checkpoint.layout, FolderLayout):
        write = folders.write
    else:
        writers = {
            "orbax": orbax.write,
            "msgpack": msgpack.write,
            "safetensors": safetensors.write,
        }
        write = writers[checkpoint.format]
    write(fresh, checkpoint, tell)


@contextlib.contextmanager
def fresh_place(path: Path) -> Iterator[Path]:
    """A place to write in that will be moved to another, and is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with workspace(path) as folder:
        yield folder / path.name


def put(fresh: Path, path: Path, overwrite: bool) -> None:
    """Puts what was written in its place, in one step.

    Raises:
      CheckpointError: the place is not free, or holds no checkpoint.
    """
    sync(fresh)  # a crash after this finds what was written whole
    try:
        install(fresh, path, lambda there: overwrite and is_checkpoint(there))
    except FileExistsError:
        raise _exists(path) from None


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: exists already; choose another name, or overwrite=True "
        "(--overwrite) to replace the checkpoint there"
    )


def step_of(checkpoint: Checkpoint) -> str | None:
    """The name of the step that a checkpoint is, where its directory holds several."""
    layout = checkpoint.layout
    if isinstance(layout, OrbaxLayout):
        return layout.step
    (name, *more) = layout.files
    return None if more or Path(name).suffix in folders.SUFFIXES else name


def check_target(src: PathLike, dst: PathLike, *, overwrite: bool = False) -> None:
    """Finds out before long work whether a checkpoint is there to be converted.

    Args:
      src: the checkpoint.
      dst: where it is to go.
      overwrite: whether a checkpoint may be there.

    Raises:
      CheckpointError: there is no ``src``, or ``dst`` is not free.
    """
    _detect(src)
    check_free(Path(dst).absolute(), overwrite)


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses a place that is taken.

    Raises:
      CheckpointError: something is there; or it may be replaced, and is no checkpoint.
    """
    if os.path.lexists(path):
        if not overwrite:
            raise _exists(path)
        if not is_checkpoint(path):
            raise CheckpointError(
                f"{path}: is no checkpoint that can be opened, and only checkpoints "
                "are overwritten; remove it, or choose another name"
            )
    for folder in path.parents:
        if folder.exists():
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: no folder; choose another place")
            break


def is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint is there, as far as its headers tell."""
    try:
        if path.is_dir():
            _, format = _detect(path)
            if format == "orbax":
                orbax.locate(path)
            return True
        open_checkpoint(path)
    except CheckpointError:
        return False
    return True


def format_for(dst: PathLike, default: Format) -> Format:
    """The format that a name asks for: by its suffix, else the default."""
    return _SUFFIXES.get(Path(dst).suffix, default)


def _detect(path: PathLike) -> tuple[Path, Format]:
    path = Path(path).absolute()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_dir():
        with named(path):
            if orbax.looks_like(path) or not folders.holds_weights(path):
                return path, "orbax"
            return path, folders.format_of(path)
    with named(path), path.open("rb") as file:
        head = file.read(16)
    # What the name says, where the content may be it: a short frame may look like a
    # header, whose length begins like anything.
    if path.suffix == ".msgpack" and msgpack.looks_like(head):
        return path, "msgpack"
    if safetensors.looks_like(head):
        return path, "safetensors"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise _no_checkpoint(path, f"it is {what}")
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        why = "it is a Python pickle, which is never loaded because it could run code"
        raise _no_checkpoint(path, why)
    if path.suffix == ".safetensors":
        return path, "safetensors"
    if msgpack.looks_like(head):
        return path, "msgpack"
    raise _no_checkpoint(path, f"it begins with {head!r}" if head else "it is empty")


def _step_name(path: Path, step: str | int) -> str:
    """The name of a step that is given by its name or its number."""
    names = step_names(path)
    by_number = {orbax.number(Path(name)): name for name in names}
    if isinstance(step, str) and (step in names or not step.isdigit()):
        return step
    return by_number.get(int(step), str(step))


def _no_checkpoint(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: no checkpoint: {why}; wanted is an Orbax directory, a Flax msgpack "
        "file or a safetensors file"
    )


def require_headers(checkpoint: Checkpoint, info: CheckpointInfo) -> None:
    """Checks that names, dtypes and shapes that were written are what was meant.

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
                f"back as {got}; nothing was kept"
            )


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turns the system's errors into ours, with the file's name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
