"""Counts what a program is made of: dots, convolutions, collectives, custom calls.

Read off the text of the program: StableHLO before compilation (what was asked for) and
HLO after it (what the backend made of it).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

_STABLEHLO = re.compile(r'"?stablehlo\.(\w+)"?')
_STABLEHLO_CALL = re.compile(r'(?:func\.)?call @("[^"]+"|[\w.$-]+)')
_STABLEHLO_FUNC = re.compile(r'func\.func (?:\w+ )*@("[^"]+"|[\w.$-]+)')
_STABLEHLO_TARGET = re.compile(r'custom_call @([\w.$-]+)|call_target_name = "([^"]+)"')
# "%name = shape opcode(...": a shape is a type with layout, or a tuple of them.
HLO_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$"
)
HLO_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_HLO_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# What XLA for TPUs says of an instruction.
HLO_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_HLO_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")
_COLLECTIVES = (
    "all-gather all-reduce all-to-all collective-broadcast collective-permute "
    "ragged-all-to-all reduce-scatter"
).split()
# A fusion that XLA hands to a compiler of its own, such as Triton.
HLO_KERNEL = re.compile(r'"kind":"(__\w+)"')


@dataclasses.dataclass(frozen=True)
class OpCounts:
    """How many operations of each kind a program text holds.

    A loop body counts once. In StableHLO a function counts once for each of its calls;
    in HLO every computation, so also the inside of a fusion, counts once.

    Attributes:
      dots: matrix products.
      convolutions: convolutions.
      custom_calls: library calls and generated kernels by name, e.g. those of cuBLAS,
        cuDNN or Triton; the products inside a Triton kernel count as dots too.
      collectives: exchanges between devices by kind, e.g. ``"all-reduce"``. XLA puts
        them in while it compiles, so StableHLO has few or none. One that XLA runs in
        several parts, beside what it computes meanwhile, counts once.
      collective_bytes: size of the arrays that each kind makes on one device. XLA
        merges collectives at will, which changes how many there are and not this.
      copies: copies to another layout, and transposes.
      fusions: loops that were fused into one.
    """

    dots: int = 0
    convolutions: int = 0
    custom_calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)
    collective_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    copies: int = 0
    fusions: int = 0


def count_stablehlo(text: str) -> OpCounts:
    """Count the operations of a StableHLO module, ``jax.jit(f).lower(...).as_text()``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> lowered = jax.jit(jnp.dot).lower(jnp.ones((2, 3)), jnp.ones((3, 4)))
      >>> count_stablehlo(lowered.as_text()).dots
      1
    """
    own: dict[str, collections.Counter] = {}
    calls: dict[str, collections.Counter] = {}
    name = ""
    for line in text.splitlines():
        if found := _STABLEHLO_FUNC.search(line):
            name = found.group(1)
        counter = own.setdefault(name, collections.Counter())
        callees = calls.setdefault(name, collections.Counter())
        if found := _STABLEHLO.search(line.split("//")[0]):
            op = found.group(1)
            if op == "custom_call":
                targets = _STABLEHLO_TARGET.search(line)
                target = targets and (targets.group(1) or targets.group(2))
                counter[f"custom_call:{target}"] += 1
            elif op in ("dot", "dot_general", "convolution", "transpose"):
                counter[op] += 1
        elif found := _STABLEHLO_CALL.search(line):
            callees[found.group(1)] += 1
    root = "main" if "main" in own else next(iter(own), "")
    total = _with_calls(root, own, calls)
    return _op_counts(total, ("dot", "dot_general"))


def _with_calls(
    name: str,
    own: Mapping[str, collections.Counter],
    calls: Mapping[str, collections.Counter],
) -> collections.Counter:
    total = collections.Counter(own.get(name, {}))
    for callee, times in calls.get(name, {}).items():
        for op, count in _with_calls(callee, own, calls).items():
            total[op] += times * count
    return total


def count_hlo(text: str) -> OpCounts:
    """Count the operations of a compiled module, ``lowered.compile().as_text()``.

    Example:
      >>> count_hlo("%d = f32[2,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}").dots
      1
      >>> count_hlo("%r = f32[2,4]{1,0} all-reduce(%d), to_apply=%add").collective_bytes
      {'all-reduce': 32}
    """
    total: collections.Counter = collections.Counter()
    exchanged: collections.Counter = collections.Counter()
    seen: set[tuple[str, str]] = set()
    for line in text.splitlines():
        found = HLO_INSTRUCTION.match(line)
        if not found:
            continue
        _, shape, op, rest = found.groups()
        kind = op.removesuffix("-start").removesuffix("-done")
        if kind in _COLLECTIVES:
            # XLA for TPUs spreads one exchange over several fusions that compute
            # meanwhile; a common channel identifies them.
            if channel := _HLO_CHANNEL.search(rest):
                part = (op, channel.group(1))
                if part in seen:
                    continue
                seen.add(part)
            # An asynchronous one is two operations: the second has the result alone.
            total[f"collective:{kind}"] += not op.endswith("-done")
            exchanged[kind] += 0 if op.endswith("-start") else array_bytes(shape)
        elif op == "custom-call":
            target = HLO_TARGET.search(line)
            total[f"custom_call:{target.group(1) if target else None}"] += 1
        else:
            total[op] += 1
            if op == "fusion" and (kernel := HLO_KERNEL.search(line)):
                total[f"custom_call:{kernel.group(1)}"] += 1
    counts = _op_counts(total, ("dot", "ragged-dot"))
    return dataclasses.replace(counts, collective_bytes=dict(sorted(exchanged.items())))


def array_bytes(shape: str) -> int:
    """Return the size of an array, or of a tuple of arrays, by its type in HLO.

    Example:
      >>> array_bytes("(f32[2,3]{1,0}, pred[])")
      25
    """
    sizes = (
        int(bits or 8) * math.prod(int(n) for n in dims.split(",") if n)
        for bits, dims in _HLO_ARRAY.findall(shape)
    )
    return sum((size + 7) // 8 for size in sizes)


def _op_counts(total: collections.Counter, dots: tuple[str, ...]) -> OpCounts:
    def named(prefix: str) -> dict[str, int]:
        return {
            name.removeprefix(prefix): count
            for name, count in sorted(total.items())
            if name.startswith(prefix)
        }

    return OpCounts(
        dots=sum(total[name] for name in dots),
        convolutions=total["convolution"],
        custom_calls=named("custom_call:"),
        collectives=named("collective:"),
        copies=total["copy"] + total["transpose"],
        fusions=total["fusion"],
    )
