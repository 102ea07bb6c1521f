"""Exact certificates of planned layers: both forms, on integers that fit them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ..backends.name import Device
from ..messages.errors import PlanError
from ..plan import Form, LayerPlan, Plan
from ..plan.layer_forms import canonical_layer, pair_of_forms
from .certificate import Certificate, prepare_certificate

# Examples in a certificate's input: enough to tell rows of a batch apart.
_ROWS = 4


def layer_certificates(
    plan: Plan, dtypes: Mapping[str, Any]
) -> dict[str, Callable[[], Certificate]]:
    """Return a function for each layer's certificate; equal layers share one."""
    known: dict[Any, Callable[[], Certificate]] = {}
    found = {}
    for path, layer in plan.items():
        dtype = dtypes[path]
        key = (layer, dtype)
        if key not in known:
            known[key] = functools.cache(prepare_layer(layer, dtype))
        found[path] = known[key]
    return found


def certify_layer(
    layer: LayerPlan,
    to: Form | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    preferred_element_type: DTypeLike | None = None,
    probes: int | None = None,
    precision: PrecisionLike = None,
    seed: int = 0,
    device: Device | None = None,
) -> Certificate:
    """Certify that a layer's two forms are the same map, bit for bit.

    Args:
      layer: the layer's plan.
      to: the form that the layer goes to, which its plan says itself.
      dtype: dtype of input and parameters; quantised ones too, such as ``int8`` and
        ``float8_e4m3fn``.
      preferred_element_type: dtype of the matmul's sums, such as ``int32``.
      probes: draws of the kernel; None for a probability of a false pass of 1e-9.
      precision: of the matmuls and convolutions.
      seed: seeds the draws.
      device: where to run; None for JAX's default device.

    Returns:
      The certificate: ``.passed``, and what was compared.

    Raises:
      PlanError: the layer goes to another form.

    Source:
      Random probes: Schwartz (1980) and Zippel (1979).

    Example:
      >>> import flax.linen as nn
      >>> import fcconv_jax as fc
      >>> plan = fc.make_plan(nn.Dense(3), jnp.ones((2, 4)))
      >>> certify_layer(plan[""]).passed
      True
    """
    if to not in (None, layer.to):
        raise PlanError(
            f"Expected a plan to {to}, got one to {layer.to}. Pass to={layer.to!r}."
        )
    return prepare_layer(
        *(layer, dtype, preferred_element_type),
        probes=probes,
        precision=precision,
        seed=seed,
        device=device,
    )()


def prepare_layer(
    layer: LayerPlan,
    dtype: DTypeLike,
    preferred_element_type: DTypeLike | None = None,
    *,
    probes: int | None = None,
    precision: PrecisionLike = None,
    seed: int = 0,
    device: Device | None = None,
) -> Callable[[], Certificate]:
    """What :func:`certify_layer` waits for, compiling in the background."""
    to = layer.to
    if layer.is_matmul:
        layer = canonical_layer(layer)
    source, target = pair_of_forms(
        layer,
        to,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    bias = layer.bias
    if to == "conv" and layer.base != "phases":  # which read the conv's own input
        rest = layer.dense_input_shape()[-2 if layer.groups > 1 else -1 :]
        reduction = rest[-1]
        index = np.broadcast_to(np.arange(reduction), rest)
    else:
        rest = layer.input_shape[-1 - len(layer.window) :]
        reduction = math.prod(layer.kernel.source[:-1])
        index = _window_index(layer, rest)
    return prepare_certificate(
        source,
        target,
        x=jax.ShapeDtypeStruct((_ROWS, *rest), dtype),
        kernel=jax.ShapeDtypeStruct(layer.kernel.source, dtype),
        # Added to the sums: narrow floats do not promote.
        bias=None
        if bias is None
        else jax.ShapeDtypeStruct(bias.source, preferred_element_type or dtype),
        map_kernel=layer.kernel,
        map_bias=bias or (lambda none: none),
        reduction=reduction,
        reduction_index=index,
        probes=probes,
        precision=precision,
        seed=seed,
        device=device,
    )


def _window_index(layer: LayerPlan, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers the entries of an image by their place in the window that covers them."""
    per_group = shape[-1] // layer.groups
    index = np.zeros(shape, int)
    for axis, size in enumerate(layer.window):
        place = np.arange(shape[axis]) % size
        index = index * size + place.reshape(-1, *[1] * (len(shape) - axis - 1))
    return index * per_group + np.arange(shape[-1]) % per_group
