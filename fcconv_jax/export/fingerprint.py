"""A file's fingerprint: all that it says, the record of this package included.

The record names the parameter of each weight; it leaves out what is between the
layers. The fingerprint covers that, too: an activation, the order of layers or a scale
of int8 that was changed after the proof gives another one. It is taken of what a file
says, not of its bytes, so that a file which was read and saved again keeps it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..messages.errors import ExportError
from .record import FileRecord
from .shipped import Shipped

_START = "sha256:"
# Stands in the record until the file is there: as long as the fingerprint itself.
BLANK = _START + "0" * 64


def digest(*parts: bytes) -> str:
    """Return one fingerprint of several parts.

    Example:
      >>> len(digest(b"a", b"b")) == len(BLANK), digest(b"a", b"b") == digest(b"ab")
      (True, False)
    """
    made = hashlib.sha256()
    for part in parts:
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return _START + made.hexdigest()


def plain(thing: Any) -> Any:
    """Return an object of a schema as plain values; what has its default is left out.

    A later schema may have more fields, which are at their defaults then.

    Example:
      >>> plain({"a": 0, "b": np.int32(2), "c": [], "d": (1, np.float32(0))})
      [('b', 2), ('d', [1, 0.0])]
    """
    if isinstance(thing, np.ndarray):
        if thing.nbytes > 64:
            kind = [str(thing.dtype), list(thing.shape)]
            return [*kind, digest(np.ascontiguousarray(thing).tobytes())]
        return thing.tolist()
    if isinstance(thing, np.generic):
        return thing.item()
    if isinstance(thing, bytes):
        return thing.decode("latin1")
    if isinstance(thing, list | tuple):
        return [plain(each) for each in thing]
    fields = thing if isinstance(thing, dict) else getattr(thing, "__dict__", None)
    if fields is None:
        return thing
    pairs = ((key, plain(value)) for key, value in sorted(fields.items()))
    return [(key, value) for key, value in pairs if value]


def fingerprint_of(shipped: Shipped, record: FileRecord) -> str:
    """Return the fingerprint of a file with its record.

    A record that names no parameter of a layer would leave its weights unchecked.
    """
    said = dataclasses.replace(record, fingerprint=None).to_json()
    return digest(shipped.fingerprint().encode(), said.encode())


def seal(path: Path, shipped: Shipped) -> None:
    """Write a new file's fingerprint into its record.

    Args:
      path: the file, alone with what belongs to it in its folder.
      shipped: the same, read back.
    """
    record = shipped.record()
    assert record is not None
    found = fingerprint_of(shipped, record)
    for file in path.parent.rglob("*"):
        if file.is_file() and BLANK.encode() in (content := file.read_bytes()):
            file.write_bytes(content.replace(BLANK.encode(), found.encode()))


def resealed(content: bytes, old: str | None, new: str) -> bytes:
    """Return a file's content with another fingerprint in its record."""
    if old is None or content.count(old.encode()) != 1:
        raise ExportError(
            "Expected one fingerprint in the file, got several or none. Export it "
            "again."
        )
    return content.replace(old.encode(), new.encode())
