"""One program that tells how the local errors of another reach its outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .arithmetic import subnormal_inputs
from .compiling import BackgroundProgram
from .perturbation import UnboundedError, run_shifted

# Pairs of opposite random signs for the sampled part.
_SAMPLES = 4
# Functionals for each leaf in one run.
_PER_LEAF = 4


@dataclasses.dataclass(frozen=True)
class Functional:
    """A linear functional of a program's float outputs.

    Attributes:
      leaf: which leaf it looks at; None for all.
      place: the flat index of the one entry that counts; None for all entries, with
        the weights that were handed over.
    """

    leaf: int | None = None
    place: int | None = None


class Sensitivity:
    """Propagates the local errors of a program to its float outputs.

    The program is run and linearised once in each call, then transposed for every
    functional. It is traced here, and compiles in the background.

    Args:
      closed: the program.
      operands: what it runs on.
      inexact: positions of its float outputs.

    Attributes:
      unmodelled: primitives whose own rounding is not in the bound.

    Raises:
      UnboundedError: it cannot be differentiated.
    """

    def __init__(self, closed: Any, operands: Sequence[Any], inexact: Sequence[int]):
        unmodelled: dict[str, None] = {}
        self.operands = list(operands)
        self._flushed = [subnormal_inputs(x) for x in operands]
        self._closed, self._inexact = closed, tuple(inexact)
        zeros = jax.eval_shape(lambda a: self._run(a, None, unmodelled)[1], operands)
        self.unmodelled = tuple(unmodelled)
        self._zeros = zeros
        avals = [closed.out_avals[i] for i in inexact]
        self.capacity = max(1, _PER_LEAF * len(avals))
        abstract = (
            [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals],
            jax.ShapeDtypeStruct((self.capacity,), jnp.int32),
            jax.ShapeDtypeStruct((self.capacity,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.bool_),
        )
        try:
            self._program = BackgroundProgram(
                self._propagate, self.operands, *abstract, quick=True
            )
        except (ValueError, NotImplementedError) as error:
            if not unmodelled:
                raise
            raise UnboundedError(
                f"no derivative through {', '.join(unmodelled)}, which also has no "
                "rounding rule: compare a function without it"
            ) from error

    @functools.cached_property
    def remainder(self) -> tuple[np.ndarray, ...]:
        """For each float output, samples of what is not first order, in float64."""
        weights = [np.zeros(a.shape, a.dtype) for a in self._avals()]
        none = np.zeros(self.capacity, np.int32)
        *_, samples = self._program(
            self.operands, weights, none, none, np.int32(0), np.bool_(True)
        )
        return tuple(np.asarray(s).astype(np.float64) for s in samples)

    def first_order(
        self, functionals: Sequence[Functional], weights: Sequence[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """First-order bounds on the errors of some functionals.

        Args:
          functionals: what to bound.
          weights: for each float output an array of its shape and dtype.

        Returns:
          For each functional the sum of |derivative| * error over all local errors,
          and the root of the sum of its squares.
        """
        totals, roots = [], []
        for first in range(0, len(functionals), self.capacity):
            some = functionals[first : first + self.capacity]
            leaves, places = (np.full(self.capacity, -1, np.int32) for _ in range(2))
            for i, each in enumerate(some):
                leaves[i] = -1 if each.leaf is None else each.leaf
                places[i] = -1 if each.place is None else each.place
            total, root, _ = self._program(
                self.operands,
                list(weights),
                leaves,
                places,
                np.int32(len(some)),
                np.bool_(False),
            )
            totals.append(np.asarray(total, np.float64)[: len(some)])
            roots.append(np.asarray(root, np.float64)[: len(some)])
        return np.concatenate([*totals, []]), np.concatenate([*roots, []])

    def _avals(self) -> list[Any]:
        return [self._closed.out_avals[i] for i in self._inexact]

    def _run(self, operands: Any, shifts: Any, unmodelled: Any) -> tuple[Any, Any]:
        """The float outputs, and the errors that operands and equations commit."""
        first, rest = (None, None) if shifts is None else shifts
        flushed = []
        if any(self._flushed):
            operands = list(operands)
        for i, number in enumerate(i for i, on in enumerate(self._flushed) if on):
            x = operands[number]
            flushed.append(_flush_error(x))
            if first is not None:
                operands[number] = (x.astype(first[i].dtype) + first[i]).astype(x.dtype)
        outs, errors = run_shifted(self._closed, operands, rest, unmodelled)
        return [outs[i] for i in self._inexact], (flushed, errors)

    def _propagate(
        self, operands: Any, weights: Any, leaves: Any, places: Any, n: Any, wanted: Any
    ) -> Any:
        zeros = jax.tree.map(lambda e: jnp.zeros(e.shape, e.dtype), self._zeros)
        y, linear, errors = jax.linearize(
            lambda s: self._run(operands, s, {}), zeros, has_aux=True
        )
        transpose = jax.linear_transpose(linear, zeros)

        def bound(i: Any, found: Any) -> Any:
            cotangents = [
                _cotangent(w, (leaves[i] == j) | (leaves[i] < 0), places[i])
                for j, w in enumerate(weights)
            ]
            (slopes,) = transpose(cotangents)
            sums = _sums(jax.tree.leaves(slopes), jax.tree.leaves(errors))
            return tuple(f.at[i].set(s) for f, s in zip(found, sums))

        none = jnp.zeros(self.capacity)
        totals, roots = lax.fori_loop(0, n, bound, (none, none))
        samples = lax.cond(
            wanted,
            lambda: self._remainders(operands, y, linear, errors),
            lambda: [jnp.zeros((2 * _SAMPLES, *a.shape), jnp.abs(a).dtype) for a in y],
        )
        return totals, roots, samples

    def _remainders(self, operands: Any, y: Any, linear: Any, errors: Any) -> Any:
        """Samples y(s) - y(0) - y'(0) s at |s| = twice the local errors."""
        leaves, treedef = jax.tree.flatten(errors)

        def sample(pair: Any) -> list[Any]:
            # One draw for all: hundreds of small ones take long to compile.
            key, sign = pair
            ends = np.cumsum([0] + [e.size for e in leaves])
            signs = sign * jax.random.rademacher(key, (int(ends[-1]),), jnp.int8)
            shifts = jax.tree.unflatten(
                treedef,
                [
                    2 * e * signs[start:end].reshape(e.shape).astype(e.dtype)
                    for e, start, end in zip(leaves, ends, ends[1:])
                ],
            )
            moved, _ = self._run(operands, shifts, None)
            gaps = [m - a - t for m, a, t in zip(moved, y, linear(shifts))]
            # A run that was pushed out of the function's domain says nothing.
            return [jnp.where(jnp.isfinite(g), jnp.abs(g), 0) for g in gaps]

        keys = jax.random.split(jax.random.key(0), _SAMPLES)
        signs = jnp.tile(jnp.array([1, -1], jnp.int8), _SAMPLES)
        return lax.map(sample, (jnp.repeat(keys, 2), signs))


