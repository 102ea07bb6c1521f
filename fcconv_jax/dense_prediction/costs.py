"""Estimated costs of sharing, in floating point operations that take as long.

Ratios measured on XLA's CPU backend; on accelerators copies cost no less.
"""

from __future__ import annotations

from collections.abc import Callable

from ..tracing.cost import flops
from ..tracing.jaxprs import AnyJaxpr, opened, subjaxprs
from ..tracing.primitives import MATMULS
from ..tracing.protocols import Equation

# Sharing an operation along an axis has to save this much.
WORTH = 1.1
# A program that shares has to be estimated to save this much of the crops' time.
# Nine families that share gained 0.93 to 1.8 times their estimate, 1.09x at least.
WORTH_WHOLE = 1.05
# A further pass of a window: some 0.2 ms.
PASS = 2e7
# To copy an entry elsewhere, where a layer chooses between copies and passes.
MOVE = 40.0
# To write an entry of a whole program, copied or computed; and how many times longer
# an operation of a grouped convolution takes. Fitted to the ten families.
_ENTRY, _GROUPED = 12.0, 40.0

_COPIES = frozenset("concatenate gather pad dynamic_slice".split())


def work(jaxpr: AnyJaxpr, batch: float = 1.0) -> float:
    """Estimate the time of a trace: its arithmetic, and the entries that it writes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> work(jax.make_jaxpr(lambda x: x + 1)(jnp.ones(5)))
      60.0
    """
    grouped = (_GROUPED - 1) * flops(jaxpr, _is_grouped)
    each = flops(jaxpr) + grouped + _ENTRY * _entries(jaxpr, lambda _: True)
    return batch * each + PASS / 10 * _matmuls(jaxpr)


def crop_batch(jaxpr: AnyJaxpr, batch: float, entries: float) -> float:
    """Estimate the time of a batch of crops.

    Args:
      jaxpr: the trace of one.
      batch: how many there are.
      entries: of one crop, which is copied.
    """
    return work(jaxpr, batch) + _ENTRY * entries * batch


def copied(jaxpr: AnyJaxpr) -> float:
    """Return how many entries a trace copies elsewhere."""
    return _entries(jaxpr, _copies)


def _entries(jaxpr: AnyJaxpr, counted: Callable[[Equation], bool]) -> float:
    total = 0.0
    for eqn in opened(jaxpr)[0].eqns:
        bodies = [body for _, body in subjaxprs(eqn)]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += times * sum(_entries(body, counted) for body in bodies)
        # A call writes what its body writes; reshapes and slices are read in place.
        if not bodies and eqn.primitive.name not in _IN_PLACE and counted(eqn):
            total += sum(getattr(v.aval, "size", 0) for v in eqn.outvars)
    return total


def _is_grouped(eqn: Equation) -> bool:
    return eqn.params.get("feature_group_count", 1) > 1


def _copies(eqn: Equation) -> bool:
    if eqn.primitive.name == "transpose":
        # Axes of size 1 may be anywhere.
        sizes = eqn.invars[0].aval.shape
        order = [axis for axis in eqn.params["permutation"] if sizes[axis] > 1]
        return order != sorted(order)
    return eqn.primitive.name in _COPIES


_IN_PLACE = frozenset("broadcast_in_dim expand_dims reshape slice squeeze".split())


def _matmuls(jaxpr: AnyJaxpr) -> int:
    return sum(
        (eqn.primitive.name in MATMULS) + sum(_matmuls(b) for _, b in subjaxprs(eqn))
        for eqn in opened(jaxpr)[0].eqns
    )
