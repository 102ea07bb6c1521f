"""The one file that touches jaxpr internals: reading them and running them.

Everything else goes through the names below, so a change in ``jax.extend`` is fixed
here. Tolerated differences, jax 0.10 to 0.12: ``ClosedJaxpr`` becomes an alias of
``Jaxpr``; ``pjit`` is called ``jit``; some primitives keep an open jaxpr in their
parameters (``remat2``) and others a closed one; ``scan`` loses ``num_consts`` and
``num_carry``. What is used of ``jax.extend.core``:

- ``Jaxpr``, ``ClosedJaxpr``: to tell jaxprs among an equation's parameters, and their
  ``constvars``, ``consts``, ``invars``, ``eqns``, ``outvars``;
- ``JaxprEqn``: ``primitive`` (its ``name``, ``bind``, ``get_bind_params`` and
  ``multiple_results``), ``params``, ``invars``, ``outvars``, and the ``name_stack`` of
  its ``source_info``;
- ``Var``: a key of dictionaries, and its ``aval``;
- ``Literal``: a constant among the ``invars``, and its ``val``;
- ``jaxpr_as_fun``: runs each equation under the mesh that it was traced under.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxpr_as_fun,
)
from jaxtyping import PyTree

from .primitives import CALLS, PLACES, REMATS
from .protocols import Atom, Equation, OpenJaxpr

__all__ = [
    "AnyJaxpr",
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "bind",
    "bodies",
    "call_body",
    "derivative_pass",
    "evaluate",
    "jaxpr_as_fun",
    "opened",
    "policy_of",
    "rerun",
    "scan_parts",
    "subjaxprs",
    "unplaced",
]

# A program as JAX traces it, or as an equation holds it; `opened` takes any apart.
AnyJaxpr = Jaxpr | ClosedJaxpr | OpenJaxpr
_BODY_NAMES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def opened(jaxpr: AnyJaxpr) -> tuple[OpenJaxpr, list[Any]]:
    """Splits an open or closed jaxpr into the open jaxpr and its constants.

    Example:
      >>> import jax
      >>> body, consts = opened(jax.make_jaxpr(lambda x: x + 1.0)(2.0))
      >>> len(body.eqns), consts
      (1, [])
    """
    program: Any = jaxpr
    if hasattr(program, "consts"):
        return getattr(program, "jaxpr", program), list(program.consts)
    return program, []


def subjaxprs(eqn: Equation) -> Iterator[tuple[str, AnyJaxpr]]:
    """Yields ``(parameter name, jaxpr)`` for every jaxpr an equation holds.

    ``cond`` holds several under ``branches``; ``while`` one each under ``cond_jaxpr``
    and ``body_jaxpr``; most others one under ``jaxpr`` or ``call_jaxpr``.

    Example:
      >>> import jax
      >>> eqn = jax.make_jaxpr(jax.jit(lambda x: x * 2.0))(1.0).eqns[0]
      >>> [name for name, _ in subjaxprs(eqn)]
      ['jaxpr']
    """
    for name, value in eqn.params.items():
        if _is_jaxpr(value):
            yield name, value
        elif isinstance(value, (tuple, list)):
            yield from ((name, item) for item in value if _is_jaxpr(item))


def call_body(eqn: Equation) -> AnyJaxpr | None:
    """The jaxpr a plain call runs (jit, remat, custom_jvp, ...), else None.

    The body's inputs and outputs correspond one to one to the equation's.

    Example:
      >>> import jax
      >>> eqn = jax.make_jaxpr(jax.checkpoint(lambda x: x * 2.0))(1.0).eqns[0]
      >>> len(opened(call_body(eqn))[0].eqns)
      1
    """
    if eqn.primitive.name not in CALLS:
        return None
    for name in _BODY_NAMES:
        if _is_jaxpr(eqn.params.get(name)):
            return eqn.params[name]
    return None


def bodies(eqn: Equation) -> tuple[AnyJaxpr, ...]:
    """The jaxprs of a call or of control flow, in the order :func:`rerun` counts them.

    Those of ``while`` are the condition and the body, those of ``cond`` its branches.
    Empty for every other equation, also for one that holds jaxprs of another kind
    (``shard_map``, ``pallas_call``).

    Example:
      >>> import jax
      >>> loop = lambda x: jax.lax.while_loop(lambda y: y < 9, lambda y: y * 2, x)
      >>> len(bodies(jax.make_jaxpr(loop)(1).eqns[0]))
      2
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return tuple(params["branches"])
    if name == "while":
        return params["cond_jaxpr"], params["body_jaxpr"]
    if name == "scan":
        return (params["jaxpr"],)
    body = call_body(eqn)
    return () if body is None else (body,)


