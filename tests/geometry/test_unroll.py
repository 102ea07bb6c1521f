"""The unrolled matrix: equal to the convolution, and taken apart again or refused."""

import math

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fcconv_jax.backends.faults import PACKED
from fcconv_jax.geometry.classify import classify
from fcconv_jax.geometry.convolution import resolve_geometry
from fcconv_jax.geometry.kernels import conv_kernel_to_dense
from fcconv_jax.geometry.unroll import roll_dense, unroll_conv, unrolled_bytes
from fcconv_jax.versions import enable_x64

quick = settings(max_examples=80, deadline=None, derandomize=True, database=None)

DTYPES = (
    "float32 bfloat16 float16 complex64 bool int8 int32 uint16 int4 uint4 int2 uint2 "
    "float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz "
    "float8_e5m2 float8_e5m2fnuz float4_e2m1fn float64 complex128 int64"
).split()
if PACKED.is_in(jaxlib.version.__version__):
    DTYPES = [
        name
        for name in DTYPES
        if "int2" not in name and "t4_" not in name and "int4" not in name
    ]


def flax_conv(kernel, x, padding="VALID", groups=1, **options):
    conv = nn.Conv(
        kernel.shape[-1],
        kernel.shape[:-2],
        padding=padding,
        feature_group_count=groups,
        use_bias=False,
        **options,
    )
    out = conv.apply({"params": {"kernel": kernel}}, x)
    assert isinstance(out, jax.Array)
    return np.asarray(out)


