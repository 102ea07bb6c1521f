"""Array maps: a dense kernel to a conv kernel and back, never changing an entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A bijection between the entries of two shapes: reshape, transpose, reshape.

    Args:
      source: shape of the array that goes in.
      split: shape the source is reshaped to; ``prod(split) == prod(source)``.
      perm: permutation of the axes of ``split``.
      target: shape of the array that comes out.

    Raises:
      ValueError: the sizes differ, or ``perm`` is no permutation.

    Example:
      >>> chw = Rearrangement((12, 5), (3, 2, 2, 5), (1, 2, 0, 3), (2, 2, 3, 5))
      >>> chw(np.arange(60).reshape(12, 5)).shape
      (2, 2, 3, 5)
      >>> chw.inverse()(chw(np.arange(60).reshape(12, 5)))[0]
      array([0, 1, 2, 3, 4])
    """

    source: tuple[int, ...]
    split: tuple[int, ...]
    perm: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self):
        sizes = {math.prod(s) for s in (self.source, self.split, self.target)}
        if len(sizes) != 1 or sorted(self.perm) != list(range(len(self.split))):
            raise ValueError(
                f"not a rearrangement: {self.source} -> {self.split} "
                f"transposed by {self.perm} -> {self.target}"
            )

    @classmethod
    def reshape(cls, source: Sequence[int], target: Sequence[int]) -> Rearrangement:
        """The pure reshape from ``source`` to ``target``."""
        source, target = tuple(source), tuple(target)
        return cls(source, source, tuple(range(len(source))), target)

    @property
    def is_reshape(self) -> bool:
        """Whether the entries keep their row-major order (no transpose is needed)."""
        moved = [p for p in self.perm if self.split[p] != 1]
        return moved == sorted(moved)

    def inverse(self) -> Rearrangement:
        """The rearrangement that takes ``target`` back to ``source``."""
        order = sorted(range(len(self.perm)), key=self.perm.__getitem__)
        return Rearrangement(
            self.target,
            tuple(self.split[p] for p in self.perm),
            tuple(order),
            self.source,
        )

    def __call__(self, array: Any) -> Any:
        """Rearranges ``array`` of shape ``source`` into shape ``target``.

        NumPy arrays stay NumPy (views where the order is kept); everything else
        goes through ``jax.numpy``, so tracers work.

        Raises:
          ValueError: the array's shape is not ``source``.
        """
        if tuple(array.shape) != self.source:
            raise ValueError(f"expected shape {self.source}, got {tuple(array.shape)}")
        if self.is_reshape:
            return array.reshape(self.target)
        xp = np if isinstance(array, np.ndarray) else jnp
        return xp.transpose(array.reshape(self.split), self.perm).reshape(self.target)
