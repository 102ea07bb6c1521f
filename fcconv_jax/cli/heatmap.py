"""Heat maps: a class's output at each position, over the image, with a legend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..dense_prediction.images.base import Image
from ..files.install import replacing
from ..messages.extras import require
from .inputs import ArgumentError

# A heat map is a picture to look at; those of larger images are reduced.
_MOST_PIXELS = 4096
# Its rows are drawn so many at a time, in floats of several times its size.
_BAND = 256
# The legend below it, which is legible beside a small image, too.
_LEGEND_WIDTH, _LEGEND_HEIGHT, _MARGIN = 360, 56, 10


@dataclasses.dataclass(frozen=True)
class Heat:
    """Values of a heat map, and their name.

    Args:
      values: ``(rows, columns)``; NaN where nothing was computed.
      what: the values in words, such as ``"class 3, softmax"``.
    """

    values: np.ndarray[Any, Any]
    what: str

    @classmethod
    def of_rows(cls, scores: Iterable[Any], label: int | None, softmax: bool) -> Heat:
        """Choose what to show, with one band of rows in memory at a time."""
        parts = [cls.of(each, label, softmax) for each in scores]
        return cls(np.concatenate([each.values for each in parts]), parts[0].what)

    @classmethod
    def of(cls, scores: np.ndarray[Any, Any], label: int | None, softmax: bool) -> Heat:
        """Choose what to show of a grid of outputs.

        Args:
          scores: ``(rows, columns, classes)``, or ``(rows, columns)``.
          label: the class; None for the largest output at each position.
          softmax: whether to show shares of 1 instead of the raw outputs.

        Example:
          >>> Heat.of(np.zeros((1, 1, 4)), 2, softmax=True)
          Heat(values=array([[0.25]]), what='class 2, softmax')
        """
        scores = scores.reshape(*scores.shape[:2], -1).astype(np.float64)
        if softmax:
            # The shift changes no share, and keeps exp from overflowing.
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
        # A view would keep all classes of all bands in memory.
        values = scores.max(-1) if label is None else scores[..., label].copy()
        what = "largest output" if label is None else f"class {label}"
        return cls(values, f"{what}, {'softmax' if softmax else 'raw outputs'}")

    def summary(
        self,
        stride: Sequence[int],
        window: Sequence[int],
        corner: Sequence[int] = (0, 0),
    ) -> str:
        """Describe the values in a sentence.

        Args:
          stride: rows and columns from one position to the next.
          window: rows and columns of a crop.
          corner: row and column of the first crop.
        """
        known = np.isfinite(self.values)
        if not known.any():
            return f"heat map of {self.what}: no finite value"
        values = np.where(known, self.values, -np.inf)
        place = np.unravel_index(int(values.argmax()), values.shape)
        row, column = (
            start + int(at) * step for start, at, step in zip(corner, place, stride)
        )
        high, low = self.values[known].max(), self.values[known].min()
        half = (values[known] > (low + high) / 2).mean()
        text = (
            f"heat map of {self.what}: from {low:.4g} to {high:.4g}, highest in the "
            f"{'x'.join(map(str, window))} crop at row {row}, column {column}; "
            f"above the middle at {half:.0%} of the positions"
        )
        missing = int((~known).sum())
        return text + (f"; {missing} positions have no finite value" * (missing > 0))


def check_heatmap(file: Path | None, label: int | None, softmax: bool) -> None:
    """Check the options of a heat map before any work.

    Raises:
      ArgumentError: Pillow writes no such file, or options lack ``--heatmap``.
    """
    if file is None:
        if label is not None or softmax:
            raise ArgumentError(
                "Expected --heatmap with --class and --softmax, got none. Pass "
                "--heatmap FILE."
            )
        return
    pillow = _pillow("Image")
    format_ = pillow.registered_extensions().get(file.suffix.lower())
    if format_ not in pillow.SAVE:
        raise ArgumentError(
            "--heatmap: expected the name of an image, such as heat.png or heat.jpg, "
            f"got {file.name}. Pass --heatmap {file.stem}.png."
        )


def check_class(label: int | None, softmax: bool, outputs: Sequence[int]) -> None:
    """Check that a model has a class.

    Raises:
      ArgumentError: it has not.
    """
    if (label is not None or softmax) and len(outputs) != 1:
        raise ArgumentError(
            "--class and --softmax: expected a model with one output for each class, "
            f"got outputs of shape {tuple(outputs)} for a crop. Drop them."
        )
    if label is not None and label >= outputs[0]:
        raise ArgumentError(
            f"--class: expected 0 to {outputs[0] - 1}, the model's classes, got "
            f"{label}. Pass one of them; they count from 0."
        )


def write_heatmap(
    file: Path,
    heat: Heat,
    image: Image,
    scale: float,
    window: Sequence[int],
    stride: Sequence[int],
) -> None:
    """Write a picture of the values over the image, with a legend below.

    A value is drawn around the centre of its window; those at the border reach it.

    Args:
      file: in any format that Pillow writes.
      heat: the values.
      image: what lies under them.
      scale: its largest value.
      window: rows and columns of a window.
      stride: rows and columns from one to the next.

    Raises:
      ArgumentError: the file can't be written.
    """
    known = np.isfinite(heat.values)
    low, high = np.nan, np.nan
    if known.any():
        low = heat.values.min(where=known, initial=np.inf)
        high = heat.values.max(where=known, initial=-np.inf)
    pixels = image.thumbnail(_MOST_PIXELS)
    height, width = pixels.shape[:2]
    rows, columns = (
        np.clip(((at + 0.5) * size / len(at) - (across - step) / 2) // step, 0, n - 1)
        for at, size, across, step, n in zip(
            *((np.arange(height), np.arange(width)), image.shape[1:3]),
            *(window, stride, heat.values.shape),
        )
    )
    rows, columns = rows.astype(int), columns.astype(int)

    def part(start: int) -> np.ndarray[Any, Any]:
        band = slice(start, start + _BAND)
        below = pixels[band].astype(np.float32) / scale
        gray = np.clip(np.nan_to_num(below).mean(-1), 0, 1)  # without data: black
        found = heat.values[rows[band, None], columns]
        # Equal values have a range of 0: don't divide by it.
        found = np.where(np.isfinite(found), found - low, 0) / np.fmax(
            high - low, 1e-30
        )
        return _colored(gray, found)

    over = np.concatenate([part(start) for start in range(0, height, _BAND)])
    Pillow = _pillow("Image")
    canvas = Pillow.new(
        "RGB", (max(width, _LEGEND_WIDTH), height + _LEGEND_HEIGHT), "white"
    )
    canvas.paste(Pillow.fromarray(over), (0, 0))
    legend = _legend(heat.what, low, high, canvas.width)
    canvas.paste(legend, (0, height))
    try:
        with replacing(file) as fresh:
            canvas.save(fresh)
    except OSError as error:
        raise ArgumentError(
            f"{file}: can't be written ({error}). Pass another --heatmap."
        ) from None


def _legend(what: str, low: float, high: float, width: int) -> Any:
    """Draw the colors from the lowest value to the highest, with their numbers."""
    Pillow = _pillow("Image")
    strip = Pillow.new("RGB", (width, _LEGEND_HEIGHT), "white")
    draw = _pillow("ImageDraw").Draw(strip)
    length = min(width, _LEGEND_WIDTH) - 2 * _MARGIN
    ramp = np.broadcast_to(np.linspace(0, 1, length), (12, length))
    strip.paste(Pillow.fromarray(_colored(np.full_like(ramp, 0.7), ramp)), (_MARGIN, 6))
    draw.text((_MARGIN, 20), f"{low:.4g}", fill="black")
    right = f"{high:.4g}"
    draw.text((_MARGIN + length - draw.textlength(right), 20), right, fill="black")
    draw.text((_MARGIN, 38), what, fill="black")
    return strip


def _colored(gray: np.ndarray[Any, Any], shares: np.ndarray[Any, Any]) -> Any:
    """Return RGB bytes: gray without heat, red with all of it."""
    red = gray + 0.75 * shares * (1 - gray)
    rest = gray * (1 - 0.75 * shares)
    return (255 * np.stack([red, rest, rest], -1)).round().astype(np.uint8)


def _pillow(module: str) -> Any:
    return require(f"PIL.{module}", "images", "Reading or writing other than .npy")
