"""Rules of convolutions and pools."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ..tracing.protocols import Equation
from .sweeps import Sweep, lay_out, swept
from .values import CropArray, NotSharedError, SlideRule, array_of, merged


def _convolution(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    value, kernel = values
    p = eqn.params
    spec = p["dimension_numbers"]
    if kernel.differs:
        raise NotSharedError("a kernel that is computed from the image")
    if p["batch_group_count"] != 1:
        raise NotSharedError("a convolution over groups of the batch")
    if any(part.map is not None for part in value.groups[spec.lhs_spec[1]]):
        raise NotSharedError("a convolution over the image's axes as channels")
    padding = [(low, high) for low, high in p["padding"]]
    holes = list(p["lhs_dilation"])
    window = [kernel.shape[dim] for dim in spec.rhs_spec[2:]]
    sweeps: list[Sweep] = []
    for k, dim in enumerate(spec.lhs_spec[2:]):
        extent = (window[k] - 1) * p["rhs_dilation"][k] + 1
        stride = p["window_strides"][k]
        value, sweep = lay_out(value, dim, extent, stride, padding[k], holes[k])
        if sweep is not None:
            sweeps.append(dataclasses.replace(sweep, out=spec.out_spec[2 + k]))
            padding[k], holes[k] = (0, 0), 1
    for dim in range(len(value.ranks)):
        value = merged(value, dim)
    weights = array_of(kernel)
    # Without padding XLA's CPU backend takes a convolution of half the speed.
    cpu = jax.default_backend() == "cpu"
    more = [
        cpu and n > step and pad == (0, 0)
        for n, step, pad in zip(window, p["window_strides"], padding)
    ]
    cut = [slice(None)] * len(value.ranks)
    for dim, longer in zip(spec.out_spec[2:], more):
        cut[dim] = slice(-1) if longer else slice(None)

    def convolve(data: Any, changed: Mapping[int, int]) -> Any:
        strides = [
            changed.get(dim, stride)
            for dim, stride in zip(spec.lhs_spec[2:], p["window_strides"])
        ]
        y = lax.conv_general_dilated(
            data,
            weights,
            strides,
            [(0, s) if m else pad for m, s, pad in zip(more, strides, padding)],
            holes,
            p["rhs_dilation"],
            spec,
            p["feature_group_count"],
            precision=p["precision"],
            preferred_element_type=p["preferred_element_type"],
        )
        return y[tuple(cut)] if any(more) else y

    places = math.prod(value.shape) / math.prod(
        value.shape[dim] for dim in spec.lhs_spec[1:]
    )
    each = 2 * places * math.prod(kernel.shape)
    kept = {out: value.groups[dim][0] for out, dim in zip(spec.out_spec, spec.lhs_spec)}
    return [swept(convolve, value, eqn, sweeps, each, 0, kept)]


def _lowest(dtype: DTypeLike) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(-np.inf, dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.zeros((), dtype)
    return np.asarray(jnp.iinfo(dtype).min, dtype)


def _highest(dtype: DTypeLike) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(np.inf, dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.ones((), dtype)
    return np.asarray(jnp.iinfo(dtype).max, dtype)


_POOL_PADDING = {
    "reduce_window_max": _lowest,
    "reduce_window_min": _highest,
    "reduce_window_sum": lambda dtype: np.zeros((), dtype),
}


def _pool(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    (value,) = values
    p = dict(eqn.params)
    padding = [(low, high) for low, high in p["padding"]]
    base = list(p["base_dilation"])
    fill = _POOL_PADDING[eqn.primitive.name](eqn.invars[0].aval.dtype)
    sweeps: list[Sweep] = []
    for dim, size in enumerate(p["window_dimensions"]):
        extent = (size - 1) * p["window_dilation"][dim] + 1
        stride = p["window_strides"][dim]
        value, sweep = lay_out(value, dim, extent, stride, padding[dim], base[dim])
        if sweep is not None:
            sweeps.append(sweep)
            padding[dim], base[dim] = (0, 0), 1
    for dim in range(len(value.ranks)):
        value = merged(value, dim)
    p["padding"], p["base_dilation"] = tuple(padding), tuple(base)

    def run(data: Any, changed: Mapping[int, int]) -> Any:
        strides = [changed.get(i, s) for i, s in enumerate(p["window_strides"])]
        return eqn.primitive.bind(data, **p | {"window_strides": tuple(strides)})

    mapped = math.prod(value.shape[sweep.axis] for sweep in sweeps)
    each = math.prod(p["window_dimensions"]) * math.prod(value.shape) / max(mapped, 1)
    kept = {dim: part for dim, (part,) in enumerate(value.groups)}
    return [swept(run, value, eqn, sweeps, each, fill, kept)]


RULES: dict[str, SlideRule] = {
    **dict.fromkeys(_POOL_PADDING, _pool),
    "conv_general_dilated": _convolution,
}
