"""The forms of a layer as programs, to measure it alone."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

from ..backends.compilation import Program
from ..plan import Form, LayerPlan, other_form
from ..plan.layer_forms import canonical_layer, pair_of_forms


def layer_forms(layer: LayerPlan, dtype: DTypeLike) -> dict[Form, Program]:
    """Return both forms of a layer as programs of input, kernel and bias.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, fcconv_jax as fc
      >>> plan = fc.make_plan(nn.Dense(3), jnp.ones((2, 4)))
      >>> [x.shape for x in layer_forms(plan[""], jnp.float32)["conv"].args]
      [(2, 4), (1, 4, 3), (3,)]
    """
    to = layer.to
    if layer.is_matmul:
        layer = canonical_layer(layer)
    moves = [move for _, move in layer.leaves]
    shape = layer.input_shape if to == "dense" else layer.dense_input_shape()
    x = _abstract(shape, dtype)
    # Without a bias, the forms still take one: None, as layers pass it.
    bias = [] if layer.bias else [None]
    found: dict[Form, Program] = {}
    source = other_form(to)
    for form, function, shapes in zip(
        (source, to),
        pair_of_forms(layer, to),
        ([move.source for move in moves], [move.target for move in moves]),
    ):
        args = (x, *(_abstract(shape, dtype) for shape in shapes), *bias)
        found[form] = Program(function, args)
    return found


def _abstract(shape: Any, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)
