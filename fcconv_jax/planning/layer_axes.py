"""How a dense layer reads the axes of its input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..geometry.meshes import OutSharding, permuted, reshape, respec

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DenseAxes:
    """How a Dense or DenseGeneral reads its input: axes by number, all non-negative.

    Args:
      batch: leading axes that the kernel has too.
      lead: axes that it leaves alone.
      contracted: axes that it sums over.
      features: shape that it puts in their place.
    """

    batch: tuple[int, ...]
    lead: tuple[int, ...]
    contracted: tuple[int, ...]
    features: tuple[int, ...]

    def groups(self, x: Array) -> int:
        """Return how many kernels stand side by side."""
        return math.prod(x.shape[b] for b in self.batch)

    def canonical(self, x: Array) -> Array:
        """``x`` as ``(*lead, [groups,] in)``."""
        order = (*self.lead, *self.batch, *self.contracted)
        if order != tuple(range(x.ndim)):
            x = x.transpose(order)
        lead = x.shape[: len(self.lead)]
        inner = x.shape[len(self.lead) + len(self.batch) :]
        n = math.prod(x.shape[len(lead) : len(lead) + len(self.batch)])
        # A batch of one makes no axis of groups, as plans of one group have none.
        groups = (n,) if n > 1 else ()
        return reshape(x, (*lead, *groups, math.prod(inner)))

    def restore(self, y: Array, batch: tuple[int, ...]) -> Array:
        """Return the layer's own output from ``(*lead, [groups,] out)``."""
        n = len(self.lead)
        y = reshape(y, (*y.shape[:n], *batch, *self.features))
        if batch:
            front = range(n, n + len(batch))
            y = jnp.moveaxis(y, tuple(front), tuple(range(len(batch))))
        return y

    def canonical_sharding(
        self, sharding: OutSharding, shape: Sequence[int]
    ) -> NamedSharding | None:
        """Return the sharding of ``(*lead, [groups,] out)``, given the output's."""
        batch, lead = ([shape[a] for a in axes] for axes in (self.batch, self.lead))
        n, ndim = len(batch), len(batch) + len(lead) + len(self.features)
        order = [*range(n, n + len(lead)), *range(n), *range(n + len(lead), ndim)]
        groups = (math.prod(batch),) if math.prod(batch) > 1 else ()
        return respec(
            permuted(sharding, order),
            (*lead, *batch, *self.features),
            (*lead, *groups, math.prod(self.features)),
        )
