"""Typos in options: keyword arguments that no model takes are refused by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

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
        cutoff = 0.8 if takes_any else 0.6
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
