"""Images on the command line: read as arrays, and heat maps over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from .inputs import ArgumentError


def read_image(file: Path) -> np.ndarray[Any, Any]:
    """An image as ``(height, width, channels)``, from ``.npy`` or what Pillow reads."""
    if not file.is_file():
        raise ArgumentError(f"{file}: no such file")
    if file.suffix == ".npy":
        array = np.load(file, allow_pickle=False)
    else:
        pillow = _pillow()
        try:
            with pillow.open(file) as image:
                array = np.asarray(image)
        except OSError as error:
            raise ArgumentError(f"{file}: Pillow cannot read it ({error})") from None
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ArgumentError(
            f"{file}: expected an image (height, width, channels), got {array.shape}"
        )
    return array


def write_heatmap(
    file: Path, scores: np.ndarray[Any, Any], image: np.ndarray[Any, Any]
) -> None:
    """Writes the largest output at each place as a picture over the image.

    Args:
      file: in any format that Pillow writes.
      scores: ``(rows, columns, ...)``.
      image: ``(height, width, channels)``, from 0 to 1.
    """
    heat = scores.reshape(*scores.shape[:2], -1).max(-1).astype(np.float64)
    low, high = float(heat.min()), float(heat.max())
    heat = (heat - low) / max(high - low, 1e-30)
    height, width = image.shape[:2]
    rows = np.arange(height) * heat.shape[0] // height
    columns = np.arange(width) * heat.shape[1] // width
    large = heat[rows[:, None], columns]
    gray = np.clip(image.mean(-1), 0, 1)
    red = 0.5 * gray + 0.5 * large
    rest = 0.5 * gray + 0.5 * gray * (1 - large)
    pixels = np.stack([red, rest, rest], -1)
    _pillow().fromarray((255 * pixels).round().astype(np.uint8)).save(file)


def _pillow() -> Any:
    return require("PIL.Image", "images", "Reading or writing other than .npy")
