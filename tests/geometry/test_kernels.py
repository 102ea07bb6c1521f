"""Dense kernel to conv kernel and back: the right entries, to the bit, no copies."""

import contextlib
import math

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from fcconv_jax.backends.faults import PACKED
from fcconv_jax.geometry.kernels import (
    Rearrangement,
    bias_rearrangement,
    conv_kernel_to_dense,
    dense_kernel_to_conv,
    kernel_rearrangement,
    window_letters,
)
from fcconv_jax.versions import enable_x64

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)

DTYPES = (
    "float64 float32 bfloat16 float16 complex64 complex128 bool "
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64 int4 uint4 int2 uint2 "
    "float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz "
    "float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn"
).split()
if PACKED.is_in(jaxlib.version.__version__):
    DTYPES = [
        name
        for name in DTYPES
        if "int2" not in name and "t4_" not in name and "int4" not in name
    ]
SUB_BYTE = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4}


def every_bit_pattern(dtype, shape):
    """An array whose bytes are random: NaN payloads, infinities, -0, denormals."""
    dtype = jnp.dtype(dtype)
    count = math.prod(shape)
    rng = np.random.default_rng(0)
    if dtype.name in SUB_BYTE:
        # One entry a byte; its high bits must be what a cast leaves there.
        low = rng.integers(0, 2 ** SUB_BYTE[dtype.name], count).astype(np.uint8)
        return low.view(dtype).astype(np.float32).astype(dtype).reshape(shape)
    if dtype.name == "bool":
        return rng.integers(0, 2, count).astype(bool).reshape(shape)
    raw = rng.integers(0, 256, (count, dtype.itemsize)).astype(np.uint8)
    if dtype.itemsize == 1:
        raw[:] = np.arange(count)[:, None] + 256 - count
        raw[: count // 2] -= 128
    else:
        # All ones in the exponent: every other entry is a NaN with a payload.
        raw[::2, -1] |= 0x7F
        raw[::2, -2] |= 0xF0
    array = raw.reshape(-1).view(dtype).copy()
    # A -0, an infinity and two NaNs that differ in their payload, by their bits.
    if dtype.name in ("float64", "float32", "bfloat16", "float16"):
        info = jnp.finfo(dtype)
        bits = array.view(f"u{dtype.itemsize}")
        exponent = ((1 << info.nexp) - 1) << info.nmant
        sign = 1 << (info.bits - 1)
        quiet = 1 << (info.nmant - 1)
        bits[:5] = [sign, exponent, exponent | quiet | 5, sign | exponent | 3, 1]
    return array.reshape(shape)


def same_bits(a, b):
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(
        a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    )


def wide(dtype):
    x64 = jnp.dtype(dtype).itemsize >= 8 and dtype != "complex64"
    return enable_x64(True) if x64 else contextlib.nullcontext()


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(dtype, kind):
    with wide(dtype):
        dense = every_bit_pattern(dtype, (2 * 3 * 4, 6))
        grouped = every_bit_pattern(dtype, (2, 2 * 3 * 4, 3))
        for order, groups, kernel in (
            ("HWC", 1, dense),
            ("CHW", 1, dense),
            ("HWC", 2, grouped),
        ):
            given_kernel = kernel if kind == "numpy" else jnp.asarray(kernel)
            conv = dense_kernel_to_conv(
                given_kernel, (2, 3), order=order, groups=groups
            )
            assert isinstance(conv, np.ndarray if kind == "numpy" else jax.Array)
            back = conv_kernel_to_dense(conv, order=order, groups=groups)
            same_bits(back, kernel)
            # NumPy moves bytes on its own: what jax gives must be what it gives.
            same_bits(
                conv, dense_kernel_to_conv(kernel, (2, 3), order=order, groups=groups)
            )


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.endswith(("64", "128"))])
def test_round_trip_under_jit_is_bit_exact(dtype):
    kernel = every_bit_pattern(dtype, (24, 5))
    there = jax.jit(lambda k: dense_kernel_to_conv(k, (2, 3), order="CHW"))
    back = jax.jit(lambda k: conv_kernel_to_dense(k, order="CHW"))
    same_bits(back(there(kernel)), kernel)


