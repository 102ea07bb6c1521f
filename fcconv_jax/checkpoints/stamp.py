"""Whether files changed while they were read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from ..messages.errors import CheckpointError
from .checkpoint import Checkpoint, FolderFiles
from .walk import regular_files


@dataclasses.dataclass(frozen=True)
class Stamp:
    """How a checkpoint's files were when they were opened."""

    root: Path
    files: Mapping[Path, tuple[int, int, int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Stamp:
        """Look at the files of a checkpoint that is open."""
        root = checkpoint.path or Path()
        return cls(root, _look(_places(checkpoint, root)))

    def check(self) -> None:
        """Look again.

        Raises:
          CheckpointError: a file is not as it was.
        """
        for path, before in self.files.items():
            try:
                now = _look([path]).get(path)
            except (OSError, CheckpointError):
                now = None
            if now != before:
                what = "is gone" if now is None else "changed"
                raise CheckpointError(
                    f"{path}: {what} while it was being read. Wait until nothing "
                    f"writes to {self.root}, and convert again."
                )


def _places(checkpoint: Checkpoint, root: Path) -> list[Path]:
    contents = checkpoint.contents
    if isinstance(contents, FolderFiles):
        return [root / name for name in contents.files]
    return [root / contents.step if contents.step else root]


def _look(places: list[Path]) -> dict[Path, tuple[int, int, int]]:
    found = {}
    for place in places:
        files = regular_files(place).values() if place.is_dir() else (place,)
        for file in files:
            stat = os.stat(file)
            # The number (inode) also shows a file that was replaced by another of the
            # same size and time.
            found[file] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found
