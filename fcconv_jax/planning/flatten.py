"""Walks a trace back from a layer's input to the flatten that made its features."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.ad_checkpoint import checkpoint_name

from ..jaxprs import Literal, call_body, opened, subjaxprs

MARK = "fcconv_jax:"

# Shape-preserving: entry i of the output depends on entry i of the operands alone.
_ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh digamma div erf erf_inv erfc exp exp2
    expm1 floor integer_pow is_finite lgamma log log1p logistic max min mul name neg
    nextafter not optimization_barrier or pow pvary reduce_precision rem round rsqrt
    select_n sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh
    xor
    """.split()
)
_POOLS = frozenset(
    """
    reduce_window reduce_window_max reduce_window_min reduce_window_sum cumsum
    """.split()
)


@dataclasses.dataclass(frozen=True)
class Flatten:
    """Where the features of a dense layer come from.

    Args:
      window: spatial sizes of the array that was flattened.
      order: its axes in the order of the flatten, slowest first, such as ``"CHW"``.
    """

    window: tuple[int, ...]
    order: str


@dataclasses.dataclass(frozen=True)
class Features:
    """Where the features of a dense layer lie in its input.

    Args:
      rank: number of axes, as the layer saw them.
      axes: the features' axes in their order, counted from the end (-1, ...).
      lead: number of axes that the layer leaves alone.
    """

    rank: int
    axes: tuple[int, ...]
    lead: int


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A jaxpr in the context of the equation that calls it."""

    jaxpr: Any
    parent: _Frame | None = None
    call: Any = None

    @functools.cached_property
    def producers(self) -> Mapping[Any, tuple[Any, int]]:
        """What makes each variable: the equation and the number of its output."""
        return {
            var: (eqn, index)
            for eqn in self.jaxpr.eqns
            for index, var in enumerate(eqn.outvars)
        }

    def enter(self, eqn: Any, body: Any) -> _Frame:
        """The frame of a jaxpr that an equation of this frame runs."""
        return _Frame(opened(body)[0], self, eqn)


@dataclasses.dataclass(frozen=True)
class _End:
    """Where a walk ended: an array, which of its axes were followed, and what made it.

    ``sizes`` are those of the axes where the flatten happened; pooling on the way
    further back changes the array's sizes, not the axes' meaning.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    producer: Any


def mark(x: Any, number: int) -> Any:
    """Names an array in the trace, to be found again by its number."""
    return checkpoint_name(x, f"{MARK}{number}")


def find_flattens(
    jaxpr: Any, features: Mapping[int, Features]
) -> dict[int, tuple[Flatten, ...]]:
    """The flattens behind each marked array.

    Args:
      jaxpr: the trace, as ``jax.make_jaxpr`` returns it.
      features: for each mark, where the features lie in the array.

    Returns:
      For each mark the distinct answers of all paths back; empty where the features
      were never split, as in a layer on the last axis. A window of ones only tells
      how many spatial axes there are.
    """
    found: dict[int, tuple[Flatten, ...]] = {}
    root = _Frame(opened(jaxpr)[0])
    for number, frame, eqn in _marks(root):
        if number in found or number not in features:
            continue
        seen = features[number]
        shape = eqn.invars[0].aval.shape
        # Under vmap the array in the trace has leading axes that the layer never saw.
        axes = tuple(len(shape) + axis for axis in seen.axes)
        sizes = tuple(shape[axis] for axis in axes)
        ends = _walk(frame, eqn.invars[0], axes, sizes, {})
        answers = [_describe(end) for end in ends]
        found[number] = tuple(dict.fromkeys(a for a in answers if a is not None))
        if not found[number]:
            spatial = min(seen.lead - 1, 3)
            if spatial < 1:
                spatial = _upstream_rank(frame, eqn.invars[0], len(shape) - seen.rank)
            found[number] = (Flatten((1,) * spatial, "DHW"[3 - spatial :] + "C"),)
    return found


