"""Bytes of files: in several places, read, written, copied or shared."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import mmap
import os
import stat
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..files.install import allocate
from ..messages.errors import CheckpointError

# Bytes that a thread holds in memory at a time; a move needs them twice.
PIECE = 4 << 20
# From so many bytes on an array is never whole in memory.
LARGE = 16 << 20
WORKERS = 3
# What file systems share between files in place of copying.
BLOCK = 4096
_BUFFER = 1 << 20
# From linux/fs.h.
_FICLONERANGE = 0x4020940D
# What is called with the number of bytes that were just dealt with.
Advance = Callable[[int], None]


def give_back_memory() -> None:
    """Pass back to the system what C libraries' threads freed, and glibc keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def silent(count: int) -> None:
    """Ignore progress."""


class File:
    """An open file, closed with the last reference to it."""

    def __init__(self, fd: int, name: str):
        self.fd, self.name = fd, name

    def __del__(self):
        os.close(self.fd)

    @classmethod
    def read(cls, path: Path) -> File:
        """Open a regular file for reading; a pipe or a device would never end.

        Raises:
          CheckpointError: it is not one.
        """
        if not hasattr(os, "preadv"):
            raise CheckpointError(
                f"{path}: expected Linux or macOS to read and write checkpoint files, "
                f"got {sys.platform}. Convert there, or load the params and pass them "
                "to convert_params."
            )
        # O_NONBLOCK: opening a pipe would otherwise wait for a writer before it is
        # refused.
        file = cls(os.open(path, os.O_RDONLY | os.O_NONBLOCK), str(path))
        if not stat.S_ISREG(os.fstat(file.fd).st_mode):
            raise CheckpointError(
                f"{path}: expected a regular file, got something else. Remove it."
            )
        return file

    @classmethod
    def create(cls, path: Path) -> File:
        """Create a file for writing and reading; it must not exist."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return cls(os.open(path, flags, 0o666), str(path))

    @classmethod
    def nameless(cls, folder: Path) -> File:
        """Make a file in a folder that is gone when it is closed."""
        fd, name = tempfile.mkstemp(dir=folder)
        # Unlinked at once, so that a killed process leaves nothing behind.
        os.unlink(name)
        return cls(fd, name)

    @property
    def size(self) -> int:
        """Its bytes."""
        return os.fstat(self.fd).st_size

    def content(self) -> bytes:
        """Return all its bytes."""
        return bytes(self.extent(0, self.size).read(0, self.size))

    def mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Map an empty file as an array to write to, after allocating its blocks.

        Raises:
          OSError: the disk is full.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        # On a full disk, writing to a mapped page without a block ends the process
        # (SIGBUS).
        allocate(self.fd, nbytes)
        return np.frombuffer(mmap.mmap(self.fd, nbytes), dtype).reshape(shape)

    def extent(self, start: int, stop: int) -> Extent:
        """Return the bytes between two places."""
        return Extent(self, ((start, stop - start),))


@dataclasses.dataclass(frozen=True)
class Extent:
    """Bytes of a file, in one or several places, one after the other.

    Args:
      file: the file that holds them.
      spans: offset and length of each place.
    """

    file: File
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes in all places together."""
        return sum(length for _, length in self.spans)

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Offset and length, in the file, of what lies between two of its bytes.

        Example:
          >>> import tempfile
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     file = File.create(Path(folder, "file"))
          >>> list(Extent(file, ((10, 4), (20, 4))).places(2, 6))
          [(12, 2), (20, 2)]
        """
        begin = 0
        for offset, length in self.spans:
            low, high = max(start - begin, 0), min(stop - begin, length)
            if low < high:
                yield offset + low, high - low
            begin += length

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes from ``start`` to ``stop``.

        Raises:
          CheckpointError: the file has become shorter.
        """
        out = bytearray(stop - start)
        self.read_into(start, memoryview(out))
        return out

    def read_into(self, start: int, out: memoryview) -> None:
        """Read as many bytes as there is room for, from ``start`` on.

        Raises:
          CheckpointError: the file has become shorter.
        """
        done = 0
        for offset, length in self.places(start, start + len(out)):
            while length:
                got = os.preadv(self.file.fd, [out[done : done + length]], offset)
                if not got:
                    raise shorter(self.file.name)
                done, offset, length = done + got, offset + got, length - got

    def write(self, start: int, data: memoryview) -> None:
        """Write bytes from ``start`` on."""
        done = 0
        for offset, length in self.places(start, start + len(data)):
            while length:
                count = os.pwrite(self.file.fd, data[done : done + length], offset)
                done, offset, length = done + count, offset + count, length - count


def shorter(file: str) -> CheckpointError:
    """Return the error for a file that was truncated while it was read."""
    return CheckpointError(
        f"{file}: became shorter while it was read; wait until nothing writes to it, "
        "and convert again"
    )


def copy(source: Extent, target: Extent, advance: Advance = silent) -> None:
    """Copy bytes from file to file; blocks are shared where the file system can.

    Raises:
      CheckpointError: the source has become shorter.
    """
    done = 0
    for start, length in source.places(0, source.nbytes):
        for to, count in target.places(done, done + length):
            begin, end = _clone(source.file, start, target.file, to, count)
            advance(end - begin)
            _copy_range(source.file, start, target.file, to, begin, advance)
            after = start + end, target.file, to + end
            _copy_range(source.file, *after, count - end, advance)
            start, done = start + count, done + count


def _copy_range(
    source: File, start: int, target: File, to: int, count: int, advance: Advance
) -> None:
    """Copy through a buffer that stays in the processor's cache.

    This is quicker than the kernel's own copy where a file's data begin anywhere.
    """
    buffer = memoryview(bytearray(min(count, _BUFFER)))
    while count:
        part = buffer[: min(count, _BUFFER)]
        source.extent(start, start + len(part)).read_into(0, part)
        target.extent(to, to + len(part)).write(0, part)
        start, to, count = start + len(part), to + len(part), count - len(part)
        advance(len(part))


def _clone(
    source: File, start: int, target: File, to: int, count: int
) -> tuple[int, int]:
    """Share the whole blocks of a range; where they begin and end in it.

    Btrfs and XFS can, and Linux's ``FICLONERANGE`` asks them; elsewhere none are.
    """
    begin = -start % BLOCK
    length = max(0, count - begin) // BLOCK * BLOCK
    # Only whole blocks are shared, so both ranges must lie in their blocks alike.
    if (start - to) % BLOCK or not length:
        return 0, 0
    import fcntl

    what = struct.pack("=qQQQ", source.fd, start + begin, length, to + begin)
    try:
        fcntl.ioctl(target.fd, _FICLONERANGE, what)
    except OSError:
        return 0, 0
    return begin, begin + length


_Item = TypeVar("_Item")


def at_once(work: Callable[[_Item], int], items: Iterable[_Item]) -> Iterator[int]:
    """Work on a few items at a time, in threads; the results in turn."""
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:  # threads cost more than most arrays: 0.3 ms
        yield from map(work, first)
        return
    items = itertools.chain(first, items)
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[Future[int]] = deque()
        for item in items:
            # As many results as threads: memory holds no more pieces than that.
            if len(waiting) == WORKERS:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
