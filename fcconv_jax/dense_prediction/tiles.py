"""Images that are too large for one program: a tile of positions at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..messages.progress import ProgressOption, shown
from .resume import FinishedTiles, identity

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
    """Write the result of :meth:`fcconv_jax.Slide.write`, whose arguments these are.

    A tile's crops are those of the whole image: their windows lie inside the part of
    the image that is read for it. Tiles are of one size, so that one program serves
    all; the last ones overlap those before them, and write what is new.
    """
    *before, images = args
    if grid.padding != "crops":
        raise ValueError(
            "padding='image' can't be written by tiles: their borders would count as "
            "the image's. Pass padding='crops', which is exact."
        )
    crop = _one_window(grid, images)
    stride = grid.report(*before, crop, **kwargs).stride
    grid = type(grid)(grid.function, grid.window, stride, grid.axes, grid.padding)
    counts = [
        (images.shape[axis] - size) // step + 1
        for axis, size, step in zip(grid.axes, grid.window, stride)
    ]
    one = grid.eval_shape(*before, crop, **kwargs)
    _check_out(jax.tree.leaves(one), out, counts)
    tile = _tile(grid, before, images, kwargs, stride, counts, memory)
    places = list(_places(counts, tile))
    slices = functools.partial(_slices, grid, stride, tile, len(images.shape))
    record = None
    if resume is not None:
        run = identity(grid, before, kwargs, images, crop, tile)
        record = FinishedTiles(Path(resume), run, len(places))
    with shown(progress) as tell:
        # Finished tiles are compared with the record before any other is computed.
        finished = () if record is None else sorted(record.tiles)
        for number in finished:
            read, new, _ = slices(places[number])
            assert record is not None
            record.check(number, _read(images, read), _written(out, new))
        todo = [n for n in range(len(places)) if n not in finished]
        for done, number in enumerate(todo, len(finished)):
            tell("tiles", done, len(places))
            read, new, inner = slices(places[number])
            pixels = _read(images, read)
            part = grid(*before, pixels, **kwargs)
            for target, values in zip(jax.tree.leaves(out), jax.tree.leaves(part)):
                target[new] = np.asarray(values[inner])
            if record is not None:
                for target in jax.tree.leaves(out):
                    if hasattr(target, "flush"):
                        target.flush()
                record.add(number, pixels, _written(out, new))
        tell("tiles", len(places), len(places))
    if record is not None:
        record.remove()


def _slices(
    grid: Any,
    stride: Sequence[int],
    tile: Sequence[int],
    rank: int,
    place: Sequence[tuple[int, int]],
) -> tuple[list[slice], tuple[slice, ...], tuple[slice, ...]]:
    """Return a tile's slices of the image, of the output, and of its own result."""
    read = [slice(None)] * rank
    new, inner = [slice(None)], [slice(None)]
    for axis, (first, fresh), count, size, step in zip(
        grid.axes, place, tile, grid.window, stride
    ):
        start = first * step
        read[axis] = slice(start, start + (count - 1) * step + size)
        new.append(slice(fresh, first + count))
        inner.append(slice(fresh - first, None))
    return read, tuple(new), tuple(inner)


def _written(out: Any, where: tuple[slice, ...]) -> list[Any]:
    return [_read(target, where) for target in jax.tree.leaves(out)]


def _one_window(grid: Any, images: Any) -> jax.ShapeDtypeStruct:
    shape = list(images.shape)
    for axis, size in zip(grid.axes, grid.window):
        shape[axis] = size
    return jax.ShapeDtypeStruct(tuple(shape), dtype_of(images))


def _check_out(one: Sequence[Any], out: Any, counts: Sequence[int]) -> None:
    """Refuse outputs that cannot hold the result, before anything is computed."""
    rank = len(counts)
    wanted = [(leaf.shape[0], *counts, *leaf.shape[1 + rank :]) for leaf in one]
    targets = jax.tree.leaves(out)
    found = [tuple(target.shape) for target in targets]
    if wanted != found:
        raise ValueError(f"out: expected arrays of shape {wanted}, got {found}.")
    for leaf, target in zip(one, targets):
        if not _holds(dtype_of(target), dtype_of(leaf)):
            raise ValueError(
                f"out: expected {leaf.dtype}, got {target.dtype}, which can't hold "
                f"the result. Pass an array of {leaf.dtype}."
            )
        if isinstance(target, jax.Array) or not _is_writable(target):
            raise ValueError(
                "out: expected an array that can be written, got a read-only "
                f"{type(target).__name__}. Pass a NumPy array or a writable file."
            )


def _holds(dtype: np.dtype[Any], result: np.dtype[Any]) -> bool:
    # To round floats to shorter ones is the caller's choice; to cut them is not.
    if jnp.issubdtype(result, jnp.floating):
        return jnp.issubdtype(dtype, jnp.inexact)
    return dtype == result or np.can_cast(result, dtype, "safe")


def _is_writable(target: Any) -> bool:
    return not isinstance(target, np.ndarray) or target.flags.writeable


def _tile(
    grid: Any,
    before: Sequence[Any],
    images: Any,
    kwargs: Mapping[str, Any],
    stride: Sequence[int],
    counts: Sequence[int],
    memory: int,
) -> list[int]:
    """Return the largest tile, halved until it fits."""
    tile = list(counts)
    while True:
        needed = 0
        shape = list(images.shape)
        for axis, count, size, step in zip(grid.axes, tile, grid.window, stride):
            shape[axis] = (count - 1) * step + size
        part = jax.ShapeDtypeStruct(tuple(shape), dtype_of(images))
        # A guess from the image alone keeps the maps of a huge one from being made.
        least = _ALIVE * math.prod(shape) * dtype_of(images).itemsize
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


def _places(
    counts: Sequence[int], tile: Sequence[int]
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Where each tile begins along each axis, and where its new positions begin."""
    return itertools.product(
        *(
            [(min(start, count - size), start) for start in range(0, count, size)]
            for count, size in zip(counts, tile)
        )
    )


def dtype_of(images: Any) -> np.dtype[Any]:
    """Return an array's dtype as NumPy has it; TensorStore has its own."""
    return np.dtype(getattr(images.dtype, "numpy_dtype", images.dtype))


def _read(images: Any, where: Sequence[slice]) -> Any:
    part: Any = images[tuple(where)]
    reader: Any = getattr(part, "read", None)
    if callable(reader):  # TensorStore
        future: Any = reader()
        part = future.result()
    return np.ascontiguousarray(part)
