"""Walks a trace back from a layer's input to the flatten that made its features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..geometry.kernels import channel_last, window_letters
from ..tracing.frames import Frame
from ..tracing.jaxprs import Literal, call_body, scan_parts
from ..tracing.primitives import ENTRYWISE, MATMULS, POOLS, SAME, SCANS
from ..tracing.protocols import Atom, Equation


@dataclasses.dataclass(frozen=True)
class Flatten:
    """Where the features of a dense layer come from.

    Args:
      window: spatial sizes of the array that was flattened.
      order: its axes in the order of the flatten, slowest first, such as ``"CHW"``.
    """

    window: tuple[int, ...]
    order: str


@dataclasses.dataclass(frozen=True, eq=False)
class LayerInput:
    """The input of one call of a dense layer, as it is in a trace.

    Args:
      number: the call's.
      frame: where the array is.
      var: the array.
      axes: its axes that hold the features, in their order.
      lead: number of axes that the layer leaves alone.
      mapped: number of axes that the layer does not see, under ``vmap``.
    """

    number: int
    frame: Frame
    var: Atom
    axes: tuple[int, ...]
    lead: int
    mapped: int = 0


@dataclasses.dataclass(frozen=True)
class _Place:
    """An array in the trace, and which of its axes are followed.

    ``sizes`` are those of the axes where the flatten happened; pooling on the way
    further back changes the array's sizes, not the axes' meaning.
    """

    frame: Frame
    var: Atom
    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.var.aval.shape)

    @property
    def producer(self) -> tuple[Equation | None, int]:
        """The equation that makes the array and the number of its output, if any."""
        return self.frame.producers.get(self.var, (None, 0))


def find_flattens(inputs: Iterable[LayerInput]) -> dict[int, tuple[Flatten, ...]]:
    """Return the flattens behind the inputs of layers.

    Returns:
      For each call the distinct answers of all paths back. Where the features were
      never split, as in a layer on the last axis, a window of ones that only tells
      how many spatial axes there are.
    """
    found: dict[int, dict[Flatten, None]] = {}
    ranks: dict[int, int] = {}
    memo: dict[_Place, tuple[_Place, ...]] = {}
    for seen in inputs:
        shape = tuple(seen.var.aval.shape)
        sizes = tuple(shape[axis] for axis in seen.axes)
        start = _Place(seen.frame, seen.var, seen.axes, sizes)
        answers = [_describe(end) for end in _ends(start, memo)]
        each = found.setdefault(seen.number, {})
        each.update({a: None for a in answers if a is not None})
        # The first leading axis is the batch; convolutions have 3 spatial axes at most.
        spatial = min(seen.lead - 1, 3)
        if spatial < 1:
            spatial = _upstream_rank(seen.frame, seen.var, seen.mapped)
        ranks[seen.number] = max(spatial, ranks.get(seen.number, 1))
    flattens = {}
    for number, answers in found.items():
        rank = ranks[number]
        pointwise = Flatten((1,) * rank, channel_last(rank))
        flattens[number] = tuple(answers) or (pointwise,)
    return flattens


def _describe(end: _Place) -> Flatten | None:
    """Read window and order off the array where a walk ended."""
    eqn, _ = end.producer
    name, params = ("", {}) if eqn is None else (eqn.primitive.name, eqn.params)
    if name == "dot_general" and params["dimension_numbers"][1][0]:
        return None  # heads of an attention, joined again: not a spatial flatten
    channel = len(end.shape) - 1
    if name == "conv_general_dilated":
        channel = params["dimension_numbers"].out_spec[1]
    # Axes of size 1 are lost in a reshape; between the others they belong to the map.
    first = min(end.axes)
    ones = [a for a, n in enumerate(end.shape) if n == 1 and a > first]
    axes = (*end.axes, *(a for a in ones if a not in end.axes))
    spatial = sorted(axis for axis in axes if axis != channel)
    if not 0 < len(spatial) <= 3:
        return None
    letters = dict(zip(spatial, window_letters(len(spatial))))
    letters[channel] = "C"
    order = "".join(letters[axis] for axis in axes)
    if channel not in axes:
        order += "C"
    # Sizes at the flatten; further back, before a pool, the array itself is larger.
    size = dict(zip(end.axes, end.sizes))
    return Flatten(tuple(size.get(axis, 1) for axis in spatial), order)


def _ends(start: _Place, memo: dict[_Place, tuple[_Place, ...]]) -> tuple[_Place, ...]:
    """Return where paths back from a place end, if the features were split on the way.

    Of paths that join in one equation those count on which the features are split
    further; a single axis that is never split has no ends. Runs on a stack of its
    own: a deep model makes a trace deeper than Python's.
    """
    stack = [start]
    while stack:
        place = stack[-1]
        if place in memo:
            stack.pop()
            continue
        sources = _sources(place)
        waiting = [source for source in sources if source not in memo]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if sources:
            ends = dict.fromkeys(end for s in sources for end in memo[s])
            more = [end for end in ends if len(end.axes) > len(place.axes)]
            memo[place] = tuple(more or ends)
        else:
            split = len(place.axes) > 1 and not _is_stretched(place)
            memo[place] = (place,) if split else ()
    return memo[start]


def _is_stretched(place: _Place) -> bool:
    """Return whether an array repeats its entries, as a group norm's statistics do.

    Then its axes don't form a map that was flattened.
    """
    eqn, _ = place.producer
    if eqn is None or eqn.primitive.name != "broadcast_in_dim":
        return False
    return math.prod(eqn.invars[0].aval.shape) != math.prod(place.shape)


def _sources(place: _Place) -> list[_Place]:
    """Return the arrays that the followed axes come from; none at an end."""
    frame, axes, sizes = place.frame, place.axes, place.sizes
    eqn, index = place.producer
    if eqn is None:
        outer = _outer(frame, place.var, axes)
        return [] if outer is None else [_Place(*outer, sizes)]
    name, params = eqn.primitive.name, eqn.params
    bodies: Any = params["branches"] if name == "cond" else (call_body(eqn),)
    if bodies[0] is not None:
        inner = [frame.enter(eqn, body) for body in bodies]
        return _variables([(f, f.jaxpr.outvars[index]) for f in inner], axes, sizes)
    if name == "scan":
        stacked = index >= scan_parts(eqn)[1]
        # The steps of a loop are not an axis of a map.
        if stacked and 0 in axes:
            return []
        axes = tuple(axis - stacked for axis in axes)
        inner = frame.enter(eqn, params["jaxpr"])
        return _variables([(inner, inner.jaxpr.outvars[index])], axes, sizes)
    if name in ENTRYWISE:
        operands = [eqn.invars[index]] if name in SAME else eqn.invars
        if name == "select_n":
            # The first operand only selects.
            operands = eqn.invars[1:]
        same = [v for v in operands if _carries(frame, v, place.shape)]
        return _variables([(frame, v) for v in same], axes, sizes)
    if name == "transpose" and _is_resized(frame, eqn.invars[0]):
        return []
    back = _axes_before(eqn, axes)
    if name == "reshape":
        # Pooled sizes are no longer those of the flatten: do not split them further.
        pooled = sizes != tuple(place.shape[axis] for axis in axes)
        back = None if pooled else back
        if back is not None:
            sizes = tuple(eqn.invars[0].aval.shape[axis] for axis in back)
    return [] if back is None else _variables([(frame, eqn.invars[0])], back, sizes)


def _is_resized(frame: Frame, var: Atom) -> bool:
    """Return whether matrices made an array from another one, as in a resize.

    The axis of the first matrix comes first, before the batch, until the result is
    transposed.
    """
    eqn, _ = frame.producers.get(var, (None, 0))
    while eqn is not None and eqn.primitive.name == "dot_general":
        left, right = eqn.invars
        if isinstance(left, Literal):
            return False
        if len(left.aval.shape) == 2 < len(right.aval.shape):
            return not eqn.params["dimension_numbers"][1][0]
        eqn, _ = frame.producers.get(left, (None, 0))
    return False


def _variables(
    found: Sequence[tuple[Frame, Atom]], axes: tuple[int, ...], sizes: tuple[int, ...]
) -> list[_Place]:
    return [
        _Place(frame, var, axes, sizes)
        for frame, var in found
        if not isinstance(var, Literal)
    ]


def _axes_before(eqn: Equation, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the operand's axes of the result's ``axes``; None if it mixes them."""
    name, params = eqn.primitive.name, eqn.params
    if name == "transpose":
        return tuple(params["permutation"][axis] for axis in axes)
    if name == "squeeze":
        rank = len(eqn.invars[0].aval.shape)
        kept = [i for i in range(rank) if i not in params["dimensions"]]
        return tuple(kept[axis] for axis in axes)
    if name == "expand_dims":
        new = {dim % len(eqn.outvars[0].aval.shape) for dim in params["dimensions"]}
        kept = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in new]
        return None if new & set(axes) else tuple(map(kept.index, axes))
    if name == "broadcast_in_dim":
        return _unbroadcast(eqn, axes)
    if name == "reshape" and params["dimensions"] is None:
        operand, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        return _unflatten(operand, result, axes)
    if name in POOLS | SCANS and len(axes) > 1:
        return axes
    return None


