"""Results of ``fcconv slide``: files that a stopped run leaves, and others finish.

While a run works on ``grid.npy``, its tiles are in ``grid.npy.part``, and the record of
the finished ones in ``grid.npy.part.json``. At the end the part becomes the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..dense_prediction.images.base import Affine
from ..dense_prediction.mapped import in_memory
from ..dense_prediction.tiles import read_part
from ..files.install import allocate, disk_fault, install, is_file, replacing, sync
from ..messages.extras import require
from .inputs import ArgumentError

try:
    import fcntl
except ImportError:  # Windows: two runs to one file aren't told apart
    fcntl = None

SUFFIXES = (".npy", ".zarr", ".tif", ".tiff")
# Positions of a chunk of a zarr, along each axis.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ResultGrid:
    """Shape and coordinates of a grid of results.

    Args:
      shape: ``(N, rows, columns, ...)``.
      dtype: of the results.
      window: rows and columns of a crop.
      stride: rows and columns from one to the next.
      transform: from columns and rows of the grid to coordinates.
      crs: the coordinates' reference system, as WKT.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    transform: Affine
    crs: str | None

    @property
    def attributes(self) -> dict[str, Any]:
        """The same for the metadata of a file."""
        found = {"window": self.window, "stride": self.stride, "crs": self.crs}
        return {**found, "transform": list(self.transform)}


@contextlib.contextmanager
def grid_file(file: Path, grid: ResultGrid, resume: bool) -> Iterator[tuple[Any, Path]]:
    """Yield the array to write to, and the path of the record; then finish the file.

    If the body raises, what is written stays for a run with ``resume``.

    Args:
      file: the destination; its suffix decides the format.
      grid: what it is to hold.
      resume: whether to go on with what a stopped run left, if it left anything.

    Raises:
      ArgumentError: it can't be written, or another run is writing it; what was there
        is unchanged.
    """
    part, record, _ = check_leftovers(file)
    as_zarr = file.suffix.lower() == ".zarr"
    as_tiff = file.suffix.lower() in (".tif", ".tiff")
    if as_tiff:
        _check_tiff(file, grid)
    left = f", then go on with --resume from {part}"
    try:
        with _locked(file):
            if not resume or not part.exists() or not record.exists():
                # The record first: alone, it would vouch for tiles that are gone.
                record.unlink(missing_ok=True)
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
            if as_zarr:
                array = _open_zarr(part, grid)
            else:
                array = _open_npy(part, grid, spare=_tiff_bytes(grid) * as_tiff)
            yield array, record
            left = f" and take the result from {part}" + ", a .npy array" * as_tiff
            if not as_zarr:
                array.flush()
            if as_tiff:
                # Gives back the space that was held for the TIFF.
                os.truncate(part, array.offset + array.nbytes)
                _write_tiff(file, array, grid)
                part.unlink()
            else:
                sync(part)
                install(part, file, is_zarr if as_zarr else is_file)
                if part.is_dir():  # holds what was replaced
                    shutil.rmtree(part)
                part.unlink(missing_ok=True)
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) else disk_fault(error)
        if why is None:
            raise
        nbytes = math.prod(grid.shape) * grid.dtype.itemsize
        raise ArgumentError(
            f"{file}: {nbytes} bytes can't be written ({why}). Make room"
            f"{left * part.exists()}, or pass another --out."
        ) from None


def is_zarr(folder: Path) -> bool:
    """Return whether a folder is an array of zarr 3 and nothing else.

    Only such a folder is replaced: anything beside the array's own files stays.
    """
    return (folder / "zarr.json").is_file() and _is_only_zarr(folder)


def _is_only_zarr(folder: Path) -> bool:
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(map(_is_of_zarr, folder.rglob("*"), itertools.repeat(folder)))
    )


def _is_of_zarr(path: Path, folder: Path) -> bool:
    # TensorStore adds the suffix to files that it is writing.
    first, *numbers = path.relative_to(folder).parts
    numbers = [number.removesuffix(".__lock") for number in numbers]
    named = first.removesuffix(".__lock") == "zarr.json" and not numbers
    named |= first == "c" and all(number.isdecimal() for number in numbers)
    return named and not path.is_symlink() and (path.is_dir() or path.is_file())


