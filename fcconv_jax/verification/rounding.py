"""Whether rounding explains a difference of two programs in float64.

Two causes are measured. float64 itself: both programs run again with the operands of
each equation moved by an ulp, and what that changes is allowed, entry by entry. And
constants that were rounded to the working precision in other places: the smallest moves
of the constants after which the two programs agree are solved for, and the programs
run with them. The moves are the witness: small ones are rounding, large ones are
another constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..messages.progress import Progress
from ..tracing.arguments import is_key
from ..tracing.jaxprs import opened
from .agreement import THRESHOLD, Agreement, Quantity, agree, largest
from .arithmetic import unit_roundoff
from .nudges import SMALL, Constant, constants, half_ulp, is_floating
from .reading import Reading
from .reference import TracedProgram

# The norm of all constants' moves, in half ulps, up to which they are called rounding.
# A constant that is rounded once moves by at most 1, one that was computed by a few
# rounded operations by 2. A factor of 1 + 1e-6 moves one of float32 by 17 at least.
LIMIT = 4.0
# The same for tables: a difference against the spread under random half-ulp moves.
_TABLE_LIMIT = 8.0
_TABLE_DRAWS = 8
# Float64's own rounding: how often it is drawn, and how far beyond the largest draw a
# difference may be. The draws move every operand by a whole ulp, rounding by a half
# at most.
_DRAWS = 4
_BEYOND = 16.0
# A reference that lost so many digits judges nothing.
_LOST = 1e-5
# How far a cause is tried: a program may answer to a constant so many times as much,
# and to float64's rounding so many times as much as to its own precision's.
_SENSITIVE = 1e4
_NOISY = 2.0**14
# Least effects of the directions of constants, as parts of the largest.
_PARTS = (1e-2, 1e-4, 1e-6, 0.0)
# Constants that are solved for; entries of each array that are looked at.
_MOST = 48
_ENTRIES = 512

Results = list[list[np.ndarray]]  # for each pair, its arrays
ByQuantity = Mapping[Quantity, tuple[list[np.ndarray], list[np.ndarray]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """One quantity of two programs, in float64.

    Attributes:
      quantity: what they are.
      traces: of both programs.
      names: of the arrays that they return.
    """

    quantity: Quantity
    traces: tuple[TracedProgram, TracedProgram]
    names: Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What rounding explains.

    Attributes:
      arrays: the results, compared with what rounding explains taken away.
      moves: by how many half ulps each constant moves for the two to agree; empty where
        none has to.
      distance: the norm of the moves after which the two agree, even where it is too
        large for rounding; None where no moves of constants make them agree.
      tables: whether arrays of constants differ by their rounding.
    """

    arrays: list[Agreement]
    moves: Mapping[Constant, float]
    distance: float | None
    tables: bool

    @property
    def passed(self) -> bool:
        """Whether rounding explains every difference."""
        return all_passed(self.arrays)


