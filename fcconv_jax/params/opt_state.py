"""Optimizer states between the forms: ``convert_opt_state``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..plan import Plan, PlanError
from .leaves import flatten_with_path, is_leaf_node
from .moves import find_moves, map_leaves


def convert_opt_state(opt_state: Any, plan: Plan, *, tx: Any, params: Any) -> Any:
    """Moves an optax optimizer state into the plan's form, moments and all.

    Args:
      opt_state: state that ``tx`` made for ``params`` (arrays or abstract).
      plan: from :func:`fcconv_jax.make_plan`.
      tx: the ``optax.GradientTransformation``; it must act on each entry of a
        parameter by itself, as adam, sgd, lion or lamb do.
      params: the parameters (or their shapes) in the form that the plan comes from.

    Returns:
      The state that continues training in the other form as if nothing had happened.

    Raises:
      PlanError: the state does not follow the shape of the parameters, as with the
        factored statistics of adafactor; the message names the leaf.
    """
    import optax

    old = jax.eval_shape(lambda tree: tree, params)
    moves = find_moves(old, plan, strict=True)
    leaves, treedef = flatten_with_path(old)
    tree = jax.tree.unflatten(treedef, [_Opaque(moves.get(path)) for path, _ in leaves])
    wanted = jax.eval_shape(tx.init, map_leaves(old, plan, strict=True))

    def move(leaf: Any, how: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # stands for any subtree of params
            return leaf
        return how.value(leaf) if how.value else leaf

    def is_leaf(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode) or is_leaf_node(node)

    try:
        moved = optax.tree_map_params(tx, move, opt_state, tree, is_leaf=is_leaf)
    except Exception as error:
        # Each optimizer fails in its own way where its state is no tree of params.
        found = str(error) if isinstance(error, PlanError) else repr(error)
        raise PlanError(_NOT_ENTRYWISE.format(found)) from error
    got_leaves, got_tree = flatten_with_path(moved)
    wanted_leaves, wanted_tree = flatten_with_path(wanted)
    if got_tree != wanted_tree:
        raise PlanError(_NOT_ENTRYWISE.format(f"{got_tree} instead of {wanted_tree}"))
    for (path, got), (_, want) in zip(got_leaves, wanted_leaves):
        if np.shape(got) != np.shape(want):
            found = f"{path!r} has shape {np.shape(got)}, {np.shape(want)} is wanted"
            raise PlanError(_NOT_ENTRYWISE.format(found))
    return moved


_NOT_ENTRYWISE = (
    "the optimizer state does not follow its parameters entry by entry: {}. Factored "
    "or matrix-wise statistics (adafactor, shampoo, muon, sm3, lbfgs) mean another "
    "thing in the other form; convert the params and start a fresh tx.init, or keep "
    "training in this form and convert at the end"
)


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Keeps a value from being taken for a subtree."""

    value: Callable[[Any], Any] | None
