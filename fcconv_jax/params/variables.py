"""Recognises NNX's modules and Variables without importing ``flax.nnx``."""

from __future__ import annotations

import sys
from typing import Any


def is_nnx_module(value: Any) -> bool:
    """Return whether a value is an ``nnx.Module``; False where nobody imported nnx yet.

    Example:
      >>> from flax import nnx
      >>> is_nnx_module(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), is_nnx_module(nnx.Linear)
      (True, False)
    """
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def is_nnx_class(value: Any) -> bool:
    """Return whether a value is a class of ``nnx.Module``s."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, type) and issubclass(value, nnx.Module)


def is_variable(value: Any) -> bool:
    """Return whether a value is an ``nnx.Variable``."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Variable)
