"""A TrainState to the other form and back, with the function that it calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import flax.linen as nn
from flax.training.train_state import TrainState
from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..params.move import Parts
from ..params.moves import map_leaves
from ..params.opt_state import convert_opt_state
from ..plan import Plan
from .convert_model import convert_model

State = TypeVar("State", bound=TrainState)


def convert_train_state(state: State, plan: Plan, model: nn.Module) -> State:
    """Convert a TrainState to the plan's form, so that training can continue.

    Args:
      state: with params (or variables) and optimizer state in the form that the plan
        comes from.
      plan: from :func:`fcconv_jax.make_plan`.
      model: the linen Module that was planned.

    Returns:
      The state with its ``params``, every copy of them in its other fields (a target
      network, a running average) and its ``opt_state`` converted, as
      :func:`convert_params` and :func:`convert_opt_state` do, and the ``apply`` of the
      converted model as its ``apply_fn``.

    Raises:
      PlanError: as those two.

    Source:
      ``flax.training.train_state.TrainState``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=optax.adam(1e-3)
      ... )
      >>> conv = fc.convert_train_state(state, fc.make_plan(model, x), model)
      >>> conv.apply_fn({"params": conv.params}, x).shape, conv.params["kernel"].shape
      ((2, 3), (1, 4, 3))
    """
    converted = convert_model(model, plan)  # before the work on the state
    return map_train_state(state, plan).replace(apply_fn=converted.apply)


def restore_train_state(state: State, plan: Plan, model: nn.Module) -> State:
    """Undo :func:`convert_train_state`, bit for bit.

    Args:
      state: in the form that the plan goes to, from :func:`convert_train_state` or
        trained since.
      plan: the plan that converted it.
      model: the linen Module that was planned.

    Returns:
      The state in the form that the plan comes from, with ``model.apply`` as its
      ``apply_fn``.

    Raises:
      PlanError: the state does not fit the plan.

    Source:
      ``flax.training.train_state.TrainState``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=optax.adam(1e-3)
      ... )
      >>> plan = fc.make_plan(model, x)
      >>> conv = fc.convert_train_state(state, plan, model)
      >>> fc.restore_train_state(conv, plan, model).params["kernel"].shape
      (4, 3)
    """
    return map_train_state(state, plan.inverse()).replace(apply_fn=model.apply)


def is_train_state(tree: PyTree) -> bool:
    """Return whether a tree is a ``TrainState``, or has the same parts."""
    return all(hasattr(tree, name) for name in ("params", "opt_state", "tx", "replace"))


def map_train_state(
    state: PyTree, plan: Plan, strict: bool = True, prefixes: Sequence[Parts] = ()
) -> Any:
    """Return a TrainState in the plan's form; its ``apply_fn`` stays."""
    if not is_train_state(state):
        raise PlanError(
            f"Expected a TrainState, got {type(state).__name__}. Pass "
            "TrainState.create(...), or convert params alone with convert_params."
        )
    opt_state = convert_opt_state(
        state.opt_state, plan, tx=state.tx, params=state.params
    )
    # Only the optimizer knows which of its leaves follow a parameter.
    rest = map_leaves(state.replace(opt_state=None), plan, strict, prefixes)
    return rest.replace(opt_state=opt_state)
