"""Unrolling: a convolution on one input size as a dense matrix, and back.

The matrix is doubly block Toeplitz: it holds each entry of the kernel once per
output position that reads an input with it, and zeros elsewhere. Its parameters
are therefore not the convolution's; see ``"unrolled"`` in
:mod:`fcconv_jax.geometry.convolution`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Shaped

from ..versions import check_bits
from .convolution import ConvGeometry, resolve_geometry
from .kernels import Array, conv_kernel_axes
from .windows import PaddingLike


def unroll_conv(
    kernel: Shaped[Array, "*window in out"],
    input_shape: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "VALID",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    max_bytes: int = 2**30,
) -> Shaped[Array, "inputs outputs"]:
    """Build the dense matrix of a convolution on inputs of one size.

    Entries are copied, never computed with, so the matrix holds the kernel's bits.

    Args:
      kernel: ``(*k, C/G, O)``, of any dtype; a NumPy array gives a NumPy array,
        anything else goes through ``jax.numpy`` and may be traced.
      input_shape: spatial sizes of the input.
      strides: step between output positions, per dimension or one int.
      padding: a name, an int, ints or ``(low, high)`` pairs, as ``nn.Conv`` takes it.
      input_dilation: spacing of the inputs (``lhs_dilation``).
      kernel_dilation: spacing of the taps (``rhs_dilation``).
      groups: ``feature_group_count``.
      max_bytes: refuse to build a larger matrix; building it may take twice this.

    Returns:
      ``(prod(input_shape) * C, prod(output_shape) * O)``: multiply it from the
      right to an input flattened from ``(*input_shape, C)`` in row-major order.

    Raises:
      ValueError: the geometry is invalid, the matrix would be larger than
        ``max_bytes``, or padding makes two taps of one position read the same input.

    Source:
      Dumoulin and Visin (2016), *A guide to convolution arithmetic for deep
      learning*, on convolution as a matrix operation.

    Example:
      >>> unroll_conv(np.array([1, 2]).reshape(2, 1, 1), 3)
      array([[1, 0],
             [2, 1],
             [0, 2]])
    """
    window, channels, features = conv_kernel_axes(np.shape(kernel), groups)
    geometry = resolve_geometry(
        input_shape, window, strides, padding, input_dilation, kernel_dilation, groups
    )
    dtype = jnp.dtype(kernel.dtype)
    _check_zero(dtype)
    _check_bytes(geometry, channels, features, dtype.itemsize, max_bytes)
    return _unroll(kernel, geometry)


def unrolled_bytes(
    geometry: ConvGeometry, in_channels: int, out_channels: int, itemsize: int
) -> int:
    """Bytes of the dense matrix that :func:`unroll_conv` makes.

    Example:
      >>> unrolled_bytes(resolve_geometry((224, 224), 3, padding=1), 3, 64, 4)
      1933540589568
    """
    rows = geometry.input_elements * in_channels
    return rows * geometry.output_elements * out_channels * itemsize


def roll_dense(
    matrix: Shaped[Array, "inputs outputs"],
    input_shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    in_channels: int,
    out_channels: int,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "VALID",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
) -> Shaped[Array, "*window in out"]:
    """Extract the kernel from an unrolled matrix; the inverse of `unroll_conv`.

    The matrix is compared with the unrolled kernel bit by bit: -0 is not 0, and two
    NaNs are the same only with the same payload.

    Args:
      matrix: ``(prod(input_shape) * C, prod(output_shape) * O)``, concrete.
      input_shape: as in :func:`unroll_conv`.
      kernel_size: taps per dimension.
      in_channels: ``C``, of all groups together.
      out_channels: ``O``.
      strides: as in :func:`unroll_conv`.
      padding: as in :func:`unroll_conv`.
      input_dilation: as in :func:`unroll_conv`.
      kernel_dilation: as in :func:`unroll_conv`.
      groups: as in :func:`unroll_conv`.

    Returns:
      The kernel ``(*k, C/G, O)``, NumPy for a NumPy matrix, else a ``jax.Array``.

    Raises:
      TypeError: the matrix is traced, so its entries can't be read.
      ValueError: the shape doesn't match, an entry is not the convolution's (the
        message names its row and column), or a tap reads no input at all.

    Source:
      As :func:`unroll_conv`.

    Example:
      >>> roll_dense(np.array([[1, 0], [2, 1], [0, 2]]), 3, 2, 1, 1).ravel()
      array([1, 2])
    """
    if isinstance(matrix, Tracer):
        raise TypeError(
            "roll_dense compares the matrix's bits and can't be traced. Call it "
            "outside jit, grad and vmap."
        )
    geometry = resolve_geometry(
        input_shape,
        kernel_size,
        strides,
        padding,
        input_dilation,
        kernel_dilation,
        groups,
    )
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups: expected a divisor of {in_channels} input and {out_channels} "
            f"output channels, got {groups}. Pass the convolution's "
            "feature_group_count."
        )
    rows = geometry.input_elements * in_channels
    columns = geometry.output_elements * out_channels
    if tuple(matrix.shape) != (rows, columns):
        raise ValueError(
            f"matrix: expected shape {(rows, columns)} for {geometry} with "
            f"{in_channels} -> {out_channels} channels, got {tuple(matrix.shape)}. "
            "Pass the geometry that the matrix was unrolled with."
        )
    host = np.asarray(matrix)
    _check_zero(host.dtype)
    kernel = _first_entries(host, geometry, in_channels, out_channels)
    _check_structure(host, _unroll(kernel, geometry))
    # The kind of array that came in, which pyright cannot follow.
    same_kind: Any = kernel if isinstance(matrix, np.ndarray) else jnp.asarray(kernel)
    return same_kind


def _unroll(kernel: Any, geometry: ConvGeometry) -> Any:
    if isinstance(kernel, np.ndarray):
        return _place(kernel, geometry, np)
    check_bits(kernel.dtype)
    kernel = jnp.asarray(kernel)
    if jnp.issubdtype(kernel.dtype, jnp.floating) and kernel.dtype.itemsize < 4:
        return _unroll_small_float(kernel, geometry)
    return _place(kernel, geometry, jnp)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _unroll_small_float(kernel: jax.Array, geometry: ConvGeometry) -> jax.Array:
    # XLA on CPU selects, pads and concatenates bfloat16 and float8 in a wider type,
    # which quiets signaling NaNs. As integers the entries pass untouched.
    bits = jnp.dtype(f"uint{jnp.finfo(kernel.dtype).bits}")
    matrix = _place(jax.lax.bitcast_convert_type(kernel, bits), geometry, jnp)
    return jax.lax.bitcast_convert_type(matrix, kernel.dtype)


@_unroll_small_float.defjvp
def _unroll_small_float_jvp(geometry, primals, tangents):
    (kernel,), (tangent,) = primals, tangents
    return _unroll_small_float(kernel, geometry), _place(tangent, geometry, jnp)


def _place(kernel: Any, geometry: ConvGeometry, xp: Any) -> Any:
    """Gather the entries where they are read and zeros elsewhere."""
    groups = geometry.groups
    window, channels, features = conv_kernel_axes(kernel.shape, groups)
    table = _tap_table(geometry)
    entries = kernel.reshape(math.prod(window), channels // groups, features)
    # Where no tap reads, tap 0 is taken and masked below: a gather has no "nothing".
    entries = xp.take(entries, np.maximum(table, 0), 0, mode="clip")
    # (inputs, G, C/G, outputs, O): rows of group g meet only columns of group g.
    entries = xp.transpose(entries, (0, 2, 1, 3))[:, None]
    own = np.arange(features) // (features // groups) == np.arange(groups)[:, None]
    held = (table >= 0)[:, None, None, :, None] & own[None, :, None, None, :]
    matrix = xp.where(held, entries, np.zeros((), kernel.dtype))
    return matrix.reshape(table.shape[0] * channels, table.shape[1] * features)


def _tap_table(geometry: ConvGeometry) -> np.ndarray:
    """Return the tap that reads each input for each output, (inputs, outputs).

    Taps are numbered in row-major order; -1 stands for none.
    """
    shapes = zip(geometry.input_shape, geometry.kernel_size, geometry.output_shape)
    table = np.zeros((1, 1), np.int32)
    for i, (size, taps, outputs) in enumerate(shapes):
        line = np.full((size, outputs), -1, np.int32)
        for position, sources in enumerate(geometry.reads(i)):
            for tap, source in enumerate(sources):
                if source is None:
                    continue
                if line[source, position] >= 0:
                    raise ValueError(
                        f"padding: with {geometry.padding_mode} padding, output "
                        f"position {position} of dimension {i} reads input {source} "
                        "with two taps, whose entries would have to be added. Pad the "
                        "input before the layer instead, and unroll with padding VALID."
                    )
                line[source, position] = tap
        # Combine with the dimensions before: none if either reads nothing.
        before, here = table[:, None, :, None], line[None, :, None, :]
        both = np.where((before < 0) | (here < 0), -1, before * taps + here)
        table = both.reshape(table.shape[0] * size, table.shape[1] * outputs)
    return table


def _first_entries(
    matrix: np.ndarray, geometry: ConvGeometry, channels: int, features: int
) -> np.ndarray:
    """Return the kernel, read where each tap first meets an input."""
    groups, taps = geometry.groups, geometry.window_elements
    table = _tap_table(geometry)
    # Every place of a tap has to hold the same entry: _check_structure compares all.
    found, first = np.unique(table, return_index=True)
    found, first = found[found >= 0], first[found >= 0]
    if len(found) != taps:
        missing = min(set(range(taps)) - set(found.tolist()))
        place = tuple(map(int, np.unravel_index(missing, geometry.kernel_size)))
        raise ValueError(
            f"kernel_size: tap {place} of {geometry} meets no input at any output "
            "position, so the matrix doesn't contain its entries. Pass the kernel "
            "without it."
        )
    inside, each = channels // groups, features // groups
    n, p = np.unravel_index(first, table.shape)
    # (inputs, G, C/G, outputs, G, O/G): a group's rows meet its own columns.
    axes = (table.shape[0], groups, inside, table.shape[1], groups, each)
    view = matrix.reshape(axes)
    entries = [view[n, g][:, :, :, g][np.arange(taps), :, p] for g in range(groups)]
    kernel = np.concatenate(entries, axis=-1)
    return kernel.reshape(*geometry.kernel_size, inside, features)


def _check_structure(matrix: np.ndarray, expected: np.ndarray) -> None:
    differ = _bits(matrix) != _bits(expected)
    if differ.any():
        row, column = map(int, np.unravel_index(differ.argmax(), matrix.shape))
        got, want = matrix[row, column], expected[row, column]
        raise ValueError(
            f"matrix: not an unrolled convolution: {int(differ.sum())} of "
            f"{matrix.size} entries differ, first row {row}, column {column}: got "
            f"{got}, expected {want} (bits {_hex(got)}, {_hex(want)}). Use the "
            "geometry that it was unrolled with, or keep it a Dense."
        )


def _bits(array: np.ndarray) -> np.ndarray:
    """Return the entries as unsigned integers (or, beyond 8 bytes, as bytes)."""
    size = array.dtype.itemsize
    kind = f"u{size}" if size in (1, 2, 4, 8) else f"V{size}"
    return np.ascontiguousarray(array).view(kind)


def _hex(entry: Any) -> str:
    # Most significant byte first, as bits are written; arrays are little-endian.
    return np.asarray(entry).tobytes()[::-1].hex()


def _check_bytes(
    geometry: ConvGeometry,
    channels: int,
    features: int,
    itemsize: int,
    max_bytes: int,
) -> None:
    needed = unrolled_bytes(geometry, channels, features, itemsize)
    if needed > max_bytes:
        rows = geometry.input_elements * channels
        columns = geometry.output_elements * features
        raise ValueError(
            f"unroll_conv: the matrix ({rows}, {columns}) of {geometry} takes "
            f"{needed / 2**20:,.1f} MiB, more than max_bytes={max_bytes}. Raise "
            "max_bytes if memory allows, or keep the convolution."
        )


def _check_zero(dtype: np.dtype) -> None:
    # float8_e8m0fnu holds powers of two only; a cast of 0 would be a NaN or 2**-127.
    if np.zeros((), np.int8).astype(dtype) != 0:
        raise ValueError(
            f"kernel: {dtype} has no zero to fill the matrix with. Cast it first."
        )
