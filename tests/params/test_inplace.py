"""In place: the bits of the copy, in the memory of the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs
from flax import nnx
from nnx_models import module_list

from fcconv_jax.geometry.kernels import Rearrangement, kernel_rearrangement
from fcconv_jax.params.inplace import convert_in_place
from fcconv_jax.params.leaves import convert_leaf
from fcconv_jax.versions import DONATES_RESHAPED, raw_value

# 515 features: several pieces, and some that are left.
BEHIND_CHW = kernel_rearrangement((32 * 5 * 7, 515), (5, 7), order="CHW")
MOVES = {
    "behind a CHW flatten": (BEHIND_CHW, (), ()),
    "back": (BEHIND_CHW.inverse(), (), ()),
    "stacked": (BEHIND_CHW, (2,), (0,)),
    "stacked twice": (BEHIND_CHW, (2, 3), (0, 0)),
}


def variable(move, lead=(), dtype=jnp.float32):
    shape = (*lead, *move.source)
    entries = jnp.arange(np.prod(shape)).reshape(shape)
    return nnx.Param(entries.astype(dtype))


def pointer(variable):
    return raw_value(variable).unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", MOVES)
def test_it_moves_within_its_memory(name, dtype):
    move, lead, axes = MOVES[name]
    there, copied = variable(move, lead, dtype), variable(move, lead, dtype)
    before = pointer(there)
    convert_in_place(there, move, axes)
    expected = convert_leaf(move, raw_value(copied), axes)
    assert raw_value(there).dtype == expected.dtype
    np.testing.assert_array_equal(there[...], expected)
    large = DONATES_RESHAPED and raw_value(copied).nbytes >= 2**20
    assert (pointer(there) == before) == large


HOLDERS = {
    "array": lambda variable: raw_value(variable),
    "numpy view": lambda variable: np.asarray(raw_value(variable)),
    "pure dict": lambda variable: nnx.to_pure_dict(nnx.state(module_list([variable]))),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_else_holds_the_array_keeps_it(holder):
    there = variable(BEHIND_CHW)
    entries = np.array(there[...])
    held = HOLDERS[holder](there)
    convert_in_place(there, BEHIND_CHW, ())
    np.testing.assert_array_equal(jax.tree.leaves(held)[0], entries)
    np.testing.assert_array_equal(there[...], BEHIND_CHW(entries))


def test_other_moves_are_copies():
    to_ohwi = BEHIND_CHW.permuted((3, 0, 1, 2))  # the features do not stay last
    reshape = Rearrangement.reshape((1120, 515), (5, 7, 32, 515))
    for move in (to_ohwi, reshape):
        there = variable(move)
        entries = np.array(there[...])
        convert_in_place(there, move, ())
        np.testing.assert_array_equal(there[...], move(entries))


@needs("jax", "0.8.0")
def test_it_stays_where_it_is():
    there = variable(BEHIND_CHW)
    assert not raw_value(there).committed
    convert_in_place(there, BEHIND_CHW, ())
    assert not raw_value(there).committed
    device = jax.devices()[0]
    there = nnx.Param(jax.device_put(np.ones(BEHIND_CHW.source, np.float32), device))
    convert_in_place(there, BEHIND_CHW, ())
    assert raw_value(there).committed