def scan_parts(eqn: Equation) -> tuple[int, int]:
    """How many constants a ``scan`` takes, and how many values it carries.

    Its operands are the constants, what it carries, and the arrays that it takes one
    step of; its outputs are what it carries and the arrays that it stacks. Read off
    the shapes, which tell one from the other in every version of JAX.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f = lambda w, xs: jax.lax.scan(lambda c, x: (c + w * x, c), 0.0, xs)
      >>> scan_parts(jax.make_jaxpr(f)(2.0, jnp.ones(3)).eqns[-1])
      (1, 1)
    """
    body, _ = opened(eqn.params["jaxpr"])

    def whole(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(
            len(a.aval.shape) == len(b.aval.shape)
            for a, b in zip(outer, inner, strict=True)
        )

    carry = whole(eqn.outvars, body.outvars)
    return whole(eqn.invars, body.invars) - carry, carry


def derivative_pass(eqn: Equation) -> str | None:
    """Which pass of a derivative inside the program made an equation.

    The equations of a call in a backward pass don't have this themselves.

    Returns:
      ``"backward"`` for those that ``jax.grad`` or ``jax.vjp`` transposed,
      ``"forward"`` for all others that were differentiated, else None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f = jax.grad(lambda x, w: jnp.sin(x @ w).sum())
      >>> eqns = jax.make_jaxpr(f)(jnp.ones((2, 3)), jnp.ones((3, 4))).eqns
      >>> [derivative_pass(e) for e in eqns if e.primitive.name == "dot_general"]
      ['forward', 'backward']
    """
    # Nothing else tells a gradient's x @ w.T from that of a model with tied weights.
    stack = str(getattr(eqn.source_info, "name_stack", ""))
    if "transpose(" in stack:
        return "backward"
    return "forward" if "jvp(" in stack else None


def rerun(
    eqn: Equation,
    operands: Sequence[Any],
    runs: Sequence[Callable[[Sequence[Any]], list[Any]]],
    policy: Callable[..., Any] | None = None,
) -> list[Any]:
    """Runs a call or control flow with other code in the place of its bodies.

    What surrounds the bodies stays: remat with its policy, loops with their unrolling,
    the derivative rule of ``custom_jvp``, the shardings that a ``jit`` was given.

    Args:
      eqn: an equation for which :func:`bodies` gives something.
      operands: its operands.
      runs: called as ``run(operands)`` in place of the body of the same number; may
        be traced several times. A ``jit`` and a remat stay what they are, so the same
        function given again is not traced again. A ``custom_vjp`` must not be given:
        its rule would be lost.
      policy: of a remat, in the place of its own.

    Returns:
      The outputs.

    Example:
      >>> import jax
      >>> eqn = jax.make_jaxpr(jax.checkpoint(lambda x: x * 2.0))(1.0).eqns[0]
      >>> float(rerun(eqn, [3.0], [lambda operands: [operands[0] + 1]])[0])
      4.0
    """
    name, p = eqn.primitive.name, eqn.params
    if name == "scan":
        return _rerun_scan(eqn, operands, *runs)
    if name == "while":
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        test, body = operands[:first], operands[first:second]
        carry = lax.while_loop(
            lambda carry: runs[0]([*test, *carry])[0],
            lambda carry: runs[1]([*body, *carry]),
            list(operands[second:]),
        )
        return list(carry)
    if name == "cond":
        which, *rest = operands
        return lax.switch(which, runs, rest)
    if name in REMATS:
        policy = policy or p["policy"]
        body = jax.checkpoint(runs[0], prevent_cse=p["prevent_cse"], policy=policy)
        return body(list(operands))
    if name == "custom_jvp_call":
        return _rerun_custom_jvp(eqn, operands, *runs)
    ins = _constrained(operands, p.get("in_shardings"))
    # What is to be inlined is not in a trace any more; 0.12 has 'auto' for the rest.
    inlined = p.get("inline") is True
    inner = runs[0] if inlined else _named_jit(runs[0], p.get("name", "call"))
    return _constrained(inner(ins), p.get("out_shardings"))


def policy_of(eqn: Equation) -> Callable[..., Any] | None:
    """Return the policy of a remat; None for every other equation.

    Example:
      >>> import jax
      >>> keep = jax.checkpoint_policies.dots_saveable
      >>> f = jax.checkpoint(lambda x: x * 2.0, policy=keep)
      >>> policy_of(jax.make_jaxpr(f)(1.0).eqns[0]) is keep
      True
    """
    return eqn.params["policy"] if eqn.primitive.name in REMATS else None


def _named_jit(run: Any, name: str) -> Any:
    """The function jitted, under the name that the program shows."""
    run.__name__ = run.__qualname__ = name
    return jax.jit(run)


def _rerun_scan(eqn: Equation, operands: Sequence[Any], run: Any) -> list[Any]:
    p = eqn.params
    first, carried = scan_parts(eqn)
    second = first + carried
    consts = operands[:first]

    def body(carry: Any, xs: PyTree) -> Any:
        outs = run([*consts, *carry, *xs])
        return outs[:carried], outs[carried:]

    carry, ys = lax.scan(
        body,
        list(operands[first:second]),
        list(operands[second:]),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys]


def _rerun_custom_jvp(eqn: Equation, operands: Sequence[Any], run: Any) -> list[Any]:
    @jax.custom_jvp
    def call(*operands: PyTree) -> list[Any]:
        return list(run(operands))

    @call.defjvp
    def _(primals: PyTree, tangents: PyTree) -> Any:
        # The equation's own rule, for the outputs and for the tangents.
        return jax.jvp(lambda *x: bind(eqn, x), tuple(primals), tuple(tangents))

    return call(*operands)


def _constrained(values: Sequence[Any], shardings: Any) -> list[Any]:
    """Keeps the shardings that an inner jit was given; the unspecified have no type."""
    if shardings is None:
        return list(values)
    return [
        lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding)
        else value
        for value, sharding in zip(values, shardings, strict=True)
    ]


