"""Atomic writes: a file or folder appears whole or not at all, even after a kill.

Every writer of the package goes through here: checkpoints, exports, grids, timings.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, so leftovers stay and merges may race
    fcntl = None

# From linux/fs.h and fcntl.h.
_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
_ZEROS = 1 << 20


# Of what a disk refuses, whatever is written to it.
_DISK = frozenset({errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS, errno.EDQUOT})


def disk_fault(error: BaseException) -> str | None:
    """Return why a disk took no more, in the system's words; None for other errors.

    TensorStore, safetensors and OpenVINO raise errors of their own for a full disk.

    Example:
      >>> disk_fault(OSError(errno.ENOSPC, "No space left on device"))
      'No space left on device'
      >>> disk_fault(ValueError("Failed to write 8 bytes: File too large [27]"))
      'File too large'
      >>> disk_fault(ValueError("another")) is None
      True
    """
    if isinstance(error, OSError) and error.errno in _DISK:
        return error.strerror
    for known in (*map(os.strerror, sorted(_DISK)), "iostream error"):
        if known in str(error):
            return known
    return None


def is_file(there: Path) -> bool:
    """Return whether a regular file is there, which a new one may replace."""
    return there.is_file()


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Yield a path to write at; afterwards, move what was written to its destination.

    Files written beside the yielded path are moved first: ``model.xml`` never appears
    without its ``model.bin``. If the body raises, nothing changes. The
    folder of a killed run is removed by the next run to the same destination.

    Args:
      final: the destination. Its folder must exist. Of what may be there, only a
        regular file is replaced: no folder, link to nowhere, device or pipe.

    Raises:
      FileExistsError: something is at the destination that may not be replaced.
      OSError: the folder does not exist, is read-only or full.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     final = Path(folder, "timings.json")
      ...     with replacing(final) as fresh:
      ...         _ = fresh.write_text("{}")
      ...     final.read_text(), [each.name for each in Path(folder).iterdir()]
      ('{}', ['timings.json'])
    """
    with workspace(final) as folder:
        yield folder / final.name
        # False sorts first: what others refer to the destination by comes last.
        written = sorted(folder.iterdir(), key=lambda each: each.name == final.name)
        for each in written:
            sync(each)
        for each in written:
            install(each, final.with_name(each.name), is_file)


@contextlib.contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """Yield a hidden folder beside a destination, on its file system.

    It is locked while its process lives, and removed at the end. The folder of a killed
    run is not locked: the next run to the same destination removes it.

    Raises:
      OSError: the destination's folder does not exist, is read-only or full.
    """
    remove_leftovers(final)
    while True:
        folder = Path(tempfile.mkdtemp(dir=final.parent, prefix=_prefix(final)))
        with _lock(folder) as mine:
            # Another run may have taken it for a leftover before it was locked.
            if mine and folder.exists():
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


def remove_leftovers(final: Path) -> list[Path]:
    """Remove the folders that killed runs left beside a destination; return them."""
    removed = []
    if fcntl is None:
        return removed
    for folder in final.parent.iterdir():
        if folder.name.startswith(_prefix(final)):
            with contextlib.suppress(OSError), _lock(folder) as dead:
                if dead:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder)
    return removed


@contextlib.contextmanager
def updating(final: Path) -> Iterator[None]:
    """Hold off other processes that update a file: read, merge and replace inside.

    The lock is on the folder, so it leaves no file behind; it ends with the process,
    and holds off other threads, too.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     final = Path(folder, "timings.json")
      ...     with updating(final), replacing(final) as fresh:
      ...         _ = fresh.write_text("{}")
    """
    if fcntl is None:
        yield
        return
    fd = os.open(final.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _prefix(final: Path) -> str:
    # A name may have 255 bytes, a character up to 4; what mkdtemp adds has 8.
    short = os.fsencode(final.name)[:200].decode(errors="ignore")
    return f".{short}.fcconv-"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Yield whether this process holds a folder's lock, which ends with the process."""
    if fcntl is None:
        yield True
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
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
    """Move a file or folder to its destination in one step.

    Call :func:`sync` first. At every moment the destination holds what it held, or the
    new whole. What was replaced is left where ``fresh`` was.

    Args:
      fresh: on the destination's file system.
      final: the destination.
      may_replace: whether what is there may be replaced; asked again afterwards, of
        what was there.

    Raises:
      FileExistsError: something is there that may not be replaced.
      OSError: the file system cannot exchange two folders in one step, or cannot
        flush the folder.
    """
    try:
        _move_new(fresh, final)
    except FileExistsError:
        if not may_replace(final):
            raise
        _exchange(fresh, final)
        if not may_replace(fresh):
            # Another program put it there since it was looked at.
            _exchange(fresh, final)
            raise
    try:
        _sync_one(final.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"is complete and in place, but its folder cannot be flushed "
            f"({error.strerror}): it may be gone after a power cut",
            str(final),
        ) from None


def _move_new(fresh: Path, final: Path) -> None:
    """Move to a place where nothing may be. Raises FileExistsError."""
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
        raise OSError(
            errno.ENOTSUP,
            "cannot be replaced in one step on this system; remove it, or choose "
            "another name",
            str(final),
        )
    kept = fresh.with_name(f"{fresh.name}.old")
    os.link(final, kept)
    fresh.replace(final)
    kept.rename(fresh)


def _rename(one: Path, other: Path, flags: int) -> bool:
    """Call Linux's renameat2; False if it does not exist for these files."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags):
        return True
    code = ctypes.get_errno()
    # The kernel, or this file system, lacks the call or its flags.
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def allocate(fd: int, nbytes: int) -> None:
    """Extend a file to a size, with the blocks allocated on the disk.

    Raises:
      OSError: there is not enough space.
    """
    if hasattr(os, "posix_fallocate"):
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
        return
    with open(fd, "ab", closefd=False) as file:  # macOS, Windows
        # Without the call, only what has been written has blocks; "ab" starts at the
        # end.
        for start in range(file.tell(), nbytes, _ZEROS):
            file.write(bytes(min(_ZEROS, nbytes - start)))


def sync(path: Path) -> None:
    """Flush a file, or a folder and all in it, and the folder that it lies in."""
    inside = path.rglob("*") if path.is_dir() else ()
    for entry in (*inside, path, path.parent):
        _sync_one(entry)


def _sync_one(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():  # cannot be opened there
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
