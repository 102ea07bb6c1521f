"""Which inputs of a traced program its outputs depend on."""

from __future__ import annotations

from jax.extend.core import Literal

from .jaxprs import AnyJaxpr, call_body, opened
from .protocols import OpenJaxpr


def inputs_read(jaxpr: AnyJaxpr) -> list[bool]:
    """Return whether each input of a program reaches one of its outputs.

    Inputs of a loop or a branch count as read, whatever becomes of them inside.

    Example:
      >>> import jax
      >>> f = jax.jit(lambda x, y: (x + 1, y))
      >>> inputs_read(jax.make_jaxpr(lambda x, y, z: (f(x, y)[0], y * z)[0])(1, 2, 3))
      [True, False, False]
    """
    body, _ = opened(jaxpr)
    return _read(body, [True] * len(body.outvars))


def _read(body: OpenJaxpr, wanted: list[bool]) -> list[bool]:
    live = {
        var
        for var, want in zip(body.outvars, wanted)
        if want and not isinstance(var, Literal)
    }
    for eqn in reversed(body.eqns):
        outs = [var in live for var in eqn.outvars]
        # An effect, such as a callback's, reads operands for no output.
        if not (any(outs) or eqn.effects):
            continue
        inner = call_body(eqn)
        read = [True] * len(eqn.invars)
        if inner is not None:
            inner, _ = opened(inner)
            # Otherwise which operand is which input isn't known, and all count as read.
            if len(inner.invars) == len(eqn.invars):
                read = _read(inner, outs)
        live |= {
            var
            for var, used in zip(eqn.invars, read)
            if used and not isinstance(var, Literal)
        }
    return [var in live for var in body.invars]