@pytest.mark.parametrize(
    ("input_shape", "kernel_size", "options"),
    [
        ((5,), (3,), {}),
        ((5,), (3,), {"padding": "CAUSAL", "kernel_dilation": 2}),
        ((5, 4), (2, 3), {"strides": 2}),
        ((5, 4), (2, 3), {"strides": (1, 2), "padding": "SAME"}),
        ((5, 4), (2, 3), {"padding": ((1, 0), (2, 1)), "kernel_dilation": (2, 1)}),
        ((3, 4), (2, 3), {"padding": 1, "input_dilation": (2, 3)}),
        ((5, 4), (2, 3), {"padding": "CIRCULAR"}),
        ((5, 4), (3, 3), {"groups": 2, "padding": "SAME"}),
        ((3, 2, 4), (2, 2, 3), {"padding": "SAME_LOWER", "groups": 2}),
        ((5, 4), (5, 4), {"padding": 1, "strides": 2}),
    ],
)
def test_matrix_is_the_convolution(input_shape, kernel_size, options):
    groups = options.get("groups", 1)
    rng = np.random.default_rng(0)
    kernel = rng.integers(-8, 8, (*kernel_size, 4 // groups, 6)).astype(np.float32)
    x = rng.integers(-8, 8, (3, *input_shape, 4)).astype(np.float32)
    matrix = unroll_conv(kernel, input_shape, **options)
    want = flax_conv(kernel, x, **options)
    np.testing.assert_array_equal(x.reshape(3, -1) @ matrix, want.reshape(3, -1))
    back = roll_dense(matrix, input_shape, kernel_size, 4, 6, **options)
    np.testing.assert_array_equal(back, kernel)
    np.testing.assert_array_equal(
        jax.jit(lambda k: unroll_conv(k, input_shape, **options))(kernel), matrix
    )


def bytes_of(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def bit_patterns(dtype):
    """A (2, 3, 2, 32) kernel: all bit patterns of a byte, many of a wider type."""
    shape = (2, 3, 2, 32)
    count = math.prod(shape)
    rng = np.random.default_rng(1)
    if dtype.itemsize > 1:
        raw = rng.integers(0, 256, (count, dtype.itemsize)).astype(np.uint8)
        # All ones in the exponent: half of the entries are NaNs with payloads.
        raw[::2, -1] |= 0x7F
        raw[::2, -2] |= 0xF0
        raw[1] = [*[0] * (dtype.itemsize - 1), 0x80]
        return raw.reshape(-1).view(dtype).reshape(shape)
    patterns = np.arange(count, dtype=np.int64)
    if dtype.name.startswith("float8"):
        return patterns.astype(np.uint8).view(dtype).reshape(shape)
    if dtype.name == "float4_e2m1fn":
        return (patterns % 16).astype(np.uint8).view(dtype).reshape(shape)
    bits = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "bool": 1}.get(dtype.name, 8)
    low = -(2 ** (bits - 1)) if dtype.name.startswith("int") else 0
    return (patterns % 2**bits + low).astype(dtype).reshape(shape)


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_survives(dtype, kind):
    dtype = jnp.dtype(dtype)
    with enable_x64(dtype.name in ("float64", "complex128", "int64")):
        kernel = bit_patterns(dtype)
        entries = jnp.asarray(kernel) if kind == "jax" else kernel
        for groups in (1, 2):
            matrix = unroll_conv(entries, (3, 4), padding=1, groups=groups)
            assert isinstance(matrix, jax.Array if kind == "jax" else np.ndarray)
            back = roll_dense(
                matrix, (3, 4), (2, 3), 2 * groups, 32, padding=1, groups=groups
            )
            assert type(back) is type(matrix)
            assert back.dtype == dtype
            np.testing.assert_array_equal(bytes_of(back), bytes_of(kernel))
            want = unroll_conv(kernel, (3, 4), padding=1, groups=groups)
            np.testing.assert_array_equal(bytes_of(matrix), bytes_of(want))
            traced = jax.jit(
                lambda k, g=groups: unroll_conv(k, (3, 4), padding=1, groups=g)
            )
            np.testing.assert_array_equal(bytes_of(traced(kernel)), bytes_of(want))


@quick
@given(st.data())
def test_round_trip_and_same_parameters(data):
    rank = data.draw(st.integers(1, 3))

    def sizes(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(rank))

    input_shape, kernel_size, strides = sizes(1, 4), sizes(1, 3), sizes(1, 3)
    padding = tuple(zip(sizes(0, 1), sizes(0, 1)))
    groups = data.draw(st.integers(1, 2))
    options = {"strides": strides, "padding": padding, "groups": groups}
    try:
        found = classify(input_shape, kernel_size, **options)
    except ValueError:
        assume(False)
    kernel = 1 + np.arange(math.prod(kernel_size) * 2 * 4).reshape(*kernel_size, 2, 4)
    matrix = unroll_conv(kernel, input_shape, **options)
    geometry = found.geometry
    assert matrix.shape == (
        geometry.input_elements * 2 * groups,
        geometry.output_elements * 4,
    )
    size = unrolled_bytes(geometry, 2 * groups, 4, matrix.itemsize)
    assert matrix.nbytes == size
    if found.base == "full_window" and groups == 1:
        np.testing.assert_array_equal(matrix, conv_kernel_to_dense(kernel))
    # The same parameters: every column holds the kernel's, whole and in order.
    if found.same_parameters:
        for column in matrix.reshape(matrix.shape[0], -1, 4).transpose(1, 2, 0):
            for o, entries in enumerate(column):
                flat = entries[entries != 0]
                assert sorted(flat) == sorted(kernel[..., o].ravel())
    try:
        back = roll_dense(matrix, input_shape, kernel_size, 2 * groups, 4, **options)
    except ValueError as error:
        assert "meets no input" in str(error)  # noqa: PT017
        reads = [
            {
                tap
                for window in geometry.reads(i)
                for tap, n in enumerate(window)
                if n is not None
            }
            for i in range(rank)
        ]
        assert math.prod(map(len, reads)) < math.prod(kernel_size)
    else:
        np.testing.assert_array_equal(back, kernel)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_sums_over_the_positions(dtype):
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.integers(-1, 2, (2, 2, 2, 4)), dtype)
    x = jnp.asarray(rng.integers(-1, 2, (1, 3, 4, 4)), dtype)

    def dense(kernel):
        y = x.reshape(1, -1) @ unroll_conv(kernel, (3, 4), padding="SAME", groups=2)
        return jnp.sum(y * y)

    def conv(kernel):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )
        return jnp.sum(y * y)

    np.testing.assert_array_equal(jax.grad(dense)(kernel), jax.grad(conv)(kernel))


