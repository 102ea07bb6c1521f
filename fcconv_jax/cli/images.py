"""Images on the command line: opened and scaled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ..dense_prediction.images import open_image
from ..dense_prediction.images.base import Image
from ..dense_prediction.images.tiff import COLOR_MAP, tags_of
from ..messages.errors import ImageError
from .inputs import ArgumentError

# What JAX takes unchanged; other numbers, such as int64, it would cut.
_KEPT = ("bool", "uint8", "int8", "uint16", "int16", "float16", "float32")


def open_images(
    files: Sequence[Path],
    level: int,
    region: str | None,
    bands: str | None,
    mode: str | None,
    apply_tags: bool | None,
) -> list[Image]:
    """Open images of one shape and dtype.

    Args:
      files: their paths.
      level: of their pyramids.
      region: ``ROW,COLUMN,HEIGHT,WIDTH`` in the level.
      bands: numbers of channels, from 1.
      mode: a Pillow mode to convert to.
      apply_tags: whether tags of the files change the pixels; None for a note on stderr
        if they would.

    Raises:
      ArgumentError: a file isn't an image, or they differ.
    """
    box = None if region is None else _ints("--region", region)
    channels = None if bands is None else _ints("--bands", bands)
    try:
        found = [
            open_image(
                file,
                level=level,
                region=box,
                bands=channels,
                mode=mode,
                apply_tags=bool(apply_tags),
            )
            for file in files
        ]
    except ImageError as error:
        raise ArgumentError(str(error)) from None
    for image in found if apply_tags is None else ():
        if image.unapplied:
            typer.echo(
                f"{image.file}: its tags give {image.unapplied}, which isn't applied. "
                "Pass --apply-tags or --ignore-tags",
                err=True,
            )
    for what in ("shape", "dtype"):
        kinds = sorted({str(getattr(image, what)) for image in found})
        if len(kinds) > 1:
            raise ArgumentError(
                f"expected images of one {what}, got {' and '.join(kinds)}. Run the "
                "command for each."
            )
    return found


def _ints(option: str, text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise ArgumentError(
            f"{option}: expected numbers separated by commas, got {text!r}. Pass them "
            "as in 0,1,2."
        ) from None


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The map from pixels to what a model was trained on.

    Args:
      scale: pixels are divided by it first.
      mean: is subtracted then: one number, or one for each channel.
      std: the rest is divided by it, likewise.

    Example:
      >>> Scaling(255.0, (0.5, 0.2), (1.0, 2.0))(np.full((1, 1, 2), 51, np.uint8))
      Array([[[-0.3,  0. ]]], dtype=float32)
    """

    scale: float
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channel_axis: int = -1

    @classmethod
    def parse(
        cls,
        image: Image,
        scale: float | None,
        mean: str | None,
        std: str | None,
        channel_axis: int,
    ) -> Scaling:
        """Read the options of a command.

        Raises:
          ArgumentError: they aren't numbers for each channel, or the range of the
            pixels isn't known.
        """
        if scale is None:
            scale = image.largest
        if scale is None:
            raise ArgumentError(
                f"Expected --scale for {image.dtype} pixels, whose range isn't known, "
                "got none. Pass --scale, such as --scale 4095 for 12 bits."
            )
        # A range of Typer's lets nan pass, in some versions.
        if not math.isfinite(scale):
            raise ArgumentError(
                f"--scale: expected a finite number, got {scale}. Pass --scale 255."
            )
        numbers: list[tuple[float, ...]] = []
        for option, text, otherwise in (("--mean", mean, 0.0), ("--std", std, 1.0)):
            try:
                found = [float(each) for each in text.split(",")] if text else []
            except ValueError:
                found = [math.nan]
            bad = not all(map(math.isfinite, found))
            bad |= option == "--std" and not all(each > 0 for each in found)
            if bad or len(found) not in (0, 1, image.shape[3]):
                raise ArgumentError(
                    f"{option}: expected one number, or {image.shape[3]} separated by "
                    f"commas, one for each channel, got {text!r}. Pass {option} 0.5."
                )
            numbers.append(tuple(found) or (otherwise,))
        return cls(scale, numbers[0], numbers[1], channel_axis)

    def __call__(self, pixels: Any) -> Any:
        """Map pixels; traced with the model, so that bytes are sent to the device."""
        import jax.numpy as jnp

        shape = [1] * pixels.ndim
        shape[self.channel_axis] = -1
        out = pixels.astype(jnp.float32) / self.scale
        if any(self.mean):
            out = out - jnp.array(self.mean, jnp.float32).reshape(shape)
        if set(self.std) != {1.0}:
            out = out / jnp.array(self.std, jnp.float32).reshape(shape)
        return out

    def __str__(self) -> str:
        said = f"divided by {self.scale:g}"
        said += f", mean {_listed(self.mean)}" if any(self.mean) else ""
        return said + (f", std {_listed(self.std)}" if set(self.std) != {1.0} else "")


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{each:g}" for each in numbers)


