"""Runs a jaxpr on values that crops share."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from ..tracing.jaxprs import (
    AnyJaxpr,
    bind,
    bodies,
    call_body,
    evaluate,
    opened,
    scan_parts,
    unplaced,
)
from ..tracing.primitives import (
    CUSTOM_VJPS,
    ELEMENTWISE,
    ENTRYWISE,
    POSITIONS,
    REDUCTIONS,
    REMATS,
    ROUNDING,
    SAME,
)
from ..tracing.protocols import Equation
from .alignment import aligned, broadcast_data, combined
from .maps import Map
from .rules import RULES
from .values import (
    CropArray,
    Grid,
    NotSharedError,
    Part,
    all_own,
    array_of,
    at_once,
    check_moves,
)

# A scan of more steps is not written out: it runs on each crop's own arrays.
UNROLL = 64


class Interpreter:
    """Runs equations for all crops.

    Args:
      left: is told why crops stopped sharing, a reason at a time.
      placed: whether equations may place their results on devices.
    """

    def __init__(self, left: Counter[str], placed: bool = True):
        self.left = left
        self.placed = placed
        self.maps: dict[Grid, Map] = {}  # the last one made, along each image axis

    def run(self, jaxpr: AnyJaxpr, operands: Sequence[Any]) -> list[CropArray]:
        """Return the outputs of a jaxpr."""
        return list(map(_value, evaluate(jaxpr, operands, self._visit)))

    def _visit(self, eqn: Equation, operands: Sequence[Any]) -> list[Any]:
        values = list(map(_value, operands))
        name = eqn.primitive.name
        if not self.placed:
            if name in SAME:
                return values
            eqn = unplaced(eqn)
        if not any(value.differs for value in values):
            return self._plain(eqn, values)
        empty = all(0 in var.aval.shape for var in eqn.outvars)
        if empty and not any(0 in value.shape for value in values):
            # Without entries, arrays of all crops are the same.
            avals = [var.aval for var in eqn.outvars]
            return [CropArray.plain(jnp.zeros(a.shape, a.dtype)) for a in avals]
        try:
            # A custom_vjp is run whole, by crop: its body alone would lose its
            # derivative.
            if bodies(eqn) and name not in CUSTOM_VJPS:
                return self._body(eqn, values)
            if name in RULES:
                outs = RULES[name](eqn, values)
                for out in outs:
                    check_moves(out.parts)
                if reason := _parting(name, values, outs):
                    self.left[f"{name}: {reason}"] += 1
                for part in (part for out in outs for part in out.parts):
                    if part.grid is not None and part.map is not None:
                        self.maps[part.grid] = part.map
                return outs
            raise NotSharedError(f"{name}, which has no rule for sharing")
        except NotSharedError as reason:
            # Without anything shared, nothing stopped here.
            if any(value.shared for value in values):
                self.left[f"{name}: {reason}"] += 1
        return self._own(eqn, values)

    def _plain(self, eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
        """Evaluate an equation that no crop changes; known numbers stay known."""
        name = eqn.primitive.name
        by_rule = name in ("broadcast_in_dim", "reshape", "squeeze")
        by_rule |= name in ELEMENTWISE | ROUNDING and any(v.parts for v in values)
        with at_once(*(value.data for value in values)):
            if by_rule:
                try:
                    return RULES[name](eqn, values)
                except NotSharedError:
                    pass
            outs = bind(eqn, list(map(array_of, values)))
        return list(map(CropArray.plain, outs))

    def _own(self, eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
        """Evaluate an equation on each crop's own arrays."""
        fronts = sorted({g for v in values for g in (*v.fronts, *v.shared)})
        values = [all_own(value) for value in values]
        run: Callable[..., Any] = functools.partial(_bind, eqn)
        for grid in reversed(fronts):
            axes = [0 if grid in value.fronts else None for value in values]
            run = jax.vmap(run, in_axes=axes)
        outs = run(*map(array_of, values))
        return [_with_fronts(out, tuple(fronts)) for out in outs]

    def _body(self, eqn: Equation, values: Sequence[CropArray]) -> list[Any]:
        """Evaluate a call or control flow by running its bodies."""
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, values)
        if name == "cond":
            return self._cond(eqn, values)
        if name == "while":
            raise NotSharedError("a while loop over values computed from the image")
        body: Any = call_body(eqn)  # what is left has one
        if name == "custom_jvp_call" and _is_elementwise(body):
            return self._with_rule(eqn, body, values)
        if name in REMATS:
            p = eqn.params
            return _through(
                lambda f: jax.checkpoint(
                    f, prevent_cse=p["prevent_cse"], policy=p["policy"]
                ),
                values,
                lambda inner: self.run(body, inner),
            )
        return self.run(body, values)

    def _scan(self, eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
        p = eqn.params
        first, carried = scan_parts(eqn)
        consts, carry = values[:first], list(values[first : first + carried])
        stacks = values[first + carried :]
        if any(stack.differs for stack in stacks):
            raise NotSharedError("a scan over values computed from the image")
        if p["length"] > UNROLL:
            raise NotSharedError(f"a scan of {p['length']} steps")
        steps = range(p["length"])
        stacked: list[list[CropArray]] = []
        arrays = list(map(array_of, stacks))
        for step in reversed(steps) if p["reverse"] else steps:
            xs = [
                CropArray.plain(lax.index_in_dim(x, step, keepdims=False))
                for x in arrays
            ]
            outs = self.run(p["jaxpr"], [*consts, *carry, *xs])
            carry = outs[:carried]
            stacked.append(outs[carried:])
        if p["reverse"]:
            stacked.reverse()
        ys = [_stack(list(column)) for column in zip(*stacked)]
        return [*carry, *ys]

    def _cond(self, eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
        which, *rest = values
        if which.differs:
            raise NotSharedError("a branch that depends on the image")
        branches = eqn.params["branches"]

        def run(branch: Any, own: bool, datas: Sequence[Any]) -> list[CropArray]:
            inner = [v.replace(data=data) for v, data in zip(rest, datas)]
            outs = self.run(branch, inner)
            fronts = {g for v in rest for g in (*v.fronts, *v.shared)}
            return [_everywhere(all_own(v), fronts) for v in outs] if own else outs

        def data(branch: Any) -> Callable[..., list[Any]]:
            return lambda *datas: [v.data for v in run(branch, True, datas)]

        found: list[list[CropArray]] = []

        def look(*datas: Any) -> list[Any]:
            found.append(run(branches[0], True, datas))
            return [v.data for v in found[-1]]

        datas = [value.data for value in rest]
        # lax.switch returns arrays alone: their parts come from tracing a branch
        # before.
        jax.eval_shape(look, *datas)
        outs = lax.switch(array_of(which), [data(b) for b in branches], *datas)
        return [v.replace(data=out) for v, out in zip(found[-1], outs)]

    def _with_rule(
        self, eqn: Equation, body: AnyJaxpr, values: Sequence[CropArray]
    ) -> list[CropArray]:
        """Evaluate an elementwise function, and keep its own derivative rule."""
        together, parts, ranks = aligned(values)
        shape = next(
            (v.aval.shape for v in eqn.invars if getattr(v.aval, "shape", ())), ()
        )

        # An axis of crops stands for each axis that an array has in front.
        plain = tuple(Part(part.size, uniform=part.uniform) for part in parts)
        inner = sum(not part.uniform for part in plain)

        @jax.custom_jvp
        def call(*arrays: PyTree) -> list[Any]:
            fronts = tuple(map(Grid, range(arrays[0].ndim - inner)))
            values = [CropArray(array, fronts, plain, ranks) for array in arrays]
            if not fronts:
                values = [value.replace(parts=parts) for value in values]
            (outs, *_) = aligned([*self.run(body, values), values[0]])
            return broadcast_data(outs)[:-1]

        @call.defjvp
        def _(primals: PyTree, tangents: PyTree) -> Any:
            return jax.jvp(lambda *x: _in_blocks(eqn, shape, x), primals, tangents)

        fronts = together[0].fronts
        outs = combined(call, together)
        return [CropArray(out, fronts, parts, ranks) for out in outs]


def _in_blocks(
    eqn: Equation, shape: Sequence[int], operands: Sequence[Any]
) -> list[Any]:
    """Run an elementwise equation on arrays of any shape, a block at a time."""
    whole, block = operands[0].shape, max(math.prod(shape), 1)
    size = math.prod(whole)
    count = -(-size // block)

    def blocks(x: Any) -> Any:
        flat = jnp.pad(x.reshape(-1), (0, count * block - size))
        return flat.reshape(count, *shape)

    axes = [0] * len(operands)
    scalars = [not getattr(v.aval, "shape", ()) and bool(shape) for v in eqn.invars]
    ins = [blocks(x) for x in operands]
    # A number that was broadcast can't be taken back out of the blocks.
    if any(scalars):
        raise NotSharedError("a derivative rule that takes single numbers")
    outs = jax.vmap(functools.partial(_bind, eqn), in_axes=axes)(*ins)
    return [out.reshape(-1)[:size].reshape(whole) for out in outs]


def _is_elementwise(jaxpr: AnyJaxpr) -> bool:
    """Return whether each output entry comes from the same entry of the inputs."""
    body, _ = opened(jaxpr)
    shapes = {v.aval.shape for v in body.invars}
    if len(shapes) != 1:
        return False
    for eqn in body.eqns:
        inner = call_body(eqn)
        if inner is not None:
            if not _is_elementwise_within(inner):
                return False
        elif not _entry_by_entry(eqn):
            return False
    return all(v.aval.shape in shapes for v in body.outvars)


def _is_elementwise_within(jaxpr: AnyJaxpr) -> bool:
    body, _ = opened(jaxpr)
    return all(
        _is_elementwise_within(inner)
        if (inner := call_body(eqn)) is not None
        else _entry_by_entry(eqn)
        for eqn in body.eqns
    )


def _entry_by_entry(eqn: Equation) -> bool:
    if eqn.primitive.name == "broadcast_in_dim":
        return eqn.invars[0].aval.shape == ()
    return eqn.primitive.name in ENTRYWISE


def _parting(
    name: str, values: Sequence[CropArray], outs: Sequence[CropArray]
) -> str | None:
    """Return why a rule made an array for each crop of a shared one, if it did.

    Not where a reduction leaves nothing to share.
    """
    shared = {grid for value in values for grid in value.shared}
    if not any(shared & set(out.fronts) for out in outs):
        return None
    if name in REDUCTIONS | POSITIONS | {"dot_general"}:
        return None
    if any(value.fronts for value in values):
        return "an operand that each crop has of its own"
    if name in ENTRYWISE and not all(value.differs for value in values):
        return "an operand that depends on the position within the crop"
    return "too few entries in common at this stride"


def _through(
    transform: Callable[[Any], Any],
    values: Sequence[CropArray],
    run: Callable[[Sequence[CropArray]], list[CropArray]],
) -> list[CropArray]:
    """Run a transformed function of the data of values."""
    found: list[CropArray] = []

    def inner(*datas: Any) -> list[Any]:
        outs = run([v.replace(data=data) for v, data in zip(values, datas)])
        found[:] = outs
        return [v.data for v in outs]

    outs = transform(inner)(*(value.data for value in values))
    return [v.replace(data=out) for v, out in zip(found, outs)]


def _bind(eqn: Equation, *operands: PyTree) -> list[Any]:
    return bind(eqn, operands)


def _value(value: Any) -> CropArray:
    return value if isinstance(value, CropArray) else CropArray.plain(value)


def _with_fronts(data: Any, fronts: tuple[Grid, ...]) -> CropArray:
    inner = CropArray.plain(jax.ShapeDtypeStruct(data.shape[len(fronts) :], data.dtype))
    return inner.replace(data=data, fronts=fronts)


def _everywhere(value: CropArray, grids: set[Grid]) -> CropArray:
    """Return a value with an array for each crop along all of these axes."""
    raise_ = sorted(grids - set(value.fronts))
    if raise_:
        raise NotSharedError("branches of which only some depend on the image")
    return _with_fronts(array_of(value), value.fronts)


def _stack(values: list[CropArray]) -> CropArray:
    together, parts, ranks = aligned(values)
    datas = broadcast_data(together)
    at = len(together[0].fronts)
    first = CropArray.plain(jax.ShapeDtypeStruct((len(datas),), datas[0].dtype)).parts[
        0
    ]
    return CropArray(
        jnp.stack(datas, at), together[0].fronts, (first, *parts), (1, *ranks)
    )