@pytest.mark.parametrize(
    ("order", "axes"),
    [
        ("HWC", "HWC"),
        (None, "HWC"),
        ("CHW", "CHW"),
        ("WHC", "WHC"),
        ("CWH", "CWH"),
        ("WC", "WC"),
        ("CW", "CW"),
        ("DHWC", "DHWC"),
        ("CDHW", "CDHW"),
        ("WCHD", "WCHD"),
    ],
)
def test_the_entry_goes_where_the_flatten_says(order, axes):
    sizes = {"D": 2, "H": 3, "W": 4, "C": 5}
    shape = [sizes[a] for a in axes]
    rows = math.prod(shape)
    dense = np.arange(rows * 2).reshape(rows, 2)
    window = tuple(sizes[a] for a in window_letters(len(axes) - 1))
    conv = dense_kernel_to_conv(dense, window, order=order)
    assert conv.shape == (*window, 5, 2)
    for index in np.ndindex(*window, 5):
        place = dict(zip(window_letters(len(window)) + "C", index))
        row = 0
        for a in axes:
            row = row * sizes[a] + place[a]
        np.testing.assert_array_equal(conv[index], dense[row])


def test_groups_are_major_in_the_output():
    dense = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    conv = dense_kernel_to_conv(dense, (2, 3), groups=2)
    assert conv.shape == (2, 3, 2, 6)
    for h, w, c, o in np.ndindex(conv.shape):
        assert conv[h, w, c, o] == dense[o // 3, (h * 3 + w) * 2 + c, o % 3]
    assert bias_rearrangement((2, 3))(np.arange(6).reshape(2, 3)).tolist() == [
        *range(6)
    ]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("letters", "window"),
    [("W", (3,)), ("HW", (2, 3)), ("DHW", (2, 1, 3)), ("HW", (1, 1))],
)
def test_flax_dense_and_conv_agree_exactly(letters, window, groups):
    channels, features = 4, 6
    rng = np.random.default_rng(1)
    x = rng.integers(-8, 8, (2, *window, channels)).astype(np.float32)
    rows = math.prod(window) * channels // groups
    kernel = rng.integers(-8, 8, (groups, rows, features // groups)).astype(np.float32)
    bias = rng.integers(-8, 8, (groups, features // groups)).astype(np.float32)
    split = np.split(x, groups, axis=-1)
    outputs = [
        nn.Dense(features // groups).apply(
            {"params": {"kernel": kernel[g], "bias": bias[g]}},
            split[g].reshape(2, rows),
        )
        for g in range(groups)
    ]
    dense = kernel if groups > 1 else kernel[0]
    conv = nn.Conv(features, window, padding="VALID", feature_group_count=groups)
    params = {
        "kernel": dense_kernel_to_conv(dense, window, groups=groups),
        "bias": bias_rearrangement(bias.shape)(bias),
    }
    got = conv.apply({"params": params}, x)
    assert isinstance(got, jax.Array)
    assert got.shape == (2, *(1 for _ in letters), features)
    np.testing.assert_array_equal(
        np.asarray(got).reshape(2, features), np.concatenate(outputs, -1)
    )


def test_torch_linear_and_conv2d_agree_exactly():
    torch = pytest.importorskip("torch", reason="needs: pip install -e '.[torch]'")
    rng = np.random.default_rng(2)
    x = rng.integers(-8, 8, (2, 3, 4, 5)).astype(np.float32)  # NCHW
    linear = torch.nn.Linear(3 * 4 * 5, 6)
    conv2d = torch.nn.Conv2d(3, 6, (4, 5))
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(rng.integers(-8, 8, (6, 60)).astype("f4")))
        linear.bias.copy_(torch.from_numpy(rng.integers(-8, 8, 6).astype("f4")))
        # torch flattens CHW and keeps (out, in) and OIHW.
        kernel = dense_kernel_to_conv(linear.weight.numpy().T, (4, 5), order="CHW")
        oihw = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        conv2d.weight.copy_(torch.from_numpy(oihw))
        conv2d.bias.copy_(linear.bias)
        want = linear(torch.from_numpy(x).flatten(1)).numpy()
        got = conv2d(torch.from_numpy(x)).numpy().reshape(2, 6)
    np.testing.assert_array_equal(got, want)
    ours = jax.lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1),
        kernel,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_array_equal(
        np.asarray(ours).reshape(2, 6) + linear.bias.detach().numpy(), want
    )


# The worked example of Machine Learning Q and AI, ch. 12 (its supplement prints
# -0.4775 and -2.1469): torch seed 123, Linear(4, 2).
W = np.array(
    [
        [-0.20388805866, 0.01656228304, -0.24832928181, 0.18855679035],
        [-0.42602753639, 0.36652195454, -0.36342012882, -0.39752095938],
    ],
    np.float32,
)
B = np.array([-0.31594353914, 0.22644674778], np.float32)
X = np.array([1, 2, 3, 4], np.float32)
Y = np.array([-0.47746772, -2.1468811], np.float32)


def book_conv(x, kernel, **options):
    conv = nn.Conv(2, kernel.shape[:2], **{"padding": "VALID", **options})
    out = conv.apply({"params": {"kernel": kernel, "bias": B}}, x[None])
    return np.asarray(out)[0]


def assert_digits(got, expected):
    """The numbers, to the six decimals that are known of them."""
    got, expected = (np.float64(array).round(6) for array in (got, expected))
    np.testing.assert_array_equal(got, expected)


def test_book_example():
    assert_digits(X @ W.T + B, Y)
    window = dense_kernel_to_conv(W.T, (2, 2))
    image = X.reshape(2, 2, 1)
    assert_digits(book_conv(image, window)[0, 0], Y)
    point = dense_kernel_to_conv(W.T, (1, 1))
    assert_digits(book_conv(X.reshape(1, 1, 4), point)[0, 0], Y)


def test_book_exercises():
    image, kernel = X.reshape(2, 2, 1), dense_kernel_to_conv(W.T, (2, 2))
    stride = book_conv(image, kernel, strides=2)
    np.testing.assert_array_equal(stride, book_conv(image, kernel))
    padded = book_conv(image, kernel, padding=1)
    expected = [
        [
            [-0.127387, -0.187159, -0.812602],
            [0.266289, -0.477468, -1.717037],
            [-0.266257, -0.861359, -1.131496],
        ],
        [
            [-0.171074, -0.932015, -0.500394],
            [-0.599594, -2.146881, -2.079289],
            [1.326013, 0.414452, -1.477663],
        ],
    ]
    assert_digits(padded.transpose(2, 0, 1), expected)
    lost = book_conv(image, kernel, padding=1, strides=2)
    assert lost.shape == (2, 2, 2)
    assert np.abs(lost - Y).max(axis=-1).min() > 0.1


def test_book_controls_do_not_match():
    image = X.reshape(2, 2, 1)
    fortran = dense_kernel_to_conv(W.T, (2, 2), order="WHC")
    got = book_conv(image, fortran)[0, 0]
    assert_digits(got, [-0.212576, -1.416939])
    assert np.abs(got - Y).min() > 0.1
    flipped = dense_kernel_to_conv(W.T, (2, 2))[::-1, ::-1]
    got = book_conv(image, flipped)[0, 0]
    assert_digits(got, [-1.389911, -1.502459])
    assert np.abs(got - Y).min() > 0.1


def test_flatten_order_shows_with_several_channels():
    # One channel cannot show it: HWC and CHW are then the same.
    x = np.arange(12.0).reshape(2, 2, 3)
    dense = np.arange(24.0).reshape(12, 2)
    want = x.transpose(2, 0, 1).reshape(-1) @ dense
    right = np.tensordot(x, dense_kernel_to_conv(dense, (2, 2), order="CHW"), 3)
    wrong = np.tensordot(x, dense_kernel_to_conv(dense, (2, 2)), 3)
    np.testing.assert_array_equal(right, want)
    assert (wrong != want).all()


@st.composite
def rearrangements(draw):
    rank = draw(st.integers(1, 3))
    window = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    order = "".join(draw(st.permutations(window_letters(rank) + "C")))
    groups = draw(st.integers(1, 3))
    rows = math.prod(window) * draw(st.integers(1, 3))
    features = draw(st.integers(1, 3))
    dense = (rows, features) if groups == 1 else (groups, rows, features)
    return kernel_rearrangement(dense, window, order=order, groups=groups)


@quick
@given(rearrangements())
def test_rearrangement_is_a_bijection(move):
    array = np.arange(math.prod(move.source)).reshape(move.source)
    there = move(array)
    assert there.shape == move.target
    assert sorted(there.ravel()) == sorted(array.ravel())
    np.testing.assert_array_equal(move.inverse()(there), array)
    assert move.inverse().inverse() == move
    if move.is_reshape:
        np.testing.assert_array_equal(there.ravel(), array.ravel())
        assert np.shares_memory(there, array)
        assert np.shares_memory(move.inverse()(there), array)


def test_vmap_over_a_stack_of_layers():
    stack = jnp.arange(3 * 12 * 2.0).reshape(3, 12, 2)
    got = jax.vmap(lambda k: dense_kernel_to_conv(k, (2, 2), order="CHW"))(stack)
    want = [dense_kernel_to_conv(k, (2, 2), order="CHW") for k in np.asarray(stack)]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("order", "groups"), [("HWC", 1), ("CHW", 1), ("HWC", 2)])
def test_gradient_is_the_gradient_mapped_back(order, groups):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.integers(-4, 4, (2, 4, 3, 4)), jnp.float32)
    shape = (24, 4) if groups == 1 else (2, 12, 2)
    dense = jnp.asarray(rng.integers(-4, 4, shape), jnp.float32)

    def conv(kernel):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.sum(y * y)

    def through(kernel):
        return conv(dense_kernel_to_conv(kernel, (3, 2), order=order, groups=groups))

    got = jax.grad(through)(dense)
    kernel = dense_kernel_to_conv(dense, (3, 2), order=order, groups=groups)
    want = conv_kernel_to_dense(jax.grad(conv)(kernel), order=order, groups=groups)
    np.testing.assert_array_equal(got, want)
    assert np.any(np.asarray(got))


