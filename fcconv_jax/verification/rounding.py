"""How much one primitive may err by itself: the local rounding error of an equation.

Each rule gives, for exact operands, a bound on |computed - exact| for every entry of
the output. Contractions follow the standard model (Higham, *Accuracy and Stability of
Numerical Algorithms*, ch. 3, to first order): n roundings on the sum of the absolute
products, whatever the order of summation. Elementwise functions follow a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..tracing import jaxprs
from .arithmetic import (
    Arithmetic,
    measure_precision,
    underflow_error,
    unit_roundoff,
)

# Relative and absolute error in units of the unit roundoff u (half an ulp): the error
# is u (relative |y| + absolute). The IEEE operations are correctly rounded (1), but a
# division may become a product with a reciprocal or an rsqrt. The others are the worst
# of 2**16 inputs on XLA's CPU backend (tests/verification/test_rounding.py repeats the
# sweep) and of NVIDIA's table (CUDA C++ Programming Guide, mathematical functions: 1
# to 4 ulp in float32), with room to spare. TPU figures are not published.
ELEMENTWISE: dict[str, tuple[float, float]] = {
    "add": (1, 0),
    "add_any": (1, 0),
    "sub": (1, 0),
    "mul": (1, 0),
    "square": (1, 0),
    "one_minus_square": (3, 1),  # as 1 - x*x or as (1 - x) (1 + x)
    "div": (4, 0),
    "sqrt": (2, 0),
    "rsqrt": (4, 0),
    "cbrt": (8, 0),
    "exp": (4, 0),
    "log": (4, 1),
    "log1p": (8, 1),
    "expm1": (12, 0),
    "tanh": (12, 0),
    "logistic": (12, 0),
    "erf": (16, 0),
    "erfc": (64, 0),
    "erf_inv": (64, 0),
    "sin": (4, 1),
    "cos": (4, 1),
    "tan": (8, 1),
    "asin": (8, 0),
    "acos": (8, 0),
    "atan": (8, 0),
    "atan2": (8, 0),
    "sinh": (32, 0),
    "cosh": (32, 0),
    "asinh": (12, 0),
    "acosh": (12, 0),
    "atanh": (12, 0),
    "lgamma": (8, 64),
    "digamma": (8, 64),
    "nextafter": (2, 0),  # exact, but its step is another where its operand errs
    "bessel_i0e": (16, 8),
    "bessel_i1e": (16, 8),
}
# XLA's float64 log1p is far from correctly rounded, and atanh is built on it.
_FLOAT64 = {"log1p": (512, 0), "atanh": (512, 0), "erf_inv": (128, 0)}

# Values are moved, chosen or cut, but no rounding happens.
EXACT = frozenset(
    """abs neg sign max min clamp select_n stop_gradient copy copy_p real imag conj
    complex floor ceil round rem is_finite broadcast_in_dim reshape transpose
    squeeze expand_dims slice split dynamic_slice dynamic_update_slice gather scatter
    concatenate pad rev sort top_k reduce_max reduce_min cummax cummin iota tile
    reduce_window_max reduce_window_min scatter_max scatter_min select_and_gather_add
    scatter-max scatter-min bitcast_convert_type device_put sharding_constraint
    optimization_barrier name pvary mesh_cast reshard axis_index ppermute all_gather
    stack all_to_all pmax pmin empty empty2 zeros_like copysign layout_constraint
    """.split()
)


def local_errors(
    eqn: Any, operands: Sequence[Any], outputs: Sequence[Any]
) -> list[jax.Array | None] | None:
    """Bounds the rounding errors that one equation itself commits.

    Args:
      eqn: the equation (no control flow, no call).
      operands: its operands; taken as exact.
      outputs: what it computed.

    Returns:
      One array for each output, of its shape, in float32 or float64, never negative,
      0 where the output is not finite; None for an output that is exact. None instead
      of a list when the primitive is not modelled and may round.
    """
    name = eqn.primitive.name
    exact: list[jax.Array | None] = [None] * len(outputs)
    if name in EXACT or not any(_is_inexact(out) for out in outputs):
        return exact
    rule = _RULES.get(name)
    if rule is None and name in ELEMENTWISE:
        rule = _elementwise
    if rule is None:
        if any(_is_inexact(x) for x in operands):
            return None
        return exact  # random numbers: the same bits in both programs
    error = rule(eqn, operands, outputs[0])
    if error is None:
        return [None]
    # A result that is subnormal errs by a constant, however small it is.
    error += underflow_error(outputs[0].dtype)
    # What overflows stays: then there is no finite bound, and not a bound of 0.
    error = jnp.where(jnp.isnan(error), jnp.inf, error)
    return [jnp.where(jnp.isfinite(outputs[0]), error, 0)]


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _magnitude(x: Any) -> jax.Array:
    """|x| in float32, or float64 where x is that wide."""
    x = jnp.abs(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _roundoff(out: Any) -> float:
    # A complex product or quotient is a few real ones (Higham, lemma 3.5).
    factor = 4 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 1
    return factor * unit_roundoff(out.dtype)


def _elementwise(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    del operands
    name = eqn.primitive.name
    relative, absolute = ELEMENTWISE[name]
    if out.dtype == jnp.float64:
        relative, absolute = _FLOAT64.get(name, (relative, absolute))
    return _roundoff(out) * (relative * _magnitude(out) + absolute)


def _power(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    # exp(y log x) carries the error of the exponent, which is |log out|, into the
    # result; exp2(x) may be exp(x log 2) likewise.
    del eqn, operands
    size = _magnitude(out)
    tiny = jnp.finfo(size.dtype).tiny
    return _roundoff(out) * (8 + 2 * jnp.abs(jnp.log(jnp.maximum(size, tiny)))) * size


def _integer_power(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    del operands
    y = eqn.params["y"]
    return _roundoff(out) * (abs(y) + (4 if y < 0 else 0)) * _magnitude(out)


def _convert(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array | None:
    del eqn
    source = jnp.result_type(operands[0])
    if source == jnp.bool_:
        return None
    if jnp.issubdtype(source, jnp.integer):
        roundoff, size = unit_roundoff(out.dtype), _magnitude(out)
        if jnp.iinfo(source).bits <= -math.log2(roundoff):
            return None
        # Small ones are exact, such as a mask that is then scaled by 1e30.
        return jnp.where(size < 1 / roundoff, 0, roundoff * size)
    rounds = unit_roundoff(source) < unit_roundoff(out.dtype)
    return unit_roundoff(out.dtype) * _magnitude(out) if rounds else None


def _reduce_precision(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    del operands
    return 2.0 ** -(eqn.params["mantissa_bits"] + 1) * _magnitude(out)


def contraction_arithmetic(dtype: Any, precision: Any, out: Any = None) -> Arithmetic:
    """The worse of dot and convolution: the other form may use either.

    Example:
      >>> contraction_arithmetic("int8", None).accumulate_roundoff
      0.0
    """
    dot = measure_precision(dtype, form="dot", precision=precision, out=out)
    return dot.worse(
        measure_precision(dtype, form="conv", precision=precision, out=out)
    )


def _contraction(eqn: Any, operands: Any, out: Any, size: Any, n: int) -> jax.Array:
    dtype = jnp.result_type(*operands)
    arithmetic = contraction_arithmetic(dtype, eqn.params.get("precision"), out.dtype)
    loss = 2 * arithmetic.input_roundoff + n * arithmetic.accumulate_roundoff
    if jnp.issubdtype(dtype, jnp.complexfloating):
        loss *= 4
    # Each product and each sum may underflow, in the type it is accumulated in.
    underflow = n * max(underflow_error(out.dtype), underflow_error("float32"))
    return loss * size + _roundoff(out) * _magnitude(out) + underflow


def _dot_general(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    dims = eqn.params["dimension_numbers"]
    a, b = (_magnitude(x) for x in operands)
    size = lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)
    n = math.prod(a.shape[axis] for axis in dims[0][0])
    return _contraction(eqn, operands, out, size, n)


def _conv(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    kept = (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
    )
    a, b = (_magnitude(x) for x in operands)
    size = lax.conv_general_dilated(
        a,
        b,
        **{name: eqn.params[name] for name in kept},
        precision=lax.Precision.HIGHEST,
    )
    n = b.size // b.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return _contraction(eqn, operands, out, size, n)


def _sum(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    (x,) = operands
    axes = eqn.params["axes"]
    n = math.prod(x.shape[axis] for axis in axes)
    accumulate = measure_precision(x.dtype, form="sum").accumulate_roundoff
    size = jnp.sum(_magnitude(x), axis=axes)
    underflow = n * underflow_error(out.dtype)
    return n * accumulate * size + _roundoff(out) * _magnitude(out) + underflow


def _product(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    n = math.prod(operands[0].shape[axis] for axis in eqn.params["axes"])
    return n * _roundoff(out) * _magnitude(out)


def _cumulative(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    n = operands[0].shape[eqn.params["axis"]]
    name = eqn.primitive.name
    if name == "cumprod":
        return n * _roundoff(out) * _magnitude(out)
    if name == "cumlogsumexp":  # each step is an exp, a sum and a log
        return 8 * n * _roundoff(out) * (1 + _magnitude(out))
    size = jaxprs.bind(eqn, [_magnitude(operands[0])])[0]
    return n * (_roundoff(out) * size + underflow_error(out.dtype))


def _window_sum(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    n = math.prod(eqn.params["window_dimensions"])
    size = jaxprs.bind(eqn, [_magnitude(operands[0])])[0]
    return n * (_roundoff(out) * size + underflow_error(out.dtype))


def _select_and_scatter_add(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    source, operand = operands
    n = math.prod(eqn.params["window_dimensions"])
    size = jaxprs.bind(eqn, [jnp.abs(source), operand])[0]
    return n * (_roundoff(out) * _magnitude(size) + underflow_error(out.dtype))


def _scatter_add(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    base, indices, updates = operands
    size = jaxprs.bind(eqn, [_magnitude(base), indices, _magnitude(updates)])[0]
    ones = jnp.ones_like(_magnitude(updates))
    count = jaxprs.bind(eqn, [jnp.zeros_like(size), indices, ones])[0]
    return count * (_roundoff(out) * size + underflow_error(out.dtype))


def _fft(eqn: Any, operands: Sequence[Any], out: Any) -> jax.Array:
    # Each output is bounded by the 1-norm of its input line; 5 log2 n roundings cover
    # the radix-2 butterflies and their twiddle factors (Higham, section 24.1).
    lengths = eqn.params["fft_lengths"]
    n = math.prod(lengths)
    axes = tuple(range(-len(lengths), 0))
    size = jnp.sum(_magnitude(operands[0]), axis=axes, keepdims=True)
    factor = 5 * max(1.0, math.log2(n)) * unit_roundoff(out.dtype)
    return factor * jnp.broadcast_to(size, out.shape)


_RULES: dict[str, Callable[[Any, Sequence[Any], Any], jax.Array | None]] = {
    "pow": _power,
    "exp2": _power,
    "integer_pow": _integer_power,
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "reduce_sum": _sum,
    "reduce_prod": _product,
    "cumsum": _cumulative,
    "cumprod": _cumulative,
    "cumlogsumexp": _cumulative,
    "reduce_window_sum": _window_sum,
    "select_and_scatter_add": _select_and_scatter_add,
    "scatter-add": _scatter_add,
    "scatter_add": _scatter_add,
    "fft": _fft,
}
