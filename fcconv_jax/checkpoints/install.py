"""New files put in their place in one step: whole or not at all, whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CheckpointError

# From linux/fs.h and fcntl.h.
_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100


@contextlib.contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """A hidden folder beside a place, to write in what will go there.

    It is locked for as long as its run lives, and removed at the end. One that a
    killed run left is not locked: the next run to the same place removes it.

    Args:
      final: the place.
    """
    remove_leftovers(final)
    while True:
        folder = Path(tempfile.mkdtemp(dir=final.parent, prefix=_prefix(final)))
        with _lock(folder) as mine:
            # Another run may have come in between, and taken it for a leftover.
            if mine and folder.exists():
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


def remove_leftovers(final: Path) -> list[Path]:
    """Removes what killed runs left beside a place; returns what it was."""
    removed = []
    for folder in final.parent.iterdir():
        if folder.name.startswith(_prefix(final)):
            with contextlib.suppress(OSError), _lock(folder) as dead:
                if dead:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder)
    return removed


def _prefix(final: Path) -> str:
    # A name may have 255 bytes; what mkdtemp adds has 8.
    return f".{final.name[:200]}.fcconv-"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process could take the lock of a folder, which dies with it."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another run took it for a leftover
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def install(fresh: Path, final: Path, may_replace: Callable[[Path], bool]) -> None:
    """Puts a file or folder in its place in one step.

    It should be on the disk by then: see :func:`sync`. At every moment the place holds
    what it held, or the new whole. What was replaced is left where ``fresh`` was.

    Args:
      fresh: on the same file system.
      final: the place.
      may_replace: whether what is there may be replaced; asked again of what was.

    Raises:
      CheckpointError: something is there that may not be replaced; or the file system
        cannot exchange two folders in one step.
    """
    try:
        _move_new(fresh, final)
    except FileExistsError:
        if not may_replace(final):
            raise exists(final) from None
        _exchange(fresh, final)
        if not may_replace(fresh):
            # Another program put it there since it was looked at.
            _exchange(fresh, final)
            raise exists(final) from None
    try:
        _sync_one(final.parent)
    except OSError as error:
        raise CheckpointError(
            f"{final}: is in its place, whole, but its folder cannot be flushed "
            f"({error.strerror}): it may be gone after a power cut"
        ) from None


def exists(final: Path) -> CheckpointError:
    """The error for a place that is not free."""
    return CheckpointError(
        f"{final}: exists already; choose another name, or overwrite=True "
        "(--overwrite) to replace the checkpoint there"
    )


def _move_new(fresh: Path, final: Path) -> None:
    """Moves to a place where nothing may be. Raises FileExistsError."""
    if _rename(fresh, final, _NOREPLACE):
        return
    if fresh.is_dir():
        # Whoever makes the folder has the place; a folder replaces an empty one.
        final.mkdir()
        fresh.rename(final)
    else:
        os.link(fresh, final)
        fresh.unlink()


def _exchange(fresh: Path, final: Path) -> None:
    if _rename(fresh, final, _EXCHANGE):
        return
    if fresh.is_dir() or final.is_dir():
        raise CheckpointError(
            f"{final}: cannot be replaced in one step on this system; remove it, or "
            "choose another name"
        )
    kept = fresh.with_name(f"{fresh.name}.old")
    os.link(final, kept)
    fresh.replace(final)
    kept.rename(fresh)


def _rename(one: Path, other: Path, flags: int) -> bool:
    """Calls Linux's renameat2; False where there is none for these files."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync(path: Path) -> None:
    """Flushes a file, or a folder and all in it, and the folder that it lies in."""
    inside = path.rglob("*") if path.is_dir() else ()
    for entry in (*inside, path, path.parent):
        _sync_one(entry)


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
