"""The predicate against brute force, Flax's own paddings, and the words."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fcconv_jax.geometry.classify import classify, explain
from fcconv_jax.geometry.convolution import ConvGeometry, resolve_geometry

quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def brute_force_matrix(geometry, kernel):
    """(inputs, outputs) of a one-channel convolution, by probing with the identity."""
    rank = len(geometry.input_shape)
    elements = math.prod(geometry.input_shape)
    probe = np.eye(elements, dtype=np.int64).reshape(elements, *geometry.input_shape)
    if geometry.padding_mode == "zeros":
        dilated = np.zeros(
            (
                elements,
                *(
                    (n - 1) * d + 1
                    for n, d in zip(geometry.input_shape, geometry.input_dilation)
                ),
            ),
            np.int64,
        )
        every = (slice(None), *(slice(None, None, d) for d in geometry.input_dilation))
        dilated[every] = probe
        grown = [(max(low, 0), max(high, 0)) for low, high in geometry.padding]
        padded = np.pad(dilated, [(0, 0), *grown])
        crop = [
            slice(max(-low, 0), size - max(-high, 0))
            for (low, high), size in zip(geometry.padding, padded.shape[1:])
        ]
        padded = padded[(slice(None), *crop)]
    else:
        mode = {"circular": "wrap", "reflect": "reflect"}[geometry.padding_mode]
        padded = np.pad(probe, [(0, 0), *geometry.padding], mode=mode)
    extents = [
        (k - 1) * d + 1 for k, d in zip(geometry.kernel_size, geometry.kernel_dilation)
    ]
    outputs = [
        (size - extent) // stride + 1
        for size, extent, stride in zip(padded.shape[1:], extents, geometry.strides)
    ]
    result = np.zeros((elements, *outputs), np.int64)
    for tap in itertools.product(*map(range, geometry.kernel_size)):
        window = [
            slice(
                t * geometry.kernel_dilation[i],
                t * geometry.kernel_dilation[i]
                + (outputs[i] - 1) * geometry.strides[i]
                + 1,
                geometry.strides[i],
            )
            for i, t in zip(range(rank), tap)
        ]
        result += kernel[tap] * padded[(slice(None), *window)]
    return result


def block_matrix(geometry, kernel, outputs):
    """Position p holds the kernel's entries at the inputs p * k + tap; 0 elsewhere."""
    if any(
        o * k > n
        for o, k, n in zip(outputs, geometry.kernel_size, geometry.input_shape)
    ):
        return None
    result = np.zeros((*geometry.input_shape, *outputs), np.int64)
    for position in itertools.product(*map(range, outputs)):
        window = tuple(
            slice(p * k, p * k + k) for p, k in zip(position, geometry.kernel_size)
        )
        result[(*window, *position)] = kernel
    return result.reshape(-1, *outputs)


