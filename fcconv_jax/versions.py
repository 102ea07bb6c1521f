"""Differences between versions of JAX and Flax, back to Colab's 0.7.2 and 0.11.2.

Each entry names the version whose lower bound lets it be deleted. With Colab's,
functions and linen models are planned; NNX models are not yet, since Flax 0.11 lacks
``Variable.get_raw_value``. The declared bounds are therefore higher.
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


def value_of(variable: Any) -> Any:
    """The value of an ``nnx.Variable``; flax 0.12.8: ``variable.get_value()``."""
    get = getattr(variable, "get_value", None)
    return variable.value if get is None else get()


def changes_when_read(variable: Any) -> bool:
    """Whether the class of an ``nnx.Variable`` has its own way to read its value.

    flax 0.12.8: ``get_value``. Earlier, the property ``value``.
    """
    from flax import nnx

    name = "get_value" if hasattr(nnx.Variable, "get_value") else "value"
    return getattr(type(variable), name) is not getattr(nnx.Variable, name)
