"""Estimated costs of sharing, in floating point operations that take as long.

Ratios measured on XLA's CPU backend; on accelerators copies cost no less.
"""

from __future__ import annotations

from typing import Any

from ..tracing.cost import flops
from ..tracing.jaxprs import opened, subjaxprs
from ..tracing.primitives import MATMULS
from ..tracing.protocols import Equation

# Sharing an operation along an axis has to save this much.
WORTH = 1.1
# A program that shares has to be estimated to save this much of the crops' time.
WORTH_WHOLE = 1.15
# A further pass of a window: some 0.2 ms.
PASS = 2e7
# To copy an entry elsewhere, and to write one that is computed.
MOVE, WRITE = 40.0, 4.0

_COPIES = frozenset("concatenate gather pad dynamic_slice".split())


def work(jaxpr: Any, batch: float = 1.0) -> float:
    """Estimate the time of a trace: its arithmetic, and the entries that it writes.

    Args:
      jaxpr: the trace.
      batch: so many of it run in a batch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> work(jax.make_jaxpr(lambda x: x + 1)(jnp.ones(5)))
      20.0
    """
    each = flops(jaxpr) + _written(jaxpr, MOVE, WRITE)
    return batch * each + PASS / 10 * _matmuls(jaxpr)


def copied(jaxpr: Any) -> float:
    """Return how many entries a trace copies elsewhere."""
    return _written(jaxpr, 1.0, 0.0)


def _written(jaxpr: Any, copies: float, others: float) -> float:
    total = 0.0
    for eqn in opened(jaxpr)[0].eqns:
        inner = [_written(body, copies, others) for _, body in subjaxprs(eqn)]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        each = copies if _copies(eqn) else others
        entries = sum(getattr(v.aval, "size", 0) for v in eqn.outvars)
        # A call writes what its body writes; reshapes and slices are read in place.
        seen = 0 if inner or eqn.primitive.name in _IN_PLACE else entries
        total += each * seen + times * sum(inner)
    return total


def _copies(eqn: Equation) -> bool:
    if eqn.primitive.name == "transpose":
        # Axes of size 1 may be anywhere.
        sizes = eqn.invars[0].aval.shape
        order = [axis for axis in eqn.params["permutation"] if sizes[axis] > 1]
        return order != sorted(order)
    return eqn.primitive.name in _COPIES


_IN_PLACE = frozenset("broadcast_in_dim expand_dims reshape slice squeeze".split())


def _matmuls(jaxpr: Any) -> int:
    return sum(
        (eqn.primitive.name in MATMULS) + sum(_matmuls(b) for _, b in subjaxprs(eqn))
        for eqn in opened(jaxpr)[0].eqns
    )
