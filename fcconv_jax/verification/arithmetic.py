"""Measures the arithmetic of dots and convolutions on a device.

XLA may round the operands (TF32 on CUDA, bf16 passes on TPU), accumulate in a type
other than the output's, and cut instead of rounding. The exact certificate needs
the truth, so tiny probes read it off the device: matmuls show what is
kept of the operands, sums of ``big``, ``t`` and ``-big`` what the accumulator keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from ..backends.name import Device

Contraction = Literal["dot", "conv"]

_REDUCTION = 256  # long enough for the blocked and vectorised paths
_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Relative errors of one contraction: rounding of operands, sums and output.

    All three are powers of two, or 0 where nothing is lost. A contraction of length n
    has the first-order error bound
    ``(2 input + n accumulate) |a|.|b| + output |a.b|``.

    Attributes:
      input_roundoff: relative error of each operand as it enters the matmul.
      accumulate_roundoff: relative error of one addition in the accumulator.
      output_roundoff: relative error of the final rounding to the output's dtype.

    Example:
      >>> Arithmetic(0.0, 2.0**-24, 2.0**-24).exact_integers
      16777216
    """

    input_roundoff: float
    accumulate_roundoff: float
    output_roundoff: float

    @property
    def exact_integers(self) -> int:
        """The largest N such that sums of integers up to N in size are exact."""
        worst = max(self.accumulate_roundoff, self.output_roundoff)
        return int(1 / worst) if worst else 2**31 - 1

    @property
    def exact_inputs(self) -> int:
        """The largest N such that integer operands up to N in size are kept."""
        return int(1 / self.input_roundoff) if self.input_roundoff else 2**53

    def worse(self, other: Arithmetic) -> Arithmetic:
        """Return the larger of each error: what holds for either form."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Arithmetic(*(max(pair) for pair in pairs))


def unit_roundoff(dtype: DTypeLike) -> float:
    """Half the distance from 1 to the next number; 0 for exact (integer) dtypes.

    Example:
      >>> unit_roundoff("float32") == 2.0**-24, unit_roundoff("int8")
      (True, 0.0)
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    return float(jnp.finfo(dtype).eps) / 2


def measure_precision(
    dtype: DTypeLike,
    *,
    form: Contraction = "dot",
    precision: PrecisionLike = None,
    device: Device | None = None,
    out: DTypeLike | None = None,
) -> Arithmetic:
    """Measure the arithmetic of a contraction of two ``dtype`` arrays.

    Operand probes are ``1 + 2**-k`` and random mantissas against 1 (and each other: a
    scheme of several passes drops the matmul of the low parts). Accumulator probes are
    the sums ``big + t - big``, in all six orders, at places near and far in a reduction
    of length 256, with t = 2**-k big and 0.75 * 2**-k big, the second of which tells
    cutting from rounding. The worst seen, rounded up to a power of two, is returned and
    cached. Complex dtypes are measured by their real part's dtype; integers are exact.

    Args:
      dtype: dtype of both operands.
      form: 'dot' (``lax.dot_general``) or 'conv' (1x1 and full-window convolutions).
      precision: as ``jax.lax.dot_general`` takes it; None is JAX's default here.
      device: where to measure; None is JAX's default device.
      out: dtype of the output (``preferred_element_type``); None is that of the
        operands. How much a wider one keeps is only probed as far as the operands
        reach: for float8 operands and a float32 output to 2**-13 or so.

    Raises:
      ValueError: an unknown ``form``.

    Example:
      >>> measure_precision("int32")
      Arithmetic(input_roundoff=0.0, accumulate_roundoff=0.0, output_roundoff=0.0)
    """
    if form not in ("dot", "conv"):
        raise ValueError(f"expected form 'dot' or 'conv', got {form!r}")
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return Arithmetic(0.0, 0.0, 0.0)
    out = dtype if out is None else jnp.dtype(out)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        dtype, out = jnp.finfo(dtype).dtype, jnp.finfo(out).dtype
    device = _device(device)
    default = jax.config.jax_default_matmul_precision  # pyright: ignore
    x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore
    return _measure(dtype, out, form, precision, device, default, x64)


@functools.cache
def _measure(dtype, out, form, precision, device, default, x64) -> Arithmetic:
    del default, x64  # part of the key only: they change what is compiled
    windows = ((1, 1), (4, 4))
    convs = [functools.partial(_conv, window=window) for window in windows]
    forms = {"dot": [_dot], "conv": convs}[form]
    found = []
    # The caller may be tracing; the probes must run now.
    with jax.ensure_compile_time_eval():
        for contraction in forms:
            compiled = jax.jit(
                functools.partial(
                    contraction, precision=precision, out=None if out == dtype else out
                )
            )

            def run(rows, columns, compiled=compiled):
                rows = jax.device_put(rows.astype(dtype), device)
                columns = jax.device_put(columns.astype(dtype), device)
                return np.asarray(compiled(rows, columns)).astype(np.float64)

            found.append(
                Arithmetic(
                    _input_roundoff(run, dtype, out),
                    _accumulate_roundoff(run, dtype),
                    unit_roundoff(out),
                )
            )
    return functools.reduce(Arithmetic.worse, found)


