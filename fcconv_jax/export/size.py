"""Size of a file, or of the files in a folder."""

from __future__ import annotations

from pathlib import Path


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder.

    Example:
      >>> size_of(Path(__file__)) > 0
      True
    """
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size
