"""Arguments that a function can't use: misspelled options, and traced arrays."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from .bound import BoundModel


def check_options(function: Callable[..., Any], bound: BoundModel) -> None:
    """Refuse keyword arguments that are neither the model's nor meant for it.

    Unknown keyword arguments go to the model, so that ``train=False`` needs no wrapper.
    A misspelled option would go there, too.

    Raises:
      TypeError: names the argument, and the option that was probably meant.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, fcconv_jax as fc
      >>> fc.make_plan(nn.Dense(3), jnp.ones((2, 4)), rule=["*=skip"])
      Traceback (most recent call last):
        ...
      TypeError: make_plan got rule=, which Dense does not take. Did you mean rules=?
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    accepted, takes_any = bound.accepts()
    for name in bound.kwargs:
        if name in accepted:
            continue
        # A model that takes any keyword may well take one that looks like an option.
        cutoff = 0.8 if takes_any else 0.7
        close = difflib.get_close_matches(name, known, 1, cutoff)
        if not (close or not takes_any):
            continue
        model = getattr(bound.model, "__name__", type(bound.model).__name__)
        fix = f"Pass one of {', '.join(sorted({*known, *accepted}))}."
        if close:
            fix = f"Did you mean {close[0]}=?"
        raise TypeError(
            f"{function.__name__} got {name}=, which {model} does not take. {fix}"
        )


def check_concrete(function: Callable[..., Any], bound: BoundModel) -> None:
    """Refuse arrays that are traced: the function runs programs on their values.

    Raises:
      TypeError: the function is called under jit, grad or vmap.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> jax.jit(lambda x: fc.verify(model, params, x).passed)(x)
      Traceback (most recent call last):
        ...
      TypeError: verify runs programs and can't be traced. Call it outside jit, grad ...
    """
    leaves = jax.tree.leaves((bound.params, bound.arrays))
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            f"{function.__name__} runs programs and can't be traced. Call it outside "
            "jit, grad and vmap, on arrays."
        )