def _device(device: Device | None) -> Any:
    return device or jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore


def _dot(
    rows: jax.Array,
    columns: jax.Array,
    precision: PrecisionLike,
    out: DTypeLike | None = None,
) -> jax.Array:
    return jax.lax.dot_general(
        rows,
        columns,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=out,
    )


def _conv(
    rows: jax.Array,
    columns: jax.Array,
    window: tuple[int, int],
    precision: PrecisionLike,
    out: DTypeLike | None = None,
) -> jax.Array:
    shape = (*window, rows.shape[1] // math.prod(window))
    made = jax.lax.conv_general_dilated(
        rows.reshape(rows.shape[0], *shape),
        columns.reshape(*shape, columns.shape[1]),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
        preferred_element_type=out,
    )
    return made.reshape(rows.shape[0], columns.shape[1])


def _power_above(error: float) -> float:
    # frexp returns a mantissa in [0.5, 1): a power of two is its own answer.
    if not error:
        return 0.0
    mantissa, exponent = math.frexp(error)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))


def _bits(dtype: DTypeLike) -> int:
    return round(-math.log2(unit_roundoff(dtype)))


def _input_roundoff(
    run: Callable[[np.ndarray, np.ndarray], np.ndarray],
    dtype: DTypeLike,
    out: DTypeLike | None = None,
) -> float:
    bits = _bits(dtype)
    random = np.random.default_rng(0).integers(1 << (bits - 1), 1 << bits, 512)
    probes = np.concatenate(
        [1 + 2.0 ** -np.arange(1, bits), random / float(1 << (bits - 1))]
    )
    # As many as the accumulator's probes: programs of one shape compile once.
    probes = np.resize(probes, max(len(probes), len(_accumulator_probes(dtype)[0])))
    # One nonzero term in a sum: what is lost is lost by the operand, not the
    # accumulator.
    rows = np.zeros((len(probes), _REDUCTION))
    rows[:, 0] = probes
    columns = np.zeros((_REDUCTION, len(probes)))
    columns[0] = probes
    one = np.zeros((_REDUCTION, _WIDTH))
    one[0] = 1
    left = run(rows, one) / probes[:, None] - 1
    right = run(one.T, columns) / probes - 1
    found = _power_above(max(abs(left).max(), abs(right).max()))
    # Both operands full: what multi-pass schemes drop must be covered as well. One
    # rounding of the output (and one in the accumulator) is not the operands' doing.
    probes = probes[: bits - 1 + len(random)]
    exact = np.outer(probes, probes)
    few = len(probes)
    both = abs(run(rows[:few], columns[:, :few]) / exact - 1).max()
    rest = both - 2 * unit_roundoff(out or dtype) - 2 * found
    return max(found, _power_above(rest)) if rest > 0 else found


def _accumulator_probes(dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Rows to be summed and their sums, in units of 2**top; top, and the reach."""
    info = jnp.finfo(dtype)
    top = min(int(info.maxexp) - 2, 60)
    reach = min(top - int(info.minexp) - 1, 2 * _bits(dtype), 60)
    reach = max(reach, min(top - int(info.minexp) - 1, 30))
    sizes = [2.0**-k for k in range(1, reach + 1)]
    if _bits(dtype) > 1:
        sizes += [0.75 * size for size in sizes[:-1]]
    far = _REDUCTION - 1
    places = [(0, 1, 2), (0, 8, 16), (3, 100, far), (0, 64, 128), (1, 31, 33)]
    orders = [order for place in places for order in itertools.permutations(place)]
    rows = np.zeros((len(orders), len(sizes), _REDUCTION))
    for index, (first, second, third) in enumerate(orders):
        rows[index, :, first] = 1
        rows[index, :, second] = sizes
        rows[index, :, third] = -1
    return rows.reshape(-1, _REDUCTION), np.tile(sizes, len(orders)), top, reach


def _accumulate_roundoff(
    run: Callable[[np.ndarray, np.ndarray], np.ndarray], dtype: DTypeLike
) -> float:
    rows, want, top, reach = _accumulator_probes(dtype)
    ones = np.ones((_REDUCTION, _WIDTH))
    worst = math.inf
    # Operands may be cut to a type of smaller range, such as float16 or float8.
    for power in dict.fromkeys((top, min(top, 12), min(top, 6))):
        big = rows * 2.0**power
        left = run(big, ones) * 2.0**-power - want[:, None]
        right = run(ones.T, big.T) * 2.0**-power - want
        worst = max(abs(left).max(), abs(right).max())
        if worst < 0.5:  # else what is big was not even held
            break
    if not worst < math.inf:
        worst = 1.0
    # Nothing lost within the dtype's range: the accumulator keeps at least that much.
    return _power_above(worst) or 2.0 ** -(reach + 1)
