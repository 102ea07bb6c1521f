"""What in a trace has no reading in float64."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..tracing.jaxprs import AnyJaxpr, bodies, opened, subjaxprs
from ..tracing.protocols import Atom, Equation, OpenJaxpr
from .widening import RESTATED

# What may happen to the bits of a float that come back as a float: JAX's derivative of
# erf cuts a number in two so.
_MASKS = frozenset(
    """
    add and not or shift_left shift_right_arithmetic shift_right_logical sub xor
    """.split()
)


def obstacles(jaxpr: AnyJaxpr) -> list[str]:
    """Return what in a trace has no float64 reading, each kind once.

    Example:
      >>> import jax
      >>> bits = lambda x: jax.lax.bitcast_convert_type(x, "int32")
      >>> obstacles(jax.make_jaxpr(bits)(1.0))
      ["'bitcast_convert_type' reads the bits of a float"]
    """
    return list(dict.fromkeys(_obstacles(jaxpr)))


def _obstacles(jaxpr: AnyJaxpr) -> Iterator[str]:
    body, _ = opened(jaxpr)
    for eqn in body.eqns:
        name = eqn.primitive.name
        inner = bodies(eqn)
        if name == "custom_linear_solve":
            # The others serve derivatives, which a reading does not take.
            inner = (eqn.params["jaxprs"].solve,)
        if _looks_at_bits(eqn) and not _comes_back(body, eqn.outvars[0]):
            yield f"{name!r} reads the bits of a float"
        elif name == "while" and _decided_by_floats(eqn):
            yield "a 'while' loop whose number of steps depends on floats"
        elif not inner and eqn.outvars and _runs_other_code(eqn):
            yield f"{name!r} runs its own code"
        for each in inner:
            yield from _obstacles(each)


def _looks_at_bits(eqn: Equation) -> bool:
    return (
        eqn.primitive.name == "bitcast_convert_type"
        and _is_float(eqn.invars[0].aval.dtype)
        and not _is_float(eqn.outvars[0].aval.dtype)
    )


def _comes_back(body: OpenJaxpr, var: Atom) -> bool:
    """Return whether the bits of a float are only masked and made a float again."""
    # Whoever takes the output sees the bits.
    if var in body.outvars:
        return False
    uses = [eqn for eqn in body.eqns if var in eqn.invars]
    return all(
        _is_float(eqn.outvars[0].aval.dtype)
        if eqn.primitive.name == "bitcast_convert_type"
        else eqn.primitive.name in _MASKS and _comes_back(body, eqn.outvars[0])
        for eqn in uses
    )


def _runs_other_code(eqn: Equation) -> bool:
    name = eqn.primitive.name
    if name in RESTATED or name == "custom_linear_solve":
        return False
    return any(True for _ in subjaxprs(eqn)) or "call" in name or name == "shard_map"


def _is_float(dtype: DTypeLike) -> bool:
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and jnp.issubdtype(
        dtype, jnp.inexact
    )


def _decided_by_floats(eqn: Equation) -> bool:
    test, _ = opened(eqn.params["cond_jaxpr"])
    values = (var for each in test.eqns for var in each.invars)
    return any(_is_float(var.aval.dtype) for var in values)
