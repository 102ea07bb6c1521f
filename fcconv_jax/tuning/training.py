"""The training step of a program: its loss, and the gradients.

The optimizer's update isn't part of it, so no params are donated: gradients
aren't the next params, and each run starts from the same ones. An update is the same
elementwise work on the same entries in every form, donated or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from ..backends.compilation import Program
from ..messages.errors import PlanError

# A scalar from what a model returns.
Loss = Callable[[Any], Any]


def sum_of_squares(outputs: PyTree) -> ArrayLike:
    """Return the sum of the squares of all float outputs.

    Its gradient depends on every output, so no part of the backward pass is dropped.

    Example:
      >>> float(sum_of_squares({"y": jnp.array([1.0, 2.0]), "step": jnp.array(7)}))
      5.0
    """
    return sum(
        jnp.sum(abs(leaf) ** 2) for leaf in jax.tree.leaves(outputs) if _is_float(leaf)
    )


def model_step(program: Program, loss: Loss | None = None) -> Program:
    """Return the training step of a model: value and gradient by its params.

    Raises:
      PlanError: no param is a float.
    """

    def apart(args: PyTree) -> PyTree:
        variables, *rest = args
        return variables["params"], lambda params: (
            {**variables, "params": params},
            *rest,
        )

    return _step(program, apart, loss or sum_of_squares)


def layer_step(program: Program) -> Program:
    """Return the training step of a layer: value and gradient by input and params."""
    return _step(program, lambda args: (args, lambda args: args), sum_of_squares)


def _step(program: Program, apart: Callable[[Any], Any], loss: Loss) -> Program:
    """Return a program of value and gradient.

    Args:
      program: the forward pass.
      apart: takes its arguments; gives the tree to differentiate by, and a function
        that puts such a tree back among the arguments.
      loss: a scalar of what the program returns.
    """
    trained = jax.tree.leaves(apart(program.args)[0])
    if not any(map(_is_float, trained)):
        raise PlanError(
            "Expected float params for a training step, got "
            f"{sorted({str(leaf.dtype) for leaf in trained}) or 'none'}. Pass float "
            'params, or objective="latency".'
        )

    def step(*args: PyTree) -> PyTree:
        tree, back = apart(args)
        leaves, treedef = jax.tree.flatten(tree)
        floats = [leaf for leaf in leaves if _is_float(leaf)]

        def lossed(floats: Any) -> Any:
            given = iter(floats)
            merged = [next(given) if _is_float(leaf) else leaf for leaf in leaves]
            value = loss(program.function(*back(jax.tree.unflatten(treedef, merged))))
            if jnp.shape(value) or not _is_float(value):
                raise PlanError(
                    "Expected a loss that returns a float scalar, got "
                    f"{jax.typeof(value)}. Pass loss=, a function of the model's "
                    "output."
                )
            # `_is_float` lets complex numbers pass, and jax.grad wants a real loss.
            return jnp.real(value)

        return jax.value_and_grad(lossed)(floats)

    return Program(step, program.args)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
