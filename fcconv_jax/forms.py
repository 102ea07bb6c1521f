"""How a layer's input and output move between its two forms: shapes only, no weights.

Both directions use one canonical dense layout: input ``(*lead, [groups,] in)``, kernel
``([groups,] in, out)``, output ``(*lead, [groups,] out)``; the groups axis is there
only for grouped layers. Conv inputs are channel-last, ``(N, *spatial, C)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .equivalence import Equivalence
from .kernels import channel_last, window_letters
from .plan import Form, LayerPlan, PlanError

Array = jax.Array
FormFn = Callable[[Array, Array, Array | None], Array]


def conv_input(layer: LayerPlan, x: Array) -> Array:
    """The conv form's input, from the dense form's.

    Args:
      layer: the layer's plan.
      x: ``(*lead, [groups,] in)``; ``in`` is flattened in ``layer.order``.

    Returns:
      ``(N, *spatial, C)``. A full window gives ``spatial == window``. A pointwise
      layer gives spatial axes of size 1, or its leading axes with layout ``"keep"``.
    """
    grouped = layer.groups > 1
    lead = x.shape[: -2 if grouped else -1]
    if math.prod(layer.window) == 1:
        channels = x.shape[len(lead) :]
        return x.reshape(*_spatial(layer, lead), math.prod(channels))
    letters = window_letters(len(layer.window))
    sizes = dict(zip(letters, layer.window))
    sizes["C"] = x.shape[-1] // math.prod(layer.window)
    split = (math.prod(lead), layer.groups, *(sizes[axis] for axis in layer.order))
    target = (*letters, "G", "C")
    axes = [1 if a == "G" else 2 + layer.order.index(a) for a in target]
    x = x.reshape(split).transpose(0, *axes)
    return x.reshape(math.prod(lead), *layer.window, layer.groups * sizes["C"])


def conv_output(layer: LayerPlan, y: Array, lead: Sequence[int]) -> Array:
    """The dense form's output ``(*lead, [groups,] out)``, from the conv form's."""
    groups = (layer.groups,) if layer.groups > 1 else ()
    return y.reshape(*lead, *groups, y.shape[-1] // layer.groups)


def dense_input(layer: LayerPlan, x: Array) -> Array:
    """The dense form's input, from the conv form's.

    Args:
      layer: the layer's plan.
      x: ``(N, *spatial, C)``.

    Returns:
      One row of features per position of the window, ``(N, *positions, [groups,] in)``,
      flattened in ``layer.order``. A trailing remainder that no position covers is
      dropped.
    """
    rank = len(layer.window)
    batch, spatial, channels = (
        x.shape[: -1 - rank],
        x.shape[-1 - rank : -1],
        x.shape[-1],
    )
    positions = output_positions(layer, spatial)
    if math.prod(layer.window) > 1 or positions != spatial:
        covered = [slice(p * k) for p, k in zip(positions, layer.window)]
        x = x[(..., *covered, slice(None))]
    pairs = [size for pair in zip(positions, layer.window) for size in pair]
    per_group = channels // layer.groups
    x = x.reshape(*batch, *pairs, layer.groups, per_group)
    n = len(batch)
    at = [n + 2 * i for i in range(rank)]
    letters = channel_last(rank)
    inner = {axis: n + 2 * i + 1 for i, axis in enumerate(letters)}
    order = letters if math.prod(layer.window) == 1 else layer.order
    features = [inner[axis] for axis in order]
    x = x.transpose(*range(n), *at, n + 2 * rank, *features)
    groups = (layer.groups,) if layer.groups > 1 else ()
    return x.reshape(*batch, *positions, *groups, math.prod(layer.window) * per_group)


def dense_output(layer: LayerPlan, y: Array) -> Array:
    """The conv form's output ``(N, *positions, O)``, from the dense form's."""
    if layer.groups == 1:
        return y
    return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])


def holds(layer: LayerPlan, found: Equivalence) -> bool:
    """Whether a conv on some input is the plain conv that the plan describes.

    The plan's conv has no padding and no dilation; the model's own may have some that
    is never read on one input and is read on another.
    """
    spatial = found.geometry.input_shape
    return (
        found.same_parameters
        and (layer.base != "full_window" or spatial == layer.window)
        and found.geometry.output_shape == output_positions(layer, spatial)
    )


def output_positions(layer: LayerPlan, spatial: Sequence[int]) -> tuple[int, ...]:
    """How many positions the window has on an input of these spatial sizes.

    Raises:
      PlanError: the layer is a full window and the input is not its window.
    """
    if layer.base == "full_window" and tuple(spatial) != layer.window:
        raise PlanError(
            f"planned as a full window of {layer.window}, called on an input of "
            f"spatial size {tuple(spatial)}: the two forms differ there; call it on "
            f"{layer.window} or leave the layer out with a rule"
        )
    return tuple(
        1 if n == k else (n - k) // s + 1
        for n, k, s in zip(spatial, layer.window, layer.strides)
    )


def pair_of_forms(
    layer: LayerPlan,
    to: Form,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> tuple[FormFn, FormFn]:
    """The layer as two functions of ``(x, kernel, bias)``: as it is, and converted.

    Both take the same ``x`` and give the same output; kernel and bias are those of
    the form (``bias`` may be None). This is the linear map that a converted model
    runs, and what verification certifies.

    Args:
      layer: the layer's plan.
      to: the form that the plan goes to.
      precision: as for ``jax.lax.dot_general``, in both forms.
      preferred_element_type: likewise.

    Example:
      >>> import numpy as np
      >>> from fcconv_jax.kernels import Rearrangement
      >>> kernel = Rearrangement.reshape((8, 3), (2, 2, 2, 3))
      >>> fc = LayerPlan("full_window", "Dense", (2, 2), "HWC", (("kernel", kernel),),
      ...                (1, 8), (1, 1))
      >>> dense, conv = pair_of_forms(fc, to="conv")
      >>> x, w = np.ones((5, 8), np.float32), np.ones((8, 3), np.float32)
      >>> bool((dense(x, w, None) == conv(x, kernel(w), None)).all())
      True
    """
    settings = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    dense = functools.partial(_dense, layer, settings)
    conv = functools.partial(_conv, layer, settings)
    if to == "conv":

        def as_conv(x: Array, kernel: Array, bias: Array | None) -> Array:
            lead = x.shape[: -2 if layer.groups > 1 else -1]
            return conv_output(layer, conv(conv_input(layer, x), kernel, bias), lead)

        return dense, as_conv

    def as_dense(x: Array, kernel: Array, bias: Array | None) -> Array:
        return dense_output(layer, dense(dense_input(layer, x), kernel, bias))

    return conv, as_dense


def _dense(
    layer: LayerPlan,
    settings: Mapping[str, Any],
    x: Array,
    kernel: Array,
    bias: Array | None,
) -> Array:
    """``x @ kernel + bias`` in the canonical dense layout."""
    last = x.ndim - 1
    if layer.groups == 1:
        matrix = kernel.reshape(x.shape[-1], -1)
        contract = (((last,), (0,)), ((), ()))
        y = lax.dot_general(x, matrix, contract, **settings)
    else:
        matrix = kernel.reshape(layer.groups, x.shape[-1], -1)
        contract = (((last,), (1,)), ((last - 1,), (0,)))
        y = lax.dot_general(x, matrix, contract, **settings)
        y = jnp.moveaxis(y, 0, -2)
    if bias is None:
        return y
    return y + bias.reshape(y.shape[-2 if layer.groups > 1 else -1 :])


def _conv(
    layer: LayerPlan,
    settings: Mapping[str, Any],
    x: Array,
    kernel: Array,
    bias: Array | None,
) -> Array:
    """The conv form on channel-last input, unpadded, as ``nn.Conv`` computes it."""
    batch = x.shape[: -1 - len(layer.window)]
    x = x.reshape(math.prod(batch), *x.shape[len(batch) :])
    y = convolve(layer, x, kernel, **settings)
    y = y.reshape(*batch, *y.shape[1:])
    return y if bias is None else y + bias


def convolve(layer: LayerPlan, x: Array, kernel: Array, **settings: Any) -> Array:
    """The convolution of a layer's conv form, in the plan's layout.

    Args:
      layer: the layer's plan.
      x: ``(N, *spatial, C)``.
      kernel: as the plan stores it.
      **settings: precision, preferred_element_type.

    Returns:
      ``(N, *positions, O)``.
    """
    strides, ones = layer.strides, x.shape[1:-1]
    if layer.layout == "flat":
        # One position only: the window and the channels are one axis of features.
        ones = (1,) * len(ones)
        x = x.reshape(x.shape[0], 1, -1)
        out = kernel.shape[-1 if layer.kernel_layout == "HWIO" else 0]
        inner = kernel.size // out
        flat = (1, inner, out) if layer.kernel_layout == "HWIO" else (out, 1, inner)
        kernel, strides = kernel.reshape(flat), (1,)
    last = x.ndim - 1
    lhs = (0, last, *range(1, last))
    rhs = (last, last - 1, *range(last - 1))
    y = lax.conv_general_dilated(
        x,
        kernel,
        strides,
        "VALID",
        dimension_numbers=lax.ConvDimensionNumbers(
            lhs, rhs if layer.kernel_layout == "HWIO" else lhs, lhs
        ),
        feature_group_count=layer.groups,
        **settings,
    )
    return y.reshape(y.shape[0], *ones, y.shape[-1]) if layer.layout == "flat" else y


def _spatial(layer: LayerPlan, lead: Sequence[int]) -> tuple[int, ...]:
    """Batch and spatial axes of a pointwise conv on a dense input's leading axes."""
    rank = len(layer.window)
    if layer.layout != "keep" or len(lead) < 2:
        return (math.prod(lead), *[1] * rank)
    spatial = tuple(lead[1:][-rank:])
    batch = math.prod(lead[: len(lead) - len(spatial)])
    return (batch, *[1] * (rank - len(spatial)), *spatial)
