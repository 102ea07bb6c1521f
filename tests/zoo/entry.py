"""What a model of the zoo is: how it is built, and what it is called with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its weights and one input.

    Args:
      model: a linen Module, an NNX Module or a function of params and inputs.
      variables: of a linen Module; the params of a function; None for NNX.
      inputs: what the model is called with.
      kwargs: likewise.
    """

    model: Any
    variables: Any
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the zoo.

    Args:
      name: of the architecture.
      group: where the model is from.
      build: makes it.
      shim: entered while the model is built and run.
    """

    name: str
    group: str
    build: Callable[[], Subject]
    shim: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def random_variables(shapes: Any) -> Any:
    """Weights of the size that training leaves, from the path of each leaf.

    Scales and variances are positive and near one, everything else is normal, kernels
    divided by the root of their fan-in: activations stay of order one.
    """

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name.rsplit("/", 1)[-1] in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        values = rng.standard_normal(leaf.shape) / math.sqrt(fan_in)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """A normal input."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def tokens(*shape: int, below: int, seed: int = 0) -> jax.Array:
    """Token ids, from 3 up: lower ones are special in most vocabularies."""
    return jnp.asarray(np.random.default_rng(seed).integers(3, below, shape), jnp.int32)
