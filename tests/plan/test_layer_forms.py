import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fcconv_jax as fc
from fcconv_jax.geometry.kernels import bias_rearrangement, kernel_rearrangement
from fcconv_jax.plan import LayerPlan
from fcconv_jax.plan import layer_forms as forms


def letters(rank):
    return "DHW"[3 - rank :] + "C"


def layer_plan(
    base, window, channels, features, groups=1, order=None, layout="fold", stored="HWIO"
):
    """A layer plan towards conv, with the dense kernel in its canonical shape."""
    order = order or letters(len(window))
    taps, transposed = int(np.prod(window)), base == "unpatchify"
    shape = (taps * channels, features)
    if transposed:
        shape = (channels, taps * features)
    dense = shape if groups == 1 else (groups, *shape)
    bias = (features,) if groups == 1 else (groups, features)
    kernel = kernel_rearrangement(
        dense, window, order=order, groups=groups, transposed=transposed
    )
    *axes, out = range(len(window) + 2)
    if stored == "OHWI":
        kernel = kernel.permuted((out, *axes))
    if stored == "OIHW":
        kernel = kernel.permuted((out, axes[-1], *axes[:-1]))
    leaves = (("kernel", kernel), ("bias", bias_rearrangement(bias)))
    strides = window if base in ("patchify", "unpatchify") else (1,) * len(window)
    return LayerPlan(
        base,
        "Dense",
        window,
        order,
        leaves,
        (),
        strides,
        groups,
        layout=layout,
        kernel_layout=stored,
    )


def integers(*shape, seed=0):
    values = np.random.default_rng(seed).integers(-4, 5, shape)
    return values.astype(np.float32)


@st.composite
def layers(draw):
    rank = draw(st.integers(1, 3))
    base = draw(st.sampled_from(["pointwise", "full_window"]))
    sizes = st.integers(1, 1) if base == "pointwise" else st.integers(1, 3)
    window = tuple(draw(st.lists(sizes, min_size=rank, max_size=rank)))
    order = "".join(draw(st.permutations(letters(rank))))
    groups, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    flat = ["flat"] if groups == 1 or base == "pointwise" else []
    layout = draw(st.sampled_from(["fold", "keep", *flat]))
    stored = draw(st.sampled_from(["HWIO", "OHWI", "OIHW"]))
    layer = layer_plan(base, window, channels, 2, groups, order, layout, stored)
    return layer, channels


@settings(max_examples=25, deadline=None)
@given(layers(), st.lists(st.integers(1, 3), max_size=4), st.booleans())
def test_dense_as_conv_agrees_to_the_bit(drawn, lead, with_bias):
    layer, channels = drawn
    rows = int(np.prod(layer.window)) * channels
    groups = (layer.groups,) if layer.groups > 1 else ()
    x = integers(*lead, *groups, rows)
    kernel = integers(*layer.kernel.source, seed=1)
    bias = integers(*layer.bias.source, seed=2) if with_bias else None
    dense, conv = forms.pair_of_forms(layer, "conv")
    moved_bias = layer.bias(bias) if with_bias else None
    want = dense(x, kernel, bias)
    assert want.shape == (*lead, *groups, 2)
    np.testing.assert_array_equal(conv(x, layer.kernel(kernel), moved_bias), want)
    # Against a sum written out, so that both forms cannot be wrong together.
    expected = np.einsum(
        "...gi,gio->...go",
        x.reshape(*lead, layer.groups, rows),
        kernel.reshape(layer.groups, rows, 2),
    )
    expected = expected if bias is None else expected + bias.reshape(layer.groups, 2)
    np.testing.assert_array_equal(want, expected.reshape(want.shape))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_conv_as_dense_agrees_to_the_bit(data):
    rank = data.draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    base = data.draw(st.sampled_from(["pointwise", "full_window", "patchify"]))
    window = (1,) * rank if base == "pointwise" else tuple(data.draw(sizes))
    order = "".join(data.draw(st.permutations(letters(rank))))
    groups, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layer = layer_plan(base, window, channels, 2, groups, order).inverse()
    spatial = window
    if base != "full_window":
        rest = data.draw(sizes)
        spatial = tuple(k * n for k, n in zip(window, rest))
    if base == "patchify":  # a remainder that no window covers
        spatial = tuple(n + k - 1 for n, k in zip(spatial, window))
    batch = data.draw(st.lists(st.integers(1, 2), max_size=2))
    x = integers(*batch, *spatial, groups * channels)
    kernel = integers(*layer.kernel.source, seed=1)
    bias = integers(*layer.bias.source, seed=2)
    conv, dense = forms.pair_of_forms(layer, "dense")
    want = conv(x, kernel, bias)
    got = dense(x, layer.kernel(kernel), layer.bias(bias))
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_transposed_forms_agree_to_the_bit(data):
    rank = data.draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    window, spatial = tuple(data.draw(sizes)), tuple(data.draw(sizes))
    order = "".join(data.draw(st.permutations(letters(rank))))
    groups, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layer = layer_plan("unpatchify", window, channels, 2, groups, order)
    batch = data.draw(st.lists(st.integers(1, 2), max_size=2))
    x = integers(*batch, *spatial, groups * channels)
    kernel = integers(*layer.kernel.target, seed=1)
    bias = integers(*layer.bias.target, seed=2)
    conv, dense = forms.pair_of_forms(layer.inverse(), "dense")
    got = conv(x, kernel, bias)
    # Against lax, so that both forms cannot be wrong together.
    pads = [(k - 1, k - 1) for k in window]
    names = "DHW"[3 - rank :]
    want = jax.lax.conv_general_dilated(
        *(x.reshape(-1, *x.shape[len(batch) :]), kernel, (1,) * rank, pads, window),
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
        feature_group_count=groups,
    )
    np.testing.assert_array_equal(got.reshape(want.shape), want + bias)
    stored = layer.kernel.inverse()(kernel), layer.bias.inverse()(bias)
    np.testing.assert_array_equal(dense(x, *stored), got)
    # And rows that go the other way.
    lead = (*batch, 2)
    rows = integers(*lead, *((groups,) if groups > 1 else ()), channels, seed=3)
    dense, conv = forms.pair_of_forms(layer, "conv")
    np.testing.assert_array_equal(conv(rows, kernel, bias), dense(rows, *stored))