class _Readings:
    """Both programs in float64, with their constants or their operands free to move."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        movable: Sequence[Constant] = (),
        tables: Container[bytes] = (),
        noisy: bool = False,
    ):
        self.pairs, self.count, self._tables = pairs, len(movable), tables
        self._readings = [
            [
                Reading(trace.jaxpr, movable=movable, noisy=noisy)
                for trace in pair.traces
            ]
            for pair in pairs
        ]

    def run(
        self,
        steps: Sequence[float] | np.ndarray = (),
        seed: int = 0,
        tables: np.random.Generator | None = None,
    ) -> tuple[Results, Results]:
        """Run both, with what moves moved; NumPy arrays."""
        sides: tuple[Results, Results] = ([], [])
        for pair, readings in zip(self.pairs, self._readings):
            for side, trace, reading in zip(sides, pair.traces, readings):
                consts = None
                if tables is not None:
                    consts = _moved_tables(reading.consts, self._tables, tables)
                outs, _ = reading(trace.operands, steps, seed, consts)
                side.append([key_bits(out) for out in outs])
        return sides


def explain(
    pairs: Sequence[Pair], results: ByQuantity, magnified: float, show: Progress
) -> Explanation:
    """Compare two programs with all that rounding explains taken away.

    Readings that move take seconds to compile, so each cause is tried only where the
    difference is near to what it can explain.

    Args:
      pairs: what was run.
      results: by quantity, the arrays of both programs.
      magnified: the larger error of the two programs in their own precision, in units
        of its roundoff.
      show: takes the progress.
    """
    arrays = agreements(pairs, results)
    mine, theirs = ([results[pair.quantity][side] for pair in pairs] for side in (0, 1))
    noise = [[np.zeros(y.shape) for y in quantity] for quantity in mine]
    if not all_passed(arrays) and _off(arrays) < _NOISY * magnified * 2.0**-53:
        show("float64: its own rounding", 0, 1)
        noise = _noise(pairs, mine)
        arrays = _agree(pairs, mine, theirs, noise)
        show("float64: its own rounding", 1, 1)
    movable, tables = _constants_of(pairs), _own_tables(pairs)
    dtypes = {dtype for dtype, _ in movable} | set(tables.values())
    unit = max(map(unit_roundoff, dtypes), default=0.0)
    if all_passed(arrays) or not _off(arrays) < _SENSITIVE * LIMIT * unit:
        return Explanation(arrays, {}, None, False)
    show("float64: constants", 0, 1)
    readings = _Readings(pairs, movable, tables)
    found = mine, theirs = readings.run()
    again, distance, steps = arrays, None, np.zeros(len(movable))
    if movable:
        steps, moved = _solve(readings, mine, theirs, noise)
        agreed = _agree(pairs, *moved, noise)
        size = float(np.linalg.norm(steps))
        distance = size if all_passed(agreed) else None
        if size <= LIMIT:
            again, found = agreed, moved
    spread = bool(tables) and not all_passed(again)
    if spread:
        again = _agree(pairs, *found, _table_noise(readings, mine, theirs, noise))
    show("float64: constants", 1, 1)
    if not all_passed(again):
        return Explanation(arrays, {}, distance, False)
    moves = {c: float(step) for c, step in zip(movable, steps) if abs(step) > 1e-3}
    return Explanation(again, moves, distance, spread)


def _off(arrays: Sequence[Agreement]) -> float:
    """Return the largest difference, as a part of the largest value of its array."""
    failed = [array for array in arrays if not array.passed and not array.unseen]
    return max((array.difference / (array.scale or 1.0) for array in failed), default=0)


def _constants_of(pairs: Sequence[Pair]) -> list[Constant]:
    traces = [trace for pair in pairs for trace in pair.traces]
    found = dict.fromkeys(c for trace in traces for c in constants(trace.jaxpr))
    # Each constant takes a run of both programs.
    return list(found) if len(found) <= _MOST else []


def all_passed(arrays: Sequence[Agreement]) -> bool:
    """Return whether all arrays agree."""
    return all(array.passed for array in arrays)


def agreements(
    pairs: Sequence[Pair],
    results: ByQuantity,
    allowed: Results | None = None,
) -> list[Agreement]:
    """Compare the results of two programs, one quantity after the other."""
    found = []
    for number, pair in enumerate(pairs):
        mine, theirs = results[pair.quantity]
        theirs = [z.reshape(y.shape) for y, z in zip(mine, theirs, strict=True)]
        more = None if allowed is None else allowed[number]
        wanted, got = (list(zip(pair.names, each)) for each in (mine, theirs))
        found += agree(pair.quantity, wanted, got, more)
    return found


def _agree(
    pairs: Sequence[Pair], mine: Results, theirs: Results, allowed: Results
) -> list[Agreement]:
    return agreements(pairs, _by_quantity(pairs, mine, theirs), allowed)


def _by_quantity(pairs: Sequence[Pair], mine: Results, theirs: Results) -> ByQuantity:
    return {
        pair.quantity: (y, z) for pair, y, z in zip(pairs, mine, theirs, strict=True)
    }


def key_bits(array: Any) -> np.ndarray:
    """Return an array as NumPy has it; random keys as their bits."""
    return np.asarray(jax.random.key_data(array) if is_key(array) else array)


def _noise(pairs: Sequence[Pair], like: Results) -> Results:
    """Return how far float64's own rounding may take each entry."""
    readings = _Readings(pairs, noisy=True)
    still = readings.run()
    worst = [[np.zeros(y.shape) for y in quantity] for quantity in like]
    # Seed 0 moves nothing.
    for seed in range(1, _DRAWS + 1):
        for side, base in zip(readings.run(seed=seed), still):
            _widen(worst, side, base, np.maximum)
    return [
        [_bounded(_BEYOND * off, scale) for off, scale in zip(*each)]
        for each in zip(worst, _scales(pairs, like))
    ]


def _widen(worst: Results, moved: Results, base: Results, combine: Any) -> None:
    for number, quantity in enumerate(worst):
        for place, so_far in enumerate(quantity):
            with np.errstate(invalid="ignore"):
                off = abs(moved[number][place] - 1.0 * base[number][place])
            off = np.where(np.isfinite(off), off, 0.0).reshape(so_far.shape)
            quantity[place] = combine(so_far, off)


def _bounded(off: np.ndarray, scale: float) -> np.ndarray:
    """Differences, but for those that would excuse anything."""
    return np.where(off <= _LOST * scale, off, 0.0)


def _scales(pairs: Sequence[Pair], results: Results) -> list[list[float]]:
    """The size of each array; of one that is nothing but rounding, of what is near."""
    found = []
    for pair, quantity in zip(pairs, results):
        given = max(
            (largest(np.asarray(x)) for x in pair.traces[0].operands if is_floating(x)),
            default=0.0,
        )
        sizes = [largest(y) for y in quantity]
        least = max([1e-8 * given, *(1e-2 * size for size in sizes)])
        found.append([max(size, least) or 1.0 for size in sizes])
    return found


