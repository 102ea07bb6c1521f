"""A file's fingerprint: of every byte of it and of what belongs to it.

The record names the parameter of each weight; it leaves out what is between the
layers. The fingerprint covers that, too: an activation, the order of layers or a scale
of int8 that was changed after the proof gives another one. It is taken of the bytes,
since what a format's reader doesn't show may still change what a runtime computes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..messages.errors import ExportError

_START = "sha256:"
# Stands in the record until the file is there: as long as the fingerprint itself.
BLANK = _START + "0" * 64


def files_of(path: Path, beside: str = "") -> list[Path]:
    """Return a file, the one beside it, or all files of a folder.

    Args:
      path: the file.
      beside: the suffix of another file that belongs to it.
    """
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    other = path.with_suffix(beside) if beside else None
    return [path, other] if other is not None and other.exists() else [path]


def fingerprint_of(path: Path, beside: str, own: str | None) -> str:
    """Return the fingerprint of a file as it was before its own was written into it.

    Args:
      path: the file.
      beside: the suffix of another file that belongs to it.
      own: the fingerprint in its record.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "m.onnx"
      >>> _ = path.write_text(f"net {BLANK}")
      >>> new = fingerprint_of(path, "", BLANK)
      >>> _ = path.write_text(f"net {new}")
      >>> fingerprint_of(path, "", new) == new, fingerprint_of(path, "", None) == new
      (True, False)
    """
    made = hashlib.sha256()
    for file in files_of(path, beside):
        # A file may be renamed, in a package only the package.
        name = str(file.relative_to(path)) if path.is_dir() else file.suffix
        content = file.read_bytes()
        if own:
            content = content.replace(own.encode(), BLANK.encode())
        for part in (name.encode(), content):
            made.update(len(part).to_bytes(8, "little"))
            made.update(part)
    return _START + made.hexdigest()


def seal(path: Path, beside: str = "") -> str:
    """Write a new file's fingerprint into its record, and return it.

    Args:
      path: the file.
      beside: the suffix of another file that belongs to it.

    Raises:
      ExportError: the record isn't in the file as it was given to the writer.
    """
    found, sealed = fingerprint_of(path, beside, BLANK), False
    for file in files_of(path, beside):
        if BLANK.encode() in (content := file.read_bytes()):
            file.write_bytes(content.replace(BLANK.encode(), found.encode()))
            sealed = True
    if not sealed:
        raise ExportError(
            f"Expected the record in {path.name}, uncompressed, got a file without "
            "its fingerprint. Write FileRecord.to_bytes() or to_text() unchanged."
        )
    return found


def resealed(content: bytes, old: str | None, new: str) -> bytes:
    """Return a file's content with another fingerprint in its record."""
    if old is None or content.count(old.encode()) != 1:
        raise ExportError(
            "Expected one fingerprint in the file, got several or none. Export it "
            "again."
        )
    return content.replace(old.encode(), new.encode())
