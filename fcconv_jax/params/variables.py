"""Recognizes NNX's Variables without importing ``flax.nnx``."""

from __future__ import annotations

import sys


def is_variable(value: object) -> bool:
    """Return whether a value is an ``nnx.Variable``."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Variable)