def _carries(frame: Frame, var: Atom, shape: tuple[int, ...]) -> bool:
    """Return whether an operand of an elementwise equation can hold the features."""
    if isinstance(var, Literal) or tuple(var.aval.shape) != shape:
        return False
    eqn, _ = frame.producers.get(var, (None, 0))
    return eqn is None or not (
        eqn.primitive.name == "broadcast_in_dim"
        and math.prod(eqn.invars[0].aval.shape) != math.prod(shape)
    )


def _outer(
    frame: Frame, var: Atom, axes: tuple[int, ...]
) -> tuple[Frame, Atom, tuple[int, ...]] | None:
    """Return the operand behind an input of a sub-jaxpr, with the axes there."""
    eqn = frame.call
    if frame.parent is None or eqn is None or var not in frame.jaxpr.invars:
        return None
    index = frame.jaxpr.invars.index(var)
    # Its body may have changed what it carries, as a scan's may.
    if eqn.primitive.name == "while":
        return None
    if eqn.primitive.name == "scan":
        consts, carry = scan_parts(eqn)
        # What a loop carries may be anything after its steps.
        if consts <= index < consts + carry:
            return None
        stacked = index >= consts + carry
        axes = tuple(axis + stacked for axis in axes)
    operand = eqn.invars[len(eqn.invars) - len(frame.jaxpr.invars) + index]
    return None if isinstance(operand, Literal) else (frame.parent, operand, axes)


