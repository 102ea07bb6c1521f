"""How a layer's input and output move between its two forms: shapes only, no weights.

Both directions use one canonical dense layout: input ``(*lead, [groups,] in)``, kernel
``([groups,] in, out)``, output ``(*lead, [groups,] out)``; the groups axis is there
only for grouped layers. Conv inputs are channel-last, ``(N, *spatial, C)``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ..geometry.classify import Equivalence
from ..geometry.kernels import channel_last, kernel_rearrangement, window_letters
from ..geometry.meshes import (
    OutSharding,
    parts,
    reshape,
    respec,
    with_mesh,
)
from ..messages.errors import PlanError
from ..versions import convolved
from . import Form, LayerPlan
from .layer_shardings import dense_sharding, gathered
from .phases import canonical_phases, check_no_mesh, phases_of

Array = jax.Array
FormFn = Callable[..., Array]


def conv_input(layer: LayerPlan, x: Array) -> Array:
    """Return the conv form's input, from the dense form's.

    Args:
      layer: the layer's plan.
      x: ``(*lead, [groups,] in)``; ``in`` is flattened in ``layer.order``.

    Returns:
      ``(N, *spatial, C)``. A full window gives ``spatial == window``, or with layout
      ``"flat"`` spatial axes of size 1. A pointwise layer gives spatial axes of size 1,
      or its leading axes with layout ``"keep"``; so does a transposed one.
    """
    grouped = layer.groups > 1
    lead = x.shape[: -2 if grouped else -1]
    letters = channel_last(len(layer.window))
    flat = layer.layout == "flat" and layer.order == letters  # as it comes
    if math.prod(layer.window) == 1 or flat or layer.transposed:
        channels = x.shape[len(lead) :]
        return reshape(x, (*_spatial(layer, lead), math.prod(channels)))
    letters = window_letters(len(layer.window))
    sizes = dict(zip(letters, layer.window))
    sizes["C"] = x.shape[-1] // math.prod(layer.window)
    split = (math.prod(lead), layer.groups, *(sizes[axis] for axis in layer.order))
    # A grouped convolution takes the channels of one group after those of another.
    target = (*letters, "G", "C")
    axes = [1 if a == "G" else 2 + layer.order.index(a) for a in target]
    x = reshape(x, split).transpose(0, *axes)
    return reshape(x, (math.prod(lead), *layer.window, layer.groups * sizes["C"]))


def conv_output(
    layer: LayerPlan, y: Array, lead: Sequence[int], out_sharding: OutSharding = None
) -> Array:
    """Return the dense form's output ``(*lead, [groups,] out)``."""
    groups = (layer.groups,) if layer.groups > 1 else ()
    if layer.transposed:
        at = _window_axes(layer)
        per_group = y.shape[-1] // layer.groups
        y = reshape(y, (*y.shape[:-1], layer.groups, per_group))
        y = y.transpose(0, y.ndim - 2, *(1 + at[axis] for axis in layer.order))
        features = math.prod(layer.window) * per_group
        return reshape(y, (*lead, *groups, features), out_sharding)
    shape = (*lead, *groups, y.shape[-1] // layer.groups)
    return reshape(y, shape, out_sharding)


def _window_axes(layer: LayerPlan) -> dict[str, int]:
    """Return the axis that each letter of an order has in ``(*window, groups, C)``."""
    letters = window_letters(len(layer.window))
    return {**{a: i for i, a in enumerate(letters)}, "C": len(letters) + 1}


def dense_input(layer: LayerPlan, x: Array) -> Array:
    """Return the dense form's input, from the conv form's.

    Args:
      layer: the layer's plan.
      x: ``(N, *spatial, C)``.

    Returns:
      One row of features per position of the window, ``(N, *positions, [groups,] in)``,
      flattened in ``layer.order``. A trailing remainder that no position covers is
      dropped. A transposed layer has one row per input.
    """
    rank = len(layer.window)
    batch, spatial, channels = (
        x.shape[: -1 - rank],
        x.shape[-1 - rank : -1],
        x.shape[-1],
    )
    if layer.transposed:
        groups = (layer.groups,) if layer.groups > 1 else ()
        return reshape(x, (*batch, *spatial, *groups, channels // layer.groups))
    positions = output_positions(layer, spatial)
    if math.prod(layer.window) > 1 or positions != spatial:
        # A single tap reads one input of each stride; windows lie side by side.
        covered = [
            slice(p * k) if k > 1 else slice(0, (p - 1) * s + 1, s)
            for p, k, s in zip(positions, layer.window, layer.strides)
        ]
        x = x[(..., *covered, slice(None))]
    pairs = [size for pair in zip(positions, layer.window) for size in pair]
    per_group = channels // layer.groups
    x = reshape(x, (*batch, *pairs, layer.groups, per_group))
    n = len(batch)
    at = [n + 2 * i for i in range(rank)]
    letters = channel_last(rank)
    inner = {axis: n + 2 * i + 1 for i, axis in enumerate(letters)}
    # Of a window of ones, every order is the same, and plans may hold any text for it.
    order = letters if math.prod(layer.window) == 1 else layer.order
    features = [inner[axis] for axis in order]
    x = x.transpose(*range(n), *at, n + 2 * rank, *features)
    groups = (layer.groups,) if layer.groups > 1 else ()
    features = math.prod(layer.window) * per_group
    return reshape(x, (*batch, *positions, *groups, features))


def dense_output(layer: LayerPlan, y: Array, out_sharding: OutSharding = None) -> Array:
    """Return the conv form's output ``(N, *positions, O)``, from the dense form's."""
    if layer.transposed:
        return _depth_to_space(layer, y)
    if layer.groups == 1:
        return y
    return reshape(y, (*y.shape[:-2], y.shape[-2] * y.shape[-1]), out_sharding)


def _depth_to_space(layer: LayerPlan, y: Array) -> Array:
    """Place each input's window of outputs."""
    rank, taps = len(layer.window), math.prod(layer.window)
    if layer.groups == 1:
        y = reshape(y, (*y.shape[:-1], 1, y.shape[-1]))
    *lead, groups, features = y.shape
    n = len(lead) - rank
    sizes = dict(zip(window_letters(rank), layer.window), C=features // taps)
    y = reshape(y, (*lead, groups, *(sizes[axis] for axis in layer.order)))
    at = {axis: len(lead) + 1 + i for i, axis in enumerate(layer.order)}
    pairs = [(n + i, at[axis]) for i, axis in enumerate(window_letters(rank))]
    inner = [axis for pair in pairs for axis in pair]
    y = y.transpose(*range(n), *inner, len(lead), at["C"])
    spatial = [size * k for size, k in zip(lead[n:], layer.window)]
    return reshape(y, (*lead[:n], *spatial, groups * sizes["C"]))


def holds(layer: LayerPlan, found: Equivalence) -> bool:
    """Return whether a conv on some input is the plain conv that the plan describes.

    The plan's conv has no padding and no dilation; the model's own may have some that
    is never read on one input and is read on another.
    """
    spatial = found.geometry.input_shape
    if layer.base == "phases":
        return found.geometry.transposed
    return (
        found.same_parameters
        and (layer.base != "full_window" or spatial == layer.window)
        and found.geometry.output_shape == output_positions(layer, spatial)
        # A single tap may skip inputs: other strides may leave as many positions.
        and all(
            d.kernel > 1 or d.output == 1 or d.stride == stride * d.holes
            for d, stride in zip(found.geometry.dimensions, layer.strides)
        )
    )


def output_positions(layer: LayerPlan, spatial: Sequence[int]) -> tuple[int, ...]:
    """Return how many positions the window has on an input of these spatial sizes.

    Raises:
      PlanError: the layer is a full window and the input is not its window.
    """
    if layer.base == "full_window" and tuple(spatial) != layer.window:
        raise PlanError(
            f"Expected an input of spatial size {layer.window}, the planned full "
            f"window, got {tuple(spatial)}, where the forms differ. Pass inputs of "
            "that size, or skip the layer with a rule."
        )
    if layer.transposed:
        return tuple(n * k for n, k in zip(spatial, layer.window))
    return tuple(
        1 if n == k else (n - k) // s + 1
        for n, k, s in zip(spatial, layer.window, layer.strides)
    )


def pair_of_forms(
    layer: LayerPlan,
    to: Form,
    *,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> tuple[FormFn, FormFn]:
    """Return both forms of the layer as functions of ``(x, kernel, bias)``.

    Both take the same ``x`` and give the same output; kernel and bias are those of
    the form (``bias`` may be None). This is the linear map that a converted model
    runs, and what verification certifies. On a mesh with explicit axes the output is
    sharded as the form that the layer was found in would have it; both functions take
    ``out_sharding=`` as ``jax.lax.dot_general`` does.

    Example:
      >>> import numpy as np
      >>> from fcconv_jax.geometry.kernels import Rearrangement
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
    if layer.base == "phases":
        phases = functools.partial(phases_of, layer, settings)
        return (conv, phases) if to == "dense" else (phases, conv)
    if to == "conv":

        def as_conv(
            x: Array,
            kernel: Array,
            bias: Array | None,
            out_sharding: OutSharding = None,
        ) -> Array:
            lead = x.shape[: -2 if layer.groups > 1 else -1]
            sharding = with_mesh(out_sharding, x, kernel)
            if layer.transposed:
                check_no_mesh(sharding, x, kernel)
                return conv_output(
                    layer, conv(conv_input(layer, x), kernel, bias), lead
                )
            if sharding is None:
                sharding = dense_sharding(layer, dense, x, kernel)
            image = conv_input(layer, x)
            kernel = gathered(layer, kernel, x, sharding, len(lead) + 1)
            features = layer.channels_last(kernel.shape)[-1]
            groups = (layer.groups,) if layer.groups > 1 else ()
            shape = (*lead, *groups, features // layer.groups)
            whole = layer.base == "full_window"  # one position is left
            positions = [1 if whole else n for n in image.shape[1:-1]]
            inner = (image.shape[0], *positions, features)
            y = conv(image, kernel, bias, respec(sharding, shape, inner))
            return conv_output(layer, y, lead, sharding)

        return dense, as_conv

    def as_dense(
        x: Array, kernel: Array, bias: Array | None, out_sharding: OutSharding = None
    ) -> Array:
        rows = dense_input(layer, x)
        sharding = with_mesh(out_sharding, x, kernel)
        if layer.transposed:
            check_no_mesh(sharding, x, kernel)
        inner = sharding
        if layer.groups > 1:
            *lead, groups, fan_in = rows.shape
            features = kernel.size // (groups * fan_in)
            shape = (*lead, groups, features)
            inner = respec(sharding, (*lead, groups * features), shape)
        return dense_output(layer, dense(rows, kernel, bias, inner), sharding)

    return conv, as_dense


def _dense(
    layer: LayerPlan,
    settings: Mapping[str, Any],
    x: Array,
    kernel: Array,
    bias: Array | None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """``x @ kernel + bias`` in the canonical dense layout."""
    last = x.ndim - 1
    rows = x.shape[-1]
    if layer.groups == 1:
        matrix = reshape(kernel, (rows, kernel.size // rows))
        contract = (((last,), (0,)), ((), ()))
        y = lax.dot_general(x, matrix, contract, out_sharding=out_sharding, **settings)
    else:
        matrix = reshape(
            kernel, (layer.groups, rows, kernel.size // (layer.groups * rows))
        )
        contract = (((last,), (1,)), ((last - 1,), (0,)))
        if out_sharding is not None:  # of (*lead, groups, out)
            *lead, group, out = parts(out_sharding, x.ndim)
            spec = PartitionSpec(group, *lead, out)
            out_sharding = NamedSharding(out_sharding.mesh, spec)
        y = lax.dot_general(x, matrix, contract, out_sharding=out_sharding, **settings)
        # dot_general puts what is batched, here the groups, in front.
        y = jnp.moveaxis(y, 0, -2)
    if bias is None:
        return y
    if layer.transposed:  # one entry per channel, alike at every place of the window
        at = {axis: 1 + i for i, axis in enumerate(layer.order)}
        sizes = dict(zip(window_letters(len(layer.window)), layer.window))
        shape = [layer.groups, *(sizes.get(axis, -1) for axis in layer.order)]
        ones = [layer.groups, *[1] * len(layer.order)]
        ones[at["C"]] = bias.size // layer.groups
        shape[at["C"]] = ones[at["C"]]
        bias = jnp.broadcast_to(reshape(bias, ones), shape).reshape(-1)
    return y + _beside(bias, y, y.shape[-2 if layer.groups > 1 else -1 :])


def _conv(
    layer: LayerPlan,
    settings: Mapping[str, Any],
    x: Array,
    kernel: Array,
    bias: Array | None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """Compute the conv form on channel-last input, unpadded, as ``nn.Conv`` does."""
    batch = x.shape[: -1 - len(layer.window)]
    x = reshape(x, (math.prod(batch), *x.shape[len(batch) :]))
    y = convolve(layer, x, kernel, out_sharding, **settings)
    y = reshape(y, (*batch, *y.shape[1:]))
    return y if bias is None else y + _beside(bias, y, y.shape[-1:])


def _beside(bias: Array, y: Array, shape: tuple[int, ...]) -> Array:
    """Return a bias of this shape with as many axes as what it is added to.

    JAX may be told to refuse ranks that differ (``jax_numpy_rank_promotion``).
    """
    return reshape(bias, (*[1] * (y.ndim - len(shape)), *shape))


def convolve(
    layer: LayerPlan,
    x: Array,
    kernel: Array,
    out_sharding: NamedSharding | None = None,
    **settings: Any,
) -> Array:
    """Return the convolution of a layer's conv form, in the plan's layout.

    Args:
      layer: the layer's plan.
      x: ``(N, *spatial, C)``.
      kernel: as the plan stores it.
      out_sharding: of the result, on a mesh with explicit axes.
      **settings: precision, preferred_element_type.

    Returns:
      ``(N, *positions, O)``.
    """
    strides, ones = layer.strides, x.shape[1:-1]
    stored = layer.kernel_layout
    if layer.layout == "flat":
        if stored == "OIHW":
            kernel, stored = kernel.transpose(*range(2, kernel.ndim), 1, 0), "HWIO"
        # One position only: the window and the channels are one axis of features.
        ones = (1,) * len(ones)
        x = reshape(x, (x.shape[0], 1, math.prod(x.shape[1:])))
        out = kernel.shape[-1 if stored == "HWIO" else 0]
        inner = kernel.size // out
        flat = (1, inner, out) if stored == "HWIO" else (out, 1, inner)
        kernel, strides = reshape(kernel, flat), (1,)
        shape = (x.shape[0], *ones, out)
        out_sharding = respec(out_sharding, shape, (x.shape[0], 1, out))
    last = x.ndim - 1
    lhs = (0, last, *range(1, last))
    specs = {
        "HWIO": (last, last - 1, *range(last - 1)),
        "OHWI": lhs,
        "OIHW": tuple(range(x.ndim)),
    }
    x, kernel = convolved(x, kernel, settings.get("preferred_element_type"))
    y = lax.conv_general_dilated(
        x,
        kernel,
        (1,) * len(strides) if layer.transposed else strides,
        [(k - 1, k - 1) for k in layer.window] if layer.transposed else "VALID",
        lhs_dilation=strides if layer.transposed else None,
        dimension_numbers=lax.ConvDimensionNumbers(lhs, specs[stored], lhs),
        feature_group_count=layer.groups,
        out_sharding=out_sharding,
        **settings,
    )
    if layer.layout != "flat":
        return y
    return reshape(y, (y.shape[0], *ones, y.shape[-1]))


def _spatial(layer: LayerPlan, lead: Sequence[int]) -> tuple[int, ...]:
    """Batch and spatial axes of a pointwise conv on a dense input's leading axes."""
    rank = len(layer.window)
    if layer.layout != "keep" or len(lead) < 2:
        return (math.prod(lead), *[1] * rank)
    spatial = tuple(lead[1:][-rank:])
    # More leading axes than a convolution has spatial ones: the first of them are the
    # batch.
    batch = math.prod(lead[: len(lead) - len(spatial)])
    return (batch, *[1] * (rank - len(spatial)), *spatial)


def canonical_layer(layer: LayerPlan) -> LayerPlan:
    """Return the layer of a matmul with its kernel as the forms take it.

    The plan moves the parameter as it is stored, such as ``(out, in)``; the matmul
    sees it in the canonical order, whatever lies between.
    """
    if layer.base == "phases":
        return canonical_phases(layer)
    *window, rows, out = layer.canonical_target
    taps = math.prod(window)
    if layer.transposed:
        if layer.to == "conv":
            out = taps * out // layer.groups
    elif layer.to == "conv":
        rows, out = taps * rows, out // layer.groups
    shape = (layer.groups, rows, out)[layer.groups == 1 :]
    kernel = kernel_rearrangement(
        shape,
        layer.window,
        order=layer.order,
        groups=layer.groups,
        transposed=layer.transposed,
    )
    kernel = layer.lay_out(kernel) if layer.to == "conv" else kernel.inverse()
    stored = layer.kernel_layout if layer.to == "conv" else "HWIO"
    return dataclasses.replace(
        layer, leaves=(("kernel", kernel),), kernel_layout=stored
    )
