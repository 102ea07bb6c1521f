"""Where to look: windows without a pixel of a mask, or not inside it, are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .tiles import Place, Sliced, Tiles, dtype_of, read_part


class Mask:
    """A mask of the images, in their size or any other.

    A pixel of a smaller mask, such as a thumbnail, stands for the pixels of the image
    that it covers. The answer for a position doesn't depend on its tile.

    Args:
      mask: an array over the axes that slide, read by slices; nonzero is where to look.
      sizes: of the images along these axes.
      tiles: the tiles.
      whole_windows: whether all pixels of a window must be of the mask; else any.

    Raises:
      ValueError: it has another number of axes, or is larger than the images.
    """

    def __init__(
        self,
        mask: Sliced,
        sizes: Sequence[int],
        tiles: Tiles,
        whole_windows: bool = False,
    ):
        shape = tuple(getattr(mask, "shape", ()))
        if len(shape) != len(sizes) or not all(
            0 < size <= most for size, most in zip(shape, sizes)
        ):
            raise ValueError(
                f"mask: expected an array of the images' size {tuple(sizes)}, or a "
                f"smaller one with as many axes, got shape {shape}. Pass one value for "
                "each pixel, without batch and channels."
            )
        self._mask, self._sizes, self._tiles = mask, tuple(sizes), tiles
        self._whole = whole_windows

    def wanted(self, place: Place) -> np.ndarray[Any, Any]:
        """Return at which of a tile's positions the window is of interest.

        Counts come from running sums, as of a summed-area table (Crow 1984).
        """
        spans = []
        for axis, first in enumerate(place.first):
            at = first + np.arange(self._tiles.tile[axis])
            begin = at * self._tiles.stride[axis]
            last = begin + self._tiles.window[axis] - 1
            size, cells = self._sizes[axis], self._mask.shape[axis]
            spans.append((begin * cells // size, last * cells // size + 1))
        where = [slice(int(low[0]), int(high[-1])) for low, high in spans]
        # Of pixels of the mask, or of others, of which a whole window has none.
        found = (read_part(self._mask, where) != 0) != self._whole
        counts = found.astype(np.int64)
        for axis, (low, high) in enumerate(spans):
            start = low[0]
            first = np.zeros_like(counts.take([0], axis))
            sums = np.concatenate([first, counts.cumsum(axis)], axis)
            counts = sums.take(high - start, axis) - sums.take(low - start, axis)
        return (counts > 0) != self._whole


def check_holds_nan(out: PyTree) -> None:
    """Refuse outputs that can't hold NaN.

    Raises:
      ValueError: one of them holds integers.
    """
    for target in jax.tree.leaves(out):
        if not jnp.issubdtype(dtype_of(target), jnp.inexact):
            raise ValueError(
                f"mask: expected a float output, which holds NaN, got {target.dtype}. "
                "Pass an array of float32."
            )
