"""Arrays in mapped files, whose pages count as this process's memory until released."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from ..tracing.arguments import native


def in_memory(part: Any) -> np.ndarray[Any, Any]:
    """Return a contiguous array in memory, in this machine's byte order.

    It is a copy if it is part of a mapped file.
    """
    if _mapping(part) is None:
        return native(np.ascontiguousarray(part))
    copied = np.array(part, order="C", subok=False)
    release(part)
    return native(copied)


def release(array: Any) -> None:
    """Let go of the pages of a mapped file; what was written to them is kept.

    Otherwise an image, or a result, is in memory as a whole once all its tiles were.
    """
    mapping = _mapping(array)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(array: Any) -> mmap.mmap | None:
    """Return the mapping of a file that an array is part of."""
    while isinstance(getattr(array, "base", None), np.ndarray):
        array = array.base
    # Changes to a copy-on-write mapping are in its pages alone.
    if not isinstance(array, np.memmap) or array.mode == "c":
        return None
    return array.base if isinstance(array.base, mmap.mmap) else None
