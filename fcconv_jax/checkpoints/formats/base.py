"""The interface of a checkpoint format: one object, in its own file in this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..extents import Advance


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A format that keeps a tree in one file.

    Args:
      name: what users call it.
      suffix: of its files.
      looks_like: whether a file that begins with these 16 bytes may be one.
      open: reads the headers, and leaves entries in the file.
      write: writes a file that does not exist yet, and reports bytes as they are done.
      fit: takes the tree of another format, and the file's name for errors; returns the
        same leaves nested as this format keeps them, or raises CheckpointError.
      flat: whether its tree is one dict of names, not nested dicts.
      weak: whether ``looks_like`` sees little, so that other formats come first.
    """

    name: str
    suffix: str
    looks_like: Callable[[bytes], bool]
    open: Callable[[Path], Checkpoint]
    write: Callable[[Path, Checkpoint, Advance], None]
    fit: Callable[[Any, str], Any]
    flat: bool = False
    weak: bool = False


@dataclasses.dataclass(frozen=True)
class FolderFormat:
    """A format that keeps trees in a folder.

    Args:
      name: what users call it.
      looks_like: whether a folder is one.
      open: reads the headers of a step, the latest for None; leaves entries in the
        files.
      write: as of a :class:`FileFormat`; copies :attr:`companions`, too.
      fit: likewise.
      step_names: names of its steps, by number.
      companions: the files beside the trees that are carried along, by their path in
        the folder.
      owns: whether a file, by its path in the folder, is the format's own. Others are
        never overwritten.
    """

    name: str
    looks_like: Callable[[Path], bool]
    open: Callable[[Path, str | None], Checkpoint]
    write: Callable[[Path, Checkpoint, Advance], None]
    fit: Callable[[Any, str], Any]
    step_names: Callable[[Path], list[str]]
    companions: Callable[[Checkpoint], Mapping[Path, Path]]
    owns: Callable[[Path], Callable[[Path], bool]]
    flat: bool = False
