"""Keeps traces of the original and the converted model apart in every jit cache."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterator
from typing import Any

import flax.linen as nn
import jax

# Part of the cache key of every jit that runs below: without it, a jit inside the
# model (or one of the user's around it) would hand out a trace of the other form.
_user_context = jax.make_user_context(default_value=None)

# The interceptors that are active, such as those of a user's context. They change what
# a trace holds, so they belong into the key of every jit that a converted model is
# called through. Flax has no public way to ask for them; where this one is gone, a
# context that is entered between two calls is not seen.
active: Collection[Any] = getattr(nn.module, "_global_interceptor_stack", ())


@contextlib.contextmanager
def intercepting(interceptor: nn.module.Interceptor, key: Hashable) -> Iterator[None]:
    """Run Flax methods through ``interceptor``, with jit caches of their own.

    Args:
      interceptor: as for ``flax.linen.intercept_methods``.
      key: equal keys share traces.
    """
    with _user_context(key), nn.intercept_methods(interceptor):
        yield
