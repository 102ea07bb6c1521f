"""Rearranges the arrays of NNX Variables within their own memory."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.core import Tracer

from ..geometry.kernels import Rearrangement
from ..versions import DONATES_RESHAPED, raw_value, set_raw_value
from .leaves import convert_leaf
from .move import stacks_lead

# Arrays of fewer bytes are copied: they hardly count, and compiling takes its time.
_WORTH = 1 << 20
# How many pieces of an array are moved one after the other.
_PIECES = 64


def convert_in_place(
    variable: nnx.Variable[Any], move: Rearrangement, stack_axes: Sequence[int]
) -> None:
    """Rearrange the value of a Variable.

    A large array whose entries change their order, as behind a CHW flatten, is
    rearranged piece by piece within its memory, so that at no time there are two of
    it. An array that something else holds as well is copied, and stays as it is there.
    What shares only its buffer (``jax.device_put`` to the device where it is, a shard)
    finds it deleted, as after any donation. Before JAX 0.8 every array is copied.
    """
    within = _within(variable, move, stack_axes)
    if within is None:
        value = convert_leaf(move, raw_value(variable), stack_axes)
    else:
        value = _rearrange(within, raw_value(variable))
    set_raw_value(variable, value)


def _within(
    variable: nnx.Variable[Any], move: Rearrangement, stack_axes: Sequence[int]
) -> Rearrangement | None:
    """Return the move of the whole stack, if it may free the Variable's array."""
    # Donation deletes the array, which another holder would still read.
    if not DONATES_RESHAPED or sys.getrefcount(raw_value(variable)) > _held_once():
        return None
    array = raw_value(variable)
    if (
        move.is_reshape
        or not isinstance(array, jax.Array)
        or isinstance(array, Tracer)
        or not isinstance(array.sharding, jax.sharding.SingleDeviceSharding)
        or array.nbytes < _WORTH
    ):
        return None
    keeps_features = (
        move.perm[-1] == len(move.perm) - 1
        and move.source[-1] == move.split[-1] == move.target[-1]
        and len(move.split) - 1 not in move.flip
    )
    if not keeps_features or not stacks_lead(stack_axes):
        return None
    return move.stacked(array.shape[: len(stack_axes)])


@functools.cache
def _held_once() -> int:
    """What :func:`sys.getrefcount` says of a value that only its Variable holds."""
    variable = nnx.Variable(object())
    return sys.getrefcount(raw_value(variable))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _rearrange(move: Rearrangement, array: jax.Array) -> jax.Array:
    """Apply a move that keeps the last axis, some of its entries at a time."""
    *lead, features = move.source
    width = max(1, features // _PIECES)

    def piece(array: jax.Array, start: Any, width: int) -> jax.Array:
        columns = lax.dynamic_slice_in_dim(array, start, width, -1)
        split = lax.rev(columns.reshape(*move.split[:-1], width), move.flip)
        moved = split.transpose(move.perm).reshape(*lead, width)
        return lax.dynamic_update_slice_in_dim(array, moved, start, array.ndim - 1)

    pieces, rest = divmod(features, width)
    array = lax.fori_loop(0, pieces, lambda i, a: piece(a, i * width, width), array)
    if rest:
        array = piece(array, pieces * width, rest)
    return array.reshape(move.target)
