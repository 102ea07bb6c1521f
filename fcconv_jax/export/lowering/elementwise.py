"""How elementwise primitives become operations of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...messages.errors import ExportError
from ...tracing.primitives import ELEMENTWISE, SAME
from ...tracing.protocols import Equation
from ..graph import BINARY, UNARY, Value, constant
from .builder import Builder, rule


# The graph has these under the names that JAX gives them.
@rule(*(UNARY | BINARY) & ELEMENTWISE, "add_any")
def _elementwise(low: Builder, eqn: Equation, *values: Value) -> Value:
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    integers = np.issubdtype(values[0].dtype, np.integer)
    if name in ("and", "or", "not") and values[0].dtype != np.bool_:
        raise ExportError(
            f"the model has {name!r} on the bits of {values[0].dtype}, which edge "
            "runtimes support for booleans only. Compute it before the model."
        )
    if name == "div" and integers:
        raise ExportError(
            "the model divides integers, which runtimes round differently. Divide "
            "floats."
        )
    if name == "round" and int(eqn.params["rounding_method"]) != 1:
        raise ExportError(
            "the model rounds halves away from zero; the runtimes round them to even. "
            "Use jnp.round."
        )
    op = "add" if name == "add_any" else name
    return low.add(op, values, out.shape, out.dtype)


@rule(*SAME, "reduce_precision")
def _same(low: Builder, eqn: Equation, *values: Value) -> Sequence[Value]:
    if eqn.primitive.name == "reduce_precision":
        info = np.finfo(values[0].dtype)
        # Rounding to its own precision changes nothing.
        if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (
            info.nexp,
            info.nmant,
        ):
            raise ExportError(
                "the model has 'reduce_precision', which no runtime supports. Remove "
                "it for the export."
            )
    return values


@rule("convert_element_type")
def _cast(low: Builder, eqn: Equation, x: Value) -> Value:
    out = eqn.outvars[0].aval
    if x.dtype == out.dtype:
        return x
    if np.issubdtype(x.dtype, np.floating) and np.issubdtype(out.dtype, np.integer):
        low.notes.append("floats are cast to integers; runtimes differ out of range")
    return low.add("cast", [x], out.shape, out.dtype)


@rule("square")
def _square(low: Builder, eqn: Equation, x: Value) -> Value:
    return low.add("mul", [x, x], x.shape)


@rule("integer_pow")
def _integer_pow(low: Builder, eqn: Equation, x: Value) -> Value:
    power = eqn.params["y"]
    out: Value | None = None
    base, left = x, abs(power)
    # By repeated squaring: x ** 8 takes three multiplications.
    while left:
        if left & 1:
            out = base if out is None else low.add("mul", [out, base], x.shape)
        left >>= 1
        if left:
            base = low.add("mul", [base, base], x.shape)
    one = constant(np.ones((), x.dtype))
    # x ** 0 is 1, also where x is NaN.
    if out is None:
        return low.add("broadcast", [one], x.shape)
    return out if power > 0 else low.add("div", [one, out], x.shape)


@rule("erfc")
def _erfc(low: Builder, eqn: Equation, x: Value) -> Value:
    one = constant(np.ones((), x.dtype))
    return low.add("sub", [one, low.add("erf", [x], x.shape)], x.shape)


@rule("log1p")
def _log1p(low: Builder, eqn: Equation, x: Value) -> Value:
    one = constant(np.ones((), x.dtype))
    return low.add("log", [low.add("add", [x, one], x.shape)], x.shape)


@rule("expm1")
def _expm1(low: Builder, eqn: Equation, x: Value) -> Value:
    one = constant(np.ones((), x.dtype))
    return low.add("sub", [low.add("exp", [x], x.shape), one], x.shape)


@rule("exp2")
def _exp2(low: Builder, eqn: Equation, x: Value) -> Value:
    scaled = low.add("mul", [x, constant(math.log(2), x.dtype)], x.shape)
    return low.add("exp", [scaled], x.shape)


@rule("is_finite")
def _is_finite(low: Builder, eqn: Equation, x: Value) -> Value:
    largest = constant(np.finfo(x.dtype).max)
    return low.add("le", [low.add("abs", [x], x.shape), largest], x.shape, np.bool_)


@rule("clamp")
def _clamp(low: Builder, eqn: Equation, least: Value, x: Value, most: Value) -> Value:
    return low.add("min", [low.add("max", [x, least], x.shape), most], x.shape)


@rule("select_n")
def _select(low: Builder, eqn: Equation, which: Value, *cases: Value) -> Value:
    out = eqn.outvars[0].aval
    if which.dtype != np.bool_ or len(cases) != 2:
        raise ExportError(
            "the model selects among more than two values with lax.select_n. Use "
            "jnp.where."
        )
    # A condition that the program fixes leaves one case, and its constant keeps its
    # origin.
    if which.data is not None and len(set(which.data.flat)) == 1:
        chosen = cases[int(which.data.flat[0])]
        if chosen.shape == tuple(out.shape):
            return chosen
    return low.add("select", [which, cases[1], cases[0]], out.shape, out.dtype)
