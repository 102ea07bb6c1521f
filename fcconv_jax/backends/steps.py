"""Reads a compiled program: the steps that compute or move data, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from .census import HLO_CYCLES, HLO_INSTRUCTION, HLO_KERNEL, HLO_TARGET

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_BITS = re.compile(r"\d+")
# Names for what is there already.
_FREE = frozenset(
    "after-all bitcast constant get-tuple-element opt-barrier parameter partition-id "
    "replica-id tuple".split()
)
_MOVES = frozenset(
    "concatenate convert copy dynamic-slice dynamic-update-slice pad reshape slice "
    "transpose".split()
)
_PRODUCTS = ("convolution", "dot", "ragged-dot")
# The detail of a step that is only started, and waited for later.
BACKGROUND = "in the background"
_CALLS = frozenset(("call", "conditional", "while"))


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction of a compiled program that computes or moves data.

    Attributes:
      name: as the compiler calls it.
      op: the instruction: ``"fusion"``, ``"convolution"``, ``"copy"``,
        ``"custom-call"``, ...
      detail: the target of a custom call, the compiler of a fusion (``"__triton"``), or
        the kind of a fusion (``"kLoop"``); :data:`BACKGROUND` for what runs beside
        other steps.
      inside: what a fusion is made of, in order.
      bytes: size of operands and result: what it reads and writes at most.
      cycles: XLA's estimate; None where it gives none.
      relayout: bytes that it writes in another order of axes than it reads them, and
        does nothing else.
    """

    name: str
    op: str
    detail: str = ""
    inside: tuple[str, ...] = ()
    bytes: int = 0
    cycles: int | None = None
    relayout: int = 0

    @property
    def product(self) -> str:
        """What multiplies in it: an operation or a library's function; '' if nothing.

        Example:
          >>> Step("f", "fusion", "__triton_gemm", ("dot", "add")).product
          'dot in __triton_gemm'
        """
        if self.op == "custom-call":
            return self.detail
        found = [op for op in (self.op, *self.inside) if op in _PRODUCTS]
        if not found:
            return ""
        made = f" in {self.detail}" if self.detail.startswith("__") else ""
        return found[0] + made


def read_steps(text: str) -> tuple[Step, ...]:
    """The steps of a compiled module, ``lowered.compile().as_text()``, as scheduled.

    Parameters, constants, bitcasts and tuples are free and left out. The bodies of
    loops, branches and calls stand in the place of the call, once.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> lowered = jax.jit(jnp.dot).lower(jnp.ones((2, 3)), jnp.ones((3, 4)))
      >>> steps = read_steps(lowered.compile().as_text())
      >>> [step.product.partition(" ")[0] for step in steps]
      ['dot']
    """
    computations, entry = _parse(text)
    return tuple(_steps(computations, entry))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str


def relayout_bytes(text: str) -> int:
    """Bytes that a compiled module only writes in another order of axes.

    Example:
      >>> relayout_bytes("HloModule empty")
      0
    """
    return sum(step.relayout for step in read_steps(text))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name and (found := HLO_INSTRUCTION.match(line)):
            end = _closing(found[4])
            computations[name].append(
                _Instruction(
                    *(found[1], found[2], found[3]),
                    tuple(_OPERAND.findall(found[4][:end])),
                    found[4][end:],
                )
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


def _steps(
    computations: Mapping[str, Sequence[_Instruction]], name: str
) -> Iterator[Step]:
    shapes = {line.name: line.shape for line in computations.get(name, ())}
    for line in computations.get(name, ()):
        if line.op in _FREE or line.op.endswith("-done"):
            continue
        if line.op in _CALLS:
            for callee in _callees(line):
                yield from _steps(computations, callee)
            continue
        yield _step(computations, line, [shapes.get(n, "") for n in line.operands])


def _step(
    computations: Mapping[str, Sequence[_Instruction]],
    line: _Instruction,
    operands: Sequence[str],
) -> Step:
    body = list(_inside(computations, line)) if line.op == "fusion" else []
    attributes = line.attributes
    detail = _first(HLO_TARGET, attributes) or _first(HLO_KERNEL, attributes)
    if line.op == "fusion" and not detail:
        detail = _first(re.compile(r"kind=(\w+)"), attributes)
    results = [array for array in _arrays(line.shape) if _size(array)]
    if line.op.endswith("-start"):  # a tuple of the result, the operand, a token
        results, detail = results[:1], BACKGROUND
    result = ", ".join(results)
    cycles = _first(HLO_CYCLES, attributes)
    written = _size(result)
    # A fusion of nothing but moves is a copy too.
    moves = [each for each, _ in body if each.op != "broadcast"] or [line]
    reorders = [_reorders(each, source) for each, source in body or [(line, operands)]]
    only_moves = all(each.op in _MOVES for each in moves)
    return Step(
        name=line.name,
        op=line.op.removesuffix("-start"),
        detail=detail,
        inside=tuple(each.op for each in moves) if body else (),
        bytes=sum(map(_size, operands)) + written,
        cycles=int(cycles) if cycles else None,
        relayout=written if only_moves and any(reorders) else 0,
    )


def _inside(
    computations: Mapping[str, Sequence[_Instruction]], line: _Instruction
) -> Iterator[tuple[_Instruction, list[str]]]:
    """The instructions of a fusion and of those in it, with their operands' shapes."""
    for callee in _callees(line):
        body = computations.get(callee, ())
        shapes = {each.name: each.shape for each in body}
        for each in body:
            if each.op == "fusion":
                yield from _inside(computations, each)
            elif each.op not in _FREE:
                yield each, [shapes.get(name, "") for name in each.operands]


def _callees(line: _Instruction) -> list[str]:
    branches = _first(_BRANCHES, line.attributes)
    return [*_CALLED.findall(line.attributes), *_OPERAND.findall(branches)]


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


def _arrays(shape: str) -> list[str]:
    return [found[0] for found in _ARRAY.finditer(shape)]


def _size(shape: str) -> int:
    """Bytes of an array, or of a tuple of arrays, by its type."""
    total = 0
    for found in _ARRAY.finditer(shape):
        bits = _BITS.search(found[1])
        count = math.prod(int(size) for size in found[2].split(",") if size)
        total += (count * int(bits[0] if bits else 8) + 7) // 8
    return total


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""
