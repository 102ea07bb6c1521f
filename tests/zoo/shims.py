"""What transformers 4.57.6 needs to run on a jax that is newer than itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def old_clip() -> Iterator[None]:
    """Lets T5 and LongT5 call ``jnp.clip(x, a_max=...)``.

    JAX renamed the bounds of ``clip`` to ``min`` and ``max`` and later dropped the old
    names; the relative position buckets of T5 still use them.
    """
    import jax.numpy as jnp

    clip = jnp.clip

    @functools.wraps(clip)
    def with_old_names(arr: Any, /, *bounds: Any, **named: Any) -> Any:
        renamed = {"a_min": "min", "a_max": "max"}
        return clip(arr, *bounds, **{renamed.get(k, k): v for k, v in named.items()})

    jnp.clip = with_old_names
    try:
        yield
    finally:
        jnp.clip = clip


# By the class's name: entered while the model is built and run.
SHIMS = {
    "FlaxLongT5ForConditionalGeneration": old_clip,
    "FlaxMT5ForConditionalGeneration": old_clip,
    "FlaxT5ForConditionalGeneration": old_clip,
}