def _flush_error(x: Any) -> jax.Array:
    """What is lost of the subnormal entries of an operand."""
    size = jnp.abs(x)
    wide = jnp.float64 if size.dtype == jnp.float64 else jnp.float32
    # The comparison would itself flush; integers tell subnormals apart.
    return jnp.full(size.shape, float(jnp.finfo(size.dtype).tiny), wide)


def _cotangent(weights: Any, chosen: Any, place: Any) -> jax.Array:
    """The weights, or 1 at one place; 0 where the leaf is not chosen."""
    index = lax.iota(jnp.int32, weights.size).reshape(weights.shape)
    one = (index == place).astype(weights.dtype)
    picked = jnp.where(place < 0, weights, one)
    return jnp.where(chosen, picked, jnp.zeros_like(picked))


def _sums(slopes: Sequence[Any], errors: Sequence[Any]) -> tuple[Any, Any]:
    """The sum of |slope| * error, and the root of the sum of its squares."""
    products = []
    for slope, error in zip(slopes, errors):
        size, error = jnp.abs(slope), jnp.abs(error)
        # An infinite slope does no harm where there is no error, and vice versa.
        products.append(jnp.where((size == 0) | (error == 0), 0, size * error))
    total = sum((jnp.sum(p) for p in products), jnp.zeros(()))
    # In units of the total: squares neither overflow nor vanish.
    unit = jnp.where(total > 0, total, 1)
    squares = sum((jnp.sum(jnp.square(p / unit)) for p in products), jnp.zeros(()))
    return total, total * jnp.sqrt(squares)
