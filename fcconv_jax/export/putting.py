"""Puts a finished file in its place: what was there stays until then."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ExportError


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder beside a file, in which it is made under its own name.

    What was made is moved into its place at the end; an error before that leaves what
    was there before, and nothing half written.

    Args:
      path: the file, or the package, that is to be there.

    Raises:
      ExportError: there is no such place, or nothing may be written there.

    Example:
      >>> with beside(Path("no_such_folder/m.onnx")) as folder:
      ...     pass
      Traceback (most recent call last):
        ...
      fcconv_jax.errors.ExportError: no_such_folder: no such folder. Make it ...
    """
    parent = path.parent
    if not parent.is_dir():
        raise ExportError(f"{parent}: no such folder. Make it first, for {path.name}")
    try:
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.stem}-")
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror}. Pass another path"
        ) from None
    with folder as name:
        yield Path(name)
        # What lies beside a file comes first: the file is never there without it.
        made = sorted(Path(name).iterdir(), key=lambda each: each.name == path.name)
        try:
            for each in made:
                _move(each, parent / each.name)
        except OSError as error:
            raise ExportError(
                f"{error.filename2 or error.filename or path} cannot be replaced: "
                f"{error.strerror}. Pass another path"
            ) from None


def _move(made: Path, there: Path) -> None:
    if made.is_dir() and there.is_dir():  # a package in the place of a package
        aside = made.with_name(f"{made.name}.old")
        os.replace(there, aside)
        os.replace(made, there)
        shutil.rmtree(aside)
    else:
        os.replace(made, there)
