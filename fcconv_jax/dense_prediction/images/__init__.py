"""Images in files, read by the part; every module here with a ``FORMAT`` adds one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from ...messages.errors import ImageError
from ...messages.extras import install_command
from .base import Format, Image, Tags
from .tiff import tags_of


@functools.cache
def formats() -> tuple[Format, ...]:
    """Return every format, in the order in which they are asked.

    Example:
      >>> formats()[-1].name  # for files that no other format accepts
      'pillow'
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f".{name}", __name__) for name in names]
    found = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return tuple(sorted(found, key=lambda each: each.rank))


def open_image(
    file: str | Path,
    *,
    level: int = 0,
    region: Sequence[int] | None = None,
    bands: Sequence[int] | None = None,
    mode: str | None = None,
    apply_tags: bool | None = None,
) -> Image:
    """Open an image in a file; its pixels are read when they are sliced.

    A TIFF, OME-TIFF, SVS or NDPI is read by tifffile (extra ``tiff``), a GeoTIFF by
    rasterio (extra ``geotiff``), both by the tiles of the file. Other images are read
    whole by Pillow (extra ``images``), and ``.npy`` files are mapped into memory.

    Args:
      file: path of the file.
      level: level of the file's pyramid; 0 is the full resolution.
      region: ``(row, column, height, width)`` in pixels of the level; all by default.
      bands: channels to read, in this order, counted from 1 as in GDAL; all by default.
      mode: a Pillow mode to convert to, such as ``"RGB"``; the file is then read by
        Pillow. For a GeoTIFF with a palette: ``"RGB"``, ``"RGBA"``, or ``"P"`` for its
        indices.
      apply_tags: whether to apply tags to the pixels: a scale and offset of GDAL, or
        the orientation of TIFF and EXIF. By default, pixels are returned as they are
        stored, as by rasterio and Pillow, with a warning; with False, without it.

    Returns:
      An :class:`Image` of shape ``(1, height, width, channels)``, for
      :meth:`fcconv_jax.Slide.write`.

    Raises:
      ImageError: the file isn't an image, is truncated or damaged, or lacks the level,
        region or band, or its tags can't be applied; names the file.
      MissingExtraError: the library that reads it isn't installed.

    Warns:
      UserWarning: the file has such tags, and ``apply_tags`` isn't given.

    Source:
      Adobe, *TIFF Revision 6.0* (1992); OGC, *GeoTIFF Standard 1.1* (2019).

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/scan.npy", np.arange(24).reshape(4, 6))
      ...     image = open_image(f"{folder}/scan.npy", region=(1, 2, 2, 3))
      ...     image.shape, image[:, :1, :, 0]
      ((1, 2, 3, 1), array([[[ 8,  9, 10]]]))
    """
    if not isinstance(file, str | os.PathLike):
        raise ImageError(
            f"Expected the path of an image, got {type(file).__name__}. Pass an array "
            "to slide itself."
        )
    file = Path(file)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise ImageError(f"{file}: {what}. Pass the path of an image.")
    able = [each for each in formats() if each.takes(file, mode)]
    present = [each for each in able if importlib.util.find_spec(each.library)]
    # The first one's error has the line that installs it.
    chosen = (present or able)[0]
    source = chosen.open(file, level, mode)
    # The others read a GeoTIFF as a TIFF. A JPEG 2000 need not be georeferenced.
    if able[0].name == "geotiff" != chosen.name and tags_of(file):
        fix = f"Install rasterio: {install_command('geotiff')}"
        lost = Tags("coordinates or nodata, which only rasterio reads", None, fix)
        source = dataclasses.replace(source, tags=lost)
    tags = source.tags
    if tags is not None and apply_tags:
        if tags.apply is None:
            raise ImageError(
                f"{file}: expected tags that can be applied, got {tags.said}. "
                f"{tags.fix}, or pass apply_tags=False."
            )
        source = tags.apply()
    elif tags is not None and apply_tags is None:
        fix = tags.fix if tags.apply is None else "Pass apply_tags=True to apply it"
        warnings.warn(
            f"{file}: its tags give {tags.said}, which isn't applied. {fix}, or pass "
            "apply_tags=False.",
            stacklevel=2,
        )
    return Image(file, source, region, bands)