def bind(eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation on ``operands`` and returns its outputs as a list.

    Example:
      >>> import jax
      >>> eqn = jax.make_jaxpr(lambda x: x * 2.0)(1.0).eqns[0]
      >>> float(bind(eqn, [3.0, 2.0])[0])
      6.0
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # before 0.10: (functions, parameters)
        functions, params = params
        operands = [*functions, *operands]
    outs = eqn.primitive.bind(*operands, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def unplaced(eqn: Equation) -> Equation:
    """An equation that leaves it to the compiler where its result is placed.

    Example:
      >>> import jax
      >>> cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
      >>> zeros = lambda: jax.lax.full((2,), 0.0, sharding=cpu)
      >>> unplaced(jax.make_jaxpr(zeros)().eqns[0]).params["sharding"]
    """
    if not any(eqn.params.get(key) is not None for key in PLACES):
        return eqn
    return eqn.replace(params=eqn.params | dict.fromkeys(PLACES & eqn.params.keys()))


def evaluate(
    jaxpr: AnyJaxpr,
    operands: Sequence[Any],
    visit: Callable[[Equation, list[Any]], Sequence[Any]] = bind,
) -> list[Any]:
    """Runs a jaxpr, handing every equation and its operands to ``visit``.

    Args:
      jaxpr: an open or closed jaxpr.
      operands: one value for each input of the jaxpr.
      visit: called as ``visit(eqn, operands)`` in program order; returns the outputs
        of the equation. The default just runs it.

    Returns:
      The outputs of the jaxpr.

    Example:
      >>> import jax
      >>> closed = jax.make_jaxpr(lambda x: x * 2.0 + 1.0)(1.0)
      >>> float(evaluate(closed, [3.0])[0])
      7.0
    """
    body, consts = opened(jaxpr)
    values: dict[Any, Any] = dict(zip(body.constvars, consts))
    values.update(zip(body.invars, operands, strict=True))

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in body.eqns:
        outs = visit(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in body.outvars]
