"""Compiler options that this package sets for its own programs, one jit at a time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib.version

from ..tracing.jaxprs import AnyJaxpr, opened, subjaxprs
from ..tracing.primitives import POOLS
from .faults import STALE

# XLA's CPU backend (jaxlib 0.10) can hand parts of a program to a library (YNNPACK).
# Some convolutions are slower there.
_PLAIN_CPU = (("xla_cpu_experimental_ynn_fusion_type", ""),)
# Some pools come out wrong there (faults.POOL). In a batch of more than a few images,
# maxima and means of a relu, over windows or whole axes, are finite where a pixel is
# NaN. So it gets none of them. It keeps matmuls and convolutions: depthwise ones take
# 3.5 times as long without it.
_NO_POOLS = (
    (
        "xla_cpu_experimental_ynn_fusion_type",
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
    ),
)
_POOLED = POOLS | {"reduce_max", "reduce_min", "reduce_sum"}

# Works around faults.STALE.
_CORRECT_CPU = (("xla_cpu_use_xnnpack", False),)


def correct_options(backend: str) -> dict[str, Any]:
    """Return options without which this XLA computes wrong results; often none.

    Example:
      >>> correct_options("tpu")
      {}
    """
    stale = backend == "cpu" and STALE.is_in(jaxlib.version.__version__)
    return dict(_CORRECT_CPU) if stale else {}


def convolution_options(backend: str) -> dict[str, Any]:
    """Options under which a backend compiles many convolutions best; often none.

    Args:
      backend: as ``jax.default_backend()`` names it.

    Example:
      >>> convolution_options("tpu")
      {}
    """
    plain = backend == "cpu" and _is_known(_PLAIN_CPU)
    return correct_options(backend) | (dict(_PLAIN_CPU) if plain else {})


def has_pools(program: AnyJaxpr) -> bool:
    """Return whether a trace computes a pool, over windows or whole axes.

    Its loops and branches count, too.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> x = jnp.ones((1, 4, 4, 1))
      >>> has_pools(jax.make_jaxpr(lambda x: nn.max_pool(x, (2, 2)))(x))
      True
      >>> has_pools(jax.make_jaxpr(lambda x: x.max((1, 2)))(x))
      True
      >>> has_pools(jax.make_jaxpr(jnp.tanh)(x))
      False
    """
    body, _ = opened(program)
    return any(
        eqn.primitive.name in _POOLED
        or any(has_pools(inner) for _, inner in subjaxprs(eqn))
        for eqn in body.eqns
    )


def pool_options(backend: str) -> dict[str, Any]:
    """Options under which a backend computes pools right; often none.

    Args:
      backend: as ``jax.default_backend()`` names it.

    Example:
      >>> pool_options("tpu")
      {}
    """
    if backend != "cpu":
        return {}
    # An XLA without the finer option turns YNNPACK off as a whole, or has none.
    found = next((each for each in (_NO_POOLS, _PLAIN_CPU) if _is_known(each)), ())
    return correct_options(backend) | dict(found)


def known_options(options: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the options of a plan, where this version of XLA knows them.

    Warns:
      RuntimeWarning: it does not. The program is the same without them, and may be
        slower.

    Example:
      >>> known_options([])
      {}
    """
    options = tuple(options)
    if not options or _is_known(options):
        return dict(options)
    names = ", ".join(name for name, _ in options)
    warnings.warn(
        f"this version of XLA doesn't know {names}, with which the plan was tuned, and "
        "runs without. Tune again",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}


@functools.cache
def _is_known(options: tuple[tuple[str, Any], ...]) -> bool:
    """Return whether XLA compiles with these options."""
    jitted = jax.jit(lambda: 0, compiler_options=dict(options))
    try:
        jitted.lower().compile()
    except Exception:  # another version of XLA, which does not know one
        return False
    return True
