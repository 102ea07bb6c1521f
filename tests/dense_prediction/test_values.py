"""Values that crops share: each step, read as the array that every crop has."""

import jax.numpy as jnp
import numpy as np
import pytest

from fcconv_jax.dense_prediction.maps import crops
from fcconv_jax.dense_prediction.values import (
    CropArray,
    Grid,
    NotSharedError,
    Part,
    all_own,
    array_of,
    classes_of,
    merged,
    own_arrays,
    reshaped,
    split_part,
    stored,
    take,
)

ROWS, COLUMNS = Grid(0), Grid(1)
PIXELS = np.random.default_rng(0).normal(size=(2, 7, 9, 3)).astype(np.float32)


def image(pixels=PIXELS, window=(4, 6), stride=(1, 3)):
    """Crops of images, moving along two axes, and all of them written out."""
    maps = [crops(n, w, s) for n, w, s in zip(pixels.shape[1:3], window, stride)]
    parts = (Part(2), Part(4, maps[0], ROWS), Part(6, maps[1], COLUMNS), Part(3))
    value = CropArray(jnp.asarray(pixels), (), parts, (1,) * 4)
    every = [
        [pixels[:, rows][:, :, columns] for columns in maps[1]] for rows in maps[0]
    ]
    return value, np.array(every)


def same(value, want):
    np.testing.assert_array_equal(array_of(value), want)
    assert value.shape == want.shape[2:]


def test_an_image_is_all_of_its_crops():
    value, every = image()
    assert value.differs
    assert value.shared == {ROWS, COLUMNS}
    assert value.fronts == ()
    same(value, every)
    same(all_own(value), every)


def test_an_array_for_each_crop_along_one_axis():
    value, every = image()
    for grid, front in ((ROWS, (ROWS,)), (COLUMNS, (COLUMNS,))):
        one = own_arrays(value, grid)
        assert one.fronts == front
        assert one.shared == {ROWS, COLUMNS} - {grid}
        same(one, every)
        assert own_arrays(one, grid) is one


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 6, 3),
        (2, 24, 3),
        (2, 4, 18),
        (2, 72),
        (2, 2, 2, 6, 3),
        (2, 4, 2, 3, 3),
        (2, 4, 3, 2, 3, 1),
        (1, 2, 4, 1, 6, 3),
        (8, 18),
        (144,),
    ],
)
def test_reshapes_are_those_of_each_crop(shape):
    value, every = image()
    made = reshaped(value, shape)
    assert made.shape == shape
    same(made, every.reshape(*every.shape[:2], *shape))
    back = reshaped(made, (2, 4, 6, 3))
    same(back, every)


def test_reshapes_that_cut_through_an_axis_are_refused():
    value, _ = image()
    with pytest.raises(NotSharedError, match="cuts through"):
        reshaped(value, (3, 4, 6, 2))


def test_merged_axes_share_as_before():
    value, every = image()
    flat = merged(reshaped(value, (2, 4, 18)), 2)
    assert [len(group) for group in flat.groups] == [1, 1, 1]
    assert flat.shared == {ROWS, COLUMNS}
    same(flat, every.reshape(*every.shape[:2], 2, 4, 18))
    with pytest.raises(NotSharedError, match="two shared ones"):
        merged(reshaped(value, (2, 24, 3)), 1)


def test_the_factors_of_a_shared_axis_are_windows_of_it():
    value, every = image()
    split = split_part(value, 2, (3, 2))
    assert split.parts[2].grid == COLUMNS
    assert split.parts[3].map is None
    shape = (*every.shape[:2], 2, 4, 3, 2, 3)
    same(split.replace(ranks=(1,) * 5), every.reshape(shape))


def test_uniform_parts_are_stored_once_asked_for():
    value = CropArray(
        jnp.asarray([1.0, 2.0]), (), (Part(2), Part(5, uniform=True)), (1, 1)
    )
    assert value.shape == (2, 5)
    whole = stored(value, 1)
    assert whole.data.shape == (2, 5)
    np.testing.assert_array_equal(array_of(value), [[1.0] * 5, [2.0] * 5])
    assert stored(whole, 1) is whole


def test_plain_arrays_are_the_same_for_all_crops():
    value = CropArray.plain(PIXELS)
    assert not value.differs
    assert value.shape == PIXELS.shape
    np.testing.assert_array_equal(array_of(value), PIXELS)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("places", [[0, 1, 2], [1, 2], [2, 0, 0], [[0, 2], [1, 1]]])
def test_take(kind, places):
    places = np.array(places)
    data = kind(PIXELS[0, :3])
    np.testing.assert_array_equal(take(data, places, 0), PIXELS[0, :3][places])


def test_slices_that_are_the_same_are_one_class():
    data = np.array([[0.0, 1.0, 0.0, -0.0], [2.0, 3.0, 2.0, 2.0]])
    ids, first = classes_of(data, 1)
    # 0 and -0 are equal, and other bits.
    assert ids[0] == ids[2] != ids[3]
    assert len(first) == 3
    np.testing.assert_array_equal(data[:, first[ids]], data)
