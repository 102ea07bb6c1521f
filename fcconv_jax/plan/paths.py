"""Paths of leaves."""

from __future__ import annotations

# What holds the array of a boxed parameter (nn.Partitioned, nnx.Variable).
BOXES = ("value", "raw_value")


def join_path(*parts: str) -> str:
    """Return the path of a leaf; a root has no name, so empty parts vanish.

    Example:
      >>> join_path("encoder", "kernel"), join_path("", "kernel")
      ('encoder/kernel', 'kernel')
    """
    return "/".join(filter(None, parts))