def test_reshape_of_a_cpu_array_is_no_copy():
    kernel = jnp.arange(64 * 32.0).reshape(64, 32)
    conv = dense_kernel_to_conv(kernel, (4, 4))
    assert conv.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()
    assert conv.sharding == kernel.sharding
    assert conv.committed == kernel.committed
    put = jax.device_put(kernel, jax.devices("cpu")[0])
    conv = dense_kernel_to_conv(put, (4, 4))
    assert conv.unsafe_buffer_pointer() == put.unsafe_buffer_pointer()
    assert conv.committed == put.committed is True


@pytest.mark.parametrize("which", ["original", "alias", "both"])
@pytest.mark.parametrize("how", ["donate", "delete", "forget"])
def test_shared_memory_is_never_corrupted(which, how):
    overwrite = jax.jit(lambda a: a * 0 - 7, donate_argnums=0)
    want = np.arange(256 * 128, dtype=np.float32) + 1
    move = Rearrangement.reshape((256, 128), (4, 64, 128))
    for _ in range(5):
        arrays = {"original": jnp.arange(256 * 128.0).reshape(256, 128) + 1}
        arrays["alias"] = move(arrays["original"])
        outputs = []
        for name in list(arrays) if which == "both" else [which]:
            if how == "donate":
                outputs.append(overwrite(arrays[name]))
            elif how == "delete":
                arrays[name].delete()
            if which != "both" or how != "donate":
                del arrays[name]
        # Give the allocator every chance to hand the memory out again.
        churn = [jnp.full((256, 128), float(i)) for i in range(8)]
        jax.block_until_ready((churn, outputs))
        for output in outputs:
            np.testing.assert_array_equal(output, np.full(output.shape, -7.0))
        for name, array in arrays.items():
            if not array.is_deleted():
                np.testing.assert_array_equal(np.ravel(array), want, err_msg=name)
            else:
                assert how == "donate"


