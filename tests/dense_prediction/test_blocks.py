"""Arrays in blocks: read at any places, and combined, as the whole arrays are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_in

from fcconv_jax.dense_prediction.blocks import (
    Blocks,
    array_from,
    as_blocks,
    blockwise,
    cut,
    reread,
    retaken,
)

WHOLE = np.arange(2 * 9 * 7 * 3, dtype=np.float32).reshape(2, 9, 7, 3)
ROWS = ((1, 5), (2, 2))
COLUMNS = ((1, 3), (4, 1))


def in_blocks(array, rows=ROWS, columns=COLUMNS):
    blocks = as_blocks(jnp.asarray(array), (1, 2))
    blocks = reread(blocks, 0, cut(np.arange(9), rows), 0)
    return reread(blocks, 1, cut(np.arange(7), columns), 0)


def test_blocks_hold_the_array():
    blocks = in_blocks(WHOLE)
    assert blocks.segments == (ROWS, COLUMNS)
    assert blocks.shape == WHOLE.shape
    assert blocks.arrays[1, 1].shape == (2, 4, 2, 2, 1, 3)
    np.testing.assert_array_equal(array_from(blocks), WHOLE)


@pytest.mark.parametrize("axis", one_in(2, [2, 1]))
@pytest.mark.parametrize(
    "target",
    [
        [[-1, 0, 1, 2, 3, 4, -1]],  # the interior, padded
        [[-1, 5, 6, 1], [-1, 6, 5, 4]],  # strips, and what lies beside them
        [[0, 1], [1, 2], [2, 3]],  # windows of the interior
        [[3, -1, 0], [6, 6, -1], [2, 5, 1], [0, 0, 0], [5, 4, 3]],  # in no order
        [[-1, -1]],
        [[5], [6]],
    ],
)
def test_any_places_are_read(axis, target):
    target = np.array(target)
    read = reread(in_blocks(WHOLE), axis - 1, [target, target[:1]], 9)
    places = np.concatenate([target.reshape(-1), target[0]])
    want = np.take(WHOLE, places, axis)
    want[(slice(None),) * axis + (places < 0,)] = 9
    np.testing.assert_array_equal(array_from(read), want)


def test_arrays_and_blocks_are_combined():
    first = in_blocks(WHOLE)
    other = in_blocks(2 * WHOLE, ((3, 3),), ((1, 7),))
    row = jnp.asarray(WHOLE[:, :1])

    def run(arrays):
        return [sum(arrays), arrays[0] * arrays[2]]

    total, product = blockwise(run, [first, other, row])
    assert isinstance(total, Blocks)
    assert total.segments == first.segments
    np.testing.assert_array_equal(array_from(total), 3 * WHOLE + WHOLE[:, :1])
    np.testing.assert_array_equal(array_from(product), WHOLE * WHOLE[:, :1])


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 0, 1]])
def test_entries_of_an_axis_are_taken(axis, places):
    got = array_from(retaken(in_blocks(WHOLE), np.array(places), axis, None))
    np.testing.assert_array_equal(got, np.take(WHOLE, places, axis))


def test_reading_is_differentiated():
    target = np.array([[-1, 4, 5], [2, 3, 3]])

    def total(array):
        return (array_from(reread(in_blocks(array), 0, [target], 0)) ** 2).sum()

    def plain(array):
        return (jnp.take(array, np.array([4, 5, 2, 3, 3]), 1) ** 2).sum()

    np.testing.assert_array_equal(jax.grad(total)(WHOLE), jax.grad(plain)(WHOLE))
