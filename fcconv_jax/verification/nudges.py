"""Numbers of a trace, moved by a little in its float64 reading.

Two programs of one function may hold one constant rounded in two places: ``x / 255``
and ``x * (1 / 255)``. And float64 rounds too, which a sum that cancels magnifies. Both
are measured: the reading runs again with its constants, or with the operands of each
equation, moved by about what rounding may have taken from them (Monte Carlo arithmetic,
Parker 1997).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from ..tracing.jaxprs import AnyJaxpr, Literal, opened, subjaxprs
from ..tracing.primitives import JOINS, MOVES, POSITIONS, ROUNDING, SAME
from ..tracing.protocols import Atom

# A dtype and a value: what is written twice in a program was rounded in one way.
Constant = tuple[str, float]
# Arrays of more entries are no longer constants of a formula, but tables.
SMALL = 64
# These move entries, pick them or decide by them, and round nothing.
_EXACT = SAME | ROUNDING | MOVES | JOINS | POSITIONS
_EXACT |= frozenset(
    """
    bitcast_convert_type clamp dynamic_slice dynamic_update_slice eq gather ge gt iota
    le lt max min ne neg reduce_max reduce_min select_n sign sort
    """.split()
)


def constants(jaxpr: AnyJaxpr) -> list[Constant]:
    """Return the constants of a trace that rounding may have moved, each once.

    Whole numbers and those of few bits, such as 0.5 and 255, are taken to be exact.

    Example:
      >>> constants(jax.make_jaxpr(lambda x: 0.5 * x + 0.1)(jnp.float32(1)))
      [('float32', 0.10000000149011612)]
    """
    return list(dict.fromkeys(_constants(jaxpr)))


def _constants(jaxpr: AnyJaxpr) -> Iterator[Constant]:
    body, consts = opened(jaxpr)
    for array in consts:
        if is_floating(array) and np.size(array) <= SMALL:
            values = np.asarray(array).astype(np.float64).reshape(-1)
            yield from _movable(array.dtype, values)
    for eqn in body.eqns:
        for atom in eqn.invars:
            if not isinstance(atom, Literal):
                continue
            array = literal_array(atom)
            if is_floating(array):
                yield from _movable(array.dtype, array.astype(np.float64).reshape(-1))
        for _, inner in subjaxprs(eqn):
            yield from _constants(inner)


def literal_array(atom: Atom) -> np.ndarray:
    """Return a literal of a trace in the dtype that its place has."""
    return np.asarray(atom.val, atom.aval.dtype)


def _movable(dtype: DTypeLike, values: np.ndarray) -> Iterator[Constant]:
    bits = jnp.finfo(dtype).nmant + 1
    for value in values.tolist():
        if not np.isfinite(value) or value == round(value):
            continue
        # Half the bits: a rounded constant has so few with a probability of 2**-12 in
        # float32.
        few = np.ldexp(np.frexp(value)[0], bits // 2)
        if few != np.round(few):
            yield str(dtype), value


def half_ulp(dtype: DTypeLike, values: ArrayLike) -> np.ndarray:
    """Half the distance to the next number of a dtype, for each entry.

    Example:
      >>> float(half_ulp("float32", 1.0)) == 2.0**-24
      True
    """
    info = jnp.finfo(dtype)
    exponent = np.frexp(np.asarray(values, np.float64))[1]
    return np.ldexp(0.5, np.maximum(exponent - 1, int(info.minexp)) - info.nmant)


def is_floating(array: Any) -> bool:
    """Return whether an array is of real floats."""
    return jnp.issubdtype(array.dtype, jnp.floating)


@dataclasses.dataclass(frozen=True)
class Nudge:
    """How far a reading moves its numbers; its arrays are traced.

    Attributes:
      index: where each constant has its step.
      steps: by how many half ulps of its own dtype each constant moves.
      seed: chooses which way operands move, by an ulp of float64; 0 for none, and
        None for a reading that never moves them.
    """

    index: Mapping[Constant, int]
    steps: Any
    seed: Any
    _count: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def constant(self, wide: Any, array: Any) -> Any:
        """Return a widened constant, moved.

        Args:
          wide: in float64; may be traced.
          array: the same as the program has it.
        """
        if not is_floating(array) or np.size(array) > SMALL:
            return wide
        values = np.asarray(array).astype(np.float64)
        keys = [(str(array.dtype), value) for value in values.reshape(-1).tolist()]
        if not any(key in self.index for key in keys):
            return wide
        table = jnp.append(self.steps, 0.0)
        places = np.array([self.index.get(key, -1) for key in keys])
        steps = table[places].reshape(values.shape)
        return wide + steps * half_ulp(array.dtype, values)

    def operands(self, name: str, values: list[Any]) -> list[Any]:
        """Return the operands of an equation, each entry an ulp up or down."""
        if self.seed is None or name in _EXACT:
            return values
        return [self._jittered(value) for value in values]

    def _jittered(self, x: Any) -> Any:
        dtype = getattr(x, "dtype", None)
        if dtype == np.complex128:
            return jax.lax.complex(self._jittered(x.real), self._jittered(x.imag))
        if dtype != np.float64:
            return x
        # A hash of the entry's own bits: a generator of random numbers costs more than
        # most equations do.
        bits = jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.uint64)
        # The constants are those of SplitMix64 (Steele, Lea and Flood, 2014).
        salt = np.uint64((2 * next(self._count) + 1) * 0x9E3779B97F4A7C15 % 2**64)
        mixed = (bits ^ (self.seed * salt)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        sign = (mixed >> np.uint64(63)) * np.uint64(2) - np.uint64(1)  # wraps
        moved = jax.lax.bitcast_convert_type(bits + sign, jnp.float64)
        still = (self.seed == 0) | (x == 0) | ~jnp.isfinite(x)
        return jnp.where(still, x, moved)
