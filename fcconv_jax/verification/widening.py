"""Equations of a trace, one by one, with their floats widened to float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from ..tracing.jaxprs import bind
from ..tracing.primitives import PLACES, SAME
from ..tracing.protocols import Atom, Equation
from .float64_convolution import convolve

# Runs a jaxpr in float64.
Run = Callable[[Any, Sequence[Any]], list[Any]]
# The code that combines two numbers is the program's: stated again in float64.
_SCATTERS = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter-max": jax.lax.scatter_max,
    "scatter-min": jax.lax.scatter_min,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter-sub": jax.lax.scatter_sub,
    "scatter_add": jax.lax.scatter_add,
    "scatter_max": jax.lax.scatter_max,
    "scatter_min": jax.lax.scatter_min,
    "scatter_mul": jax.lax.scatter_mul,
    "scatter_sub": jax.lax.scatter_sub,
}
# Primitives that hold code for two numbers, which is made again in float64.
RESTATED = frozenset({*_SCATTERS, "reduce"})


def widened(dtype: DTypeLike) -> Any:
    """Return the dtype in which a dtype is read: float64, complex128, or the same.

    Example:
      >>> widened("bfloat16"), widened("int32")
      (dtype('float64'), dtype('int32'))
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
        return dtype
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else dtype


def widen(leaf: Any) -> Any:
    """An array with its floats widened, on the host's CPU; needs x64 to be enabled."""
    if not hasattr(leaf, "dtype"):
        return leaf
    dtype = widened(leaf.dtype)
    if isinstance(leaf, Tracer) or leaf.dtype == dtype:
        return _convert(leaf, dtype)
    # NumPy: another device would round first.
    return jnp.asarray(np.asarray(leaf).astype(dtype))


def widen_literal(atom: Atom) -> Any:
    """A constant of the program, in the dtype that its place in the program has."""
    dtype = widened(atom.aval.dtype)
    if dtype == atom.aval.dtype and not isinstance(atom.val, (int, float, complex)):
        return atom.val
    # A number of Python may be kept as it was written: the program rounds it, and up to
    # JAX 0.7 an int has no dtype, so that it would be an int64 here.
    return np.asarray(np.asarray(atom.val, atom.aval.dtype), dtype)


def bind_wide(eqn: Equation, ins: list[Any], run: Run) -> Sequence[Any]:
    """Bind one equation with its floats widened; ``run`` runs what it holds."""
    name = eqn.primitive.name
    if name in SAME or name == "reduce_precision":
        return ins
    if name == "convert_element_type":
        return [_convert(ins[0], widened(eqn.params["new_dtype"]))]
    if name == "bitcast_convert_type" or name.startswith("random_"):
        # Of integers, or of a float in the bits that it has; and a draw in float64
        # would be another draw.
        narrow = [_convert(x, var.aval.dtype) for x, var in zip(ins, eqn.invars)]
        return [widen(out) for out in bind(eqn, narrow)]
    if name in _SCATTERS:
        return [_scatter(eqn, ins)]
    if name == "reduce":
        return _reduce(eqn, ins, run)
    if name == "conv_general_dilated":
        return [convolve(ins[0], ins[1], _hashable(eqn.params))]
    return bind(_wide_equation(eqn), ins)


def _scatter(eqn: Equation, ins: list[Any]) -> Any:
    p = eqn.params
    scatter: Any = _SCATTERS[eqn.primitive.name]
    return scatter(
        *ins,
        p["dimension_numbers"],
        indices_are_sorted=p["indices_are_sorted"],
        unique_indices=p["unique_indices"],
        mode=p["mode"],
    )


def _reduce(eqn: Equation, ins: list[Any], run: Run) -> Sequence[Any]:
    """Return a reduction by the program's own code."""
    count = len(ins) // 2

    def computation(xs: Any, ys: Any) -> Any:
        return tuple(run(eqn.params["jaxpr"], [*xs, *ys]))

    axes = eqn.params["dimensions"]
    return list(
        jax.lax.reduce(tuple(ins[:count]), tuple(ins[count:]), computation, axes)
    )


def _convert(x: Any, dtype: DTypeLike) -> Any:
    if getattr(x, "dtype", None) == dtype:
        return x
    return jax.lax.convert_element_type(x, dtype)


def _wide_equation(eqn: Equation) -> Equation:
    params = {key: _wide_param(key, value) for key, value in eqn.params.items()}
    return eqn.replace(params=params)


def _wide_param(key: str, value: Any) -> Any:
    # A reading runs on the host's CPU alone, in full precision.
    if key in PLACES or key == "precision":
        return None
    if isinstance(value, np.dtype | type) or type(value).__name__ == "dtype":
        return widened(value)
    return value


def _hashable(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    names = (
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation"),
        *("dimension_numbers", "feature_group_count", "batch_group_count"),
    )
    return tuple((name, params[name]) for name in names)
