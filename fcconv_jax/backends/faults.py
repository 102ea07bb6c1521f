"""Released versions of XLA whose CPU backend is known to compute wrong results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jaxlib.version

from ..tracing.jaxprs import AnyJaxpr, Literal, call_body, opened, subjaxprs
from ..tracing.primitives import ELEMENTWISE, ENTRYWISE, MOVES, POOLS
from ..tracing.protocols import Atom, Equation

# Of arrays, each counts before those that precede it: broadcast, computed from such a
# one and another, or that and reshaped since.
_MARKS = ("", "wide", "spread", "reshaped")
_RESHAPES = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze")


def _pools(eqn: Equation, marks: Sequence[str]) -> bool:
    return eqn.primitive.name in POOLS and "reshaped" in marks


def _moves_packed(eqn: Equation, marks: Sequence[str]) -> bool:
    del marks
    dtype = getattr(eqn.invars[0].aval, "dtype", None) if eqn.invars else None
    packed = str(dtype).lstrip("u").startswith(("int2", "int4", "float4"))
    return packed and eqn.primitive.name in ("gather", "pad", "transpose")


def _multiplies(eqn: Equation, marks: Sequence[str]) -> bool:
    del marks
    return eqn.primitive.name == "dot_general"


def _crops(eqn: Equation, marks: Sequence[str]) -> bool:
    del marks
    pads = eqn.params.get("padding", ())
    return eqn.primitive.name == "conv_general_dilated" and any(
        low < 0 or high < 0 for low, high in pads
    )


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of XLA's CPU backend.

    Args:
      what: comes out wrong.
      in_equation: whether an equation of a trace may show it, from the equation and
        what its operands are: "reshaped" behind such an operation as an addition that
        broadcasts, and a reshape.
      first: jaxlib version that has it.
      fixed: jaxlib version that does not have it any more; None if none is known.
      handled: what this package does about it.
      test: shows that the fault is still there, so fails once it can be struck out.
    """

    what: str
    in_equation: Callable[[Equation, Sequence[str]], bool]
    first: tuple[int, ...]
    fixed: tuple[int, ...] | None
    handled: str
    test: str

    def is_in(self, version: str) -> bool:
        """Return whether a jaxlib version, such as ``"0.10.2"``, has the fault."""
        have = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
        return self.first <= have and (self.fixed is None or have < self.fixed)


POOL = Fault(
    "a pool behind an addition that broadcasts and a reshape, of some shapes, in "
    "YNNPACK",
    _pools,
    *((0, 10), (0, 11)),
    "slide keeps pools of its own programs out of YNNPACK",
    "tests/backends/test_faults.py::test_a_pool_behind_an_addition",
)
PACKED = Fault(
    "a transpose, pad or gather of entries of 2 or 4 bits, which writes past them",
    _moves_packed,
    *((0, 7), (0, 8)),
    "refused by name",
    "tests/backends/test_faults.py::test_packed_integers",
)
STALE = Fault(
    "a matmul in XNNPACK, which reads the previous kernel where the next one lies at "
    "the same address; set XLA_FLAGS=--xla_cpu_use_xnnpack=false before importing jax",
    _multiplies,
    *((0, 7), (0, 8, 3)),
    "verify, slide, tune and converted models compile without XNNPACK",
    "tests/backends/test_faults.py::test_a_matmul_with_another_kernel",
)
CROP = Fault(
    "a convolution with negative padding, of some shapes, which reads what the padding "
    "crops",
    _crops,
    *((0, 7), (0, 12)),
    "phases slices its input; in your own model, slice before the convolution",
    "tests/backends/test_faults.py::test_a_convolution_with_negative_padding",
)
FAULTS = (POOL, PACKED, STALE, CROP)


def cpu_notes(
    programs: Sequence[AnyJaxpr], version: str = jaxlib.version.__version__
) -> list[str]:
    """Return a sentence on each fault of a jaxlib version that programs may show.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> program = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4)))
      >>> len(cpu_notes([program], "0.8.0")), len(cpu_notes([program], "0.9.2"))
      (1, 0)
    """
    faults = [fault for fault in FAULTS if fault.is_in(version)]
    found = {what for each in programs for what in _shown(each, faults)}
    return [
        f"jaxlib {version} on CPU is known to compute wrongly: {fault.what} "
        f"({fault.handled})"
        for fault in faults
        if fault.what in found
    ]


def _shown(program: AnyJaxpr, faults: Sequence[Fault]) -> set[str]:
    """Return what may come out wrong."""
    found: set[str] = set()

    def read(jaxpr: AnyJaxpr, marks: Sequence[str]) -> list[str]:
        """Return the marks of the outputs."""
        body, _ = opened(jaxpr)
        known = dict(zip(body.invars, marks))

        def marks_of(atoms: Sequence[Atom]) -> list[str]:
            return ["" if isinstance(a, Literal) else known.get(a, "") for a in atoms]

        for eqn in body.eqns:
            ins = marks_of(eqn.invars)
            found.update(f.what for f in faults if f.in_equation(eqn, ins))
            name, outs = eqn.primitive.name, [""] * len(eqn.outvars)
            if (inner := call_body(eqn)) is not None:
                outs = read(inner, ins)
            elif name in _RESHAPES and {"spread", "reshaped"} & {*ins}:
                outs = ["reshaped"]
            elif name == "broadcast_in_dim":
                outs = ["wide"]
            elif name in ELEMENTWISE and "wide" in ins and {*ins} != {"wide"}:
                outs = [max("spread", *ins, key=_MARKS.index)]
            elif name in ENTRYWISE | MOVES:
                outs = [max(ins, key=_MARKS.index, default="")] * len(outs)
            else:
                # Into loops and branches, marks aren't followed: which operand is which
                # input differs with each.
                for _, each in subjaxprs(eqn):
                    read(each, ())
            known.update(zip(eqn.outvars, outs))
        return marks_of(body.outvars)

    read(program, ())
    return found
