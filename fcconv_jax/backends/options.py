"""Compiler options that this package sets for its own programs, one jit at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax

# XLA's CPU backend (jaxlib 0.10) can hand parts of a program to a library (YNNPACK).
# Convolutions are slower there, and a pool behind a broadcast addition comes out wrong:
# jax.jit(lambda y, b: max_pool((y[0] + b)[None])) on (1, 236, 236, 8).
_PLAIN_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def convolution_options(backend: str) -> dict[str, Any]:
    """Options under which a backend compiles many convolutions best; often none.

    Args:
      backend: as ``jax.default_backend()`` names it.

    Example:
      >>> convolution_options("tpu")
      {}
    """
    if backend != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_PLAIN_CPU).lower().compile()
    except Exception:  # another version of XLA, which does not know it
        return {}
    return dict(_PLAIN_CPU)