def test_training_on_the_converted_kernel_leaves_the_original():
    step = jax.jit(lambda k: k - 1, donate_argnums=0)
    kernel = jnp.arange(64 * 32.0).reshape(64, 32)
    conv = dense_kernel_to_conv(kernel, (4, 4))
    for _ in range(4):
        conv = step(conv)
    np.testing.assert_array_equal(kernel, np.arange(64 * 32.0).reshape(64, 32))
    np.testing.assert_array_equal(
        conv_kernel_to_dense(conv), np.arange(64 * 32.0).reshape(64, 32) - 4
    )


def test_what_cannot_alias_reshapes_as_jax_does():
    move = Rearrangement.reshape((4, 2), (2, 2, 2))
    weak = jnp.full((4, 2), 1.0)
    assert jax.typeof(weak).weak_type
    assert jax.typeof(move(weak)).weak_type
    with enable_x64(True):
        double = jnp.ones((4, 2), jnp.float64)
    assert move(double).dtype == double.reshape(2, 2, 2).dtype
    keys = jax.random.split(jax.random.key(0), 8).reshape(4, 2)
    assert move(keys).shape == (2, 2, 2)
    assert Rearrangement.reshape((0, 2), (2, 0))(jnp.zeros((0, 2))).shape == (2, 0)
    with jax.transfer_guard("disallow_explicit"):
        assert move(weak * weak).shape == (2, 2, 2)
    ready = jnp.ones((4, 2), jnp.bfloat16)
    with jax.transfer_guard("disallow_explicit"):
        assert move(ready).dtype == jnp.bfloat16
    closed = jax.make_jaxpr(lambda s: move(ready) * s)(1.0)
    assert closed.out_avals[0].shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dense_kernel_to_conv(np.zeros((10, 2)), (2, 2)),
            "multiple of the 4 taps",
        ),
        (lambda: dense_kernel_to_conv(np.zeros((8, 2)), (2, 2), order="HW"), "'HW'"),
        (lambda: dense_kernel_to_conv(np.zeros((8, 2)), (2, 2), order="CWW"), "HWC"),
        (lambda: dense_kernel_to_conv(np.zeros(8), (2, 2)), r"shape \(F, O\)"),
        (lambda: dense_kernel_to_conv(np.zeros((8, 2)), (0, 2)), "kernel_size"),
        (lambda: dense_kernel_to_conv(np.zeros((8, 2)), 2, groups=2), r"\(2, F, O/2\)"),
        (
            lambda: dense_kernel_to_conv(np.zeros((3, 8, 2)), 2, groups=2),
            r"\(2, F, O/2\)",
        ),
        (lambda: dense_kernel_to_conv(np.zeros((8, 2)), 2, groups=0), "groups"),
        (lambda: conv_kernel_to_dense(np.zeros((8, 2))), "a conv kernel"),
        (
            lambda: conv_kernel_to_dense(np.zeros((2, 2, 3)), groups=2),
            "groups: .* got 2",
        ),
        (lambda: window_letters(4), "1 to 3 dimensions.* got 4"),
        (lambda: Rearrangement.reshape((2, 3), (5,)), "not a rearrangement"),
        (lambda: Rearrangement.reshape((6,), (2, 3))(np.zeros(5)), r"Expected shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@quick
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from((1, 1, 2, 3)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_a_transposed_kernel_is_the_one_of_lax(window, groups, inner, outer, random):
    rank = len(window)
    letters = window_letters(rank)
    order = "".join(random.sample(letters + "C", rank + 1))
    rng = np.random.default_rng(0)
    conv = rng.integers(-3, 4, (*window, inner, groups * outer)).astype(np.float32)
    shape = [random.randint(1, 3) for _ in window]
    x = rng.integers(-3, 4, (2, *shape, groups * inner)).astype(np.float32)
    want = jax.lax.conv_general_dilated(
        *(x, conv, (1,) * rank, [(k - 1, k - 1) for k in window]),
        lhs_dilation=window,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )
    dense = conv_kernel_to_dense(conv, order=order, groups=groups, transposed=True)
    rows = x.reshape(*x.shape[:-1], groups, inner)
    kernel = dense.reshape(groups, inner, -1)
    y = np.einsum("...gi,gio->...go", rows, kernel)
    # Depth to space, with the axes of the window found by their letters.
    sizes = dict(zip(letters, window), C=outer)
    y = y.reshape(*y.shape[:-1], *(sizes[a] for a in order))
    at = {a: 2 + rank + i for i, a in enumerate(order)}
    inner_first = [n for i, a in enumerate(letters) for n in (1 + i, at[a])]
    y = y.transpose(0, *inner_first, 1 + rank, at["C"]).reshape(want.shape)
    np.testing.assert_array_equal(y, want)
    again = dense_kernel_to_conv(
        dense, window, order=order, groups=groups, transposed=True
    )
    same_bits(again, conv)


@quick
@given(st.permutations(range(4)), st.sets(st.integers(0, 3)))
def test_a_reversed_rearrangement_has_an_inverse_and_a_normal_form(perm, flip):
    split = (2, 3, 1, 2)
    target = (*(split[p] for p in perm), 1)
    move = Rearrangement((12,), split, tuple(perm), target, tuple(sorted(flip)))
    array = np.arange(12, dtype=np.int32)
    moved = move(array)
    same_bits(moved, move(jnp.asarray(array)))
    same_bits(move.inverse()(moved), array)
    same_bits(move.normal()(array), moved)
    assert move.normal().normal() == move.normal()
    assert move.is_reshape == np.array_equal(moved.reshape(-1), array)
    stack = np.stack([array, array + 12])
    same_bits(move.stacked((2,))(stack), np.stack([moved, moved + 12]))


def test_the_window_is_an_integer_of_any_type():
    found = dense_kernel_to_conv(np.zeros((6, 5)), np.int64(3))
    assert found.shape == (3, 2, 5)
    with pytest.raises(ValueError, match=r"kernel_size: expected an int.* got True"):
        dense_kernel_to_conv(np.zeros((6, 5)), True)
    with pytest.raises(ValueError, match="groups: expected an int, got True"):
        dense_kernel_to_conv(np.zeros((6, 5)), 3, groups=True)
