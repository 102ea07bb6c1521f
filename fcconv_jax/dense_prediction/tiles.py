"""Images that are too large for one program: a tile of positions at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..progress import ProgressOption, shown

# A program holds a few arrays at once; the largest is what can be told beforehand.
_ALIVE = 3


def write_tiles(
    grid: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
    memory: int,
    resume: str | Path | None,
    progress: ProgressOption,
) -> None:
    """Writes the result of :meth:`fcconv_jax.Slide.write`, whose arguments these are.

    A tile's crops are those of the whole image: their windows lie inside the part of
    the image that is read for it. Tiles are of one size, so that one program serves
    all; the last ones overlap those before them.
    """
    *before, images = args
    if grid.padding != "crops":
        raise ValueError(
            "padding='image' has no tiles: their borders would be the image's. Use "
            "padding='crops', which is exact"
        )
    stride = grid.report(*before, _one_window(grid, images), **kwargs).stride
    grid = type(grid)(grid.function, grid.window, stride, grid.axes, grid.padding)
    counts = [
        (images.shape[axis] - size) // step + 1
        for axis, size, step in zip(grid.axes, grid.window, stride)
    ]
    _check_out(grid, before, images, kwargs, out, counts)
    tile = _tile(grid, before, images, kwargs, stride, counts, memory)
    places = list(_places(counts, tile))
    done = _Done(resume, [counts, tile, list(images.shape), list(grid.window)])
    with shown(progress) as tell:
        for number, place in enumerate(places):
            tell("tiles", number, len(places))
            if number in done.tiles:
                continue
            read = [slice(None)] * len(images.shape)
            for axis, first, count, size, step in zip(
                grid.axes, place, tile, grid.window, stride
            ):
                start = first * step
                read[axis] = slice(start, start + (count - 1) * step + size)
            part = grid(*before, _read(images, read), **kwargs)
            where = (slice(None), *(slice(p, p + n) for p, n in zip(place, tile)))
            for target, values in zip(jax.tree.leaves(out), jax.tree.leaves(part)):
                target[where] = np.asarray(values)
            done.add(number, out)
        tell("tiles", len(places), len(places))
    done.remove()


class _Done:
    """Which tiles are written, kept in a file if one is given."""

    def __init__(self, file: str | Path | None, what: Any):
        self.file = None if file is None else Path(file)
        self.name = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self.tiles: set[int] = set()
        if self.file is not None and self.file.exists():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept.get("run") != self.name:
                raise ValueError(
                    f"{self.file} is of a run with another image, window or tile. "
                    "Remove it, or pass the same arguments"
                )
            self.tiles = set(kept["tiles"])

    def add(self, number: int, out: Any) -> None:
        """Notes that a tile is written; what is written is on disk first."""
        self.tiles.add(number)
        if self.file is None:
            return
        for target in jax.tree.leaves(out):
            if hasattr(target, "flush"):
                target.flush()
        fresh = self.file.with_name(f"{self.file.name}.new")
        kept = {"run": self.name, "tiles": sorted(self.tiles)}
        fresh.write_text(json.dumps(kept), encoding="utf-8")
        fresh.replace(self.file)

    def remove(self) -> None:
        """Forgets the run, which is over."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _one_window(grid: Any, images: Any) -> jax.ShapeDtypeStruct:
    shape = list(images.shape)
    for axis, size in zip(grid.axes, grid.window):
        shape[axis] = size
    return jax.ShapeDtypeStruct(tuple(shape), _dtype(images))


def _check_out(
    grid: Any,
    before: Sequence[Any],
    images: Any,
    kwargs: Mapping[str, Any],
    out: Any,
    counts: Sequence[int],
) -> None:
    one = grid.eval_shape(*before, _one_window(grid, images), **kwargs)
    rank = len(counts)
    wanted = [
        (leaf.shape[0], *counts, *leaf.shape[1 + rank :])
        for leaf in jax.tree.leaves(one)
    ]
    found = [tuple(leaf.shape) for leaf in jax.tree.leaves(out)]
    if wanted != found:
        raise ValueError(f"out: expected arrays of shape {wanted}, got {found}")


def _tile(
    grid: Any,
    before: Sequence[Any],
    images: Any,
    kwargs: Mapping[str, Any],
    stride: Sequence[int],
    counts: Sequence[int],
    memory: int,
) -> list[int]:
    """The largest tile, halved until it fits."""
    tile = list(counts)
    while True:
        needed = 0
        shape = list(images.shape)
        for axis, count, size, step in zip(grid.axes, tile, grid.window, stride):
            shape[axis] = (count - 1) * step + size
        part = jax.ShapeDtypeStruct(tuple(shape), _dtype(images))
        # A guess from the image alone keeps the maps of a huge one from being made.
        least = _ALIVE * math.prod(shape) * _dtype(images).itemsize
        if least <= memory:
            report = grid.report(*before, part, **kwargs)
            needed = report.bytes if report.shares else report.crop_bytes
            if _ALIVE * needed <= memory:
                return tile
        if max(tile) == 1:
            raise ValueError(
                "memory: expected room for one window, which takes some "
                f"{max(_ALIVE * needed, least)} bytes, got {memory}. "
                "Pass more, or fewer images at once"
            )
        longest = tile.index(max(tile))
        tile[longest] = -(-tile[longest] // 2)


def _places(counts: Sequence[int], tile: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Where each tile begins."""
    return itertools.product(
        *(
            sorted({min(start, count - size) for start in range(0, count, size)})
            for count, size in zip(counts, tile)
        )
    )


def _dtype(images: Any) -> np.dtype[Any]:
    """The dtype as NumPy has it; TensorStore has its own."""
    return np.dtype(getattr(images.dtype, "numpy_dtype", images.dtype))


def _read(images: Any, where: Sequence[slice]) -> Any:
    part: Any = images[tuple(where)]
    reader: Any = getattr(part, "read", None)
    if callable(reader):  # TensorStore
        future: Any = reader()
        part = future.result()
    return np.ascontiguousarray(part)
