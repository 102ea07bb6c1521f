"""TIFF, OME-TIFF, SVS and NDPI by tifffile, tile by tile."""

from __future__ import annotations

import functools
import math
import os
import struct
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...messages.errors import ImageError
from ...messages.extras import require
from .base import (
    Affine,
    Box,
    Format,
    OpenedLevel,
    Pixels,
    check_level,
    with_orientation,
)

# Neighbouring parts of an image share tiles of the file; this much is kept decoded.
_KEPT = 64 << 20
# A file in one compressed strip can't be read by the part.
_LARGEST_SEGMENT = 512 << 20
_MIN_IS_WHITE, _PALETTE = 0, 3
# Numbers of tags.
_ORIENTATION, COLOR_MAP = 274, 320


def tags_of(file: Path) -> frozenset[int] | None:
    """Return the tags of the first page of a TIFF; None for another file.

    Which library reads a file is decided by them, so that neither is imported for it.
    """
    with file.open("rb") as opened:
        head = opened.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            return None
        version = struct.unpack(f"{order}H", head[2:4])[0]
        if version == 42:
            counted, entry, start = "H", 12, struct.unpack(f"{order}I", head[4:8])[0]
        elif version == 43 and len(head) == 16:
            counted, entry, start = "Q", 20, struct.unpack(f"{order}Q", head[8:])[0]
        else:
            return None
        opened.seek(min(start, file.stat().st_size))
        count = opened.read(struct.calcsize(counted))
        if len(count) < struct.calcsize(counted):
            return frozenset()
        # A damaged count of tags must not make this read the whole file.
        number = min(struct.unpack(order + counted, count)[0], 4096)
        entries = opened.read(number * entry)
    return frozenset(
        struct.unpack_from(f"{order}H", entries, at)[0]
        for at in range(0, len(entries) - entry + 1, entry)
    )


def _takes(file: Path, mode: str | None) -> bool:
    return mode is None and tags_of(file) is not None


def open_(file: Path, level: int, mode: str | None) -> OpenedLevel:
    """Open a level of the pyramid; its tiles are decoded when they are read.

    Raises:
      ImageError: the file is truncated or damaged, or isn't one image of numbers.
    """
    tifffile: Any = require("tifffile", "tiff", "Reading TIFF files by the tile")
    try:
        tif = tifffile.TiffFile(file)
    except Exception as error:  # struct.error, MemoryError, ... of damaged headers
        raise _damaged(file, error) from None
    try:
        source = _opened(file, tif, level)
    except ImageError:
        tif.close()
        raise
    except Exception as error:
        tif.close()
        raise _damaged(file, error) from None
    # tifffile warns of files that nobody closed.
    weakref.finalize(source.read, tif.close)
    return source


def _opened(file: Path, tif: Any, level: int) -> OpenedLevel:
    # Several threads read; tifffile itself reads some tags when first asked for them.
    tif.filehandle.set_lock(True)
    levels = tif.series[0].levels
    sizes = [_size(file, each) for each in levels]
    height, width = check_level(file, level, sizes)
    chosen = levels[level]
    page = chosen.keyframe
    if page.photometric == _PALETTE:
        raise ImageError(
            f"{file}: expected colors, got indices into a palette. Pass the mode RGB, "
            "or P for the indices."
        )
    pages = [_Page(file, each, tif.filehandle.size) for each in chosen.pages]
    dtype = chosen.dtype.newbyteorder("=")
    if dtype.kind not in "uifb":
        raise ImageError(f"{file}: expected numbers, got {dtype}. Convert the file.")
    bands = [
        (number, band)
        for number, each in enumerate(pages)
        for band in range(each.channels)
    ]
    inverted = page.photometric == _MIN_IS_WHITE and dtype.kind == "u"
    # Codecs release the GIL.
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "fcconv-tiff")

    def read(box: Box, wanted: Sequence[int]) -> Pixels:
        chosen = [bands[band] for band in wanted]
        out: Pixels = np.zeros((box.height, box.width, len(chosen)), dtype)
        for number in dict.fromkeys(number for number, _ in chosen):
            where = [n for n, (page, _) in enumerate(chosen) if page == number]
            inside = [chosen[n][1] for n in where]
            pages[number].read_into(out, where, box, inside, pool.map)
        return np.invert(out) if inverted else out

    top_height, top_width = sizes[0]
    source = OpenedLevel(
        (height, width, len(bands)),
        dtype,
        read,
        Affine(a=top_width / width, e=top_height / height),
        bits=page.bitspersample if dtype.kind == "u" else None,
        levels=sizes,
        open_level=lambda level: open_(file, level, None),
    )
    orientation = levels[0].keyframe.tags.get(_ORIENTATION)
    return with_orientation(source, orientation.value if orientation else 1)


def _size(file: Path, level: Any) -> tuple[int, int]:
    found = dict(zip(level.axes, level.shape))
    several = {
        name: n
        for name, n in found.items()
        if n > 1 and name not in ("Y", "X", "S", "C")
    }
    if several or "Y" not in found or "X" not in found:
        raise ImageError(
            f"{file}: expected an image with rows (Y), columns (X) and channels (S, "
            f"C), got axes {level.axes} of shape {level.shape}. Extract one plane."
        )
    return found["Y"], found["X"]


