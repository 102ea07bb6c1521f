import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcconv_jax.planning.factors import (
    axes_of,
    rearrangement,
    regroup,
    size,
    stacked_axes,
)


def entries(axes):
    """The flat indices that an array with these axes holds."""
    index = np.zeros((), int)
    for axis in axes:
        steps = np.zeros((), int)
        for stride, n in axis:
            steps = np.add.outer(steps, stride * np.arange(n))
        index = np.add.outer(index, steps.reshape(-1))
    return index


@st.composite
def moves(draw):
    """A shape, and an array of its flat indices after some reshapes and transposes."""
    shape = tuple(
        draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    )
    array, axes = np.arange(math.prod(shape)).reshape(shape), axes_of(shape)
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            perm = draw(st.permutations(range(array.ndim)))
            array, axes = array.transpose(perm), tuple(axes[p] for p in perm)
        else:
            rest, target = array.size, []
            while rest > 1:
                target.append(
                    draw(
                        st.sampled_from(
                            [n for n in range(2, rest + 1) if rest % n == 0]
                        )
                    )
                )
                rest //= target[-1]
            found = regroup([f for axis in axes for f in axis], target)
            if found is not None:
                array, axes = array.reshape(target), tuple(found)
    return shape, array, axes


@settings(max_examples=300, deadline=None)
@given(moves())
def test_axes_follow_reshapes_and_transposes(move):
    shape, array, axes = move
    np.testing.assert_array_equal(entries(axes), array)
    factors = [f for axis in axes for f in axis]
    there = rearrangement(shape, factors, array.shape)
    leaf = np.arange(math.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(there(leaf), array)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_every_even_reshape_of_a_plain_array_is_followed(shape, random):
    n = math.prod(shape)
    first = random.choice([d for d in range(1, n + 1) if n % d == 0])
    axes = regroup([f for axis in axes_of(shape) for f in axis], (first, n // first))
    assert axes is not None, "a contiguous array splits at any place"
    np.testing.assert_array_equal(entries(axes), np.arange(n).reshape(first, -1))


def test_a_cut_through_a_transposed_axis_is_not_followed():
    assert regroup([(1, 6), (6, 4)], (4, 6)) is None
    assert size(((4, 6), (1, 4))) == 24


@pytest.mark.parametrize(
    ("stack", "axes"),
    [
        ([], []),
        ([(20, 6)], [0]),
        ([(60, 2), (20, 3)], [0]),  # scanned over reshape(2, 3, ...)
        ([(1, 5)], [2]),
        ([(20, 6), (5, 4)], [0, 1]),
        ([(60, 2)], None),
        ([(10, 12)], None),
    ],
)
def test_stack_axes_are_whole_axes(stack, axes):
    assert stacked_axes((6, 4, 5), stack) == axes
