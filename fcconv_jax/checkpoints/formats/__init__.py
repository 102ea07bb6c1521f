"""The checkpoint formats: every module here that has a ``FORMAT`` adds one."""

from __future__ import annotations

import importlib
import pkgutil

from ...messages.errors import CheckpointError
from .base import FileFormat as FileFormat
from .base import FolderFormat as FolderFormat

FORMATS: dict[str, FileFormat | FolderFormat] = {
    found.name: found
    for module in pkgutil.iter_modules(__path__)
    for found in [
        getattr(importlib.import_module(f".{module.name}", __name__), "FORMAT", None)
    ]
    if found is not None
}
FILES = {f.suffix: f for f in FORMATS.values() if isinstance(f, FileFormat)}
FOLDERS = [f for f in FORMATS.values() if isinstance(f, FolderFormat)]


def format_named(name: str) -> FileFormat | FolderFormat:
    """Return a format by its name.

    Raises:
      CheckpointError: the format is unknown.
    """
    if name not in FORMATS:
        raise CheckpointError(
            f"Expected a format among {sorted(FORMATS)}, got {name!r}. Pass one of "
            "these."
        )
    return FORMATS[name]
