"""Size of a file, or of the files in a folder."""

from __future__ import annotations

from pathlib import Path

from .fingerprint import files_of


def size_of(path: Path, beside: str = "") -> int:
    """Return the bytes of a file, or of all files in a folder.

    Args:
      path: the file.
      beside: the suffix of another file that belongs to it.

    Example:
      >>> size_of(Path(__file__)) > 0
      True
    """
    return sum(each.stat().st_size for each in files_of(path, beside))
