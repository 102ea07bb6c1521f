"""Differences between the supported versions of JAX and Flax.

The oldest are Colab's: jax 0.7.2 and flax 0.11.2. Each entry names the version whose
lower bound lets it be deleted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax

# jax 0.10.1: import them from jax.errors and jax.extend.core, and use jax.enable_x64.
if hasattr(jax.errors, "InconclusiveDimensionOperation"):
    from jax.errors import InconclusiveDimensionOperation
    from jax.extend.core import get_opaque_trace_state

    enable_x64 = jax.enable_x64
else:
    import jax.core
    import jax.experimental

    InconclusiveDimensionOperation: Any = vars(jax.core)[
        "InconclusiveDimensionOperation"
    ]
    get_opaque_trace_state: Any = functools.partial(
        vars(jax.core)["get_opaque_trace_state"], convention="nnx"
    )
    enable_x64: Any = vars(jax.experimental)["enable_x64"]


@functools.cache
def graph_mode() -> Mapping[str, Any]:
    """Options of ``nnx.split`` and the like, under which shared modules stay shared.

    flax 0.12.8: always ``graph=True``. Earlier versions have only that mode.
    """
    from flax import nnx

    known = "graph" in inspect.signature(nnx.split).parameters
    return {"graph": True} if known else {}


def holds_reference(variable: Any) -> bool:
    """Whether an ``nnx.Variable`` holds a mutable reference, whose shape is fixed.

    flax 0.12.8: ``variable.ref or variable.hijax``. Earlier, ``has_ref``.
    """
    if hasattr(type(variable), "has_ref"):
        return variable.has_ref
    return bool(variable.ref or variable.hijax)
