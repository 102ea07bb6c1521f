"""Runs transposed convolutions in phases: plain convolutions, interleaved."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..geometry.kernels import Rearrangement, window_letters
from ..geometry.meshes import OutSharding, typed_sharding, with_mesh
from ..messages.errors import PlanError
from . import LayerPlan

Array = jax.Array
# First tap of a phase, and the zeros before the inputs; None if no tap meets an input.
_Phase = tuple[int, int] | None


def phases_of(
    layer: LayerPlan,
    settings: Mapping[str, Any],
    x: Array,
    kernel: Array,
    bias: Array | None,
    out_sharding: OutSharding = None,
) -> Array:
    """Run a planned layer in phases, on ``(N, *spatial, C)``, without cropping."""
    check_no_mesh(with_mesh(out_sharding, x, kernel), x, kernel)
    pads = [(k - 1, k - 1) for k in layer.window]
    ones = (1,) * len(pads)
    y = in_phases(x, kernel, layer.strides, pads, ones, layer.groups, **settings)
    return y if bias is None else y + bias.reshape(*[1] * len(pads), 1, -1)


def canonical_phases(layer: LayerPlan) -> LayerPlan:
    """Return a layer in phases with its kernel as ``(*window, C/groups, O)``.

    The parameter itself stays as it is stored.
    """
    channels = layer.input_shape[-1] // layer.groups
    size = math.prod(layer.kernel.source)
    out = size // (math.prod(layer.window) * channels)
    shape = (*layer.window, channels, out)
    leaves = (("kernel", Rearrangement.reshape(shape, shape)),)
    return dataclasses.replace(layer, leaves=leaves, kernel_layout="HWIO")


def check_no_mesh(sharding: OutSharding, *arrays: Array) -> None:
    """Refuse a transposed layer on a mesh with explicit axes.

    Depth-to-space would split a sharded axis, which JAX does not infer.
    """
    found = [typed_sharding(array) for array in arrays]
    if sharding is not None or any(s is not None and any(s.spec) for s in found):
        raise PlanError(
            "Expected a transposed convolution without explicitly sharded axes, got "
            f"{', '.join(str(jax.typeof(array)) for array in arrays)}. Skip the layer "
            "with a rule, or use a mesh with automatic axes."
        )


def in_phases(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    **settings: Any,
) -> Array:
    """Compute a transposed convolution without zeros between its inputs.

    Outputs of one residue of the stride read the same taps of the kernel, at adjacent
    inputs: they are a plain convolution. XLA's CPU runs those much faster than
    convolutions of spaced inputs, backward most of all.

    Args:
      x: ``(N, *spatial, C)``.
      kernel: ``(*window, C/groups, O)``.
      strides: outputs per input.
      padding: zeros around the spaced inputs.
      dilation: spacing of the taps.
      groups: ``feature_group_count``.
      **settings: precision and preferred_element_type of the convolutions.

    Returns:
      ``(N, *outputs, O)``, of the same products in the same sums.

    Source:
      Shi et al. (2016), arXiv:1609.07009, for sub-pixel convolutions.

    Example:
      >>> x, kernel = jnp.arange(6.0).reshape(1, 3, 2), jnp.ones((4, 2, 5))
      >>> y = in_phases(x, kernel, (2,), [(2, 2)], (1,), 1)
      >>> want = lax.conv_transpose(x, kernel, (2,), "SAME")
      >>> y.shape, bool((y == want).all())
      ((1, 6, 5), True)
    """
    rank = len(strides)
    letters = window_letters(rank)
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    sizes = [
        (n - 1) * s + 1 + low + high - (k - 1) * d
        for n, k, s, (low, high), d in zip(
            x.shape[1:-1], kernel.shape, strides, padding, dilation
        )
    ]
    rows = [-(-size // s) for size, s in zip(sizes, strides)]  # of each phase
    # Taps at a distance of `step` meet inputs at a distance of `spread`.
    common = [math.gcd(s, d) for s, d in zip(strides, dilation)]
    step = [s // g for s, g in zip(strides, common)]
    spread = [d // g for d, g in zip(dilation, common)]

    def convolved(phase: Sequence[_Phase]) -> Array | None:
        # No tap meets an input there: these outputs are zeros.
        if None in phase:
            return None
        found = [each for each in phase if each is not None]
        taps = kernel[tuple(slice(f, None, t) for (f, _), t in zip(found, step))]
        pads = [
            (low, q + (k - 1) * d - n - low)
            for (_, low), q, k, d, n in zip(
                found, rows, taps.shape, spread, x.shape[1:-1]
            )
        ]
        # XLA's CPU convolutions read what negative padding crops (backends/faults.py).
        kept = [
            slice(max(-low, 0), n + min(high, 0))
            for (low, high), n in zip(pads, x.shape[1:-1])
        ]
        pads = [(max(low, 0), max(high, 0)) for low, high in pads]
        return lax.conv_general_dilated(
            *(x[(slice(None), *kept)], taps, (1,) * rank, pads),
            rhs_dilation=spread,
            dimension_numbers=numbers,
            feature_group_count=groups,
            **settings,
        )

    phases = itertools.product(
        *(
            [_phase(r, k, s, low, d) for r in range(s)]
            for k, s, (low, _), d in zip(kernel.shape, strides, padding, dilation)
        )
    )
    made = [convolved(phase) for phase in phases]
    like = next((y for y in made if y is not None), None)
    if like is None:  # an output of padding alone
        dtype = settings.get("preferred_element_type") or x.dtype
        return jnp.zeros((x.shape[0], *sizes, kernel.shape[-1]), dtype)
    filled = [jnp.zeros_like(like) if y is None else y for y in made]
    y = jnp.stack(filled, axis=1).reshape(x.shape[0], *strides, *rows, kernel.shape[-1])
    pairs = [axis for i in range(rank) for axis in (1 + rank + i, 1 + i)]
    y = y.transpose(0, *pairs, 1 + 2 * rank)
    y = y.reshape(x.shape[0], *(q * s for q, s in zip(rows, strides)), kernel.shape[-1])
    # Phases are of one size, so the last ones may reach over the end.
    return y[(slice(None), *map(slice, sizes))]


def _phase(residue: int, taps: int, stride: int, low: int, spread: int) -> _Phase:
    """Return how the outputs of one residue read the inputs of a dimension."""
    # Taps a stride apart read inputs of one phase: its first tap is among these.
    for tap in range(min(taps, stride)):
        at = residue + tap * spread - low
        if at % stride == 0:
            return tap, -(at // stride)
    return None
