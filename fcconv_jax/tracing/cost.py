"""Costs of a trace, derived from its shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

from .jaxprs import AnyJaxpr, opened, subjaxprs
from .primitives import MATMULS
from .protocols import Equation


def flops(
    jaxpr: AnyJaxpr, counted: Callable[[Equation], bool] = lambda _: True
) -> float:
    """Floating point operations of the matmuls and convolutions of a trace.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> flops(jax.make_jaxpr(lambda x, w: x @ w)(jnp.ones((2, 3)), jnp.ones((3, 4))))
      48.0
    """
    total = 0.0
    for eqn in opened(jaxpr)[0].eqns:
        name, p = eqn.primitive.name, eqn.params
        if name in MATMULS and not counted(eqn):
            continue
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            terms = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * eqn.outvars[0].aval.size * terms
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            # A kernel's own input features are those of one group, so its size over its
            # output features counts grouped convolutions, too.
            features = kernel.shape[p["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / max(features, 1)
        # How often a `while` runs isn't in its equation: it counts once.
        times = p.get("length", 1) if name == "scan" else 1
        total += times * sum(flops(body, counted) for _, body in subjaxprs(eqn))
    return total


def largest(jaxpr: AnyJaxpr) -> int:
    """Bytes of the largest array of a trace.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> largest(jax.make_jaxpr(lambda x: jnp.sum(x[:, None] * x))(jnp.ones(100)))
      40000
    """
    body, _ = opened(jaxpr)
    sizes = [
        math.prod(v.aval.shape) * v.aval.dtype.itemsize
        for eqn in body.eqns
        for v in eqn.outvars
        if hasattr(v.aval, "shape")
    ]
    inner = [largest(sub) for eqn in body.eqns for _, sub in subjaxprs(eqn)]
    return max([*sizes, *inner], default=0)
