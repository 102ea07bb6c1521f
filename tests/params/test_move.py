"""Which leaves fit a move, and what is said of those that do not."""

import pytest

from fcconv_jax.geometry.kernels import Rearrangement
from fcconv_jax.params.move import Leaf, Move, inner_shape

TO_CONV = Rearrangement.reshape((12, 5), (2, 2, 3, 5))


@pytest.mark.parametrize(
    ("shape", "stack_axes", "fits"),
    [
        ((12, 5), (), True),
        ((5, 12), (), False),
        ((7, 12, 5), (), False),
        ((7, 12, 5), (0,), True),
        ((12, 7, 5), (0,), False),
        ((12, 7, 5), (1,), True),
        ((12, 5, 7), (-1,), True),
        ((9, 12, 7, 5), (1, 0), True),
        ((9, 12, 7, 5), (0, 1), False),
        (..., (), True),  # of a sharding, which shows none
        (None, (), False),
    ],
)
def test_a_move_fits_its_own_shape_below_the_stacks(shape, stack_axes, fits):
    assert Move(TO_CONV, stack_axes).fits(shape) is fits


def test_axes_of_stacks_go_from_the_outermost_in():
    assert inner_shape((9, 12, 7, 5), (1, 0), (12, 5)) == (12, 5)
    assert inner_shape((9, 12, 7, 5), (0,), (12, 5)) is None


def test_a_refusal_tells_converted_leaves_from_those_of_another_model():
    move = Move(TO_CONV)
    done = move.refusal(Leaf("fc/kernel", (2, 2, 3, 5)))
    assert "leaf 'fc/kernel': expected shape (12, 5), got shape (2, 2, 3, 5)" in done
    assert "in this form already" in done
    other = move.refusal(Leaf("fc/kernel", (13, 5)))
    assert "of another model" in other
    stacked = Move(TO_CONV, (0,)).refusal(Leaf("fc/kernel", (7, 2, 2, 3, 5)))
    assert "below 1 stacked axes" in stacked
    assert "in this form already" in stacked
    assert "got no array" in move.refusal(Leaf("name", None))


def test_shapes_that_do_not_show_are_like_all_others():
    assert Leaf("a", ...).like(Leaf("b", (2, 3)))
    assert Leaf("a", (2, 3)).like(Leaf("b", (2, 3)))
    assert not Leaf("a", (2, 3)).like(Leaf("b", (3, 2)))
    assert not Leaf("a", None).like(Leaf("b", ()))


def test_a_move_that_changes_nothing_is_the_identity():
    assert Move(Rearrangement.reshape((5,), (5,))).is_identity
    assert not Move(TO_CONV).is_identity
    assert not Move(Rearrangement((2, 2), (2, 2), (1, 0), (2, 2))).is_identity
