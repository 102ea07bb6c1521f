"""GeoTIFF, COG and JPEG 2000 by rasterio: by the tile, with coordinates and nodata."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...messages.errors import ImageError
from ...messages.extras import require
from .base import Affine, Box, Format, Pixels, Source, check_level
from .tiff import tags_of

# ModelPixelScale, ModelTransformation, GeoKeyDirectory; GDAL's nodata.
_GEOGRAPHIC = frozenset({33550, 34264, 34735, 42113})
_DRIVERS = {".jp2": "JP2OpenJPEG"}


def _takes(file: Path, mode: str | None) -> bool:
    if mode is not None:
        return False
    tags = tags_of(file)
    return file.suffix.lower() in _DRIVERS or bool(tags and tags & _GEOGRAPHIC)


def open_(file: Path, level: int, mode: str | None) -> Source:
    """Open a level: the image itself, or one of its overviews.

    Raises:
      ImageError: GDAL can't read the file.
    """
    rasterio: Any = require("rasterio", "geotiff", "Reading GeoTIFFs")
    with _naming(file):
        return _opened(rasterio, file, level)


def _opened(rasterio: Any, file: Path, level: int) -> Source:
    # By name, because GDAL would also open files that refer to others.
    driver = _DRIVERS.get(file.suffix.lower(), "GTiff")
    dataset = rasterio.open(file, driver=driver)
    sizes = [(dataset.height, dataset.width)]
    sizes += [
        (-(-dataset.height // factor), -(-dataset.width // factor))
        for factor in dataset.overviews(1)
    ]
    height, width = check_level(file, level, sizes)
    transform = Affine(*dataset.transform[:6])
    if level:
        dataset.close()
        dataset = rasterio.open(file, driver=driver, overview_level=level - 1)
        height, width = dataset.height, dataset.width
        # GDAL's own for an overview isn't initialised where the file has none.
        transform = transform.part(0, 0, sizes[0][1] / width, sizes[0][0] / height)
    if len(set(dataset.dtypes)) > 1:
        raise ImageError(
            f"{file}: expected bands of one type, got {', '.join(dataset.dtypes)}. "
            "Convert it with gdal_translate -ot Float32."
        )
    dtype = np.dtype(dataset.dtypes[0])
    if dtype.kind not in "uifb":
        raise ImageError(f"{file}: expected numbers, got {dtype}. Convert the file.")
    lock = threading.Lock()  # GDAL's datasets are for one thread at a time

    def read(box: Box, bands: Sequence[int]) -> Pixels:
        if not box.height or not box.width:
            return np.zeros((box.height, box.width, len(bands)), dtype)
        numbers = [band + 1 for band in bands]
        with _naming(file), lock:
            pixels = dataset.read(numbers, window=_window(rasterio, box))
        return np.moveaxis(pixels, 0, -1)

    flags, found = rasterio.enums.MaskFlags, dataset.mask_flag_enums
    everywhere = all(flags.all_valid in each for each in found)
    # 0 or 255 in one band may be a color, but -9999 or NaN isn't a measurement.
    each_band = dtype.kind != "u"
    each_band &= not any(flags.per_dataset in each for each in found)

    def valid(box: Box, bands: Sequence[int]) -> Pixels:
        window = _window(rasterio, box)
        with _naming(file), lock:
            if each_band:
                numbers = [band + 1 for band in bands]
                return (dataset.read_masks(numbers, window=window) > 0).all(0)
            return dataset.dataset_mask(window=window) > 0

    # Where a channel has less than 8 or 16 bits.
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    source = Source(
        (height, width, dataset.count),
        dtype,
        read,
        transform,
        dataset.crs.to_wkt() if dataset.crs else None,
        int(bits) if bits else None,
        None if everywhere else valid,
        sizes,
        lambda level: open_(file, level, None),
    )
    weakref.finalize(read, dataset.close)
    return source


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Raise whatever a damaged file makes rasterio raise as an ImageError.

    Beside its own errors these are ValueError, CRSError and MemoryError, at least.
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # GDAL's own words are in the cause
        said = (str(cause) or type(cause).__name__).splitlines()[0]
        raise ImageError(
            f"{file}: rasterio can't read it ({said}). Get another copy, or convert it."
        ) from None


def _window(rasterio: Any, box: Box) -> Any:
    return rasterio.windows.Window(box.column, box.row, box.width, box.height)


FORMAT = Format("geotiff", 1, "rasterio", _takes, open_)