def check_leftovers(file: Path) -> tuple[Path, Path, Path]:
    """Return the paths of a run's part, its record and its lock.

    Raises:
      ArgumentError: a link, a pipe or a folder of something else is there. It would be
        written through, waited for or deleted.
    """
    part, record, lock = (
        file.with_name(f"{file.name}.{end}")
        for end in ("part", "part.json", "part.lock")
    )
    for path in (part, record, lock):
        if not os.path.lexists(path):
            continue
        regular = path.is_file() and not path.is_symlink()
        if path == part and file.suffix.lower() == ".zarr":
            regular = _is_only_zarr(path)
        if not regular:
            raise ArgumentError(
                f"{path}: expected the leftovers of a stopped run, got something else. "
                "Move it away, or pass another name."
            )
    return part, record, lock


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold off another run to the same file; the lock ends with the process."""
    *_, lock = check_leftovers(file)
    busy = ArgumentError(
        f"{file}: another run is writing it. Wait for it, or pass another name"
    )
    with lock.open("a") as opened:
        if fcntl is not None:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A run that has just ended may have removed it since it was opened.
                if not os.path.samestat(os.fstat(opened.fileno()), lock.stat()):
                    raise busy
            except (BlockingIOError, FileNotFoundError):
                raise busy from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _open_npy(part: Path, grid: ResultGrid, spare: int) -> Any:
    """Open or create a ``.npy`` array, with bytes to spare behind it.

    Its blocks are allocated first: on a full disk, writing to mapped memory would end
    the process.
    """
    if part.exists():
        try:
            array = np.load(part, mmap_mode="r+", allow_pickle=False)
        except Exception:  # tokenize, which reads the header, has errors of its own
            raise _other_run(part, "not a .npy array") from None
        if (array.shape, array.dtype) != (grid.shape, grid.dtype):
            raise _other_run(part, f"{array.dtype} of shape {array.shape}")
        with part.open("r+b") as opened:
            allocate(opened.fileno(), array.offset + array.nbytes + spare)
        return array
    header = io.BytesIO()
    described = np.lib.format.dtype_to_descr(grid.dtype)
    np.lib.format.write_array_header_2_0(
        header, {"descr": described, "fortran_order": False, "shape": grid.shape}
    )
    start = header.getbuffer().nbytes
    with part.open("w+b") as opened:
        opened.write(header.getbuffer())
        opened.flush()
        try:
            nbytes = math.prod(grid.shape) * grid.dtype.itemsize
            allocate(opened.fileno(), start + nbytes + spare)
        except OSError:
            part.unlink()
            raise
    return np.memmap(part, grid.dtype, "r+", start, grid.shape)


def _open_zarr(part: Path, grid: ResultGrid) -> Any:
    """Open or create a zarr (version 3) with the grid's attributes."""
    import tensorstore

    chunks = [1, *(min(_CHUNK, size) for size in grid.shape[1:3]), *grid.shape[3:]]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(part)},
        "metadata": {
            "shape": list(grid.shape),
            "data_type": grid.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "attributes": {"fcconv_jax": grid.attributes},
        },
    }
    try:
        opened: Any = tensorstore.open(spec, open=True, create=True)
        return opened.result()
    except ValueError as error:
        found = _other_fields(part / "zarr.json", spec["metadata"])
        raise _other_run(part, found or str(error).partition(" [")[0]) from None


