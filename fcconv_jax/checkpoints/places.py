"""Where a checkpoint goes: whether the place is free, and how it gets there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..files.install import install, sync, workspace
from ..messages.errors import CheckpointError
from ..messages.flags import check_flags
from .detect import PathLike, detect, full_path
from .formats import FolderFormat
from .walk import foreign_files, regular_files


def check_target(src: PathLike, dst: PathLike, *, overwrite: bool = False) -> None:
    """Find out before long work whether a checkpoint is there to be converted.

    Raises:
      CheckpointError: there is no ``src``, or ``dst`` is not free.
    """
    detect(src)
    check_free(full_path(dst), overwrite)


def check_free(
    path: Path,
    overwrite: bool,
    carried: Mapping[Path, Path] | None = None,
) -> None:
    """Refuse a place that is taken.

    Args:
      path: the place.
      overwrite: whether a checkpoint may be there.
      carried: files that the new one has beside its own, if known: a folder with others
        is refused.

    Raises:
      CheckpointError: something is there; or it may be replaced, and is more than a
        checkpoint.
    """
    check_flags(overwrite=overwrite)
    if os.path.lexists(path):
        if not overwrite:
            raise _exists(path)
        if found := _obstacle(path, carried):
            raise CheckpointError(f"{path}: {found}")
    for folder in path.parents:
        if folder.exists():
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: not a folder. Choose another destination."
                )
            break


def _obstacle(path: Path, carried: Mapping[Path, Path] | None) -> str:
    """Return why what is there must not be replaced; empty if it may be."""
    no_checkpoint = (
        "is not a checkpoint that can be opened, and only checkpoints are overwritten. "
        "Remove it, or choose another name"
    )
    try:
        path, format = detect(path)
        if not isinstance(format, FolderFormat):
            format.open(path)
            return ""
        if not format.looks_like(path):
            return no_checkpoint
        own = format.owns(path)
        kept = {inside: own(inside) for inside in regular_files(path)}
    except (CheckpointError, OSError) as error:
        return f"{no_checkpoint} ({error})"
    if carried is None:
        return ""
    if more := foreign_files(path, kept, carried):
        return (
            f"holds more than a checkpoint: {more[:5]}. Move these files away, or "
            "choose another name"
        )
    return ""


@contextlib.contextmanager
def fresh_place(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is removed afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with workspace(path) as folder:
        yield folder / path.name


def put(
    fresh: Path,
    path: Path,
    overwrite: bool,
    carried: Mapping[Path, Path],
) -> None:
    """Put what was written in its place, in one step.

    Raises:
      CheckpointError: the place is not free, or holds more than a checkpoint.
    """
    sync(fresh)  # a crash after this finds what was written whole
    try:
        install(fresh, path, lambda it: overwrite and not _obstacle(it, carried))
    # Something has come there since check_free looked, before long work.
    except FileExistsError:
        if overwrite and (found := _obstacle(path, carried)):
            raise CheckpointError(f"{path}: exists already, and {found}") from None
        raise _exists(path) from None


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: exists already; choose another name, or overwrite=True "
        "(--overwrite) to replace the checkpoint there"
    )