def _unflatten(
    before: Sequence[int], after: Sequence[int], axes: Sequence[int]
) -> tuple[int, ...] | None:
    """Return the axes before a reshape that make up ``axes`` after it, in order."""
    source: list[int] = []
    for axis in axes:
        outer = math.prod(after[:axis])
        size = after[axis]
        start = 0
        # By equality, which symbolic sizes decide too.
        while start < len(before) and math.prod(before[:start]) != outer:
            start += 1
        # A batch of one is a batch, not the first axis of the window.
        while start < min(axis, len(before)) and before[start] == 1:
            start += 1
        if math.prod(before[:start]) != outer:
            return None
        stop = start
        while stop < len(before) and math.prod(before[start:stop]) != size:
            stop += 1
        if math.prod(before[start:stop]) != size:
            return None
        # An axis of 1 has no entries of its own to follow.
        if size != 1:
            source += range(start, stop)
    return tuple(source) or None


def _unbroadcast(eqn: Equation, axes: Sequence[int]) -> tuple[int, ...] | None:
    """Return the operand's axes of a broadcast's ``axes``, if none was stretched."""
    placed = {out: i for i, out in enumerate(eqn.params["broadcast_dimensions"])}
    operand, shape = eqn.invars[0], eqn.outvars[0].aval.shape
    if isinstance(operand, Literal):
        return None
    for axis in axes:
        if axis not in placed or operand.aval.shape[placed[axis]] != shape[axis]:
            return None
    return tuple(placed[axis] for axis in axes)


def _upstream_rank(frame: Frame, var: Atom, mapped: int) -> int:
    """Spatial axes of a pointwise conv: those of the nearest array that has some."""
    while not isinstance(var, Literal):
        eqn, index = frame.producers.get(var, (None, 0))
        rank = len(var.aval.shape) - mapped
        if rank > 2:
            return min(rank - 2, 3)
        if eqn is None:
            outer = _outer(frame, var, ())
            if outer is None:
                break
            frame, var, _ = outer
        elif (body := call_body(eqn)) is not None:
            frame = frame.enter(eqn, body)
            var = frame.jaxpr.outvars[index]
        else:
            var = _main_operand(frame, eqn)
    return 1


def _main_operand(frame: Frame, eqn: Equation) -> Any:
    """Return the operand that the activations come in by: the left one of a matmul.

    Of several the one of the highest rank; not one number everywhere, as the zeros of
    dropout are.
    """
    operands = eqn.invars[1:] if eqn.primitive.name == "select_n" else eqn.invars
    if not operands:
        return Literal(0, None)
    if eqn.primitive.name in MATMULS:
        return operands[0]

    def rank(var: Atom) -> tuple[int, bool]:
        shape = tuple(var.aval.shape)
        return len(shape), _carries(frame, var, shape)

    return max(operands, key=rank)