class _Page:
    """A page of a file: an array ``(height, width, channels)`` in segments.

    Args:
      file: the file.
      page: of tifffile.
      size: of the file in bytes.
    """

    def __init__(self, file: Path, page: Any, size: int):
        if page is None:
            raise ImageError(f"{file}: one of its pages is missing. Get another copy.")
        self._file, self._page, self._keyframe = file, page, page.keyframe
        planes, depth, height, width, samples = self._keyframe.shaped
        if depth != 1:
            raise ImageError(
                f"{file}: expected one plane, got a depth of {depth}. Extract one "
                "plane."
            )
        self.channels = planes * samples
        self._offsets = page.dataoffsets
        self._counts = page.databytecounts
        if self._keyframe.is_tiled:
            rows, columns = self._keyframe.tilelength, self._keyframe.tilewidth
        else:
            rows, columns = min(self._keyframe.rowsperstrip, height), width
        self._segment = rows, columns
        self._across, self._down = -(-width // columns), -(-height // rows)
        self._planes = planes
        ends = [start + count for start, count in zip(self._offsets, self._counts)]
        if max(ends, default=0) > size:
            raise ImageError(
                f"{file}: truncated: its pixels end at byte {max(ends)}, the file at "
                f"{size}. Get another copy."
            )
        self._raw: Pixels | None = None
        if self._keyframe.is_contiguous and page.dataoffsets[0]:
            self._raw = np.memmap(
                file,
                self._keyframe.dtype.newbyteorder(page.parent.byteorder),
                "r",
                page.dataoffsets[0],
                (planes, height, width, samples),
            )
            return
        wanted = planes * self._across * self._down
        if not len(self._offsets) == len(self._counts) == wanted:
            raise ImageError(
                f"{file}: damaged: an image of {height}x{width} needs {wanted} "
                f"segments of {rows}x{columns}, the file has {len(self._offsets)} "
                f"offsets and {len(self._counts)} sizes. Get another copy."
            )
        nbytes = math.prod(self._segment) * samples * self._keyframe.dtype.itemsize
        if nbytes > _LARGEST_SEGMENT:
            raise ImageError(
                f"{file}: expected tiles, got segments of {rows}x{columns}, which can "
                "only be read whole. Convert it with gdal_translate -co TILED=YES."
            )
        # Made before threads read: tifffile looks into the first segment for it, and
        # into tags for the tables, without the lock.
        self._decoder = self._keyframe.decode
        self._options = {
            name: value
            for name in ("jpegtables", "jpegheader")
            if (value := getattr(page, name, None)) is not None
        }
        kept = max(4, _KEPT // max(nbytes, 1))
        self._decoded = functools.lru_cache(kept)(self._decode)

    def read_into(
        self,
        out: Pixels,
        where: Sequence[int],
        box: Box,
        bands: Sequence[int],
        each: Callable[..., Any],
    ) -> None:
        """Copy channels of a box into those channels of an array.

        Args:
          out: ``(height, width, channels)`` of the box.
          where: the channels of ``out``.
          box: in pixels of the page.
          bands: the page's channels, as many.
          each: a ``map``, which may run in several threads.
        """
        if self._raw is not None:
            part = self._raw[
                :, box.row : box.row + box.height, box.column : box.column + box.width
            ]
            samples = part.shape[-1]
            for target, band in zip(where, bands):
                out[..., target] = part[band // samples, ..., band % samples]
            return
        rows, columns = self._segment
        lines = range(box.row // rows, -(-(box.row + box.height) // rows))
        places = range(box.column // columns, -(-(box.column + box.width) // columns))
        samples = self.channels // self._planes
        todo = [
            (plane, i, j)
            for plane in dict.fromkeys(band // samples for band in bands)
            for i in lines
            for j in places
        ]

        def copy(segment: tuple[int, int, int]) -> None:
            plane, i, j = segment
            data = self._decoded((plane * self._down + i) * self._across + j)
            if data is None:  # a sparse file has none where all are zeros
                return
            top, left = i * rows - box.row, j * columns - box.column
            bottom = min(top + data.shape[0], box.height)
            right = min(left + data.shape[1], box.width)
            inner = data[max(-top, 0) : bottom - top, max(-left, 0) : right - left]
            target = out[max(top, 0) : bottom, max(left, 0) : right]
            for channel, band in zip(where, bands):
                if band // samples == plane:
                    target[..., channel] = inner[..., band % samples]

        list(each(copy, todo))

    def _decode(self, index: int) -> Pixels | None:
        """Return a segment's pixels ``(rows, columns, samples)``; None if it has none.

        Raises:
          ImageError: it is damaged.
        """
        count = self._counts[index]
        if not count and not self._offsets[index]:
            return None
        opened = self._page.parent.filehandle
        with opened.lock:
            opened.seek(self._offsets[index])
            data = opened.read(count)
        try:
            if not count:
                raise ValueError("0 bytes, though it has an offset")
            if len(data) < count:
                raise ValueError(f"expected {count} bytes, got {len(data)}")
            pixels, _, shape = self._decoder(data, index, **self._options)
        except Exception as error:  # codecs raise errors of their own
            raise _damaged(self._file, error, f"segment {index}") from None
        if pixels is None:
            return None
        return pixels.reshape(shape)[0]


def _damaged(file: Path, error: Exception, where: str = "") -> ImageError:
    said = (str(error) or type(error).__name__).splitlines()[0]
    return ImageError(
        f"{file}: tifffile cannot read it ({where}{': ' * bool(where)}{said}). "
        "Get another copy, or convert it"
    )


FORMAT = Format("tiff", 2, "tifffile", _takes, open_)
