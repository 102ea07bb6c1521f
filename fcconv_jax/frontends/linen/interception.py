"""Keeps traces of the original and the converted model apart in every jit cache."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator

import flax.linen as nn
import jax

# Part of the cache key of every jit that runs below: without it, a jit inside the
# model (or one of the user's around it) would hand out a trace of the other form.
_user_context = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def intercepting(interceptor: nn.module.Interceptor, key: Hashable) -> Iterator[None]:
    """Runs Flax methods through ``interceptor``, with jit caches of their own.

    Args:
      interceptor: as for ``flax.linen.intercept_methods``.
      key: equal keys share traces.
    """
    with _user_context(key), nn.intercept_methods(interceptor):
        yield