def _describe(end: _End) -> Flatten | None:
    """Reads window and order off the array where a walk ended."""
    if len(end.axes) < 2:
        return None
    name, params = "", {}
    if end.producer is not None:
        name, params = end.producer.primitive.name, end.producer.params
    if name == "dot_general" and params["dimension_numbers"][1][0]:
        return None  # heads of an attention, joined again: not a spatial flatten
    channel = len(end.shape) - 1
    if name == "conv_general_dilated":
        channel = params["dimension_numbers"].out_spec[1]
    spatial = sorted(axis for axis in end.axes if axis != channel)
    if not 0 < len(spatial) <= 3:
        return None
    letters = dict(zip(spatial, "DHW"[3 - len(spatial) :]))
    letters[channel] = "C"
    size = dict(zip(end.axes, end.sizes))
    order = "".join(letters[axis] for axis in end.axes)
    if channel not in end.axes:
        order += "C"
    return Flatten(tuple(size[axis] for axis in spatial), order)


def _walk(
    frame: _Frame, var: Any, axes: tuple[int, ...], sizes: tuple[int, ...], memo: Any
) -> list[_End]:
    """All ends of the paths back from ``var`` along ``axes``."""
    key = (id(frame.jaxpr), id(frame.call), id(var), axes)
    if key not in memo:
        memo[key] = []  # a cycle cannot happen; this guards the recursion
        memo[key] = _step(frame, var, axes, sizes, memo)
    return memo[key]


def _step(
    frame: _Frame, var: Any, axes: tuple[int, ...], sizes: tuple[int, ...], memo: Any
) -> list[_End]:
    shape = tuple(var.aval.shape)
    eqn, index = frame.producers.get(var, (None, 0))
    end = [_End(shape, axes, sizes, eqn)]
    if eqn is None:
        outer = _outer(frame, var, axes)
        return end if outer is None else _walk(*outer, sizes, memo)
    name = eqn.primitive.name
    body = call_body(eqn)
    if body is not None:
        inner = frame.enter(eqn, body)
        return _walk(inner, inner.jaxpr.outvars[index], axes, sizes, memo)
    if name == "scan":
        inner = frame.enter(eqn, eqn.params["jaxpr"])
        stacked = index >= eqn.params["num_carry"]
        if stacked and 0 in axes:
            return end
        axes = tuple(axis - stacked for axis in axes)
        return _walk(inner, inner.jaxpr.outvars[index], axes, sizes, memo)
    if name == "transpose":
        axes = tuple(eqn.params["permutation"][axis] for axis in axes)
        return _walk(frame, eqn.invars[0], axes, sizes, memo)
    if name == "squeeze":
        kept = [
            i
            for i in range(len(eqn.invars[0].aval.shape))
            if i not in eqn.params["dimensions"]
        ]
        axes = tuple(kept[axis] for axis in axes)
        return _walk(frame, eqn.invars[0], axes, sizes, memo)
    if name == "broadcast_in_dim":
        source = _unbroadcast(eqn, axes)
        return (
            end if source is None else _walk(frame, eqn.invars[0], source, sizes, memo)
        )
    if name == "reshape":
        pooled = sizes != tuple(shape[axis] for axis in axes)
        source = None if pooled else _unflatten(eqn.invars[0].aval.shape, shape, axes)
        if source is None:
            return end
        before = eqn.invars[0].aval.shape
        sizes = tuple(before[axis] for axis in source)
        return _walk(frame, eqn.invars[0], source, sizes, memo)
    if name in _POOLS and len(axes) > 1:
        return _walk(frame, eqn.invars[0], axes, sizes, memo)
    if name in _ELEMENTWISE:
        same = [v for v in eqn.invars if _carries(frame, v, shape)]
        if name == "optimization_barrier":
            same = [eqn.invars[index]]
        if name == "select_n":
            same = [v for v in same if v is not eqn.invars[0]]
        ends = [e for v in same for e in _walk(frame, v, axes, sizes, memo)]
        split = [e for e in ends if len(e.axes) > len(axes)] or ends
        return split or end
    return end


