"""Arrays in blocks: the interior that crops share, and strips at their borders.

A padded layer changes what lies near the border of each crop. In one array the strips
would be set apart, and the interior copied, for each layer and axis: on XLA's CPU
backend that took most of the time of small networks. In blocks, a layer reads the
interior as it is and copies strips only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from .maps import PADDING, Map

Array = np.ndarray | jax.Array
# Rows in more groups, or more stretches of a row, are gathered.
_MOST_GROUPS, _MOST_STRETCHES = 4, 8


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """An array, some of whose axes are cut into stretches of one length each.

    Args:
      axes: those axes of the whole array.
      segments: of each axis, ``(rows, length)``: stretches that follow one another.
      arrays: for each choice of a segment along each axis: first an axis of rows for
        each cut axis, then the axes of the array, the cut ones as long as a stretch.

    Example:
      >>> whole = jnp.arange(7)
      >>> pieces = {(0,): whole[None, :3], (1,): whole[3:].reshape(2, 2)}
      >>> blocks = Blocks((0,), (((1, 3), (2, 2)),), pieces)
      >>> blocks.shape, array_from(blocks).tolist()
      ((7,), [0, 1, 2, 3, 4, 5, 6])
    """

    axes: tuple[int, ...]
    segments: tuple[tuple[tuple[int, int], ...], ...]
    arrays: Mapping[tuple[int, ...], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        first = next(iter(self.arrays.values()))
        shape = list(first.shape[len(self.axes) :])
        for axis, segments in zip(self.axes, self.segments):
            shape[axis] = sum(rows * length for rows, length in segments)
        return tuple(shape)


Held = Array | Blocks


def take(data: Array, places: ArrayLike, axis: int) -> Array:
    """Read an axis at places known beforehand; a slice where they are in a row."""
    places = np.asarray(places)
    size = data.shape[axis]
    if places.ndim == 1 and len(places):
        first = int(places[0])
        if (places == np.arange(first, first + len(places))).all():
            if len(places) == size:
                return data
            return lax.slice_in_dim(data, first, first + len(places), axis=axis)
    if isinstance(data, np.ndarray):
        return np.take(data, places, axis)
    # All places are inside; the default mode would test each, to fill others with NaN.
    return jnp.take(data, places, axis=axis, mode="clip")


def array_from(held: Held) -> Array:
    """Return the whole array of blocks; an array as it is."""
    while isinstance(held, Blocks):
        *axes, axis = held.axes
        k = len(axes)
        whole: dict[tuple[int, ...], Array] = {}
        for key in itertools.product(*(range(len(s)) for s in held.segments[:-1])):
            pieces = [
                _flat(held.arrays[*key, i], k, axis)
                for i in range(len(held.segments[-1]))
            ]
            whole[key] = _concatenate(pieces, k + axis)
        if not axes:
            return whole[()]
        held = Blocks(tuple(axes), held.segments[:-1], whole)
    return held


def as_blocks(held: Held, axes: Sequence[int]) -> Blocks:
    """Return an array as blocks along these axes, of one segment where it is whole."""
    axes = tuple(axes)
    if isinstance(held, Blocks) and held.axes == axes:
        return held
    array = array_from(held)
    segments = tuple(((1, array.shape[axis]),) for axis in axes)
    one = array.reshape(*(1,) * len(axes), *array.shape)
    return Blocks(axes, segments, {(0,) * len(axes): one})


def simplest(blocks: Blocks) -> Held:
    """Return blocks as an array, where they are one."""
    if all(segments[0][0] == 1 == len(segments) for segments in blocks.segments):
        return array_from(blocks)
    return blocks


def cut(places: Map, segments: Sequence[tuple[int, int]]) -> list[Map]:
    """Return places in a row, as the stretches of segments.

    Example:
      >>> [each.tolist() for each in cut(np.arange(7), ((1, 3), (2, 2)))]
      [[[0, 1, 2]], [[3, 4], [5, 6]]]
    """
    ends = np.cumsum([rows * length for rows, length in segments])
    return [
        part.reshape(segment)
        for part, segment in zip(np.split(places, ends[:-1]), segments)
    ]


def reread(blocks: Blocks, k: int, targets: Sequence[Map], fill: ArrayLike) -> Blocks:
    """Return blocks whose ``k``-th cut axis is read at other places.

    Args:
      blocks: what is read.
      k: which of its axes.
      targets: places along it, ``(rows, length)`` for each new segment.
      fill: what padding holds.

    Example:
      >>> blocks = as_blocks(jnp.arange(4), (0,))
      >>> targets = [np.array([[-1, 0, 1]]), np.array([[1], [3]])]
      >>> array_from(reread(blocks, 0, targets, 9)).tolist()
      [9, 0, 1, 1, 3]
    """
    count = len(blocks.segments[k])
    others = [range(len(s)) for s in blocks.segments]
    others[k] = range(1)
    arrays: dict[tuple[int, ...], Array] = {}
    for key in itertools.product(*others):
        pieces = [blocks.arrays[*key[:k], i, *key[k + 1 :]] for i in range(count)]
        for i, target in enumerate(targets):
            piece = _read(pieces, k, len(blocks.axes) + blocks.axes[k], target, fill)
            arrays[*key[:k], i, *key[k + 1 :]] = piece
    segments = list(blocks.segments)
    segments[k] = tuple((len(target), target.shape[1]) for target in targets)
    return Blocks(blocks.axes, tuple(segments), arrays)


def segments_along(held: Held, axis: int) -> tuple[tuple[int, int], ...] | None:
    """Return how an axis is cut; None where it is not."""
    if not isinstance(held, Blocks) or axis not in held.axes:
        return None
    return held.segments[held.axes.index(axis)]


def retaken(
    held: Held,
    places: Map,
    axis: int,
    segments: Sequence[tuple[int, int]] | None,
) -> Held:
    """Read an axis at places in a row, cut into segments if it is an axis of blocks."""
    if not isinstance(held, Blocks) or segments_along(held, axis) is None:
        return take(array_from(held), places, axis)
    if held.shape[axis] == len(places) == int((places == np.arange(len(places))).sum()):
        return held
    targets = cut(places, segments or ((1, len(places)),))
    return reread(held, held.axes.index(axis), targets, 0)


def blockwise(run: Callable[[Sequence[Any]], Any], helds: Sequence[Any]) -> Any:
    """Run a function of arrays with axes of equal size, or of 1, on blocks.

    Args:
      run: entry by entry along the axes that are cut. It gets arrays with further axes
        in front, of equal size or 1, and returns one array or several.
      helds: arrays and blocks.
    """
    like = next((held for held in helds if isinstance(held, Blocks)), None)
    if like is None:
        return run(helds)
    every = [_cut_like(held, like) for held in helds]
    outs = {key: run([each[key] for each in every]) for key in like.arrays}
    first = next(iter(outs.values()))
    if not isinstance(first, list | tuple):
        return dataclasses.replace(like, arrays=outs)
    return [
        dataclasses.replace(like, arrays={key: out[i] for key, out in outs.items()})
        for i in range(len(first))
    ]


def _cut_like(held: Held, like: Blocks) -> Mapping[tuple[int, ...], Array]:
    if isinstance(held, Blocks) and held.segments == like.segments:
        return held.arrays
    blocks = as_blocks(held, like.axes)
    shape = blocks.shape
    for k, (axis, segments) in enumerate(zip(like.axes, like.segments)):
        if shape[axis] != 1 and blocks.segments[k] != segments:
            targets = cut(np.arange(shape[axis]), segments)
            blocks = reread(blocks, k, targets, 0)
    # An axis of size 1 is the same for all segments.
    one = [shape[axis] == 1 for axis in like.axes]
    return {
        key: blocks.arrays[tuple(0 if o else i for o, i in zip(one, key))]
        for key in like.arrays
    }


def _read(
    pieces: Sequence[Array], k: int, axis: int, target: Map, fill: ArrayLike
) -> Array:
    """Read the stretches of ``target`` from all segments along an axis."""
    bounds = np.cumsum([0, *(piece.shape[k] * piece.shape[axis] for piece in pieces)])
    which = np.searchsorted(bounds, target, side="right") - 1  # -1 where it is padding
    lengths = np.array([piece.shape[axis] for piece in pieces])
    row, column = np.divmod(target - bounds[which], lengths[which])
    row[which < 0] = column[which < 0] = 0
    # A stretch continues where the next entry is the next of the same stretch.
    on = (np.diff(which) == 0) & (np.diff(row) == 0)
    on &= (np.diff(column) == 1) | (which[:, 1:] < 0)
    looks = np.concatenate([which, on], 1)
    ends = np.flatnonzero((np.diff(looks, axis=0) != 0).any(1)) + 1
    groups = np.split(np.arange(len(target)), ends)
    stretches = 1 + (~on).sum(1).max(initial=0)
    if len(groups) > _MOST_GROUPS or stretches > _MOST_STRETCHES:
        return _gathered(pieces, k, axis, target, fill)
    parts = []
    for rows in groups:
        first = int(rows[0])
        starts = [0, *(np.flatnonzero(~on[first]) + 1).tolist(), target.shape[1]]
        runs = []
        for start, stop in itertools.pairwise(starts):
            source = int(which[first, start])
            piece = pieces[source]
            runs.append(
                _padding(piece, k, axis, (len(rows), stop - start), fill)
                if source < 0
                else _run(
                    piece, k, axis, row[rows, start], column[rows, start], stop - start
                )
            )
        if any(run is None for run in runs):
            return _gathered(pieces, k, axis, target, fill)
        parts.append(_concatenate(runs, axis))
    return _concatenate(parts, k)


def _run(
    piece: Array, k: int, axis: int, rows: Map, columns: Map, length: int
) -> Array | None:
    """Read a stretch from each of some rows of a block; None if it has no order."""
    in_a_row = (np.diff(rows) == 1).all()
    if in_a_row and (columns == columns[0]).all():
        first = int(rows[0])
        piece = lax.slice_in_dim(piece, first, first + len(rows), axis=k)
        first = int(columns[0])
        return lax.slice_in_dim(piece, first, first + length, axis=axis)
    # Rows in any order would be a gather along two axes at once.
    if piece.shape[k] != 1:
        return None
    one = lax.squeeze(piece, (k,))
    places = columns[:, None] + np.arange(length)
    return jnp.moveaxis(take(one, places, axis - 1), axis - 1, k)


def _gathered(
    pieces: Sequence[Array], k: int, axis: int, target: Map, fill: ArrayLike
) -> Array:
    flat = _concatenate([_flat(p, k, axis - k - 1) for p in pieces], axis - 1)
    if (target == PADDING).any():
        widths = [(0, 0, 0)] * flat.ndim
        widths[axis - 1] = (0, 1, 0)
        target = np.where(target == PADDING, flat.shape[axis - 1], target)
        flat = lax.pad(flat, jnp.asarray(fill, flat.dtype), widths)
    return jnp.moveaxis(take(flat, target, axis - 1), axis - 1, k)


def _padding(
    piece: Array, k: int, axis: int, sizes: tuple[int, int], fill: ArrayLike
) -> Array:
    shape = list(piece.shape)
    shape[k], shape[axis] = sizes
    return jnp.full(shape, fill, piece.dtype)


def _flat(array: Array, k: int, axis: int) -> Array:
    """Set the rows of axis ``k`` side by side along an axis of the array."""
    array = jnp.moveaxis(array, k, k + axis)
    shape = array.shape
    at = k + axis
    return array.reshape(*shape[:at], math.prod(shape[at : at + 2]), *shape[at + 2 :])


def _concatenate(arrays: Sequence[Array], axis: int) -> Array:
    return lax.concatenate(arrays, axis) if len(arrays) > 1 else arrays[0]
