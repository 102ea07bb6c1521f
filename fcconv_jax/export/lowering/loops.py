"""How loops and branches become operations that hold graphs of their own.

=========  =================================  ==========================  ==============
operation  inputs                             outputs                     of its bodies
=========  =================================  ==========================  ==============
``scan``   captured, carried, stacks of rows  carried, stacks of results  captured,
                                                                          carried, rows
``while``  whether to begin, captured,        carried                     captured,
           carried                                                        carried
``cond``   whether, captured                  results                     captured
=========  =================================  ==========================  ==============

The body of a ``while`` returns first whether to go on; of a ``cond`` the second body is
the one for True.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...tracing.jaxprs import opened, scan_parts
from ...tracing.protocols import Equation
from ..graph import Graph, Node, Value, constant
from .builder import refusal, rule

# Steps up to which a loop is written out where it must be: files and their proofs grow
# with each.
_MOST = 64

Run = Callable[[Any, list[Value]], list[Value]]


@rule("scan")
def _scan(low: Any, eqn: Equation, *values: Value) -> list[Value]:
    length = eqn.params["length"]
    fixed, carried = scan_parts(eqn)
    stacks = list(values[fixed + carried :])
    own = any(value.leaves for value in stacks)
    if 0 < length <= low.unroll:
        return _written_out(low, eqn, values)
    # A loop over nothing counts, as ONNX's Scan needs something to go over.
    counted = [] if stacks else [constant(np.arange(length, dtype=np.int32))]
    if own or ("while" if counted else "scan") not in low.whole:
        if not 0 < length <= _MOST:
            raise refusal(eqn)
        why = "each step has its own weights" if own else "the runtime lacks such loops"
        low.notes.append(f"a loop of {length} steps is unrolled: {why}")
        return _written_out(low, eqn, values)
    rows = [Value(x.shape[1:], x.dtype) for x in (*stacks, *counted)]

    def run(inner: Any, taken: list[Value]) -> list[Value]:
        return inner.run(eqn.params["jaxpr"], [*taken, *rows[: len(stacks)]])

    taken, body = _inside(low, values[: fixed + carried], fixed, run)
    body.inputs += rows
    return _add(
        *(low, "scan", [*taken, *stacks, *counted], eqn, [body]),
        captured=len(taken) - carried,
        carried=carried,
        length=length,
        reverse=eqn.params["reverse"],
    )


@rule("while")
def _while(low: Any, eqn: Equation, *values: Value) -> list[Value]:
    if "while" not in low.whole:
        raise refusal(eqn)
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    carried = len(eqn.outvars)
    tested = len(opened(test)[0].invars) - carried
    fixed = len(values) - carried

    def run(inner: Any, taken: list[Value]) -> list[Value]:
        new = inner.run(body, taken[tested:])
        return [inner.run(test, [*taken[:tested], *new])[0], *new]

    # Runtimes test before the first step, and take the result of the test.
    begin = low.run(test, [*values[:tested], *values[fixed:]])[0]
    taken, made = _inside(low, values, fixed, run)
    captured = len(taken) - carried
    return _add(low, "while", [begin, *taken], eqn, [made], captured=captured)


@rule("cond")
def _cond(low: Any, eqn: Equation, *values: Value) -> list[Value]:
    if "cond" not in low.whole:
        raise refusal(eqn)
    return _branch(low, eqn, list(values), 0)


def _branch(low: Any, eqn: Equation, values: list[Value], number: int) -> list[Value]:
    """Branches from a number on: the first of them, or one of the others."""
    branches, index = eqn.params["branches"], values[0]
    if number == len(branches) - 1:
        return low.run(branches[number], values[1:])
    # Runtimes branch in two: several branches become a chain.
    least = constant(np.asarray(number, index.dtype))
    later = low.add("gt", [index, least], index.shape, np.bool_)
    runs: list[Run] = [
        lambda inner, taken: inner.run(branches[number], taken[1:]),
        lambda inner, taken: _branch(inner, eqn, taken, number + 1),
    ]
    made = [_inside(low, values, len(values), run) for run in runs]
    taken = made[0][0]
    return _add(low, "cond", [later, *taken], eqn, [body for _, body in made])


def _inside(
    low: Any, values: Sequence[Value], fixed: int, run: Run
) -> tuple[list[Value], Graph]:
    """The graph of a body, and the values that it takes.

    Args:
      low: what collects the operations around it.
      values: what it is given.
      fixed: how many of them no step changes: constants among them are its own.
      run: walks its equations.
    """
    own = [i < fixed and value.data is not None for i, value in enumerate(values)]
    given = [v if c else Value(v.shape, v.dtype) for v, c in zip(values, own)]
    inner = type(low)(low.unroll, low.whole)
    # One list: what a body has to report belongs to the file.
    inner.notes = low.notes
    outs = run(inner, given)
    inputs = [v for v, c in zip(given, own) if not c]
    taken = [v for v, c in zip(values, own) if not c]
    return taken, Graph(inputs, outs, inner.nodes, [], [])


def _add(
    low: Any,
    op: str,
    inputs: list[Value],
    eqn: Equation,
    bodies: list[Graph],
    **attrs: Any,
) -> list[Value]:
    outs = [
        Value(tuple(map(int, v.aval.shape)), np.dtype(v.aval.dtype))
        for v in eqn.outvars
    ]
    low.nodes.append(Node(op, inputs, outs, {"bodies": bodies, **attrs}))
    return outs


def _written_out(low: Any, eqn: Equation, values: Sequence[Value]) -> list[Value]:
    length, jaxpr = eqn.params["length"], eqn.params["jaxpr"]
    consts, carried = scan_parts(eqn)
    fixed, carry = values[:consts], list(values[consts : consts + carried])
    stacked = values[consts + carried :]
    steps: list[list[Value]] = []
    order = range(length)
    for i in reversed(order) if eqn.params["reverse"] else order:
        xs = [_row(low, value, i) for value in stacked]
        outs = low.run(jaxpr, [*fixed, *carry, *xs])
        carry, ys = outs[:carried], outs[carried:]
        steps.append(ys)
    if eqn.params["reverse"]:
        steps.reverse()
    stacks = []
    for rows in zip(*steps):
        each = [low.reshape(row, (1, *row.shape)) for row in rows]
        shape = (length, *each[0].shape[1:])
        stacks.append(low.add("concat", each, shape, axis=0))
    return [*carry, *stacks]


def _row(low: Any, x: Value, i: int) -> Value:
    start, stop = (i, *[0] * (len(x.shape) - 1)), (i + 1, *x.shape[1:])
    return low.reshape(low.slice(x, start, stop), x.shape[1:])