def test_size_is_estimated_before_anything_is_made():
    kernel = np.zeros((3, 3, 3, 64), np.float32)
    with pytest.raises(ValueError, match=r"1,843,968\.0 MiB, more than max_bytes="):
        unroll_conv(kernel, (224, 224), padding=1)
    small = unroll_conv(np.zeros((2, 1, 1), np.float32), 3, max_bytes=24)
    assert small.nbytes == 24
    with pytest.raises(ValueError, match="max_bytes=23"):
        unroll_conv(np.zeros((2, 1, 1), np.float32), 3, max_bytes=23)
    assert unrolled_bytes(resolve_geometry(3, 2), 1, 1, 4) == 24


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
def test_two_taps_on_one_input_are_refused(padding):
    kernel = np.arange(3.0).reshape(3, 1, 1)
    with pytest.raises(ValueError, match="with two taps, whose entries"):
        unroll_conv(kernel, 2, padding=padding)


def bad(change):
    kernel = np.arange(1.0, 25.0, dtype=np.float32).reshape(2, 3, 2, 2)
    matrix = unroll_conv(kernel, (3, 4), padding=1)
    change(matrix)
    return matrix


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        # The first input does not meet the last output: a zero, even a negative one.
        (0, 31, 1.0, r"row 0, column 31: got 1.0, expected 0.0"),
        (0, 31, -0.0, r"row 0, column 31: got -0.0.*bits 80000000, 00000000"),
        # The last input meets it: one of the places of a repeated entry.
        (22, 31, 99.0, r"1 of 768 entries differ, first row 22, column 31"),
    ],
)
def test_a_matrix_without_the_structure_is_refused(row, column, value, message):
    def change(matrix):
        assert matrix[row, column] != value or value == 0
        matrix[row, column] = value

    roll_dense(bad(lambda m: None), (3, 4), (2, 3), 2, 2, padding=1)
    with pytest.raises(ValueError, match=message):
        roll_dense(bad(change), (3, 4), (2, 3), 2, 2, padding=1)


def test_nan_payloads_that_differ_are_refused():
    kernel = np.full((2, 1, 1), np.nan, np.float32)
    matrix = unroll_conv(kernel, 4)
    assert np.isnan(roll_dense(matrix, 4, 2, 1, 1)).all()
    matrix.view(np.uint32)[2, 2] ^= 1
    with pytest.raises(
        ValueError, match="first row 2, column 2: got nan, expected nan"
    ):
        roll_dense(matrix, 4, 2, 1, 1)


def test_the_wrong_geometry_is_refused():
    kernel = np.arange(1.0, 7.0).reshape(3, 1, 2)
    matrix = unroll_conv(kernel, 5, padding="SAME")
    with pytest.raises(ValueError, match="not an unrolled convolution"):
        roll_dense(matrix, 5, 3, 1, 2, padding="CAUSAL")
    with pytest.raises(ValueError, match=r"expected shape \(5, 6\) for input 5"):
        roll_dense(matrix, 5, 3, 1, 2)
    with pytest.raises(ValueError, match="groups: expected a divisor of 1 input"):
        roll_dense(matrix, 5, 3, 1, 2, padding="SAME", groups=2)


def test_a_tap_that_meets_no_input_is_refused():
    kernel = np.arange(1.0, 4.0).reshape(3, 1, 1)
    matrix = unroll_conv(kernel, 1, padding=1)
    assert matrix.tolist() == [[2.0]]
    with pytest.raises(ValueError, match=r"tap \(0,\) of .* meets no input"):
        roll_dense(matrix, 1, 3, 1, 1, padding=1)


def test_refusals_by_name():
    with pytest.raises(ValueError, match="float8_e8m0fnu has no zero"):
        unroll_conv(np.ones((2, 1, 1), jnp.float8_e8m0fnu), 3)
    with pytest.raises(ValueError, match="expected a conv kernel"):
        unroll_conv(np.ones((2, 1)), 3)
    with pytest.raises(ValueError, match="groups: expected a divisor of the 3"):
        unroll_conv(np.ones((2, 1, 3)), 3, groups=2)
    with pytest.raises(TypeError, match="can't be traced"):
        jax.jit(lambda m: roll_dense(m, 3, 2, 1, 1))(np.ones((3, 2)))
