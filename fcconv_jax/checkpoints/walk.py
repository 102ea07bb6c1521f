"""Folders walked safely: regular files only, each folder once, links known.

A folder that was downloaded may hold a link to itself, to a device, or out of the
folder, and pipes that hang whoever opens them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..messages.errors import CheckpointError


def regular_files(folder: Path, leave: Iterable[str] = ()) -> dict[Path, Path]:
    """Return all files below a folder, by their path in it.

    Args:
      folder: where to look; links in it are followed.
      leave: names in the folder itself that are passed over.

    Raises:
      CheckpointError: something is not a regular file, or a link leads to a folder that
        was visited before.
    """
    found: dict[Path, Path] = {}
    _walk(folder, Path(), set(leave), {folder.resolve()}, found)
    return found


def _walk(
    folder: Path,
    inside: Path,
    leave: set[str],
    seen: set[Path],
    found: dict[Path, Path],
) -> None:
    # Sorted: file systems list in orders of their own, and errors name the first.
    for entry in sorted(folder.iterdir()):
        if entry.name in leave:
            continue
        mode = require_regular(entry, folders=True)
        if not stat.S_ISDIR(mode):
            found[inside / entry.name] = entry
            continue
        # A link that leads up would be walked without end.
        real = entry.resolve()
        if entry.is_symlink() and real in seen:
            raise CheckpointError(
                f"{entry}: a link to {real}, which was already visited. Remove it."
            )
        seen.add(real)
        _walk(entry, inside / entry.name, set(), seen, found)


def require_regular(path: Path, folders: bool = False) -> int:
    """Return the mode of a file, links followed.

    Raises:
      CheckpointError: it is a pipe, a device, a socket, or a link to nowhere.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or (folders and stat.S_ISDIR(mode))):
        raise CheckpointError(
            f"{path}: expected a regular file, got a pipe, device or socket. Remove it."
        )
    return mode


def refuse_links_out(folder: Path, files: Iterable[Path]) -> None:
    """Refuse files of a folder that lie elsewhere, but for links in the hub's cache.

    The cache keeps ``snapshots/REVISION/model.safetensors`` as a link to ``blobs/``.

    Raises:
      CheckpointError: lists the links.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    out = [
        f"{path} -> {real}"
        for path in files
        for real in [path.resolve()]
        if home not in real.parents
    ]
    if out:
        raise CheckpointError(
            f"{folder}: {len(out)} links leave the folder: {out[:5]}. Remove them, or "
            "pass follow_links=True (--follow-links) to copy their targets."
        )


def foreign_files(
    folder: Path, own: Mapping[Path, bool], carried: Mapping[Path, Path]
) -> Sequence[str]:
    """Return what a folder holds beside a checkpoint: names, sorted.

    Args:
      folder: that would be replaced.
      own: for each of its files, whether it is the checkpoint's.
      carried: files that the new checkpoint has, by their path; the same bytes are no
        loss.
    """
    return sorted(
        str(name)
        for name, is_own in own.items()
        if not is_own and not (name in carried and _same(folder / name, carried[name]))
    )


def _same(one: Path, other: Path) -> bool:
    return (
        # Sizes first: a file of weights may be many GB.
        os.path.getsize(one) == os.path.getsize(other)
        and one.read_bytes() == other.read_bytes()
    )
