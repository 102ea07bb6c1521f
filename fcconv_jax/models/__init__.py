"""Runs a model in its other form without touching its code: ``convert_model``."""

from __future__ import annotations

import flax.linen as nn

from ..plan import Plan
from .linen import ConvertedLinen


def convert_model(model: nn.Module, plan: Plan) -> ConvertedLinen:
    """The model in the plan's form: same calls, same numbers, converted parameters.

    Args:
      model: the ``flax.linen`` Module that was planned.
      plan: from :func:`fcconv_jax.make_plan`.

    Returns:
      An object with the model's ``init`` and ``apply`` (same arguments), jitted.

    Raises:
      TypeError: the model is not a linen Module.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.arange(8.0).reshape(2, 4)
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = fc.make_plan(model, x)
      >>> conv = fc.convert_model(model, plan)
      >>> y = conv.apply(fc.convert_params(variables, plan), x)
      >>> bool((y == model.apply(variables, x)).all())
      True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert_model takes a flax.linen Module, got {type(model).__name__}"
        )
    return ConvertedLinen(model, plan)
