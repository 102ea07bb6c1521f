"""Installs a file: the old one stays until the new one is whole and proved."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..files.install import disk_fault, install, is_file, sync, workspace
from ..messages.errors import ExportError


def check_free(path: Path) -> None:
    """Find out before long work that something is there that may not be replaced.

    Raises:
      ExportError: it is a folder, a link to nowhere, a pipe or a device.
    """
    if os.path.lexists(path) and not _may_replace(path):
        raise ExportError(
            f"{path} can't be replaced: export didn't write it. Pass another path, or "
            "move it away."
        )


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside a file, in which it is written under its own name.

    The folder disappears at the end; that of a killed run disappears with the next one.

    Args:
      path: the file, or the package, to be written; its folder is made.

    Raises:
      ExportError: the folder cannot be made or written to, or its disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Entered by hand: an OSError of the body isn't one of the folder.
        made = workspace(path)
        folder = made.__enter__()
    except OSError as error:
        raise ExportError(
            f"{path} can't be written: {error.strerror}. Pass another path."
        ) from None
    with contextlib.ExitStack() as stack:
        stack.push(made)
        try:
            yield folder
        except Exception as error:
            why = disk_fault(error)
            if why is None:
                raise
            raise ExportError(
                f"{path} can't be written: {why}. Make room, or pass another path."
            ) from error


def emptied(path: Path) -> Path:
    """A path without its file, which is not overwritten: a runtime may map it."""
    for each in path.parent.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    return path


def put(folder: Path, path: Path, passed: bool) -> Path:
    """Move what is in a folder to its place; return where the file is.

    Args:
      folder: holds the file and what belongs to it.
      path: where the file is to be.
      passed: whether it passed its proof. A file that did not pass does not replace an
        older one: it gets the name ``net.different.tflite`` instead.

    Raises:
      ExportError: something is in the place that is not a file of this kind.
    """
    final, stem = path, path.stem
    if not passed and path.exists():
        stem = f"{path.stem}.different"
        final = path.with_name(f"{stem}{path.suffix}")
    # What lies beside a file comes first: the file never appears without it.
    made = sorted(folder.iterdir(), key=lambda each: each.name == path.name)
    try:
        for each in made:
            sync(each)
        for each in made:
            there = path.with_name(stem + each.name.removeprefix(path.stem))
            install(each, there, _may_replace)
    except OSError as error:
        name = error.filename2 or error.filename or final
        raise ExportError(
            f"{name} can't be replaced: {error.strerror}. Pass another path."
        ) from None
    return final


def _may_replace(there: Path) -> bool:
    """Whether a file is there, or a Core ML package, which is a folder, and no more."""
    if not there.is_dir() or there.is_symlink():
        return is_file(there)
    inside = {each.name for each in there.iterdir()}
    return "Manifest.json" in inside and inside <= {"Manifest.json", "Data"}
