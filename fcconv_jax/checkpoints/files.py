"""Checkpoints on disk: which format, read, look inside, write whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import msgpack, orbax, safetensors
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointInfo,
    Format,
    LeafInfo,
    iter_leaves,
)

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


def read_checkpoint(path: PathLike) -> Checkpoint:
    """Reads a checkpoint: an Orbax directory, a Flax msgpack or a safetensors file.

    Damage is found where the format shows it: sizes, headers, indexes, checksums where
    Orbax keeps them. No format has a checksum of every entry: a flipped bit in an
    array passes as another number.

    The format is told from the content. No code from the file is run. Entries of a
    safetensors file are mapped and read when used; the others are read whole.

    Args:
      path: file or directory; for a manager's directory the latest step is read, for
        another one name its directory.

    Raises:
      CheckpointError: nothing is there, it is no checkpoint, or it is damaged.

    Example:
      >>> import numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "model.safetensors")
      ...     tree = {"fc.kernel": np.ones((8, 3), np.float32)}
      ...     _ = write_checkpoint(path, Checkpoint("safetensors", tree))
      ...     read_checkpoint(path).tree["fc.kernel"].shape
      (8, 3)
    """
    path, format = _detect(path)
    with _named(path):
        if format == "orbax":
            return orbax.read(path)
        return msgpack.read(path) if format == "msgpack" else safetensors.read(path)


def inspect_checkpoint(path: PathLike) -> CheckpointInfo:
    """Says what is in a checkpoint, without loading arrays where the format allows.

    An Orbax directory and a safetensors file have an index; a msgpack file has none
    and is read whole. Arguments and errors as for :func:`read_checkpoint`.
    """
    path, format = _detect(path)
    with _named(path):
        if format == "orbax":
            return orbax.inspect(path)
        if format == "msgpack":
            return msgpack.inspect(path)
        return safetensors.inspect(path)


def write_checkpoint(
    path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False
) -> CheckpointInfo:
    """Writes a checkpoint whole, or leaves everything as it was.

    It is written beside the place it goes to, its leaves are looked up there and
    compared, and only then it is moved into place.

    Args:
      path: file, or for Orbax directory, to write; its folder is made where missing.
      checkpoint: what to write, in its own format.
      overwrite: replace what is there; it stays if the writing fails.

    Returns:
      What was written.

    Raises:
      CheckpointError: something is there already, a leaf does not fit the format, or
        what was written does not read back.
    """
    path = Path(path).absolute()
    finals = _free(path, checkpoint.format, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _named(path),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder,
    ):
        fresh = Path(folder, path.name)
        if checkpoint.format == "orbax":
            orbax.write(fresh, checkpoint)
        elif checkpoint.format == "msgpack":
            msgpack.write(fresh, checkpoint)
        else:
            safetensors.write(fresh, checkpoint)
        info = inspect_checkpoint(fresh)
        _compare(checkpoint, info)
        _sync(Path(folder))
        _install([Path(folder, final.name) for final in finals], finals)
    return dataclasses.replace(info, path=path)


def check_target(src: PathLike, dst: PathLike, *, overwrite: bool = False) -> None:
    """Finds out before long work whether a checkpoint is there to be converted.

    Args:
      src: the checkpoint.
      dst: where it is to go.
      overwrite: whether something may be there.

    Raises:
      CheckpointError: there is no ``src``, or ``dst`` is not free.
    """
    _, default = _detect(src)
    _free(Path(dst).absolute(), format_for(dst, default), overwrite)


def _free(path: Path, format: Format, overwrite: bool) -> list[Path]:
    """The files or the directory that a checkpoint will be."""
    finals = [path]
    if format == "msgpack":
        finals.append(msgpack.plan_path(path))
    for final in finals:
        if final.exists() and not overwrite:
            raise CheckpointError(
                f"{final}: exists already; choose another name, or overwrite=True "
                "(--overwrite) to replace it"
            )
    for folder in path.parents:
        if folder.exists():
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: no folder; choose another place")
            break
    return finals


def format_for(dst: PathLike, default: Format) -> Format:
    """The format that a name asks for: by its suffix, else the default."""
    return _SUFFIXES.get(Path(dst).suffix, default)


def _detect(path: PathLike) -> tuple[Path, Format]:
    path = Path(path).absolute()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_dir():
        return path, "orbax"
    with _named(path), path.open("rb") as file:
        head = file.read(16)
    # Before the others: a header's length may begin like anything.
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


def _no_checkpoint(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: no checkpoint: {why}; wanted is an Orbax directory, a Flax msgpack "
        "file or a safetensors file"
    )


def _compare(checkpoint: Checkpoint, info: CheckpointInfo) -> None:
    """Checks that what was written is what was meant."""
    meant = {
        leaf.path: leaf
        for parts, value in iter_leaves(checkpoint.tree)
        for leaf in [LeafInfo.of("/".join(parts), value)]
    }
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


def _sync(folder: Path) -> None:
    """Flushes every file, so that a crash after the move finds it whole."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _install(fresh: Sequence[Path], finals: Sequence[Path]) -> None:
    """Moves the new files into place, or puts the old ones back."""
    old: list[tuple[Path, Path]] = []
    done: list[Path] = []
    try:
        for new, final in zip(fresh, finals):
            if final.exists():
                kept = new.with_name(f"{new.name}.old")
                final.rename(kept)
                old.append((kept, final))
        for new, final in zip(fresh, finals):
            if new.exists():
                new.rename(final)
                done.append(final)
    except BaseException:
        for final in done:
            shutil.rmtree(final) if final.is_dir() else final.unlink()
        for kept, final in old:
            kept.rename(final)
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns the system's errors into ours, with the file's name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
