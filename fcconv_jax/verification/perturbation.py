"""Runs a program with a perturbation added to every equation that rounds.

The derivatives by the perturbations say how each local error reaches the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..tracing import jaxprs
from .rounding import local_errors


class UnboundedError(NotImplementedError):
    """The program holds a primitive through which no error bound can be carried."""


def run_shifted(
    jaxpr: Any,
    operands: Sequence[Any],
    shifts: Any,
    unmodelled: dict[str, None] | None,
) -> tuple[list[Any], list[Any]]:
    """Runs a jaxpr with ``shifts`` added to its equations' outputs.

    Returns the outputs and, in the structure that ``shifts`` has to have, the local
    errors; ``shifts=None`` adds nothing. The names of primitives without a rule are
    put into ``unmodelled``; where that is None, no errors are worked out, and all that
    is returned for them is None.
    """
    errors: list[Any] = []
    remaining = None if shifts is None else iter(shifts)

    def visit(eqn: Any, ins: list[Any]) -> list[Any]:
        shift = None if remaining is None else next(remaining)
        body = jaxprs.call_body(eqn)
        if body is not None:
            outs, error = run_shifted(body, ins, shift, unmodelled)
        elif eqn.primitive.name == "scan":
            outs, error = _run_scan(eqn, ins, shift, unmodelled)
        elif eqn.primitive.name == "cond":
            outs, error = _run_cond(eqn, ins, shift, unmodelled)
        else:
            outs, error = _run_leaf(eqn, ins, shift, unmodelled)
        errors.append(error)
        return outs

    return jaxprs.evaluate(jaxpr, operands, visit), errors


def _run_leaf(
    eqn: Any, ins: list[Any], shift: Any, unmodelled: dict[str, None] | None
) -> tuple[list[Any], Any]:
    name = eqn.primitive.name
    if name == "while" and any(
        jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars
    ):
        raise UnboundedError(
            "floats go through a 'while' loop, which has no reverse pass: use "
            "lax.scan, or a fori_loop whose bounds are known when it is traced"
        )
    if name == "stop_gradient":  # stops derivatives, not errors
        return list(ins), None
    if name == "nextafter":
        outs = _following(eqn)(*ins)
    elif name in _SINGULAR:
        outs = _regular(eqn)(*ins)
    else:
        outs = jaxprs.bind(eqn, ins)
    error = None if unmodelled is None else _errors(eqn, ins, outs, unmodelled)
    if shift is not None:
        outs = [
            o if s is None else (o.astype(jnp.result_type(o, s)) + s).astype(o.dtype)
            for o, s in zip(outs, shift)
        ]
    return outs, error


def _errors(
    eqn: Any, ins: list[Any], outs: list[Any], unmodelled: dict[str, None]
) -> Any:
    fixed = [lax.stop_gradient(x) for x in outs]
    error = local_errors(eqn, [lax.stop_gradient(x) for x in ins], fixed)
    if error is None:
        unmodelled[eqn.primitive.name] = None
        return None
    # A complex output is shifted along the real axis and the imaginary one.
    return [
        e if e is None or not jnp.iscomplexobj(o) else e * (1 + 1j)
        for e, o in zip(error, outs)
    ]


def _following(eqn: Any) -> Callable[..., list[Any]]:
    """The equation with the derivative of its first operand: JAX has none for it."""
    return _with_derivative(eqn, lambda out, primals, tangents: tangents[0])


# Derivatives of these are infinite somewhere. Backpropagated, an infinity meets a zero
# and spoils everything with NaN, also where a `where` hides the place.
_SINGULAR = frozenset(
    """sqrt rsqrt cbrt log log1p div pow integer_pow acos asin acosh atanh
    erf_inv""".split()
)


def _regular(eqn: Any) -> Callable[..., list[Any]]:
    """The equation with infinite derivatives replaced by large finite ones."""

    def derivative(out: Any, primals: Any, tangents: Any) -> Any:
        total = jnp.zeros_like(out)
        for i, (x, tangent) in enumerate(zip(primals, tangents)):
            if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
                continue

            def along(x: Any, i: int = i) -> Any:
                return jaxprs.bind(eqn, [*primals[:i], x, *primals[i + 1 :]])[0]

            slope = jax.jvp(along, (x,), (jnp.ones_like(x),))[1]
            limit = float(jnp.finfo(slope.dtype).max) ** 0.5
            slope = jnp.where(jnp.isnan(slope), 0, slope)
            if not jnp.iscomplexobj(slope):
                slope = jnp.clip(slope, -limit, limit)
            total = total + slope * tangent
        return total

    return _with_derivative(eqn, derivative)


def _with_derivative(
    eqn: Any, derivative: Callable[[Any, Any, Any], Any]
) -> Callable[..., list[Any]]:
    """An equation of one output, with another derivative.

    Args:
      eqn: the equation.
      derivative: called as ``derivative(output, primals, tangents)``.
    """

    @jax.custom_jvp
    def primitive(*ins: Any) -> list[Any]:
        return jaxprs.bind(eqn, ins)

    @primitive.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        outs = primitive(*primals)
        return outs, [derivative(outs[0], primals, tangents)]

    return primitive


def _run_scan(
    eqn: Any, ins: list[Any], shift: Any, unmodelled: dict[str, None] | None
) -> tuple[list[Any], Any]:
    p = eqn.params
    first, carried = jaxprs.scan_parts(eqn)
    consts, xs = ins[:first], ins[first + carried :]
    carry = ins[first : first + carried]

    def body(carry: Any, x: Any) -> Any:
        x, shifts = x
        outs, errors = run_shifted(
            p["jaxpr"], [*consts, *carry, *x], shifts, unmodelled
        )
        return outs[:carried], (outs[carried:], errors)

    carry, (ys, errors) = lax.scan(
        body, carry, (xs, shift), length=p["length"], reverse=p["reverse"]
    )
    return [*carry, *ys], errors


def _run_cond(
    eqn: Any, ins: list[Any], shift: Any, unmodelled: dict[str, None] | None
) -> tuple[list[Any], Any]:
    which, *operands = ins
    branches = eqn.params["branches"]
    if unmodelled is None:

        def shifted(number: int) -> Callable[..., Any]:
            return lambda operands, shift: run_shifted(
                branches[number],
                operands,
                None if shift is None else shift[number],
                None,
            )[0]

        bodies = [shifted(i) for i in range(len(branches))]
        return lax.switch(which, bodies, operands, shift), None
    shapes = [
        jax.eval_shape(lambda a, b=b: run_shifted(b, a, None, unmodelled)[1], operands)
        for b in branches
    ]

    def taken(number: int) -> Callable[..., Any]:
        def branch(operands: Any, shift: Any) -> Any:
            # The branches not taken commit no error.
            errors = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            own = None if shift is None else shift[number]
            outs, errors[number] = run_shifted(
                branches[number], operands, own, unmodelled
            )
            return outs, errors

        return branch

    return lax.switch(which, [taken(i) for i in range(len(branches))], operands, shift)