def picked_matrix(geometry, kernel, outputs):
    """Output p reads input p * stride with the one tap; others are skipped."""
    left = tuple(-(-n // s) for n, s in zip(geometry.input_shape, geometry.strides))
    if kernel.size > 1 or outputs != left:
        return None
    result = np.zeros((*geometry.input_shape, *outputs), np.int64)
    for position in np.ndindex(*outputs):
        read = tuple(p * s for p, s in zip(position, geometry.strides))
        result[(*read, *position)] = kernel.item()
    return result.reshape(-1, *outputs)


def window_matrix(geometry, kernel, outputs):
    """Input p holds the reversed kernel at the outputs of its own window."""
    size = tuple(n * k for n, k in zip(geometry.input_shape, geometry.kernel_size))
    if outputs != size:
        return None
    result = np.zeros((*geometry.input_shape, *outputs), np.int64)
    for position in np.ndindex(geometry.input_shape):
        window = tuple(
            slice(p * k, p * k + k) for p, k in zip(position, geometry.kernel_size)
        )
        result[(*position, *window)] = np.flip(kernel)
    return result.reshape(-1, *outputs)


def distinct_entries(kernel_size):
    # Powers of two: no sum of entries is another entry or another sum.
    taps = math.prod(kernel_size)
    return (2 ** np.arange(taps, dtype=np.int64)).reshape(kernel_size)


@st.composite
def geometries(draw):
    rank = draw(st.sampled_from((1, 1, 2, 2, 3)))
    largest = {1: 8, 2: 5, 3: 3}[rank]

    def sizes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    input_shape = sizes(1, largest)
    # Near misses matter more than random numbers: start from a valid choice often.
    kernel = tuple(
        draw(st.sampled_from((1, n, max(n // 2, 1), draw(st.integers(1, 3)))))
        for n in input_shape
    )
    strides = tuple(draw(st.sampled_from((1, k, 2, k + 1, 2 * k))) for k in kernel)
    mode = draw(st.sampled_from(("zeros", "zeros", "zeros", "circular", "reflect")))
    plain = draw(st.booleans())
    pads = st.sampled_from((0, 0, 0, 0, 1, 2, -1) if mode == "zeros" else (0, 0, 1, 2))
    padding = tuple((0 if plain else draw(pads), draw(pads)) for _ in range(rank))
    holes = tuple(
        draw(st.sampled_from((1, 1, 1, 2, 3))) if mode == "zeros" and not plain else 1
        for _ in range(rank)
    )
    if mode == "zeros" and draw(st.sampled_from((False, False, True))):
        # A transposed convolution, or nearly one.
        holes, strides = (
            tuple(map(draw, map(st.sampled_from, zip(kernel, kernel, sizes(1, 3))))),
            (1,) * rank,
        )
        padding = tuple(
            (k - 1, draw(st.sampled_from((k - 1, k - 1, k)))) for k in kernel
        )
    spread = tuple(draw(st.sampled_from((1, 1, h, 2, 5))) for h in holes)
    try:
        return ConvGeometry(
            input_shape, kernel, strides, padding, mode, holes, spread, 1
        )
    except ValueError:
        assume(False)


def classified(geometry):
    assert geometry.padding_mode == "zeros"
    return classify(
        geometry.input_shape,
        geometry.kernel_size,
        geometry.strides,
        geometry.padding,
        geometry.input_dilation,
        geometry.kernel_dilation,
    )


def check_against_brute_force(geometry):
    kernel = distinct_entries(geometry.kernel_size)
    matrix = brute_force_matrix(geometry, kernel)
    assert matrix.shape[1:] == geometry.output_shape
    reads, picks, writes = (
        expected is not None and np.array_equal(matrix, expected)
        for expected in (
            block_matrix(geometry, kernel, matrix.shape[1:]),
            picked_matrix(geometry, kernel, matrix.shape[1:]),
            window_matrix(geometry, kernel, matrix.shape[1:]),
        )
    )
    reads |= picks and geometry.input_dilation == (1,) * len(geometry.input_shape)
    assert (geometry.base not in ("unrolled", "unpatchify")) == reads, geometry
    assert (geometry.base == "unpatchify") == (writes and not reads), geometry
    return reads or writes


@settings(quick, max_examples=800)
@given(geometries())
def test_predicate_is_brute_force(geometry):
    same = check_against_brute_force(geometry)
    if geometry.padding_mode == "zeros":
        found = classified(geometry)
        assert found.same_parameters == same
        assert bool(found.fix) == (not same)
        assert found.reason.endswith(".")
        assert explain(found).count("\n") == 4 + (not same)


def test_predicate_is_brute_force_on_every_small_line():
    counts = {False: 0, True: 0}
    for size, k, stride, low, high, holes, spread in itertools.product(
        range(1, 5), range(1, 4), range(1, 5), (-1, 0, 1), (-1, 0, 1, 2), (1, 2), (1, 2)
    ):
        try:
            geometry = ConvGeometry(
                (size,),
                (k,),
                (stride,),
                ((low, high),),
                "zeros",
                (holes,),
                (spread,),
                1,
            )
        except ValueError:
            continue
        counts[check_against_brute_force(geometry)] += 1
    assert counts[True] > 150
    assert counts[False] > 300


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_predicate_is_brute_force_on_every_small_ring(mode):
    counts = {False: 0, True: 0}
    for size, k, stride, low, high, spread in itertools.product(
        range(1, 5), range(1, 4), range(1, 7), range(5), range(4), range(1, 6)
    ):
        try:
            geometry = ConvGeometry(
                (size,), (k,), (stride,), ((low, high),), mode, (1,), (spread,), 1
            )
        except ValueError:
            continue
        counts[check_against_brute_force(geometry)] += 1
    # The padding's inputs can stand in for the inputs themselves.
    assert counts[True] > 100
    assert counts[False] > 100


@quick
@given(
    st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3),
    st.sampled_from(("SAME", "VALID", 0, 1)),
    st.integers(1, 2),
)
def test_transposed_geometry_is_the_one_of_lax(sizes, padding, spread):
    shape, kernel, strides = zip(*sizes)
    rank = len(sizes)
    pads = padding if isinstance(padding, str) else [(padding, padding)] * rank
    extents = [(k - 1) * spread + 1 for k in kernel]
    spans = [(n - 1) * s + 1 for n, s in zip(shape, strides)]
    if isinstance(padding, int):
        assume(all(e <= n + 2 * padding for e, n in zip(extents, spans)))
    found = classify(shape, kernel, strides, pads, 1, spread, transposed=True).geometry
    spatial = "DHW"[-rank:]
    run = functools.partial(
        jax.lax.conv_transpose,
        strides=strides,
        padding=pads,
        rhs_dilation=(spread,) * rank,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    out = jax.eval_shape(run, jnp.zeros((1, *shape, 2)), jnp.zeros((*kernel, 2, 3)))
    assert out.shape == (1, *found.output_shape, 3)
    (eqn,) = jax.make_jaxpr(run)(
        jnp.zeros((1, *shape, 2)), jnp.zeros((*kernel, 2, 3))
    ).eqns
    assert found.padding == tuple(map(tuple, eqn.params["padding"]))


@pytest.mark.parametrize(
    ("arguments", "case", "reason", "fix"),
    [
        ((4, 2, 2), "unpatchify", "its own window of outputs, 2", ""),
        (((1, 1), (3, 2), 1, "VALID"), "unpatchify", "The only input", ""),
        (((3, 4), 1), "pointwise", "reads each input alone", ""),
        ((4, 4, 2), "unrolled", "windows of outputs overlap", "opt in to phases"),
        ((4, 2, 3), "unrolled", "no input reaches", "strides equal to the kernel"),
        (
            (4, 2, 2, 0),
            "unrolled",
            "crops the output",
            "padding VALID, which is (1, 1)",
        ),
        ((1, 3, 5, "VALID"), "unrolled", "enlarges", "Use padding of (2, 2) here"),
        ((4, 2, 2, 2), "unrolled", "enlarges or shifts", "slice or pad"),
        ((4, 3, 3, "VALID", 1, 2), "unrolled", "are not adjacent", "kernel_dilation 1"),
        # With strides of 1, and where dilation undoes them, phases change nothing.
        (
            (8, 3, 1, "SAME"),
            "unrolled",
            "Stride 1 in dimension 0",
            "3. Or opt in to un",
        ),
        (
            (4, 2, 2, "VALID", 1, 2),
            "unrolled",
            "are not adjacent",
            "1. Or opt in to un",
        ),
        (((3, 4), (1, 2), (2, 2)), "unrolled", "Stride 2 in dimension 0 is larger", ""),
        (((3, 4, 2), (2, 3, 3), (2, 3, 2), "VALID", 1, 1, 5), "unrolled", "ion 2", ""),
    ],
)
def test_transposed_reason_and_fix(arguments, case, reason, fix):
    found = classify(*arguments, transposed=True)
    assert found.case == case
    assert reason in found.reason
    assert fix in found.fix
    assert bool(found.fix) == (case == "unrolled")


def test_a_transposed_convolution_names_what_it_does_not_take():
    with pytest.raises(ValueError, match="input_dilation: expected 1"):
        classify(4, 2, 2, input_dilation=2, transposed=True)
    with pytest.raises(ValueError, match="expected SAME, VALID or"):
        classify(4, 2, 2, "CIRCULAR", transposed=True)


@settings(quick, max_examples=25)
@given(geometries())
def test_brute_force_is_lax(geometry):
    assume(geometry.padding_mode == "zeros")
    # One more check of the check: XLA's own convolution gives the same matrix.
    kernel = distinct_entries(geometry.kernel_size)
    assume(kernel.size < 12)
    matrix = brute_force_matrix(geometry, kernel)
    elements = matrix.shape[0]
    probe = jnp.eye(elements).reshape(elements, *geometry.input_shape, 1)
    spatial = "DHW"[-len(geometry.input_shape) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    out = jax.lax.conv_general_dilated(
        probe,
        jnp.asarray(kernel, jnp.float32)[..., None, None],
        geometry.strides,
        geometry.padding,
        geometry.input_dilation,
        geometry.kernel_dilation,
        jax.lax.conv_dimension_numbers(
            probe.shape, (*geometry.kernel_size, 1, 1), numbers
        ),
    )
    np.testing.assert_array_equal(np.asarray(out)[..., 0], matrix)


@pytest.mark.parametrize(
    ("padding", "input_shape", "kernel", "stride", "spread"),
    [
        ("VALID", (5, 4), (2, 3), 2, 1),
        ("SAME", (5, 4), (2, 3), 2, 1),
        ("SAME", (6, 5), (3, 2), 3, 2),
        ("SAME_LOWER", (5, 4), (2, 4), 1, 1),
        ("CIRCULAR", (5, 4), (2, 3), 1, 1),
        ("CIRCULAR", (2,), (2,), 1, 5),
        ("CIRCULAR", (2,), (2,), 2, 5),
        ("REFLECT", (5, 4), (4, 3), 2, 1),
        ("REFLECT", (3,), (2,), 1, 3),
        ("CAUSAL", (6,), (3,), 2, 2),
        (1, (5, 4), (2, 3), 2, 1),
        ((1, 2), (5, 4), (2, 3), 2, 1),
        (((1, 2), (0, 1)), (5, 4), (2, 3), 2, 1),
    ],
)
def test_padding_is_flax(padding, input_shape, kernel, stride, spread):
    geometry = resolve_geometry(
        input_shape, kernel, stride, padding, kernel_dilation=spread
    )
    entries = distinct_entries(kernel)
    matrix = brute_force_matrix(geometry, entries)
    layer = nn.Conv(
        1, kernel, stride, padding=padding, kernel_dilation=spread, use_bias=False
    )
    elements = math.prod(input_shape)
    probe = jnp.eye(elements).reshape(elements, *input_shape, 1)
    weights = {"params": {"kernel": jnp.asarray(entries, jnp.float32)[..., None, None]}}
    out = layer.apply(weights, probe)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(np.asarray(out)[..., 0], matrix)
    check_against_brute_force(geometry)


@settings(quick, max_examples=150)
@given(
    st.sampled_from(["VALID", "SAME", "SAME_LOWER", "CIRCULAR", "REFLECT", "CAUSAL"]),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_output_shape_is_flax(padding, size, kernel, stride, spread):
    layer = nn.Conv(1, (kernel,), stride, padding=padding, kernel_dilation=spread)
    x = jax.ShapeDtypeStruct((1, size, 1), jnp.float32)
    out = jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x)[0], x)
    try:
        geometry = resolve_geometry(size, kernel, stride, padding, 1, spread)
    except ValueError:
        assert out.shape[1] == 0
    else:
        assert geometry.output_shape == out.shape[1:2]


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("pointwise", {"input_shape": (5, 4), "kernel_size": 1}),
        ("pointwise", {"input_shape": 1, "kernel_size": 1, "strides": 3}),
        ("pointwise", {"input_shape": (5, 4), "kernel_size": 1, "padding": "SAME"}),
        ("pointwise", {"input_shape": 5, "kernel_size": 1, "kernel_dilation": 4}),
        ("full_window", {"input_shape": (5, 4), "kernel_size": (5, 4)}),
        ("full_window", {"input_shape": (2, 3, 4), "kernel_size": (2, 3, 4)}),
        (
            "full_window",
            {"input_shape": 3, "kernel_size": 3, "padding": ((0, 1),), "strides": 2},
        ),
        ("patchify", {"input_shape": (6, 7), "kernel_size": (2, 3), "strides": (2, 3)}),
        ("patchify", {"input_shape": (6, 4), "kernel_size": (1, 4)}),
        ("unrolled", {"input_shape": (6, 7), "kernel_size": (2, 3), "strides": (2, 2)}),
        ("unrolled", {"input_shape": 6, "kernel_size": 6, "padding": "SAME"}),
        ("pointwise", {"input_shape": (6, 5), "kernel_size": 1, "strides": (1, 2)}),
        ("unrolled", {"input_shape": 6, "kernel_size": 1, "strides": 2, "padding": 1}),
        ("unrolled", {"input_shape": (6, 4), "kernel_size": (1, 4), "strides": 2}),
        ("unrolled", {"input_shape": 6, "kernel_size": 6, "padding": "CIRCULAR"}),
        ("unrolled", {"input_shape": 6, "kernel_size": 3, "padding": "CAUSAL"}),
    ],
)
def test_cases(case, arguments):
    found = classify(**arguments)
    assert (found.case, found.base) == (case, case)
    grouped = classify(**arguments, groups=2)
    assert grouped.case == ("unrolled" if case == "unrolled" else "grouped")
    assert grouped.base == case


def test_exercise_stride_changes_nothing_for_a_full_window():
    found = classify((7, 7), (7, 7), strides=2)
    assert found.case == "full_window"
    assert "Strides 2x2 change nothing" in found.reason
    assert not found.fix


def test_exercise_padding_keeps_the_value_in_the_centre():
    found = classify((7, 7), (7, 7), padding=1)
    assert found.case == "unrolled"
    assert "from 7x7 to 9x9" in found.reason
    assert "output is 3x3, position (1, 1) of it is the Dense's value" in found.reason
    assert "makes it full_window" in found.fix


def test_exercise_padding_and_stride_lose_the_value():
    found = classify((7, 7), (7, 7), padding=1, strides=2)
    assert "the output is 2x2, and the Dense's value is lost" in found.reason
    # Padding 2 and stride 2: the stride lands on the value again.
    again = classify((7, 7), (7, 7), padding=2, strides=2)
    assert "position (1, 1) of it is the Dense's value" in again.reason


@settings(quick, max_examples=60)
@given(
    st.tuples(st.integers(2, 4), st.integers(2, 4)),
    st.tuples(*(st.tuples(st.integers(0, 3), st.integers(0, 3)) for _ in range(2))),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_the_value_stands_where_the_words_say(shape, padding, strides):
    found = classify(shape, shape, strides, padding)
    assume(found.case == "unrolled")
    entries = distinct_entries(shape)
    matrix = brute_force_matrix(found.geometry, entries)
    holds = [
        position
        for position in itertools.product(*map(range, matrix.shape[1:]))
        if np.array_equal(matrix[(slice(None), *position)], entries.ravel())
    ]
    if holds:
        assert f"position {holds[0]} of it is the Dense's value" in found.reason
    else:
        assert "the Dense's value is lost" in found.reason


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((8, 8), 1, 2), "x[:, ::2, ::2], 4x4 of 8x8."),
        (((8, 7), 1, (1, 3), "SAME"), "x[:, :, ::3], 8x3 of 8x7."),
        ((8, 1, 8), "Strides 8 change nothing: there is one position. Inputs beyond"),
    ],
)
def test_strides_of_a_single_tap_skip_inputs(arguments, words):
    found = classify(*arguments)
    assert found.same_parameters
    assert not found.fix
    assert words in found.reason
    subsample = f", at every position of {words.split(', 4')[0]}\n"
    assert "4x4" not in words or subsample in explain(found)


@pytest.mark.parametrize(
    ("arguments", "reason", "fix"),
    [
        ((8, 1, 2, ((0, -2),)), "larger than the kernel 1", "strides equal"),
        ((8, 3, 2), "smaller than the kernel 3", "makes it patchify"),
        ((8, 2, 3), "larger than the kernel 2", "makes it patchify"),
        ((8, 3, 1, "SAME"), "meet no input", "the next condition fails: Stride 1"),
        ((6, 3, 3, "VALID", 1, 2), "skips the inputs", "makes it patchify"),
        ((6, 3, 3, "VALID", 2, 1), "holes between", "makes it patchify"),
        # The order of the conditions: padding comes before the dilations.
        ((6, 3, 1, 1, 2, 2), "Padding (1, 1)", "Use padding VALID"),
        ((6, 3, 3, 0, 2, 2), "Input dilation 2", "Use input_dilation 1"),
        ((6, 3, 3, ((-1, 0),)), "crops the first", "Crop the input"),
        (((2, 2), 4, 1, 1), "meet no input", "a kernel cropped to the taps"),
    ],
)
def test_reason_and_fix(arguments, reason, fix):
    found = classify(*arguments)
    assert found.case == "unrolled"
    assert reason in found.reason
    assert fix in found.fix
    assert str(found) == f"unrolled: {found.reason} {found.fix}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((7, 7), (7, 7, 7)), "kernel_size: expected 2 entries, .* got .7, 7, 7"),
        (((7, 0), 1), "input_shape: expected every entry to be at least 1"),
        ((7, 0), "kernel_size: expected every entry to be at least 1"),
        ((7, 1, 0), "strides: "),
        ((7, 1, 1, "VALID", 0), "input_dilation: "),
        ((7, 1, 1, "VALID", 1, 0), "kernel_dilation: "),
        ((7, 1, 1, "VALID", 1, 1, 0), "groups: expected at least 1, got 0"),
        ((7, 1.5), "kernel_size: expected an int .* got 1.5"),
        ((7, True), "kernel_size: expected an int .* got True"),
        (((7, 7), (True, 1)), "kernel_size: expected an int .* got .True, 1"),
        ((7, 1, True), "strides: expected an int .* got True"),
        ((7, 1, 1, True), "padding: expected an int.* got True"),
        ((7, 1, 1, "VALID", 1, 1, True), "groups: expected an int, got True"),
        (((), 1), "input_shape: "),
        ((7, 8), "kernel_size: 8 taps span 8 inputs in dimension 0.* has 7"),
        ((7, 4, 1, "VALID", 1, 3), "kernel_dilation 3 span 10 inputs"),
        ((7, 1, 1, "FULL"), "padding: expected one of VALID.* got 'FULL'"),
        ((7, 1, 1, (1, 2)), "padding: expected an int, 1 ints.* got .1, 2"),
        (((7, 7), 1, 1, ((1, 2, 3), 1)), "padding: expected an int"),
        ((7, 1, 1, 1.5), "padding: expected an int.* got 1.5"),
        (((7, 7), 3, 1, "CAUSAL"), "padding: CAUSAL is for one dimension"),
        ((7, 3, 1, "SAME", 2), "padding: SAME isn't defined with input_dilation"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        classify(*arguments)


def test_geometry_refuses_what_no_padding_can_be():
    with pytest.raises(ValueError, match="input_dilation 1 with circular"):
        ConvGeometry((4,), (2,), (1,), ((0, 0),), "circular", (2,), (1,), 1)
    with pytest.raises(ValueError, match="0 or more with reflect"):
        ConvGeometry((4,), (2,), (1,), ((0, -1),), "reflect", (1,), (1,), 1)
    with pytest.raises(ValueError, match=r"padding: expected 1 .* got 2"):
        ConvGeometry((4,), (2,), (1,), ((0, 0),) * 2, "zeros", (1,), (1,), 1)


def test_json_and_numbers():
    found = classify((9, 4), (2, 4), (2, 1), groups=3)
    text = json.loads(found.to_json())
    assert text["case"] == "grouped"
    assert text["base"] == "patchify"
    assert text["geometry"]["output_shape"] == [4, 1]
    assert found.geometry.covered_shape == (8, 4)
    assert found.geometry.window_elements == 8
    assert "first 8x4" in found.reason
    assert "Dense (3, 8*C/3, O/3) <-> Conv (2, 4, C/3, O)" in explain(found)
    assert hash(found) == hash(classify((9, 4), (2, 4), (2, 1), groups=3))


def test_numpy_integers_and_none_are_numbers():
    found = classify(np.int64(4), (np.int32(4),), None, [(np.int64(0), 0)])
    assert found.case == "full_window"
    assert json.loads(found.to_json())
