"""Integers that a layer of a file must compute exactly, in no less than its precision.

Sums stay below 2**24, which float32 holds exactly in any order. One side of each
product has entries of 12 significant bits: bfloat16 keeps 8, TF32 and float16 keep 11,
so a runtime that rounds to any of them unasked gives another number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from ..verification.integer_draws import WIDE_BITS, integers
from .layers import Layer

_LIMIT = 2**24 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """One draw.

    Args:
      x: the layer's input.
      kernel: in the graph's arrangement.
      bias: None for a layer without.
      large: which side has entries of many bits; ``"none"`` of a draw that a lower
        precision keeps too.
    """

    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None
    large: Literal["kernel", "input", "none"]


def probes(layer: Layer) -> Iterator[Probe]:
    """Yield draws for a layer: each side large in turn, until every input was read.

    Where a sum has too many terms, only some of the input's features are nonzero, and
    the draws go through all of them.

    Example:
      >>> shapes = (9000, 2), None, True, (1, 9000), (1, 2)
      >>> layer = Layer("fc", "dense", None, *shapes, ())
      >>> found = list(probes(layer))
      >>> len(found), {p.large for p in found} == {"kernel", "input"}
      (6, True)
      >>> max(int((p.x[0] != 0).sum()) for p in found) <= 2**12
      True
    """
    rng = np.random.default_rng(0)
    for large in ("kernel", "input"):
        yield from _draws(layer, rng, 2**WIDE_BITS - 1, large)


def small_probes(layer: Layer) -> Iterator[Probe]:
    """Yield draws whose sums bfloat16 keeps: a failure isn't due to rounding."""
    rng = np.random.default_rng(0)
    # bfloat16 holds all integers up to 2**8.
    for probe in _draws(layer, rng, 1, "kernel", 2**8 - 1):
        yield dataclasses.replace(probe, large="none")


def _draws(
    layer: Layer,
    rng: np.random.Generator,
    size: int,
    large: Literal["kernel", "input"],
    limit: int = _LIMIT,
) -> Iterator[Probe]:
    terms = layer.terms
    # The small side: as large as the sums allow, 15 at most.
    other = max(1, min(15, (limit - size) // (size * terms)))
    # The bias takes one more entry of the large side.
    summed = (limit - size) // (size * other)
    axis = _summed_axis(layer)
    features = layer.input_shape[axis]
    # A sum goes over the features of one group.
    inner = features // (layer.options["groups"] if layer.op == "conv" else 1)
    window = terms // inner if layer.op == "conv" else 1
    together = max(1, min(inner, summed // window))
    sizes = {"kernel": (other, size), "input": (size, other)}[large]
    places = np.arange(features) % inner
    for first in range(0, inner, together):
        x = integers(rng, layer.input_shape, sizes[0])
        mask = ((places >= first) & (places < first + together)).astype(np.int64)
        shape = [1] * x.ndim
        shape[axis] = features
        kernel = integers(rng, layer.kernel_shape, sizes[1])
        bias = None
        if layer.has_bias:
            bias = integers(rng, (layer.output_shape[-1],), size)
        yield Probe(x * mask.reshape(shape), kernel, bias, large)


def _summed_axis(layer: Layer) -> int:
    """Return the axis of the input that is summed over: its features."""
    if layer.op != "matmul":
        return len(layer.input_shape) - 1
    options = layer.options
    first = options["side"] == 1  # x is the first operand
    swapped = options["adj_a" if first else "adj_b"]
    return len(layer.input_shape) - (1 if first != swapped else 2)
