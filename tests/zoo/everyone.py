"""All models of the zoo, in the order of the table."""

from __future__ import annotations

from . import in_linen, in_nnx, library
from .entry import Entry


def everyone() -> list[Entry]:
    """The library's models, then those written with Flax's own layers."""
    return [*library.entries(), *in_linen.entries(), *in_nnx.entries()]