def _other_fields(file: Path, wanted: Mapping[str, Any]) -> str:
    """Name what a zarr's metadata has otherwise; empty if they can't be read."""
    try:
        found = json.loads(file.read_bytes())
        held = found | found["attributes"]["fcconv_jax"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    # As JSON has it: lists in place of tuples.
    asked = json.loads(json.dumps(wanted | wanted["attributes"]["fcconv_jax"]))
    return ", ".join(
        f"{name.replace('_', ' ')} {held.get(name)}"
        for name in ("shape", "data_type", "window", "stride", "crs", "transform")
        if held.get(name) != asked[name]
    )


def _other_run(part: Path, what: str) -> ArgumentError:
    return ArgumentError(
        f"--resume: expected the part of this run in {part}, got that of another "
        f"({what}). Pass that run's window, stride, level, region and model, or leave "
        "--resume out to start again"
    )


def _check_tiff(file: Path, grid: ResultGrid) -> None:
    """Refuse grids that can't be a TIFF, before any work.

    Raises:
      ArgumentError: there are several images, or rasterio isn't installed.
    """
    require("rasterio", "geotiff", "Writing TIFF files")
    if grid.shape[0] > 1:
        raise ArgumentError(
            f"{file}: expected one image for a TIFF, got {grid.shape[0]}. Run the "
            "command for each, or pass --out grid.npy."
        )


def _tiff_bytes(grid: ResultGrid) -> int:
    """Return what a TIFF takes at most: that of pixels that don't compress."""
    _, rows, columns, *rest = grid.shape
    pixels = math.prod(grid.shape) * np.dtype(_tiff_dtype(grid)).itemsize
    blocks = -(-rows // _CHUNK) * -(-columns // _CHUNK) * math.prod(rest)
    # Deflate adds 5 bytes to each 16 KiB. Blocks are padded with zeros, a run or
    # a few for each row, and take an entry of the file's tables.
    return pixels + pixels // 1024 + blocks * (16 * _CHUNK + 1024) + (1 << 16)


def _tiff_dtype(grid: ResultGrid) -> str:
    # GDAL has no bool, and float16 only from version 3.11 on.
    known = {"bool": "uint8", "float16": "float32"}
    return known.get(grid.dtype.name, grid.dtype.name)


def _write_tiff(file: Path, array: Any, grid: ResultGrid) -> None:
    """Write a tiled TIFF whose pixels are the positions and bands the outputs."""
    rasterio: Any = require("rasterio", "geotiff", "Writing TIFF files")
    _, rows, columns, *rest = grid.shape
    bands = math.prod(rest)
    array = array.reshape(rows, columns, bands)
    dtype = _tiff_dtype(grid)
    floats = dtype.startswith("float")
    options = {
        "driver": "GTiff",
        "dtype": dtype,
        "count": bands,
        "height": rows,
        "width": columns,
        "crs": grid.crs,
        "transform": rasterio.Affine(*grid.transform),
        # A mask needs float outputs, so only these have positions without a result.
        "nodata": math.nan if floats else None,
        "compress": "deflate",
        # TIFF's numbers: 3 is the predictor for floats, 1 is none.
        "predictor": 3 if floats else 1,
        "interleave": "band",
        # Whether a compressed file passes 4 GiB isn't known before it is written.
        "bigtiff": "if_safer",
        "tiled": True,
        "blockxsize": _CHUNK,
        "blockysize": _CHUNK,
    }
    windows = [
        rasterio.windows.Window(
            left, top, min(_CHUNK, columns - left), min(_CHUNK, rows - top)
        )
        for top in range(0, rows, _CHUNK)
        for left in range(0, columns, _CHUNK)
    ]

    def values(window: Any) -> np.ndarray[Any, Any]:
        part = array[window.toslices()]
        return np.moveaxis(in_memory(part), -1, 0).astype(dtype)

    try:
        with replacing(file) as fresh:
            with rasterio.open(fresh, "w", **options) as dataset:
                dataset.update_tags(fcconv_jax=json.dumps(grid.attributes))
                for window in windows:
                    dataset.write(values(window), window=window)
            # GDAL writes its last blocks as it closes, where it raises no error.
            with rasterio.open(fresh) as dataset:
                for window in windows:
                    found = dataset.read(window=window)
                    # As bytes, since NaN, at positions without a result, doesn't equal
                    # itself.
                    if found.tobytes() != values(window).tobytes():
                        raise OSError(errno.EIO, "it reads back differently")
    except rasterio.errors.RasterioError as error:
        raise ArgumentError(
            f"{file}: can't be written ({error}). Make room, or pass --out grid.npy."
        ) from None


def rows_of(array: Any, image: int, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Read rows of one image's results, ``(rows, columns, outputs)``."""
    part = read_part(array, (image, slice(start, min(stop, array.shape[1]))))
    return part.reshape(*part.shape[:2], -1)


def bands_of(array: Any, image: int) -> Iterator[np.ndarray[Any, Any]]:
    """Read one image's results by bands of rows, ``(rows, columns, outputs)`` each."""
    for start in range(0, array.shape[1], _CHUNK):
        yield rows_of(array, image, start, start + _CHUNK)
