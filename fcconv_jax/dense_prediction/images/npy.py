"""Arrays in ``.npy`` files, mapped into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...messages.errors import ImageError
from .base import Format, OpenedLevel, whole


def open_(file: Path, level: int, mode: str | None) -> OpenedLevel:
    """Map an array into memory.

    Raises:
      ImageError: the file isn't one, or it is shorter than its header says.
    """
    if mode is not None:
        raise ImageError(
            f"{file}: expected no mode for an array, got one. Pass bands= instead."
        )
    try:
        # What np.load takes for a pickle, it advises to load unsafely.
        array = np.lib.format.open_memmap(file, mode="r")
    # The header is Python, of which tokenize raises errors that derive from Exception.
    except Exception as error:
        raise ImageError(
            f"{file}: not a .npy array ({error}). Save it with numpy.save."
        ) from None
    return whole(file, array, level)


FORMAT = Format("npy", 0, "numpy", lambda file, _: file.suffix == ".npy", open_)