class Pixels:
    """Images of one size as one array, read by the part.

    Args:
      images: ``(1, height, width, channels)`` each.
      channels_first: whether the array is ``(N, channels, height, width)``.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/a.npy", np.arange(6.0).reshape(2, 3))
      ...     image = open_image(f"{folder}/a.npy")
      >>> pixels = Pixels([image, image], channels_first=True)
      >>> pixels.shape, pixels[:, :, 1:, :1].tolist()
      ((2, 1, 2, 3), [[[[3.0]]], [[[3.0]]]])
    """

    def __init__(self, images: Sequence[Image], channels_first: bool = False):
        self.images, self._first = images, channels_first
        _, height, width, channels = images[0].shape
        size = (height, width)
        self.shape = (
            len(images),
            *((channels, *size) if self._first else (*size, channels)),
        )
        kept = images[0].dtype.name in _KEPT
        self.dtype = images[0].dtype if kept else np.dtype(np.float32)

    def __getitem__(self, where: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        batch, *inner = where
        rows, columns, channels = [*inner[1:], inner[0]] if self._first else inner
        chosen = [image[:, rows, columns, channels] for image in self.images[batch]]
        pixels = np.concatenate(chosen).astype(self.dtype)
        return np.moveaxis(pixels, -1, 1) if self._first else pixels


class MaskImage:
    """A mask in a file, as an array of the size of the images' region.

    A pixel of a smaller mask stands for those of the image that it covers.

    Args:
      mask: the mask; nonzero in any band is where to look.
      image: what it is of; the mask is of its whole level.

    Raises:
      ArgumentError: it is of another image.
    """

    def __init__(self, mask: Image, image: Image):
        self._mask, self._region = mask, image.region
        self._level = image.level_shape
        self.shape = image.shape[1:3]
        (height, width), (rows, columns) = self._level, mask.shape[1:3]
        # A thumbnail's sides are rounded.
        same = abs(rows * width - columns * height) <= max(height, width)
        if not same or rows > height or columns > width:
            raise ArgumentError(
                f"--mask: expected a mask of {image.file}, {height}x{width} pixels or "
                f"fewer of the same proportions, got {rows}x{columns} in {mask.file}. "
                "Resize the mask."
            )

    def __getitem__(self, where: tuple[slice, slice]) -> np.ndarray[Any, Any]:
        spans = []
        for part, start, size, most, cells in zip(
            where, self._region[:2], self.shape, self._level, self._mask.shape[1:3]
        ):
            # For each pixel asked for, the mask's pixel over it; read is only what lies
            # between the first and the last.
            at = np.arange(start, start + size)[part] * cells // most
            spans.append((slice(int(at[0]), int(at[-1]) + 1), at - at[0]))
        (rows, i), (columns, j) = spans
        pixels = self._mask[0, rows, columns] != 0
        if pixels.shape[-1] in (2, 4):  # the last is alpha: opaque isn't wanted
            pixels = pixels[..., :-1] & pixels[..., -1:]
        return pixels.any(-1)[i[:, None], j]


class DataMask:
    """Where an image has data, as an array of its size.

    Args:
      image: with a nodata value, or alpha.

    Raises:
      ArgumentError: the file has neither.
    """

    def __init__(self, image: Image):
        if not image.has_nodata:
            raise ArgumentError(
                "--mask nodata: expected a GeoTIFF with a nodata value, got "
                f"{image.file}. Pass --mask FILE."
            )
        self._image, self.shape = image, image.shape[1:3]

    def __getitem__(self, where: tuple[slice, slice]) -> np.ndarray[Any, Any]:
        return self._image.valid(*where)


def open_mask(
    mask: str | None, images: Sequence[Image], apply_tags: bool | None = None
) -> MaskImage | DataMask | None:
    """Open the mask of an image: ``nodata``, or a file.

    Raises:
      ArgumentError: it isn't one of this image, or there are several images.
    """
    if mask is None:
        return None
    if len(images) > 1:
        raise ArgumentError(
            f"--mask: expected one image, got {len(images)}. Run the command for each."
        )
    if mask == "nodata":
        return DataMask(images[0])
    file = Path(mask)
    try:
        # A palette colors the numbers of classes, of which 0 is none.
        colored = file.is_file() and COLOR_MAP in (tags_of(file) or ())
        mode = "P" if colored else None
        found = open_image(file, mode=mode, apply_tags=bool(apply_tags))
        return MaskImage(found, images[0])
    except ImageError as error:
        raise ArgumentError(f"--mask: {error}") from None
