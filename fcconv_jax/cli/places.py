"""The places of a grid where outputs are largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..dense_prediction.images.base import Image
from .grid_files import bands_of, rows_of


class FoundPlace(NamedTuple):
    """A position, its largest output and which one that is."""

    row: int
    column: int
    label: int
    value: float


def largest_places(
    grid: Any, image: int, count: int, window: Sequence[int], stride: Sequence[int]
) -> list[FoundPlace]:
    """Return the places of the largest outputs, none in the window of a larger one.

    Args:
      grid: ``(N, rows, columns, ...)``, read by rows; NaN where nothing was computed.
      image: which of the N.
      count: how many places at most.
      window: rows and columns of a window.
      stride: rows and columns from one to the next.

    Example:
      >>> grid = np.zeros((1, 4, 5, 2))
      >>> grid[0, 1, 1, 1], grid[0, 1, 2, 1], grid[0, 3, 4, 0] = 3, 2, 1
      >>> [place[:3] for place in largest_places(grid, 0, 2, (2, 2), (1, 1))]
      [(1, 1, 1), (3, 4, 0)]
    """
    heat = np.concatenate([_known(rows).max(-1) for rows in bands_of(grid, image)])
    heat = heat.astype(np.float64)
    # Windows fewer positions apart than this overlap.
    reach = [-(-size // step) for size, step in zip(window, stride)]
    found = []
    for _ in range(count):
        row, column = map(int, np.unravel_index(int(heat.argmax()), heat.shape))
        if heat[row, column] == -np.inf:
            break
        outputs = rows_of(grid, image, row, row + 1)[0, column]
        label = int(_known(outputs).argmax())
        found.append(FoundPlace(row, column, label, float(heat[row, column])))
        rows = slice(max(row - reach[0] + 1, 0), row + reach[0])
        heat[rows, max(column - reach[1] + 1, 0) : column + reach[1]] = -np.inf
    return found


def _known(outputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return outputs with NaN below all others."""
    return np.where(np.isnan(outputs), -np.inf, outputs)


def place_text(
    place: FoundPlace, image: Image, window: Sequence[int], stride: Sequence[int]
) -> str:
    """Return a line on a place: its corner in pixels, and its centre's coordinates."""
    corner = -image.region.column, -image.region.row
    y = image.region.row + place.row * stride[0]
    x = image.region.column + place.column * stride[1]
    text = f"largest output {place.label}, {place.value:.4g}, at {y},{x}"
    # Without coordinates of its own, a file has those of the pixels of its level 0.
    of_pixels = image.crs is None and image.transform.at(*corner) == (0, 0)
    of_pixels &= image.transform[1] == image.transform[3] == 0 < image.transform[4]
    if of_pixels and image.transform[0] == image.transform[4] == 1:
        return text
    grid = image.transform.grid(window, stride)
    east, north = grid.at(place.column + 0.5, place.row + 0.5)
    what = "pixels of the largest level" if of_pixels else "coordinates"
    return f"{text}; centre at x={east:.10g}, y={north:.10g} ({what})"
