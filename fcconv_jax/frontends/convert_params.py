"""Trees of parameters to the other form: params, variables, optimizer states, specs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..messages.flags import check_flags, check_kind
from ..params.moves import map_leaves
from ..plan import Plan, check_plan
from .bind import frontend_of_instance
from .train_state import has_train_state, map_train_states

Tree = TypeVar("Tree")


def convert_params(
    params: Tree, plan: Plan, *, strict: bool = True, prefix: str | Sequence[str] = ()
) -> Tree:
    """Convert every planned parameter of a tree to the plan's form.

    Entries are rearranged, never changed: :func:`restore_params` returns the same bits.
    The tree may be params with or without the outer ``"params"`` level, full variables,
    a ``FrozenDict``, an ``nnx.State`` or a pure dict of it, an abstract tree of
    ``ShapeDtypeStruct``, or a tree of ``PartitionSpec`` or ``NamedSharding``. In boxed
    leaves, the axis names are converted, too.

    Every copy of the params in the tree is also converted: a target network, a running
    average, both parts of ``optax.LookaheadParams``, moments of an optimizer. A subtree
    is a copy if it has the same leaves with the same shapes; a partial copy is an
    error. Other leaves are returned unchanged. The optimizer state of a ``TrainState``
    is converted by :func:`convert_opt_state`. If the state's ``apply_fn`` is a
    Module's, use :func:`convert_train_state`.

    Args:
      params: the tree, in the model's original form.
      plan: from :func:`fcconv_jax.make_plan`.
      strict: whether a missing planned leaf is an error. If all are missing, it always
        is.
      prefix: path of the params to convert, such as ``"actor/params"``, or several for
        several copies; no other copy is converted. By default, all copies are.

    Returns:
      A tree of the same structure. NumPy leaves stay NumPy, and share memory with the
      original if the order of their entries doesn't change. An array that occurs
      several times is converted once.

    Raises:
      PlanError: a planned leaf is missing, has another shape, or has no equivalent
        sharding; or a subtree resembles the params but differs from them. The message
        names the leaf.

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
    check_flags(strict=strict)
    _refuse_model(params)
    check_kind("prefix=", prefix, (str, Sequence), "levels of the tree", "'actor'")
    if has_train_state(params):
        return map_train_states(params, plan, _checked_apply, strict, prefix)
    return map_leaves(params, plan, strict, prefix)


def restore_params(
    params: Tree, plan: Plan, *, strict: bool = True, prefix: str | Sequence[str] = ()
) -> Tree:
    """Undo :func:`convert_params`, bit for bit.

    Args:
      params: a tree as for :func:`convert_params`, in the converted form.
      plan: the plan that converted it.
      strict: as for :func:`convert_params`.
      prefix: as for :func:`convert_params`.

    Returns:
      The tree in the original form: planned leaves have their original shapes, other
      leaves are unchanged.

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
    check_plan(plan)
    return convert_params(params, plan.inverse(), strict=strict, prefix=prefix)


def _refuse_model(params: PyTree) -> None:
    """Refuse a model in the place of its params.

    An NNX model is a tree, too, but its layers would keep the class of the other form.
    """
    frontend = frontend_of_instance(params)
    if frontend is not None and frontend.params_of:
        raise PlanError(
            f"Expected a tree of params, got the model {type(params).__name__}. Pass "
            f"{frontend.params_of}, or convert it with convert_model(model, plan)."
        )


def _checked_apply(given: Any) -> Any:
    """Refuse the ``apply`` of a model: it fails on params in the other form."""
    apply_fn = given
    while not _is_of_a_model(apply_fn):
        # jax.jit and functools.wraps, functools.partial, a converted model's apply.
        inner = "__wrapped__", "func"
        found = [getattr(apply_fn, name) for name in inner if hasattr(apply_fn, name)]
        if not found:
            return given
        apply_fn = found[0]
    raise PlanError(
        "Expected params, got a TrainState whose apply_fn would fail on params in the "
        "other form. Call convert_train_state(state, plan, model), or "
        "restore_train_state to convert back; they set apply_fn, too."
    )


def _is_of_a_model(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    # A converted linen model is a class of this package, not the library's.
    is_converted = isinstance(getattr(owner, "plan", None), Plan)
    return is_converted or frontend_of_instance(owner) is not None