def _solve(
    readings: _Readings, mine: Results, theirs: Results, noise: Results
) -> tuple[np.ndarray, tuple[Results, Results]]:
    """The smallest moves of the constants after which both agree, and the results."""
    pick = _picker(mine, theirs)
    start = pick(mine, theirs)
    columns = [pick(*readings.run(step)) - start for step in np.eye(readings.count)]
    jacobian = np.stack(columns, 1)
    # A direction that cannot be seen within the limit says nothing about its constants.
    u, sizes, vt = np.linalg.svd(jacobian, full_matrices=False)
    seen = sizes * LIMIT > THRESHOLD
    # Directions of little effect last: they would move far to make up for what the
    # strong ones, such as constants of bfloat16, leave by not acting linearly.
    ranks = {int((seen & (sizes > part * sizes[0])).sum()) for part in _PARTS}
    steps, moved = np.zeros(readings.count), (mine, theirs)
    for rank in sorted(ranks - {0}):
        steps, moved, off = np.zeros(readings.count), (mine, theirs), start
        while True:
            steps = steps - vt[:rank].T @ (u[:, :rank].T @ off / sizes[:rank])
            moved, before = readings.run(steps), np.linalg.norm(off)
            off = pick(*moved)
            if all_passed(_agree(readings.pairs, *moved, noise)):
                return steps, moved
            if not np.linalg.norm(off) < before / 2:  # also where it is NaN
                break
    return steps, moved


def _picker(mine: Results, theirs: Results) -> Any:
    """Return what gives the difference as a vector, of entries that tell most."""
    rng = np.random.default_rng(0)
    places = []
    for ys, zs in zip(mine, theirs):
        most = max((largest(y) for y in ys), default=0.0)
        for y, z in zip(ys, zs):
            if not np.issubdtype(y.dtype, np.inexact):
                places.append((np.zeros(0, int), 1.0))
                continue
            with np.errstate(invalid="ignore"):
                off = abs(y.reshape(-1) - z.reshape(-1))
            finite = np.flatnonzero(np.isfinite(off))
            chosen = finite[np.argsort(-off[finite])[:_ENTRIES]]
            # Beside the largest differences, entries that must not move when constants
            # do.
            more = rng.choice(finite, min(_ENTRIES, finite.size), replace=False)
            scale = max(largest(y), 1e-2 * most) or 1.0
            places.append((np.union1d(chosen, more), scale))

    def pick(mine: Results, theirs: Results) -> np.ndarray:
        flat = [
            (z.reshape(-1)[at] - y.reshape(-1)[at]) / scale
            for (at, scale), y, z in zip(
                places,
                (y for ys in mine for y in ys),
                (z for zs in theirs for z in zs),
            )
        ]
        return np.concatenate(
            [np.concatenate([np.real(part), np.imag(part)]) for part in flat]
        )

    return pick


def _own_tables(pairs: Sequence[Pair]) -> dict[bytes, str]:
    """Dtypes of tables of constants that only one program has, in any order."""
    sides: tuple[dict[bytes, str], dict[bytes, str]] = ({}, {})
    for pair in pairs:
        for side, trace in zip(sides, pair.traces):
            for array in filter(_is_table, opened(trace.jaxpr)[1]):
                side[_fingerprint(array)] = str(array.dtype)
    both = {**sides[0], **sides[1]}
    return {key: both[key] for key in sides[0].keys() ^ sides[1].keys()}


def _is_table(array: Any) -> bool:
    return is_floating(array) and np.size(array) > SMALL


def _fingerprint(array: Any) -> bytes:
    return np.sort(np.asarray(array).astype(np.float64).reshape(-1)).tobytes()


def _moved_tables(
    consts: Sequence[Any], own: Container[bytes], rng: np.random.Generator
) -> list[Any]:
    """The constants with their own tables moved by up to half an ulp at random."""
    moved = list(consts)
    for place, array in enumerate(consts):
        if _is_table(array) and _fingerprint(array) in own:
            wide = np.asarray(array).astype(np.float64)
            step = half_ulp(array.dtype, wide) * (wide != 0)
            moved[place] = wide + step * rng.uniform(-1, 1, wide.shape)
    return moved


def _table_noise(
    readings: _Readings, mine: Results, theirs: Results, noise: Results
) -> Results:
    """Return the noise, and how far the rounding of tables may take each entry."""
    rng = np.random.default_rng(0)
    total = [[np.zeros(y.shape) for y in quantity] for quantity in mine]
    for _ in range(_TABLE_DRAWS):
        for side, base in zip(readings.run(tables=rng), (mine, theirs)):
            _widen(total, side, base, lambda so_far, off: so_far + off**2)
    return [
        [
            more + _bounded(_TABLE_LIMIT * np.sqrt(squares / _TABLE_DRAWS), scale)
            for more, squares, scale in zip(*each)
        ]
        for each in zip(noise, total, _scales(readings.pairs, mine))
    ]
