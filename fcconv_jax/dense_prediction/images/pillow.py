"""Images that Pillow reads, which are decoded whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...messages.errors import ImageError
from ...messages.extras import require
from .base import Format, OpenedLevel, turned, whole, with_orientation

_ORIENTATION = 274


def open_(file: Path, level: int, mode: str | None) -> OpenedLevel:
    """Decode an image.

    Raises:
      ImageError: Pillow can't read it, or convert it to the mode.
    """
    pillow = require("PIL.Image", "images", "Reading images other than .npy and TIFF")
    # Pillow refuses 179 megapixels as an attack; here the user names the file.
    limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
    try:
        with pillow.open(file) as image:
            if mode is not None and image.mode.startswith(("I", "F")):
                # Pillow would clip 16 bits to 8.
                raise ImageError(
                    f"{file}: --mode {mode}: expected 8 bits a channel, got mode "
                    f"{image.mode!r}. Leave --mode out, or convert the file."
                )
            if mode is None and image.mode == "P":
                # The pixels of a palette image are numbers of colours.
                mode = "RGBA" if "transparency" in image.info else "RGB"
            orientation = int(image.getexif().get(_ORIENTATION) or 1)
            is_tiff = image.format == "TIFF"
            if is_tiff and orientation in range(5, 9):
                # Pillow 13 mixes up the rows of uncompressed ones.
                raise ImageError(
                    f"{file}: expected rows and columns that aren't swapped, got "
                    f"orientation {orientation}. Leave the mode out, or store the file "
                    "upright."
                )
            image.load()  # any error after this one is of the mode
            try:
                pixels = np.asarray(image if mode is None else image.convert(mode))
            except ValueError as error:
                raise ImageError(
                    f"{file}: --mode {mode}: {error}. Pass a mode such as RGB or L."
                ) from None
    except ImageError:
        raise
    except Exception as error:  # its plugins raise errors of any kind
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(
            f"{file}: Pillow can't read it ({said}). Get another copy, or convert it."
        ) from None
    finally:
        pillow.MAX_IMAGE_PIXELS = limit
    source = whole(file, pixels, level)
    if is_tiff and orientation in range(2, 5):
        # Pillow applies the tag of a TIFF, and of no other format. Each undoes itself.
        source = turned(source, orientation)
    return with_orientation(source, orientation)


FORMAT = Format("pillow", 9, "PIL", lambda *_: True, open_)
