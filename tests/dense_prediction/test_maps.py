"""Index maps, against the windows of each crop written out one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcconv_jax.dense_prediction.maps import (
    PADDING,
    crops,
    distinct,
    full_window_layouts,
    join,
    whole_layout,
    window_passes,
)


def laid_out(layout, window):
    """The windows of all passes of a layout, set side by side: places of the axis."""
    rows = []
    for segment in layout.segments:
        for stretch in segment:
            starts = range(0, len(stretch) - window + 1, layout.stride)
            rows += [stretch[start : start + window] for start in starts]
    assert len(rows) == layout.outputs
    return np.array(rows)


def seen_by_each_crop(map_, window, stride, padding, holes):
    """The windows of each crop, padded by itself: places of the axis."""
    found = []
    for row in map_:
        spread = np.full((len(row) - 1) * holes + 1, PADDING)
        spread[::holes] = row
        low, high = padding
        spread = spread[max(-low, 0) : len(spread) - max(-high, 0)]
        spread = np.pad(spread, [max(p, 0) for p in padding], constant_values=PADDING)
        starts = range(0, len(spread) - window + 1, stride)
        found.append([spread[start : start + window] for start in starts])
    return np.array(found)


@st.composite
def windows(draw):
    size = draw(st.integers(6, 14))
    crop = draw(st.integers(4, min(size, 9)))
    map_ = crops(size, crop, draw(st.integers(1, 4)))
    if draw(st.booleans()):
        map_ = map_[:, ::-1]
    padding = draw(st.integers(-1, 2)), draw(st.integers(-1, 2))
    holes = draw(st.integers(1, 2))
    most = (crop - 1) * holes + 1 + sum(padding)
    window = draw(st.integers(1, min(most, 5)))
    return map_, size, window, draw(st.integers(1, 3)), padding, holes


@given(windows())
@settings(max_examples=300, deadline=None)
def test_every_way_computes_the_windows_of_every_crop(case):
    map_, size, window, stride, padding, holes = case
    want = seen_by_each_crop(map_, window, stride, padding, holes)
    ways = window_passes(map_, size, window, stride, padding, holes)
    assert ways
    for layout in ways:
        np.testing.assert_array_equal(laid_out(layout, window)[layout.map], want)


@given(windows())
@settings(max_examples=300, deadline=None)
def test_no_way_computes_more_than_the_crops(case):
    map_, size, window, stride, padding, holes = case
    every = seen_by_each_crop(map_, window, stride, padding, holes).reshape(-1, window)
    by_length = window_passes(map_, size, window, stride, padding, holes)[-1]
    if len(by_length.segments) > 1:  # nothing lies across two chains
        assert by_length.outputs == len(np.unique(every, axis=0))


@given(st.integers(5, 20), st.integers(3, 8), st.integers(1, 5))
def test_a_window_over_all_of_a_crop(size, window, step):
    map_ = crops(max(size, window), window, step)
    ways = full_window_layouts(map_)
    assert bool(ways) == (len(map_) > 1 and step < window)
    for layout in ways:
        found = laid_out(layout, window)[layout.map[:, 0]]
        np.testing.assert_array_equal(found, map_)


def test_padding_around_the_image_is_read_beside_a_crop():
    layout = whole_layout(crops(7, 3, 2), 7, 3, 1, (1, 1))
    found = laid_out(layout, 3)[layout.map]
    assert found[0].tolist() == [[PADDING, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert found[1].tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    with pytest.raises(ValueError, match="multiple of a layer's stride 2 apart"):
        whole_layout(crops(9, 4, 3), 9, 2, 2, (0, 0))
    with pytest.raises(ValueError, match="skipped, repeated or reversed"):
        whole_layout(crops(9, 4, 2)[:, ::-1], 9, 2, 2, (0, 0))


@given(st.data())
@settings(deadline=None)
def test_join_names_every_combination_once(data):
    shape = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    count = data.draw(st.integers(1, 3))
    maps = []
    for _ in range(count):
        entries = st.lists(
            st.integers(0, 4),
            min_size=shape[0] * shape[1],
            max_size=shape[0] * shape[1],
        )
        maps.append(np.array(data.draw(entries)).reshape(shape))
    joined, places = join(maps)
    for map_, place in zip(maps, places, strict=True):
        np.testing.assert_array_equal(place[joined], map_)
    combinations = {tuple(row) for row in np.stack(maps, -1).reshape(-1, count)}
    assert len(np.unique(joined)) == len(combinations)


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=20)
)
def test_distinct_rows(rows):
    rows = np.array(rows)
    found, ids = distinct(rows)
    np.testing.assert_array_equal(found[ids], rows)
    assert len(found) == len(np.unique(rows, axis=0))
