"""Size of a file, or of the files in a folder."""

from __future__ import annotations

from pathlib import Path


def size_of(path: Path, beside: str = "") -> int:
    """Return the bytes of a file, or of all files in a folder.

    Args:
      path: the file.
      beside: the suffix of another file that belongs to it.

    Example:
      >>> size_of(Path(__file__)) > 0
      True
    """
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    other = path.with_suffix(beside) if beside else None
    more = other.stat().st_size if other and other.exists() else 0
    return path.stat().st_size + more
