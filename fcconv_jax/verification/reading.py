"""Reads a traced program in float64: the same equations, every float widened.

A program in float32 or bfloat16 rounds after each equation, and two forms of one
function round differently. Read in float64 (complex128) they differ by so little that a
real difference stands out: the reference that both forms are held against. Casts
between floats are left out, what is computed from integers (random bits, masks,
indices) stays as it is.

Convolutions run as sums of matmuls, see :mod:`.float64_convolution`. What the
program names (by ``jax.ad_checkpoint.checkpoint_name``) comes out as well, from inside
calls and scans too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..tracing.jaxprs import (
    AnyJaxpr,
    Literal,
    bind,
    bodies,
    opened,
    rerun,
    scan_parts,
)
from ..tracing.protocols import Atom, Equation, OpenJaxpr
from ..versions import enable_x64
from .compiling import BackgroundProgram
from .nudges import Constant, Nudge, literal_array
from .widening import bind_wide, widen, widen_literal, widened

Named = dict[str, list[Any]]
VALUE = "fcconv_jax.value"  # the name of values that no module returns


class Reading:
    """A trace on its way to being run in float64; compiles in the background.

    Args:
      jaxpr: a closed trace without obstacles, see :mod:`.obstacles`.
      wide: whether floats are widened; else the trace is run as it is, on JAX's
        default device, for the sake of what it names.
      movable: constants that :meth:`__call__` can move.
      noisy: whether it can move the operands of equations.
      sizes: name all values of these numbers of entries, too.

    Example:
      >>> import jax
      >>> reading = Reading(jax.make_jaxpr(lambda x: x / 3)(jnp.float32(1)))
      >>> outputs, named = reading([jnp.float32(1)])
      >>> float(outputs[0])
      0.3333333333333333
    """

    def __init__(
        self,
        jaxpr: AnyJaxpr,
        *,
        wide: bool = True,
        movable: Sequence[Constant] = (),
        noisy: bool = False,
        sizes: Collection[int] = (),
    ):
        self._wide, self._movable = wide, movable
        body, self.consts = opened(jaxpr)
        self._names: list[str] = []

        def run(
            operands: Sequence[Any], consts: Sequence[Any], steps: Any, seed: Any
        ) -> Any:
            named: Named = {}
            nudge = None
            if movable or noisy:
                index = {constant: n for n, constant in enumerate(movable)}
                nudge = Nudge(index, steps, seed if noisy else None)
                consts = list(map(nudge.constant, consts, self.consts))
            outs = _Reader(named, wide, nudge, sizes).run(body, operands, consts)
            self._names = list(named)
            return outs, named

        with self._mode():
            # Constants are passed too: XLA would fold large ones for minutes.
            abstract = [
                [self._abstract(var.aval) for var in variables]
                for variables in (body.invars, body.constvars)
            ]
            moves = self._moves((), 0)
            self._program = BackgroundProgram(run, *abstract, *moves, quick=True)

    @property
    def bytes(self) -> int:
        """Memory that a run needs: arguments, results and what lies between."""
        found = self._program.compiled.memory_analysis()
        return (
            found.temp_size_in_bytes
            + found.argument_size_in_bytes
            + found.output_size_in_bytes
        )

    def __call__(
        self,
        operands: Sequence[Any],
        steps: Sequence[float] | np.ndarray = (),
        seed: int = 0,
        consts: Sequence[Any] | None = None,
    ) -> tuple[list[Any], Named]:
        """Run it.

        Args:
          operands: the trace's inputs, in any precision, on any devices.
          steps: by how many half ulps each movable constant moves; none if empty.
          seed: which way operands of equations move by an ulp of float64; 0 for none.
          consts: arrays in the place of those that the trace holds.

        Returns:
          The outputs and, by name, what the program names, in the order in which it
          does; what a scan names has an axis of steps in front. NumPy arrays.
        """
        with self._mode():
            given = [
                [widen(x) if self._wide else x for x in values]
                for values in (operands, self.consts if consts is None else consts)
            ]
            outs, named = jax.tree.map(
                _to_host, self._program(*given, *self._moves(steps, seed))
            )
            return outs, {name: named[name] for name in self._names}

    def _moves(self, steps: Sequence[float] | np.ndarray, seed: int) -> tuple[Any, Any]:
        if not self._wide:
            return np.zeros(0, np.float32), np.uint32(0)
        given = steps if len(steps) else np.zeros(len(self._movable))
        return np.asarray(given, np.float64), np.uint64(seed)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        if not self._wide:
            yield
            return
        with enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            yield

    def _abstract(self, aval: Any) -> Any:
        dtype = widened(aval.dtype) if self._wide else aval.dtype
        return jax.ShapeDtypeStruct(aval.shape, dtype, weak_type=aval.weak_type)


def _to_host(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return np.asarray(value)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Runs equations, widened or as they are, and collects what they name."""

    named: Named | None
    wide: bool
    nudge: Nudge | None = None
    sizes: Collection[int] = ()

    def __call__(self, jaxpr: AnyJaxpr, operands: Sequence[Any]) -> list[Any]:
        body, consts = opened(jaxpr)
        if self.wide:
            consts = [self._constant(widen(const), const) for const in consts]
        return self.run(body, operands, consts)

    def _constant(self, wide: Any, array: Any) -> Any:
        return wide if self.nudge is None else self.nudge.constant(wide, array)

    def run(
        self, body: OpenJaxpr, operands: Sequence[Any], consts: Iterable[Any]
    ) -> list[Any]:
        """Run an open jaxpr."""
        values: dict[Any, Any] = dict(zip(body.constvars, consts))
        values.update(zip(body.invars, operands, strict=True))

        def value(atom: Atom) -> Any:
            if not isinstance(atom, Literal):
                return values[atom]
            if not self.wide:
                return atom.val
            return self._constant(widen_literal(atom), literal_array(atom))

        for eqn in body.eqns:
            if eqn.effects and not eqn.outvars:  # such as jax.debug.print
                continue
            outs = self._visit(eqn, [value(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
            if self.sizes and self.named is not None and not bodies(eqn):
                kept = [out for out in outs if out.size in self.sizes]
                self.named.setdefault(VALUE, []).extend(kept)
        return [value(atom) for atom in body.outvars]

    def _visit(self, eqn: Equation, ins: list[Any]) -> Sequence[Any]:
        name, inner = eqn.primitive.name, bodies(eqn)
        if name == "name":
            if self.named is not None:
                self.named.setdefault(eqn.params["name"], []).append(ins[0])
            return ins
        if name == "scan" and self.named is not None:
            return self._scan(eqn, ins, self.named)
        if name in ("while", "cond", "scan"):
            # A name inside a branch or a while loop may come any number of times, or
            # never.
            silent = _Reader(None, self.wide, self.nudge)
            runs = [functools.partial(silent, body) for body in inner]
            return rerun(eqn, ins, runs)
        if inner:  # a plain call; its rule for derivatives plays no part any more
            return self(inner[0], ins)
        if name == "custom_linear_solve":
            # Its solver alone: the rest is for derivatives.
            lengths, solvers = eqn.params["const_lengths"], eqn.params["jaxprs"]
            first = lengths.matvec + lengths.vecmat
            given = ins[first : first + lengths.solve]
            return self(solvers.solve, [*given, *ins[sum(lengths) :]])
        if not self.wide:
            return bind(eqn, ins)
        if self.nudge is not None:
            ins = self.nudge.operands(name, ins)
        return bind_wide(eqn, ins, _Reader(None, wide=True))

    def _scan(self, eqn: Equation, ins: list[Any], named: Named) -> Sequence[Any]:
        """Return a scan that also stacks what its body names."""
        p = eqn.params
        first, carried = scan_parts(eqn)
        consts, carry = ins[:first], ins[first : first + carried]

        def step(carry: Any, xs: PyTree) -> Any:
            inside: Named = {}
            outs = _Reader(inside, self.wide, self.nudge, self.sizes)(
                p["jaxpr"], [*consts, *carry, *xs]
            )
            return outs[:carried], (outs[carried:], inside)

        settings = {key: p[key] for key in ("length", "reverse", "unroll")}
        carry, (ys, inside) = jax.lax.scan(
            step, carry, ins[first + carried :], **settings
        )
        for name, values in inside.items():
            named.setdefault(name, []).extend(values)
        return [*carry, *ys]