def test_a_transposed_layer_is_planned_without_other_layouts():
    layer = layer_plan("unpatchify", (2, 3), 2, 2)
    assert forms.output_positions(layer, (5, 7)) == (10, 21)
    assert dataclasses.replace(layer, input_shape=(4, 2)).dense_input_shape() == (4, 2)
    with pytest.raises(fc.PlanError, match="unpatchify with layout 'flat'"):
        dataclasses.replace(layer, layout="flat")
    with pytest.raises(fc.PlanError, match="unpatchify of"):
        dataclasses.replace(layer, strides=(1, 1))


def test_a_window_in_any_order_sees_the_map_itself():
    """The conv input of a flattened map is the map, whatever the order was."""
    image = integers(2, 4, 3, 5)
    for order, axes in (("HWC", (1, 2, 3)), ("CHW", (3, 1, 2)), ("WCH", (2, 3, 1))):
        layer = layer_plan("full_window", (4, 3), 5, 2, order=order)
        flat = jnp.asarray(image.transpose(0, *axes).reshape(2, -1))
        np.testing.assert_array_equal(forms.conv_input(layer, flat), image)
        inverse = layer.inverse()
        rows = forms.dense_input(inverse, jnp.asarray(image))
        np.testing.assert_array_equal(rows, flat[:, None, None])


def test_groups_of_a_flattened_window_lie_side_by_side():
    layer = layer_plan("full_window", (2, 3), 2, 4, groups=3, order="CHW")
    x = integers(5, 3, 12)
    image = forms.conv_input(layer, jnp.asarray(x))
    assert image.shape == (5, 2, 3, 6)
    for g, h, w, c in np.ndindex(3, 2, 3, 2):
        np.testing.assert_array_equal(
            image[:, h, w, g * 2 + c], x[:, g, (c * 2 + h) * 3 + w]
        )


@pytest.mark.parametrize(
    ("layout", "lead", "rank", "shape"),
    [
        ("fold", (2, 3, 4), 2, (24, 1, 1, 5)),
        ("keep", (2, 3, 4), 2, (2, 3, 4, 5)),
        ("keep", (2, 3), 2, (2, 1, 3, 5)),
        ("keep", (7, 2, 3, 4), 2, (14, 3, 4, 5)),
        ("keep", (2,), 2, (2, 1, 1, 5)),
        ("keep", (), 1, (1, 1, 5)),
        ("fold", (), 3, (1, 1, 1, 1, 5)),
    ],
)
def test_where_the_leading_axes_go(layout, lead, rank, shape):
    layer = layer_plan("pointwise", (1,) * rank, 5, 2, layout=layout)
    out = jax.eval_shape(
        lambda x: forms.conv_input(layer, x), jax.ShapeDtypeStruct((*lead, 5), "f4")
    )
    assert out.shape == shape


def test_a_full_window_refuses_another_size():
    layer = layer_plan("full_window", (4, 3), 5, 2).inverse()
    with pytest.raises(fc.PlanError, match=r"size \(4, 3\), .* got \(8, 6\)"):
        forms.output_positions(layer, (8, 6))
    patches = layer_plan("patchify", (2, 3), 5, 2)
    assert forms.output_positions(patches, (5, 7)) == (2, 2)
