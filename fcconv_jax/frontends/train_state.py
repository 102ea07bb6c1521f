"""A TrainState to the other form and back, with the function that it calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..params.moves import map_leaves
from ..params.opt_state import convert_opt_state
from ..plan import Plan, check_plan
from .convert_model import convert_model

State = TypeVar("State")


def convert_train_state(state: State, plan: Plan, model: nn.Module) -> State:
    """Convert a TrainState to the plan's form, so that training can continue.

    Args:
      state: a ``TrainState`` in the model's original form, or a tree of several, such
        as an agent's dataclass.
      plan: from :func:`fcconv_jax.make_plan`.
      model: the linen Module that was planned.

    Returns:
      The state with converted ``params`` (or variables) and ``opt_state``, and with the
      converted model's ``apply`` as its ``apply_fn``. Copies of the params in its other
      fields (a target network, a running average) are converted, too. See
      :func:`convert_params` and :func:`convert_opt_state`. In a tree, this is done for
      each state whose params convert.

    Raises:
      PlanError: as :func:`convert_params` and :func:`convert_opt_state`.

    Source:
      ``flax.training.train_state.TrainState``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fcconv_jax as fc
      >>> from flax.training.train_state import TrainState
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
    return _map(state, plan, converted.apply)


def restore_train_state(state: State, plan: Plan, model: nn.Module) -> State:
    """Undo :func:`convert_train_state`, bit for bit.

    Args:
      state: a state from :func:`convert_train_state`, which may have been trained
        since.
      plan: the plan that converted it.
      model: the linen Module that was planned.

    Returns:
      The state in the original form, with ``model.apply`` as its ``apply_fn``.

    Raises:
      PlanError: the state does not fit the plan.

    Source:
      ``flax.training.train_state.TrainState``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fcconv_jax as fc
      >>> from flax.training.train_state import TrainState
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
    check_plan(plan)
    return _map(state, plan.inverse(), model.apply)


def is_train_state(tree: PyTree) -> bool:
    """Return whether a tree is a ``TrainState``, or has the same parts."""
    return all(hasattr(tree, name) for name in ("params", "opt_state", "tx", "replace"))


def map_train_states(
    tree: PyTree,
    plan: Plan,
    apply: Callable[[Any], Any],
    strict: bool = True,
    prefix: str | Sequence[str] = (),
) -> PyTree:
    """Return a TrainState, or a tree with several, in the plan's form.

    Args:
      tree: a state, or for example a dataclass of an agent's states.
      plan: the plan.
      apply: returns the ``apply_fn`` of a state that converts, given the old one.
      strict: as :func:`convert_params` takes it.
      prefix: the levels above the params to convert.
    """
    olds, treedef = jax.tree.flatten(tree, is_leaf=is_train_state)
    # Only the optimizer knows which of its leaves follow a parameter.
    bare = [x.replace(opt_state=None) if is_train_state(x) else x for x in olds]
    moved = map_leaves(jax.tree.unflatten(treedef, bare), plan, strict, prefix)

    def joined(old: Any, new: Any) -> Any:
        if not is_train_state(old):
            return new
        leaves = map(jax.tree.leaves, (old.params, new.params))
        # What doesn't move stays the same object: this state is of another model.
        if all(map(operator.is_, *leaves)):
            return new.replace(opt_state=old.opt_state)
        opt_state = convert_opt_state(old.opt_state, plan, tx=old.tx, params=old.params)
        return new.replace(opt_state=opt_state, apply_fn=apply(old.apply_fn))

    news = jax.tree.leaves(moved, is_leaf=is_train_state)
    return jax.tree.unflatten(treedef, list(map(joined, olds, news)))


def has_train_state(tree: PyTree) -> bool:
    """Return whether a tree is a ``TrainState`` or holds one."""
    return any(map(is_train_state, jax.tree.leaves(tree, is_leaf=is_train_state)))


def _map(state: Any, plan: Plan, apply: Callable[..., Any]) -> Any:
    if not has_train_state(state):
        raise PlanError(
            f"Expected a TrainState, or a tree with some, got {type(state).__name__}. "
            "Pass TrainState.create(...), or convert params alone with convert_params."
        )
    return map_train_states(state, plan, lambda _: apply)
