"""Images on the command line: read as arrays, and heat maps over them."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files.install import replacing
from ..messages.extras import require
from .inputs import ArgumentError


def read_image(file: Path, mode: str | None = None) -> np.ndarray[Any, Any]:
    """Read an image as ``(height, width, channels)`` in its own dtype.

    Args:
      file: a ``.npy`` file, which is mapped into memory, or one that Pillow reads.
      mode: a Pillow mode to convert to, such as ``"RGB"``; None for the file's own.

    Raises:
      ArgumentError: the file isn't an image, or can't be converted.
    """
    if not file.is_file():
        raise ArgumentError(f"{file}: no such file")
    if file.suffix == ".npy":
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{file}: not a .npy array ({error})") from None
    else:
        array = _read_by_pillow(file, mode)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ArgumentError(
            f"{file}: expected an image (height, width, channels), got {array.shape}"
        )
    if array.dtype.kind not in "uifb":
        raise ArgumentError(f"{file}: expected numbers, got {array.dtype}")
    return array


def _read_by_pillow(file: Path, mode: str | None) -> np.ndarray[Any, Any]:
    pillow = _pillow()
    # Pillow refuses 179 megapixels as an attack; here the user names the file.
    limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
    try:
        with pillow.open(file) as image:
            if mode is not None and image.mode.startswith(("I", "F")):
                # Pillow would clip 16 bits to 8.
                raise ArgumentError(
                    f"{file}: --mode {mode}: expected 8 bits a channel, got mode "
                    f"{image.mode!r}. Leave --mode out, or convert the file."
                )
            if mode is None and image.mode == "P":
                # The pixels of a palette image are numbers of colours.
                mode = "RGBA" if "transparency" in image.info else "RGB"
            return np.asarray(image if mode is None else image.convert(mode))
    except (OSError, SyntaxError) as error:
        raise ArgumentError(f"{file}: Pillow cannot read it ({error})") from None
    except ValueError as error:
        raise ArgumentError(f"{file}: --mode {mode}: {error}") from None
    finally:
        pillow.MAX_IMAGE_PIXELS = limit


def default_scale(dtype: np.dtype[Any]) -> float:
    """Return what pixels are divided by, so that they run from 0 to 1.

    Raises:
      ArgumentError: the dtype doesn't show their range.

    Example:
      >>> default_scale(np.dtype(np.uint8)), default_scale(np.dtype(np.uint16))
      (255.0, 65535.0)
      >>> default_scale(np.dtype(np.float32))
      1.0
    """
    if dtype in (np.uint8, np.uint16):
        return float(np.iinfo(dtype).max)
    if dtype.kind in "fb":
        return 1.0
    raise ArgumentError(
        f"the range of {dtype} pixels isn't known. Pass --scale, such as --scale 4095 "
        "for 12 bits"
    )


class Pixels:
    """Images of one size as one array of floats, scaled where they are read.

    Args:
      images: ``(height, width, channels)`` each.
      scale: what they are divided by.

    Example:
      >>> pixels = Pixels([np.full((4, 5, 1), 51, np.uint8)], 255.0)
      >>> pixels.shape, pixels[:, 1:2, :2].tolist()
      ((1, 4, 5, 1), [[[[0.20000000298023224], [0.20000000298023224]]]])
    """

    dtype = np.dtype(np.float32)

    def __init__(self, images: Sequence[np.ndarray[Any, Any]], scale: float):
        self.images = images
        self.scale = np.float32(scale)
        self.shape = (len(images), *images[0].shape)

    def __getitem__(self, where: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        batch, *inner = where
        chosen = [image[tuple(inner)] for image in self.images[batch]]
        return np.stack(chosen).astype(np.float32) / self.scale


@contextlib.contextmanager
def grid_file(
    file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield an array in a ``.npy`` file that replaces another when it is finished.

    Its blocks are allocated first: on a full disk, writing to mapped memory would end
    the process.

    Raises:
      ArgumentError: it can't be written; what was there is unchanged.
    """
    header = io.BytesIO()
    described = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_2_0(
        header, {"descr": described, "fortran_order": False, "shape": shape}
    )
    start = header.getbuffer().nbytes
    nbytes = start + math.prod(shape) * dtype.itemsize
    try:
        with replacing(file, nbytes=nbytes) as fresh:
            with fresh.open("r+b") as opened:
                opened.write(header.getbuffer())
            grid = np.memmap(fresh, dtype, "r+", start, shape)
            yield grid
            grid.flush()
    except OSError as error:
        raise ArgumentError(
            f"{file}: {nbytes} bytes can't be written ({error.strerror})"
        ) from None


# A heat map is a picture to look at; those of larger images are reduced.
_MOST_PIXELS = 4096


def write_heatmap(
    file: Path,
    scores: np.ndarray[Any, Any],
    image: np.ndarray[Any, Any],
    scale: float,
) -> None:
    """Write the largest output at each place as a picture over the image.

    Args:
      file: in any format that Pillow writes.
      scores: ``(rows, columns, ...)``.
      image: ``(height, width, channels)``.
      scale: its largest value.
    """
    heat = scores.reshape(*scores.shape[:2], -1).max(-1).astype(np.float64)
    low, high = float(heat.min()), float(heat.max())
    heat = (heat - low) / max(high - low, 1e-30)
    step = -(-max(image.shape[:2]) // _MOST_PIXELS)
    image = image[::step, ::step].astype(np.float32) / scale
    height, width = image.shape[:2]
    rows = np.arange(height) * heat.shape[0] // height
    columns = np.arange(width) * heat.shape[1] // width
    large = heat[rows[:, None], columns]
    gray = np.clip(image.mean(-1), 0, 1)
    red = 0.5 * gray + 0.5 * large
    rest = 0.5 * gray + 0.5 * gray * (1 - large)
    pixels = np.stack([red, rest, rest], -1)
    picture = _pillow().fromarray((255 * pixels).round().astype(np.uint8))
    try:
        with replacing(file) as fresh:
            picture.save(fresh)
    except OSError as error:
        raise ArgumentError(f"{file}: can't be written ({error})") from None


def check_picture(option: str, file: Path) -> None:
    """Check that Pillow writes files of this suffix.

    Raises:
      ArgumentError: it doesn't.
    """
    pillow = _pillow()
    format_ = pillow.registered_extensions().get(file.suffix.lower())
    if format_ not in pillow.SAVE:
        raise ArgumentError(
            f"{option}: expected a picture's name such as heat.png or heat.jpg, got "
            f"{file.name}"
        )


def _pillow() -> Any:
    return require("PIL.Image", "images", "Reading or writing other than .npy")