def _carries(frame: _Frame, var: Any, shape: tuple[int, ...]) -> bool:
    """Whether an operand of an elementwise equation can hold the features."""
    if isinstance(var, Literal) or tuple(var.aval.shape) != shape:
        return False
    eqn, _ = frame.producers.get(var, (None, 0))
    return eqn is None or not (
        eqn.primitive.name == "broadcast_in_dim"
        and math.prod(eqn.invars[0].aval.shape) != math.prod(shape)
    )


def _outer(
    frame: _Frame, var: Any, axes: tuple[int, ...]
) -> tuple[_Frame, Any, tuple[int, ...]] | None:
    """The operand behind an input of a sub-jaxpr, with the axes there."""
    if frame.parent is None or var not in frame.jaxpr.invars:
        return None
    index = frame.jaxpr.invars.index(var)
    eqn = frame.call
    if eqn.primitive.name == "scan":
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        if consts <= index < consts + carry:
            return None
        stacked = index >= consts + carry
        axes = tuple(axis + stacked for axis in axes)
    operand = eqn.invars[len(eqn.invars) - len(frame.jaxpr.invars) + index]
    return None if isinstance(operand, Literal) else (frame.parent, operand, axes)


def _unflatten(
    before: Sequence[int], after: Sequence[int], axes: Sequence[int]
) -> tuple[int, ...] | None:
    """The axes before a reshape that make up ``axes`` after it, in the same order."""
    source: list[int] = []
    for axis in axes:
        outer = math.prod(after[:axis])
        size = after[axis]
        start = 0
        while start < len(before) and math.prod(before[:start]) < outer:
            start += 1
        if math.prod(before[:start]) != outer:
            return None
        stop = start
        while stop < len(before) and math.prod(before[start:stop]) < size:
            stop += 1
        if math.prod(before[start:stop]) != size:
            return None
        if size == 1:
            continue
        # Axes of size 1 on the border belong to the flatten's window if they follow
        # a batch axis; between other axes they are harmless.
        source += range(start, stop)
    return tuple(source) or None


def _unbroadcast(eqn: Any, axes: Sequence[int]) -> tuple[int, ...] | None:
    """The operand's axes behind ``axes`` of a broadcast, if none was stretched."""
    placed = {out: i for i, out in enumerate(eqn.params["broadcast_dimensions"])}
    operand, shape = eqn.invars[0], eqn.outvars[0].aval.shape
    if isinstance(operand, Literal):
        return None
    for axis in axes:
        if axis not in placed or operand.aval.shape[placed[axis]] != shape[axis]:
            return None
    return tuple(placed[axis] for axis in axes)


def _upstream_rank(frame: _Frame, var: Any, mapped: int) -> int:
    """Spatial axes of a pointwise conv: those of the nearest array that has some."""
    while not isinstance(var, Literal):
        rank = len(var.aval.shape) - mapped
        if rank > 2:
            return min(rank - 2, 3)
        eqn, index = frame.producers.get(var, (None, 0))
        if eqn is None:
            outer = _outer(frame, var, ())
            if outer is None:
                break
            frame, var, _ = outer
        elif (body := call_body(eqn)) is not None:
            frame = frame.enter(eqn, body)
            var = frame.jaxpr.outvars[index]
        else:
            var = _main_operand(eqn)
    return 1


def _main_operand(eqn: Any) -> Any:
    """The operand that the activations come in by: the left one of a product."""
    operands = eqn.invars[1:] if eqn.primitive.name == "select_n" else eqn.invars
    if not operands:
        return Literal(0, None)
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        return operands[0]
    return max(operands, key=lambda v: len(v.aval.shape))


def _marks(frame: _Frame) -> Iterator[tuple[int, _Frame, Any]]:
    """Every marked equation of a jaxpr and its sub-jaxprs."""
    for eqn in frame.jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(MARK):
            yield int(eqn.params["name"].removeprefix(MARK)), frame, eqn
        for _, body in subjaxprs(eqn):
            yield from _marks(frame.enter(eqn, body))
