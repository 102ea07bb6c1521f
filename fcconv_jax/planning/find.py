"""Follows parameters through a traced program to the matmuls that they go into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jax import lax
from jax.lax import PrecisionLike

from ..tracing.jaxprs import (
    AnyJaxpr,
    Literal,
    bodies,
    derivative_pass,
    opened,
    scan_parts,
    subjaxprs,
)
from ..tracing.marks import layer_of
from ..tracing.primitives import (
    CUSTOM_VJPS,
    ENTRYWISE,
    MATMULS,
    MOVES,
    REDUCTIONS,
    ROUNDING,
    SAME,
)
from ..tracing.protocols import Atom, Equation
from .factors import Axis, regroup, reversed_axis, size
from .matmul import (
    ACTIVE,
    NUMBER,
    Analysis,
    Matmul,
    Other,
    Tag,
    Use,
    Weight,
)

# Equations that leave the entries of a weight in place, apart from dtype and sign.
_KEPT = ROUNDING | {"neg"}
# Equations whose result is one number everywhere if their operands are.
_UNIFORM = ENTRYWISE | MOVES | REDUCTIONS


Memo = dict[Hashable, Analysis]


@dataclasses.dataclass(frozen=True)
class _Context:
    """Where a jaxpr runs.

    Args:
      obstacle: why no matmul in it may be converted, if so.
      derivative: the pass of a derivative inside the program that it is in, if any.
    """

    obstacle: str | None = None
    derivative: str | None = None


def analyse(
    jaxpr: AnyJaxpr,
    tags: Sequence[Tag],
    context: _Context = _Context(),
    memo: Memo | None = None,
) -> Analysis:
    """Tag every value of a jaxpr.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jaxpr = jax.make_jaxpr(lambda w, x: x @ w.T)(jnp.ones((3, 4)), jnp.ones(4))
      >>> analysis = analyse(jaxpr, [Weight.leaf("w", (3, 4)), ACTIVE])
      >>> [found.weight.axes for _, found in analysis.walk()]
      [(((1, 4),), ((4, 3),))]
    """
    memo = {} if memo is None else memo
    body, consts = opened(jaxpr)
    analysis = Analysis(jaxpr)
    known: dict[Any, Tag] = dict(zip(body.constvars, map(_constant, consts)))
    known.update(zip(body.invars, tags, strict=True))

    def tag(atom: Atom) -> Tag:
        return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in body.eqns:
        ins = [tag(atom) for atom in eqn.invars]
        here = context
        # What a backward pass calls is part of it, whatever its own name stack says.
        if context.derivative != "backward" and (found := derivative_pass(eqn)):
            here = dataclasses.replace(context, derivative=found)
        outs = _visit(analysis, eqn, ins, here, memo)
        known.update(zip(eqn.outvars, outs, strict=True))
    analysis.outs = [tag(atom) for atom in body.outvars]
    return analysis


def _constant(value: Any) -> Other:
    # One number scales every entry of a kernel alike, so the kernel is still followed.
    return NUMBER if math.prod(getattr(value, "shape", ())) == 1 else Other()


def _visit(
    analysis: Analysis, eqn: Equation, ins: list[Tag], context: _Context, memo: Memo
) -> Sequence[Tag]:
    name = eqn.primitive.name
    if name in MATMULS:
        return [_matmul(analysis, eqn, ins, context)]
    if bodies(eqn):
        if name in CUSTOM_VJPS:
            obstacle = "inside a custom_vjp, whose rule expects it as it is"
            context = dataclasses.replace(context, obstacle=obstacle)
        return _enter(analysis, eqn, ins, context, memo)
    if any(True for _ in subjaxprs(eqn)):
        reason = f"passed to a {name}, which runs its own code on it"
        return _elsewhere(analysis, eqn, ins, context, reason, reported=True)
    kept = _kept(eqn, ins)
    if kept is not None:
        return kept
    looked_up = name == "gather" and isinstance(ins[0], Weight)
    reason = f"used by {name!r}"
    if looked_up:  # rows of a table; what has more axes is a kernel for each index
        several = len(eqn.params["dimension_numbers"].offset_dims) > 1
        reason = "a stack of kernels, read by index" if several else "read by index"
    # Matmuls of other kinds: ragged_dot_general, scaled_dot, ...
    reported = looked_up or "dot" in name
    return _elsewhere(analysis, eqn, ins, context, reason, reported)


def _elsewhere(
    analysis: Analysis,
    eqn: Equation,
    ins: Sequence[Tag],
    context: _Context,
    reason: str,
    reported: bool,
) -> list[Tag]:
    """Handle an equation that changes its weights."""
    name = eqn.primitive.name
    updated = name in ENTRYWISE and ACTIVE in ins  # w - rate * gradient
    gradient = context.derivative == "backward" or updated
    for tag in ins:
        if isinstance(tag, Weight):
            use = Use(
                tag.path, reason, reported, name, tag.reader is not None, gradient
            )
            analysis.uses.append(use)
    return [_mixed(ins, name)] * len(eqn.outvars)


def _mixed(ins: Sequence[Tag], how: str) -> Other:
    """Tag the result of an equation that computes with its operands."""
    made_of: set[tuple[str, str]] = set()
    for tag in ins:
        if isinstance(tag, Weight):
            made_of.add((tag.path, how))
        elif tag.active:
            return ACTIVE
        else:
            made_of |= tag.made_of
    uniform = how in _UNIFORM and all(isinstance(t, Other) and t.uniform for t in ins)
    return Other(made_of=frozenset(made_of), uniform=uniform)


def _kept(eqn: Equation, ins: Sequence[Tag]) -> list[Tag] | None:
    """The outputs of an equation that only moves or scales a weight, else None."""
    name, p = eqn.primitive.name, eqn.params
    reader = layer_of(p["name"]) if name == "name" else None
    if reader is not None and isinstance(ins[0], Weight) and not ins[0].sliced:
        return [dataclasses.replace(ins[0], reader=reader)]
    if name in SAME:
        return list(ins)
    weight = ins[0] if ins else None
    if name == "mul" and isinstance(ins[1], Weight):
        weight, scale = ins[1], ins[0]
    else:
        scale = ins[1] if len(ins) > 1 else None
    if not isinstance(weight, Weight):
        return None
    shape = tuple(eqn.outvars[0].aval.shape)
    axes: Sequence[Axis] | None = None
    if name in _KEPT:
        axes = weight.axes
    elif name in ("mul", "div") and isinstance(scale, Other) and scale.uniform:
        # A scale of a larger shape would repeat the entries.
        axes = weight.axes if shape == tuple(map(size, weight.axes)) else None
    elif name == "reshape":
        order = p["dimensions"] or range(len(weight.axes))  # transposed before
        axes = regroup([f for axis in order for f in weight.axes[axis]], shape)
    elif name == "transpose":
        axes = [weight.axes[axis] for axis in p["permutation"]]
    elif name == "rev":
        turned = p["dimensions"]
        axes = [
            reversed_axis(a) if i in turned else a for i, a in enumerate(weight.axes)
        ]
    elif name == "squeeze":
        axes = [a for i, a in enumerate(weight.axes) if i not in p["dimensions"]]
    # A broadcast that repeats nothing only adds axes of size 1.
    elif name == "expand_dims" or (
        name == "broadcast_in_dim"
        and math.prod(shape) == math.prod(map(size, weight.axes))
    ):
        placed = dict(zip(p["broadcast_dimensions"], weight.axes))
        axes = [placed.get(axis, ()) for axis in range(len(shape))]
    elif name in ("slice", "dynamic_slice"):
        step = _one_step(weight, shape)
        return None if step is None else [step]
    elif name == "unstack":
        step = dataclasses.replace(weight.drop(p["axis"]), sliced=True)
        return [step for _ in eqn.outvars]
    if axes is None:
        return None
    return [dataclasses.replace(weight, axes=tuple(axes))]


def _one_step(weight: Weight, shape: Sequence[int]) -> Weight | None:
    """Return a slice that takes one step of some axes, and others whole."""
    axes = []
    stack = list(weight.stack)
    for axis, taken in zip(weight.axes, shape):
        # Several steps are neither one layer's kernel nor the whole stack.
        if taken not in (1, size(axis)):
            return None
        if taken != size(axis):
            stack += axis
            axis = ()
        axes.append(axis)
    return dataclasses.replace(
        weight, axes=tuple(axes), stack=tuple(stack), sliced=True
    )


def _matmul(
    analysis: Analysis, eqn: Equation, ins: Sequence[Tag], context: _Context
) -> Tag:
    """Record a matmul and return the tag of its result."""
    name = eqn.primitive.name
    weights = [i for i, tag in enumerate(ins) if isinstance(tag, Weight)]
    active = [i for i, tag in enumerate(ins) if tag == ACTIVE]
    if len(active) == 2:
        analysis.unweighted[id(eqn)] = f"a matmul of two activations, {_shapes(eqn)}"
    elif len(weights) == len(active) == 1:
        weight: Any = ins[weights[0]]
        obstacle = context.obstacle or _obstacle(eqn, weights[0])
        analysis.matmuls[id(eqn)] = Matmul(
            eqn, weight, weights[0], obstacle, context.derivative == "backward"
        )
        return ACTIVE
    for tag in ins:
        if isinstance(tag, Weight):
            reason = "multiplied with no activation, but with parameters or constants"
            # Forward, too: the tangents that a Hessian begins with are constants.
            gradient = context.derivative is not None
            use = Use(tag.path, reason, True, name, tag.reader is not None, gradient)
            analysis.uses.append(use)
        elif tag.made_of and active:
            for path, how in sorted(tag.made_of):
                kind = "matmul" if name == "dot_general" else "convolution"
                reason = f"changed by {how!r} on the way to its {kind}"
                backward = context.derivative == "backward"
                use = Use(path, reason, True, how, gradient=backward)
                analysis.uses.append(use)
        elif active and not tag.active:
            analysis.unweighted[id(eqn)] = (
                f"a matmul with a constant of the program, {_shapes(eqn)}: no "
                "parameter holds it; pass it in params"
            )
    return _mixed(ins, name)


def _shapes(eqn: Equation) -> str:
    return " and ".join(str(tuple(v.aval.shape)) for v in eqn.invars)


def _obstacle(eqn: Equation, side: int) -> str | None:
    """Return why a matmul with a weight cannot take the other form, if so."""
    p = eqn.params
    dtypes = {str(v.aval.dtype) for v in eqn.invars}
    if len(dtypes) > 1:
        return f"multiplied in two dtypes, {' and '.join(sorted(dtypes))}"
    if any(0 in v.aval.shape for v in eqn.invars):
        return "in a matmul without entries"
    if eqn.primitive.name == "dot_general":
        if not p["dimension_numbers"][0][0]:
            return "in an outer product: nothing is summed over"
        if not _known_precision(p["precision"]):
            return f"multiplied with a special algorithm, {p['precision']}"
        return None
    if side != 1:
        return "the input of a convolution, not its kernel"
    if p["batch_group_count"] != 1:
        return "in a convolution with batch groups"
    # The window of a plan has one to three axes.
    if not 1 <= len(p["window_strides"]) <= 3:
        return f"in a convolution of {len(p['window_strides'])} spatial dimensions"
    return None


def _known_precision(precision: PrecisionLike) -> bool:
    # Convolutions have no algorithm (lax.DotAlgorithm), so only a dot would keep one.
    pair = precision if isinstance(precision, tuple) else (precision,)
    return all(p is None or isinstance(p, lax.Precision) for p in pair)


def _enter(
    analysis: Analysis, eqn: Equation, ins: list[Tag], context: _Context, memo: Memo
) -> list[Tag]:

    def analysed(body: AnyJaxpr, tags: Sequence[Tag]) -> Analysis:
        return _analysed(body, tags, context, memo)

    name, p = eqn.primitive.name, eqn.params
    if name == "scan":
        first, carried = scan_parts(eqn)
        second = first + carried
        consts, carry, xs = ins[:first], ins[first:second], ins[second:]
        steps = []
        for tag in xs:
            steps.append(tag.drop(0) if isinstance(tag, Weight) else tag)

        def step(carry: list[Tag]) -> list[Analysis]:
            return [analysed(p["jaxpr"], [*consts, *carry, *steps])]

        inner, carry = _settle(analysis, step, carry, name)
        stacked = inner[0].outs[len(carry) :]
        # What a scan stacks has an axis of steps, which a weight's axes don't describe.
        outs = [*carry, *_elsewhere_each(analysis, stacked, name)]
    elif name == "while":
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        test, consts, carry = ins[:first], ins[first:second], ins[second:]

        def step(carry: list[Tag]) -> list[Analysis]:
            return [
                analysed(p["body_jaxpr"], [*consts, *carry]),
                analysed(p["cond_jaxpr"], [*test, *carry]),
            ]

        inner, outs = _settle(analysis, step, carry, name)
        inner = inner[::-1]  # in the order of bodies(eqn), the condition first
    elif name == "cond":
        inner = [analysed(b, ins[1:]) for b in bodies(eqn)]
        outs = [_joined(analysis, tags, name) for tags in zip(*(p.outs for p in inner))]
        # Constants that an activation chooses between depend on the input.
        if ins[0] == ACTIVE:
            outs = [ACTIVE if t == Other() or t == NUMBER else t for t in outs]
    else:
        inner = [analysed(b, ins) for b in bodies(eqn)]
        outs = inner[0].outs
    analysis.inner[id(eqn)] = inner
    for each in inner:
        analysis.uses += each.uses
    return outs


def _analysed(
    body: AnyJaxpr, tags: Sequence[Tag], context: _Context, memo: Memo
) -> Analysis:
    """Return a body in the context of one call; analysed once for alike operands.

    A function that is called for one layer after the other is one jaxpr: each further
    call only puts the names of other parameters on what was found.
    """
    names: dict[str, None] = {}
    for tag in tags:
        if isinstance(tag, Weight):
            names[tag.path] = None
        else:
            names |= dict.fromkeys(path for path, _ in sorted(tag.made_of))
    numbers = {name: str(number) for number, name in enumerate(names)}
    plain = tuple(tag.renamed(numbers) for tag in tags)
    # By identity: comparing bodies would cost more than analysing them.
    key = id(body), plain, context
    if key not in memo:
        memo[key] = analyse(body, plain, context, memo)
    return memo[key].renamed({number: name for name, number in numbers.items()})


def _settle(
    analysis: Analysis,
    step: Callable[[list[Tag]], list[Analysis]],
    carry: list[Tag],
    name: str,
) -> tuple[list[Analysis], list[Tag]]:
    """Run the body of a loop until the tags of what it carries stay the same."""
    # It ends: a tag only ever becomes a more general one.
    while True:
        inner = step(carry)
        after = inner[0].outs[: len(carry)]
        joined = [_joined(analysis, pair, name) for pair in zip(carry, after)]
        if joined == carry:
            return inner, carry
        carry = joined


def _joined(analysis: Analysis, tags: Sequence[Tag], name: str) -> Tag:
    """Return the tag of a value that may be any of several."""
    if all(tag == tags[0] for tag in tags):
        return tags[0]
    return _mixed(_elsewhere_each(analysis, tags, name), name)


def _elsewhere_each(analysis: Analysis, tags: Sequence[Tag], name: str) -> list[Tag]:
    outs: list[Tag] = []
    for tag in tags:
        if isinstance(tag, Weight):
            reason = f"used by {name!r}"
            analysis.uses.append(
                Use(tag.path, reason, False, name, tag.reader is not None)
            )
            tag = _mixed([tag], name)
        outs.append(tag)
    return outs
