"""Runs this package's own checks as under JAX's defaults, whatever is switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Suspend JAX's strict switches, which are about the code of a model.

    A check compiles ahead of time, moves probes to devices, adds numbers of several
    dtypes and lets values overflow where the model would.

    Example:
      >>> with jax.disable_jit(), default_settings():
      ...     jax.jit(lambda x: len(str(x)) > 3)(1)
      Array(True, dtype=bool)
    """
    with (
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield
