"""Counts the bytes that a compiled program only writes in another order of axes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from .census import HLO_INSTRUCTION, array_bytes

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_CALLS = frozenset(("call", "conditional", "while"))
_MOVES = frozenset(
    "concatenate convert copy dynamic-slice dynamic-update-slice pad reshape slice "
    "transpose".split()
)
# In a fusion these cost nothing, so that it is a copy with them as well as without.
_BESIDE = frozenset("bitcast broadcast constant parameter".split())


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: list[str]
    attributes: str


_Computations = Mapping[str, Sequence[_Instruction]]


def relayout_bytes(text: str) -> int:
    """Return the bytes that a module writes in another order than it reads them.

    Steps that also compute something don't count, because their traffic is needed
    anyway. Bodies of loops and branches count once.

    Args:
      text: the compiled module, ``lowered.compile().as_text()``.

    Example:
      >>> relayout_bytes("HloModule empty")
      0
    """
    computations, entry = _parse(text)
    total = 0
    for line, operands in _walk(computations, entry, _CALLS):
        body = [(line, operands)]
        if line.op == "fusion":
            (callee,) = _callees(line)
            body = list(_walk(computations, callee, {"fusion"}))
        # XLA fuses a transpose with what reads it: such a fusion computes, and its
        # traffic would be there without the transpose.
        ops = {each.op for each, _ in body} - _BESIDE
        if ops <= _MOVES and any(_reorders(*each) for each in body):
            total += array_bytes(line.shape)
    return total


def _parse(text: str) -> tuple[_Computations, str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name and (found := HLO_INSTRUCTION.match(line)):
            end = _closing(found[4])
            operands = _OPERAND.findall(found[4][:end])
            computations[name].append(
                _Instruction(found[1], found[2], found[3], operands, found[4][end:])
            )
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before the text."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return at
    return len(text)


def _walk(
    computations: _Computations, name: str, into: Collection[str]
) -> Iterator[tuple[_Instruction, list[str]]]:
    """Yield instructions with their operands' shapes, bodies in the place of calls."""
    shapes = {line.name: line.shape for line in computations.get(name, ())}
    for line in computations.get(name, ()):
        if line.op in into:
            for callee in _callees(line):
                yield from _walk(computations, callee, into)
        else:
            yield line, [shapes.get(operand, "") for operand in line.operands]


def _callees(line: _Instruction) -> list[str]:
    branches = _BRANCHES.search(line.attributes)
    return [
        *_CALLED.findall(line.attributes),
        *_OPERAND.findall(branches[1] if branches else ""),
    ]


def _reorders(line: _Instruction, operands: Sequence[str]) -> bool:
    """Whether an instruction changes the order in which axes lie in memory."""
    if line.op == "transpose":
        return True
    return line.op == "copy" and _memory_order(line.shape) != _memory_order(operands[0])


def _memory_order(array: str) -> list[int]:
    """The axes of an array, fastest first; those of size 1 lie anywhere."""
    found = _ARRAY.match(array)
    if not found or not found[3]:
        return []
    sizes = [int(size) for size in found[2].split(",")]
    return [axis for axis in map(int, found[3].split(",")) if sizes[axis] > 1]
