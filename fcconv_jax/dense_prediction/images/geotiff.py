"""GeoTIFF, COG and JPEG 2000 by rasterio: by the tile, with coordinates and nodata."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...messages.errors import ImageError
from ...messages.extras import require
from .base import Affine, Box, Format, OpenedLevel, Pixels, Tags, check_level
from .tiff import COLOR_MAP, tags_of

# ModelPixelScale, ModelTransformation, GeoKeyDirectory; GDAL's nodata; tie points and
# RPCs.
_GEOGRAPHIC = frozenset({33550, 34264, 34735, 42113, 33922, 50844})
_DRIVERS = {".jp2": "JP2OpenJPEG"}
# Modes in which a palette is read, and the channels of each.
_MODES = {"P": 1, "RGB": 3, "RGBA": 4}


def _takes(file: Path, mode: str | None) -> bool:
    tags = tags_of(file) or frozenset()
    if mode is not None:  # Pillow converts, but loses the coordinates
        return mode in _MODES and COLOR_MAP in tags and bool(tags & _GEOGRAPHIC)
    return file.suffix.lower() in _DRIVERS or bool(tags & _GEOGRAPHIC)


def open_(file: Path, level: int, mode: str | None) -> OpenedLevel:
    """Open a level: the image itself, or one of its overviews.

    Raises:
      ImageError: GDAL can't read the file.
    """
    rasterio: Any = require("rasterio", "geotiff", "Reading GeoTIFFs")
    with _naming(file):
        return _opened(rasterio, file, level, mode)


def _opened(rasterio: Any, file: Path, level: int, mode: str | None) -> OpenedLevel:
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
    # Overviews have neither.
    tagged, colors = _tags(dataset), _palette(rasterio, file, dataset, mode)
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
    source = OpenedLevel(
        (height, width, dataset.count),
        dtype,
        read,
        transform,
        dataset.crs.to_wkt() if dataset.crs else None,
        int(bits) if bits else None,
        None if everywhere else valid,
        sizes,
        lambda level: open_(file, level, mode),
    )
    weakref.finalize(read, dataset.close)
    return tagged(source) if colors is None else _colored(source, colors)


def _palette(
    rasterio: Any, file: Path, dataset: Any, mode: str | None
) -> Pixels | None:
    """Return the colors of a palette in a mode; None to read the pixels as they are.

    Raises:
      ImageError: whether colors or indices are wanted isn't known, or there is no
        palette to convert.
    """
    if dataset.colorinterp[0] != rasterio.enums.ColorInterp.palette:
        if mode is not None:
            raise ImageError(
                f"{file}: expected a palette to convert to {mode}, got bands without "
                "one. Leave the mode out."
            )
        return None
    if mode == "P":
        return None
    if mode is None or dataset.count > 1:
        raise ImageError(
            f"{file}: expected colors, got indices into a palette. Pass the mode P for "
            f"the indices{', or RGB for the colors' * (dataset.count == 1)}."
        )
    number = np.iinfo(dataset.dtypes[0]).max + 1
    colors = np.zeros((number, _MODES[mode]), np.uint8)
    for index, color in dataset.colormap(1).items():
        colors[index] = color[: _MODES[mode]]
    return colors


def _colored(source: OpenedLevel, colors: Pixels) -> OpenedLevel:
    def read(box: Box, bands: Sequence[int]) -> Pixels:
        return colors[source.read(box, (0,))[..., 0]][..., list(bands)]

    shape = (*source.shape[:2], colors.shape[1])
    return dataclasses.replace(
        source, shape=shape, dtype=colors.dtype, read=read, bits=None
    )


def _tags(dataset: Any) -> Callable[[OpenedLevel], OpenedLevel]:
    """Return what marks an image with the tags of its file that aren't applied."""
    scales, offsets = np.array(dataset.scales), np.array(dataset.offsets)
    changed = bool((scales != 1).any() or (offsets != 0).any())
    said = f"a scale of {scales[0]:g} and an offset of {offsets[0]:g}"
    if len(set(zip(scales, offsets))) > 1:
        said = "a scale and an offset of each band"
    fix = ""
    if dataset.transform.is_identity and (dataset.gcps[0] or dataset.rpcs):
        kind = "ground control points" if dataset.gcps[0] else "RPCs"
        placed = f"coordinates by {kind} instead of a transform"
        said = f"{said}, and {placed}" if changed else placed
        fix = "Warp the file with gdalwarp"

    def scaled(source: OpenedLevel) -> OpenedLevel:
        dtype = np.result_type(source.dtype, np.float32)

        def read(box: Box, bands: Sequence[int]) -> Pixels:
            pixels = source.read(box, bands) * scales[list(bands)]
            return (pixels + offsets[list(bands)]).astype(dtype)

        open_level = source.open_level
        assert open_level is not None
        return dataclasses.replace(
            source,
            dtype=dtype,
            read=read,
            bits=None,
            open_level=lambda level: scaled(open_level(level)),
            tags=None,
        )

    def tagged(source: OpenedLevel) -> OpenedLevel:
        if not changed and not fix:
            return source
        apply = None if fix else lambda: scaled(source)
        return dataclasses.replace(source, tags=Tags(said, apply, fix))

    return tagged


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
