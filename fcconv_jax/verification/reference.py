"""Both forms of a program in float64, and whether they can be read so at all."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..messages.progress import Progress
from ..tracing.cost import flops
from ..tracing.jaxprs import AnyJaxpr
from .obstacles import obstacles
from .reading import VALUE, Named, Reading

# Floating point operations that a core does in a second, in float64: a low guess.
_RATE = 5e9
_ASSUMED = 4 << 30  # bytes of memory, where no one tells
_LONG = 60.0  # seconds; longer work is announced


@dataclasses.dataclass(frozen=True, eq=False)
class TracedProgram:
    """A program's trace, with the arrays that it was traced on.

    Attributes:
      jaxpr: closed.
      operands: one array for each input of the trace.
      treedef: the structure of what the program returns.
    """

    jaxpr: AnyJaxpr
    operands: Sequence[Any]
    treedef: Any

    @classmethod
    def of(cls, function: Callable[..., Any], *args: PyTree) -> TracedProgram:
        """Trace a function on arrays."""
        jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*args)
        # A call without x64 reads NumPy's 64-bit arrays in 32 bits; so does the trace.
        operands = [
            x.astype(aval.dtype)
            if isinstance(x, np.ndarray | np.generic) and x.dtype != aval.dtype
            else x
            for x, aval in zip(jax.tree.leaves(args), jaxpr.in_avals, strict=True)
        ]
        return cls(jaxpr, operands, jax.tree.structure(out))


@dataclasses.dataclass(frozen=True)
class Read:
    """Outputs of a program in float64, and the arrays that it names."""

    outputs: PyTree
    named: Named


class Reference:
    """Both forms of a program on their way through float64.

    Attributes:
      traces: the two.
      unread: why no reference could be made; empty if it was.
    """

    def __init__(self, original: TracedProgram, converted: TracedProgram, what: str):
        self.traces, self._what = (original, converted), what
        found = [name for trace in self.traces for name in obstacles(trace.jaxpr)]
        self.unread = list(dict.fromkeys(found))
        self._readings = (
            [] if found else [Reading(trace.jaxpr) for trace in self.traces]
        )

    def run(self, show: Progress) -> tuple[Read, Read] | None:
        """Run both; return None if that is impossible, see :attr:`unread`."""
        for reading in self._readings:
            wanted, free = reading.bytes, free_memory()
            if wanted > free:
                self.unread.append(
                    f"the {self._what} need {wanted / 2**30:.1f} GiB in float64, "
                    f"{free / 2**30:.1f} GiB are free"
                )
                break
        if self.unread:
            return None
        row = f"float64: {self._what}"
        seconds = sum(float64_seconds(trace.jaxpr) for trace in self.traces)
        if seconds > _LONG:
            row += f", about {math.ceil(seconds / 60)} minutes"
        found: list[Read] = []
        for done, (trace, reading) in enumerate(zip(self.traces, self._readings)):
            show(row, done, len(self._readings))
            found.append(_read(trace, reading))
        show(row, len(found), len(found))
        return found[0], found[1]

    def rerun(self, first: TracedProgram, second: TracedProgram) -> tuple[Read, Read]:
        """Run both again, on other operands."""
        mine, theirs = self._readings
        return _read(first, mine), _read(second, theirs)

    def values(self, which: int, sizes: Collection[int]) -> list[np.ndarray[Any, Any]]:
        """Return all of these numbers of entries that one of the two computes.

        Empty if it doesn't fit in memory.
        """
        trace = self.traces[which]
        reading = Reading(trace.jaxpr, sizes=sizes)
        if reading.bytes > free_memory():
            return []
        found = reading(trace.operands)[1].get(VALUE, [])
        # A loop stacks its steps.
        return [row for z in found for row in ([z] if z.size in sizes else z)]


def _read(trace: TracedProgram, reading: Reading) -> Read:
    outputs, named = reading(trace.operands)
    return Read(jax.tree.unflatten(trace.treedef, outputs), named)


def float64_seconds(jaxpr: AnyJaxpr) -> float:
    """Estimate the seconds that a trace takes in float64."""
    return flops(jaxpr) / _RATE / (os.cpu_count() or 1)


def free_memory() -> int:
    """Return the bytes of memory that are available without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _ASSUMED
