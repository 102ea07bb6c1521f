"""Trees of parameters to the other form: params, variables, optimizer states, specs."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn

from ..errors import PlanError
from ..plan import Plan
from .moves import map_leaves
from .opt_state import convert_opt_state

Tree = TypeVar("Tree")


def convert_params(params: Tree, plan: Plan, *, strict: bool = True) -> Tree:
    """Moves every planned parameter of a tree into the plan's form.

    Entries are moved, never changed: :func:`restore_params` gives back the same bits.
    Works on params with or without the outer ``"params"`` level, full variables,
    ``FrozenDict``, an ``nnx.State`` or a pure dict of it, a ``TrainState`` (its
    optimizer state included; :func:`convert_train_state` sets its ``apply_fn`` too),
    abstract trees of ``ShapeDtypeStruct``, trees of ``PartitionSpec`` or
    ``NamedSharding``, and boxed leaves, whose axis names move along. Everything else in
    the tree is passed through.

    Args:
      params: the tree, in the form that the plan comes from.
      plan: from :func:`fcconv_jax.make_plan`.
      strict: whether a planned leaf that the tree lacks is an error.

    Returns:
      A tree of the same structure. NumPy leaves stay NumPy, without a copy where the
      order of the entries is kept; an array that stands in several places is
      converted once.

    Raises:
      PlanError: a planned leaf is missing, has another shape, or its sharding cannot
        follow; the message names the leaf.

    Source:
      Raschka, *Machine Learning Q and AI* (2024), ch. 12: the same entries in another
      shape.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> plan = fc.make_plan(model, x)
      >>> variables = model.init(jax.random.key(0), x)
      >>> fc.convert_params(variables, plan)["params"]["kernel"].shape
      (1, 4, 3)
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"expected a Plan, got {type(plan).__name__}. Pass what make_plan returns"
        )
    if _is_train_state(params):
        return _convert_train_state(params, plan, strict)
    return map_leaves(params, plan, strict)


def restore_params(params: Tree, plan: Plan, *, strict: bool = True) -> Tree:
    """Undoes :func:`convert_params`, to the bit.

    Args:
      params: what :func:`convert_params` takes, in the form that the plan goes to.
      plan: the plan that converted it.
      strict: as there.

    Returns:
      The same tree in the form that the plan comes from: leaves of the plan in the
      shapes that they had, every other leaf as it is.

    Raises:
      PlanError: as :func:`convert_params`.

    Source:
      As :func:`convert_params`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params, plan = model.init(jax.random.key(0), x), fc.make_plan(model, x)
      >>> conv = fc.convert_params(params, plan)
      >>> back = fc.restore_params(conv, plan)
      >>> conv["params"]["kernel"].shape, back["params"]["kernel"].shape
      ((1, 4, 3), (4, 3))
    """
    return convert_params(params, plan.inverse(), strict=strict)


def _is_train_state(tree: Any) -> bool:
    return all(hasattr(tree, name) for name in ("params", "opt_state", "tx", "replace"))


def _convert_train_state(state: Any, plan: Plan, strict: bool) -> Any:
    known = {}
    if hasattr(state, "apply_fn"):
        known["apply_fn"] = _in_other_form(state.apply_fn)
    return state.replace(
        params=map_leaves(state.params, plan, strict),
        opt_state=convert_opt_state(
            state.opt_state, plan, tx=state.tx, params=state.params
        ),
        **known,
    )


@dataclasses.dataclass(frozen=True)
class _ApplyOfTheOtherForm:
    """Stands for the ``apply_fn`` of a state whose params were converted."""

    apply_fn: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise PlanError(
            "state.apply_fn is the model's own apply, and the state's params are in "
            "the other form. Pass convert_train_state(state, plan, model) the original "
            "state, or state.replace(apply_fn=convert_model(model, plan).apply)"
        )


def _in_other_form(apply_fn: Any) -> Any:
    if isinstance(apply_fn, _ApplyOfTheOtherForm):
        return apply_fn.apply_fn
    of_a_module = isinstance(getattr(apply_fn, "__self__", None), nn.Module)
    return _ApplyOfTheOtherForm(apply_fn) if of_a_module else apply_fn
