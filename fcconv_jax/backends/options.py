"""Compiler options that this package sets for its own programs, one jit at a time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax

# XLA's CPU backend (jaxlib 0.10) can hand parts of a program to a library (YNNPACK).
# Convolutions are slower there, and some pools come out wrong (faults.POOL).
_PLAIN_CPU = (("xla_cpu_experimental_ynn_fusion_type", ""),)


def convolution_options(backend: str) -> dict[str, Any]:
    """Options under which a backend compiles many convolutions best; often none.

    Args:
      backend: as ``jax.default_backend()`` names it.

    Example:
      >>> convolution_options("tpu")
      {}
    """
    return dict(_PLAIN_CPU) if backend == "cpu" and _is_known(_PLAIN_CPU) else {}


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
        f"this version of XLA does not know {names}, with which the plan was tuned: it "
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
