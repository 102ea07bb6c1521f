"""Compiles programs side by side: XLA works outside Python's lock."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jaxtyping import PyTree

from ..backends.options import correct_options

# For programs on the CPU that run a few times: their compile time is what counts.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


class BackgroundProgram:
    """A program that has been traced and lowered, and compiles in the background.

    Args:
      f: a function of arrays.
      *args: its arguments, arrays or abstract ones.
      quick: compile in a hurry; the program may run slower.

    Attributes:
      jaxpr: the trace, closed.
      out_info: shapes and dtypes of the outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> program = BackgroundProgram(lambda x: x * 2.0, jnp.ones(3))
      >>> program(jnp.ones(3)).tolist()
      [2.0, 2.0, 2.0]
    """

    def __init__(self, f: Callable[..., Any], *args: PyTree, quick: bool = False):
        # Unused arguments are kept, so that the call takes what the function takes.
        traced = jax.jit(f, keep_unused=True).trace(*args)
        self.jaxpr = traced.jaxpr
        self.out_info = traced.out_info
        self._future: Future[Any] = _pool().submit(_compile, traced.lower(), quick)

    @property
    def compiled(self) -> Any:
        """The executable; waits for it."""
        return self._future.result()

    def __call__(self, *args: PyTree) -> Any:
        """Run the program, on arguments like those that it was traced with."""
        return self.compiled(*args)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "fcconv-compile")


def _compile(lowered: jax.stages.Lowered, quick: bool) -> Any:
    options = correct_options(jax.default_backend())
    if quick:
        try:
            return lowered.compile(compiler_options=_QUICK | options)
        except jax.errors.JaxRuntimeError:
            # Options of another backend, or of another XLA: a true failure comes again.
            pass
    return lowered.compile(compiler_options=options or None)
