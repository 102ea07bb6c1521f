"""An image in a file, as its format opens it and as models see it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...messages.errors import ImageError
from ..mapped import in_memory

Pixels = np.ndarray[Any, Any]


class Box(NamedTuple):
    """A part of an image, in pixels."""

    row: int
    column: int
    height: int
    width: int


class Affine(NamedTuple):
    """A map from ``(column, row)`` to ``(x, y)``: ``x = a * column + b * row + c``.

    The fields are in the order of rasterio and GDAL's worldfiles. A pixel's centre is
    half a pixel from its corner.

    Example:
      >>> Affine(10, 0, 500, 0, -10, 900).at(2, 3)
      (520.0, 870.0)
      >>> Affine(10, 0, 500, 0, -10, 900).part(2, 3, 4, 5)
      Affine(a=40.0, b=0.0, c=520.0, d=0.0, e=-50.0, f=870.0)
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 1.0
    f: float = 0.0

    def at(self, column: float, row: float) -> tuple[float, float]:
        """Return the coordinates of a place."""
        x = self.a * column + self.b * row + self.c
        return float(x), float(self.d * column + self.e * row + self.f)

    def part(self, column: float, row: float, columns: float, rows: float) -> Affine:
        """Return the map of a grid whose corner is at a place, with larger pixels."""
        x, y = self.at(column, row)
        a, b, d, e = self.a * columns, self.b * rows, self.d * columns, self.e * rows
        return Affine(float(a), float(b), x, float(d), float(e), y)

    def grid(self, window: Sequence[int], stride: Sequence[int]) -> Affine:
        """Return the map of a grid of windows: each place is at its window's centre."""
        (height, width), (down, right) = window, stride
        return self.part((width - right) / 2, (height - down) / 2, right, down)


_PIXELS = Affine()
# Orientations of TIFF and EXIF: whether rows and columns are swapped, and then whether
# each is reversed.
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class Tags(NamedTuple):
    """Tags of a file that would change its pixels or coordinates.

    Args:
      said: the tags, in words.
      apply: opens the image with them applied; None where that needs another tool.
      fix: what to do then.
    """

    said: str
    apply: Callable[[], OpenedLevel] | None = None
    fix: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedLevel:
    """One level of an image, as its format opened it.

    Args:
      shape: ``(height, width, channels)``.
      dtype: of the pixels, in the machine's byte order.
      read: the pixels of a box, of the channels with these numbers from 0.
      transform: from pixels to the coordinates of the file; without coordinates of its
        own, to the pixels of its largest level.
      crs: what these coordinates are, as WKT.
      bits: of integer pixels that use fewer than their dtype has.
      valid: which pixels of a box hold data in these channels; None if the file has no
        nodata value.
      levels: height and width of each level of the file.
      open_level: opens another of them.
      tags: those of the file that are not applied; None if there are none.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    read: Callable[[Box, Sequence[int]], Pixels]
    transform: Affine = _PIXELS
    crs: str | None = None
    bits: int | None = None
    valid: Callable[[Box, Sequence[int]], Pixels] | None = None
    levels: Sequence[tuple[int, int]] = ()
    open_level: Callable[[int], OpenedLevel] | None = None
    tags: Tags | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """A library that reads images.

    Its module is imported to list the formats, so it imports the library only inside
    its functions.

    Args:
      name: of the format.
      rank: formats of a lower rank are asked first.
      library: the module to import.
      takes: whether a file, with the ``mode`` of :func:`open_image`, is for it.
      open: opens a level of a file in a mode.
    """

    name: str
    rank: int
    library: str
    takes: Callable[[Path, str | None], bool]
    open: Callable[[Path, int, str | None], OpenedLevel]


class Image:
    """An image in a file, ``(1, height, width, channels)``, read when it is sliced.

    Made by :func:`fcconv_jax.open_image`.

    Attributes:
      file: its path.
      shape: ``(1, height, width, channels)`` of the region and bands.
      dtype: of its pixels.
      region: its box in its level.
      level_shape: height and width of the level.
      transform: from its pixels to coordinates: those of a georeferenced file, or else
        pixels of the file's largest level.
      crs: the coordinates' reference system as WKT; None without georeference.
      unapplied: what the file's tags would change, in words; None if they are applied
        or change nothing.
    """

    def __init__(
        self,
        file: Path,
        source: OpenedLevel,
        region: Sequence[int] | None = None,
        bands: Sequence[int] | None = None,
    ):
        self.file, self._source = file, source
        height, width, channels = source.shape
        self.level_shape = height, width
        self.region = _region(file, region, self.level_shape)
        self._bands = _bands(file, bands, channels)
        self.shape = (1, self.region.height, self.region.width, len(self._bands))
        self.dtype = source.dtype
        self.crs = source.crs
        self.unapplied = source.tags.said if source.tags else None
        left, top = self.region.column, self.region.row
        self.transform = source.transform.part(left, top, 1, 1)

    @property
    def has_nodata(self) -> bool:
        """Whether the file marks pixels that hold no data."""
        return self._source.valid is not None

    @property
    def largest(self) -> float | None:
        """The largest value of its pixels; None if the file doesn't show it."""
        if self.dtype in (np.uint8, np.uint16):
            return float(2 ** (self._source.bits or 8 * self.dtype.itemsize) - 1)
        return 1.0 if self.dtype.kind in "fb" else None

    def __getitem__(self, where: Any) -> Pixels:
        """Read a part; slices without steps are read alone, others from within one."""
        where = where if isinstance(where, tuple) else (where,)
        free = (slice(None),) * (4 - sum(each is not Ellipsis for each in where))
        at = where.index(Ellipsis) if Ellipsis in where else len(where)
        batch, rows, columns, channels = (*where[:at], *free, *where[at + 1 :])
        # The box alone is read: the rest of a slide need not fit into memory.
        row, height, rows = _span(rows, self.shape[1])
        column, width, columns = _span(columns, self.shape[2])
        box = Box(self.region.row + row, self.region.column + column, height, width)
        pixels = self._source.read(box, self._bands)
        if pixels.dtype == bool:
            # Pillow stores True as 255, which XLA would convert to 255.0.
            pixels = pixels.view(np.uint8) != 0
        return pixels[rows, columns][..., channels][None][batch]

    def thumbnail(self, most: int) -> Pixels:
        """Return every n-th pixel, ``(rows, columns, channels)``, by bands of rows.

        They are of the coarsest level of the file that has as many.

        Args:
          most: rows and columns at most; they decide n.
        """
        wanted = max(1.0, max(self.shape[1:3]) / most)
        (height, width), image = self.level_shape, self
        for level, (rows, columns) in enumerate(self._source.levels):
            # Levels still finer than the thumbnail: it is every n-th pixel of the last
            # of them.
            if self._source.open_level and 1 < height / rows <= wanted:
                top, left, *size = (
                    int(each * there / here)
                    for each, there, here in zip(
                        self.region, (rows, columns) * 2, (height, width) * 2
                    )
                )
                # A small region may be less than a pixel of a coarse level.
                box = (top, left, *(max(each, 1) for each in size))
                bands = [band + 1 for band in self._bands]
                coarser = self._source.open_level(level)
                image = Image(self.file, coarser, box, bands)
        return image._sampled(most)

    def _sampled(self, most: int) -> Pixels:
        step = -(-max(self.shape[1:3]) // most)
        # Files are stored by tiles or strips: rows are read some hundred at a time.
        rows = step * max(1, 256 // step)
        bands = [
            self[0, start : start + rows : step, ::step]
            for start in range(0, self.shape[1], rows)
        ]
        return np.concatenate(bands)

    def valid(self, rows: slice, columns: slice) -> Pixels:
        """Return which pixels hold data, as ``(height, width)`` booleans.

        With a nodata value, signed and float pixels hold data if all bands do, unsigned
        ones if any band does: 0 in one band may be a color.
        """
        row, height, _ = _span(rows, self.shape[1])
        column, width, _ = _span(columns, self.shape[2])
        box = Box(self.region.row + row, self.region.column + column, height, width)
        if self._source.valid is None:
            return np.ones((height, width), bool)
        return self._source.valid(box, self._bands)


def check_level(
    file: Path, level: int, sizes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Return the size of a level.

    Raises:
      ImageError: the file doesn't have it.
    """
    whole_number = isinstance(level, int | np.integer) and level is not True
    if whole_number and 0 <= level < len(sizes):
        return sizes[level]
    shown = ", ".join(
        f"{n}: {height}x{width}" for n, (height, width) in enumerate(sizes)
    )
    raise ImageError(
        f"{file}: expected one of its levels ({shown}), got level {level!r}. Pass one "
        "of these numbers."
    )


def whole(file: Path, pixels: Pixels, level: int) -> OpenedLevel:
    """Return the source of an array ``(height, width[, channels])``.

    Raises:
      ImageError: it isn't an image of numbers, or another level is wanted.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3:
        raise ImageError(
            f"{file}: expected an image (height, width, channels), got shape "
            f"{pixels.shape}. Extract one plane."
        )
    if pixels.dtype.kind not in "uifb":
        raise ImageError(
            f"{file}: expected numbers, got {pixels.dtype}. Convert the file."
        )
    check_level(file, level, [pixels.shape[:2]])

    def read(box: Box, bands: Sequence[int]) -> Pixels:
        rows = slice(box.row, box.row + box.height)
        part = pixels[rows, box.column : box.column + box.width]
        everything = list(bands) == list(range(pixels.shape[2]))
        return in_memory(part if everything else part[..., list(bands)])

    dtype = pixels.dtype.newbyteorder("=")
    return OpenedLevel(pixels.shape, dtype, read)


def with_orientation(source: OpenedLevel, orientation: int) -> OpenedLevel:
    """Return an image whose tag of this orientation is not applied, but can be."""
    if orientation not in _TURNS:
        return source
    tags = Tags(
        f"an orientation ({orientation}), by which viewers turn or mirror it",
        lambda: turned(source, orientation),
    )
    return dataclasses.replace(source, tags=tags)


def turned(source: OpenedLevel, orientation: int) -> OpenedLevel:
    """Return an image turned and mirrored as its orientation tag has it.

    Source:
      JEITA, *Exif 2.32* (2019), tag 274; the names in Pillow's ``ImageOps``.
    """
    swapped, up, left = _TURNS[orientation]
    height, width, channels = source.shape
    rows, columns = (width, height) if swapped else (height, width)

    def read(box: Box, bands: Sequence[int]) -> Pixels:
        row = rows - box.row - box.height if up else box.row
        column = columns - box.column - box.width if left else box.column
        stored = Box(row, column, box.height, box.width)
        if swapped:
            stored = Box(column, row, box.width, box.height)
        pixels = source.read(stored, bands)
        pixels = pixels.swapaxes(0, 1) if swapped else pixels
        return pixels[:: -1 if up else 1, :: -1 if left else 1]

    levels, transform = source.levels, source.transform
    if swapped:
        levels = [(across, down) for down, across in levels]
        # Formats with orientations have no coordinates, only the scale of a level.
        transform = Affine(a=transform.e, e=transform.a)
    open_level = source.open_level
    return dataclasses.replace(
        source,
        shape=(rows, columns, channels),
        read=read,
        transform=transform,
        levels=levels,
        open_level=open_level
        and (lambda level: turned(open_level(level), orientation)),
        tags=None,
    )


def _span(where: Any, size: int) -> tuple[int, int, Any]:
    """Return the start and length to read, and the index into what was read."""
    if not isinstance(where, slice):
        index = operator.index(where)
        if not -size <= index < size:
            raise IndexError(f"Expected an index below {size}, got {index}.")
        return index % size, 1, 0
    places = range(size)[where]
    if not places:
        return 0, 0, slice(0, 0)
    first, last = min(places[0], places[-1]), max(places[0], places[-1])
    # What is read starts and ends at a wanted place: from either, the step finds the
    # rest.
    inner = slice(None, None, where.step) if places.step != 1 else slice(None)
    return first, last - first + 1, inner


def _region(file: Path, region: Sequence[int] | None, size: tuple[int, int]) -> Box:
    if region is None:
        return Box(0, 0, *size)
    fits = _are_ints(region, 4) and all(
        min(start, length - 1) >= 0 and start + length <= most
        for start, length, most in zip(region[:2], region[2:], size)
    )
    if not fits:
        raise ImageError(
            f"{file}: expected a region (row, column, height, width) inside "
            f"{size[0]}x{size[1]} pixels, got {region!r}. Pass a smaller one."
        )
    return Box(*map(operator.index, region))


def _are_ints(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, Sequence | np.ndarray) or len(values) == 0:
        return False
    # True is an int to Python, and no number of a band.
    kinds = (isinstance(n, int | np.integer) and type(n) is not bool for n in values)
    return count in (None, len(values)) and all(kinds)


def _bands(file: Path, bands: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if bands is None:
        return tuple(range(count))
    if not _are_ints(bands) or not all(1 <= band <= count for band in bands):
        raise ImageError(
            f"{file}: expected bands from 1 to {count}, got {bands!r}. Pass a list of "
            "them, such as [1] for the first."
        )
    return tuple(band - 1 for band in bands)
