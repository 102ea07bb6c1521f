"""Gradients and one optimizer step of a model in both forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from ..frontends.bound import BothForms
from ..params.moves import map_leaves
from ..params.opt_state import move_opt_state
from .gradients import random_projection

if TYPE_CHECKING:
    import optax


class TrainingStep:
    """Both forms' gradients, and the params after one step from given gradients.

    The step is taken from the same gradients in both forms: whether they are the same
    has been compared before, and adam would blow up what is nothing but rounding in
    a gradient that is zero. All come out in the form of the original.
    """

    def __init__(self, pair: BothForms, tx: optax.GradientTransformation | None):
        import optax

        plan, params = pair.plan, pair.variables["params"]
        # Momentum, so that there is a state to convert.
        tx = optax.sgd(1e-2, momentum=0.9) if tx is None else tx
        self.state = jax.jit(tx.init)(params)
        # The step itself is compared, so no updates need to be run beforehand.
        self.other_state = move_opt_state(self.state, plan, tx, params)

        def stepped(params: PyTree, state: PyTree, gradients: PyTree) -> PyTree:
            updates, _ = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates)

        # Both return params in the original's form, so that leaves compare one by one.
        def converted_step(params: PyTree, state: PyTree, gradients: PyTree) -> PyTree:
            after = stepped(params, state, map_leaves(gradients, plan))
            return map_leaves(after, plan.inverse())

        def gradients(variables: PyTree, arrays: PyTree) -> PyTree:
            return gradient(pair.original.call, variables, arrays)

        def converted_gradients(variables: PyTree, arrays: PyTree) -> PyTree:
            found = gradient(pair.changed.call, variables, arrays)
            return map_leaves(found, plan.inverse())

        self.gradients: tuple[Callable[..., Any], Callable[..., Any]]
        self.gradients = gradients, converted_gradients
        self.steps = stepped, converted_step


def gradient(call: Callable[..., Any], variables: PyTree, arrays: PyTree) -> PyTree:
    """Gradient of a fixed random projection of the float outputs."""

    def loss(params: PyTree) -> ArrayLike:
        out = call({**variables, "params": params}, arrays)
        return random_projection(out)

    return jax.grad(loss)(variables["params"])


def has_gradients(params: PyTree) -> bool:
    """Return whether all params are floats."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    return all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
