"""Optimizer states between the forms: ``convert_opt_state``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..backends.default_settings import default_settings
from ..messages.errors import PlanError
from ..messages.flags import check_flags, check_kind
from ..plan import Plan
from .leaves import flatten_with_path, is_leaf_node
from .move import Move
from .moves import map_leaves, moved, tree_moves
from .opt_probe import ProbeError, different_update, updated_shapes

if TYPE_CHECKING:
    import optax


def convert_opt_state(
    opt_state: PyTree,
    plan: Plan,
    *,
    tx: optax.GradientTransformation,
    params: PyTree,
    check: bool = True,
    probe_kwargs: Mapping[str, PyTree] | None = None,
) -> PyTree:
    """Convert an optax optimizer state to the plan's form.

    Before returning, two updates run in both forms on random gradients, in float64. The
    converted state's updates must be the conversion of the original's. This detects
    optimizers that depend on the rank or shape of a leaf, even if their state doesn't
    show it: a weight decay mask by ``ndim``, ``adaptive_grad_clip``, a partition by
    shape, noise drawn in the shape of a leaf.

    Args:
      opt_state: state that ``tx`` made for ``params`` (arrays or abstract).
      plan: from :func:`fcconv_jax.make_plan`.
      tx: the ``optax.GradientTransformation``; it must act on each entry of a
        parameter separately, as adam, sgd, lion or lamb do.
      params: the params (or their shapes) in the model's original form.
      check: whether to run these updates. Under ``jit``, and for states that are
        abstract or spread over processes, random numbers replace the state; if that
        would take more than 1 GiB, only shapes are compared.
      probe_kwargs: keyword arguments for these updates, if ``tx.update`` requires more
        than ``value`` and ``grad``. A tree like ``params`` is converted for the other
        form.

    Returns:
      The converted state, with which training continues in the other form.

    Raises:
      PlanError: the state doesn't follow the shapes of the params, such as adafactor's
        factored statistics, or its next update would differ; the message names the
        leaf. Or the updates could not run.

    Source:
      ``optax.tree_map_params`` finds the leaves of a state that belong to the params.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax
      >>> import fcconv_jax as fc
      >>> model, x, tx = nn.Dense(3), jnp.ones((2, 4)), optax.adam(1e-3)
      >>> params, plan = model.init(jax.random.key(0), x), fc.make_plan(model, x)
      >>> state = fc.convert_opt_state(tx.init(params), plan, tx=tx, params=params)
      >>> state[0].mu["params"]["kernel"].shape
      (1, 4, 3)
    """
    check_flags(check=check)
    check_optimizer(tx)
    if probe_kwargs is not None:
        wanted = "a dictionary of keywords of tx.update"
        check_kind("probe_kwargs=", probe_kwargs, Mapping, wanted, "{'value': loss}")
    out, move = _moved(opt_state, plan, tx, params, probe_kwargs or {})
    if check:
        try:
            found = different_update(
                tx,
                opt_state,
                params,
                move,
                lambda tree: map_leaves(tree, plan),
                probe_kwargs or {},
            )
        except ProbeError as error:
            raise PlanError(_NOT_RUN.format(str(error).rstrip("."))) from None
        if found:
            raise PlanError(_ANOTHER_UPDATE.format(found))
    return out


def move_opt_state(
    opt_state: PyTree, plan: Plan, tx: optax.GradientTransformation, params: PyTree
) -> PyTree:
    """Convert a state as :func:`convert_opt_state` does, and run no update.

    Raises:
      PlanError: the state does not follow the shape of the parameters.
    """
    return _moved(opt_state, plan, tx, params, {})[0]


def _moved(
    opt_state: PyTree,
    plan: Plan,
    tx: optax.GradientTransformation,
    params: PyTree,
    kwargs: Mapping[str, PyTree],
) -> tuple[Any, Callable[[PyTree], PyTree]]:
    """Return a state in the plan's form, and what moves others of its optimizer."""
    # Shapes alone: no second copy of the params, and none for the state.
    old = jax.eval_shape(lambda tree: tree, params)
    there = map_leaves(old, plan)
    first, wanted = jax.eval_shape(tx.init, old), jax.eval_shape(tx.init, there)
    if jax.tree.structure(opt_state) != jax.tree.structure(first):
        # The state of optax.monitor has no measurements before its first update.
        wanted = updated_shapes(tx, there, kwargs) or wanted
    move = _mover(plan, tx, params)
    try:
        out = move(opt_state)
    except Exception as error:
        # Each optimizer fails in its own way if its state isn't a tree of params.
        found = str(error).partition("\n")[0]
        if not isinstance(error, PlanError):
            found = f"{type(error).__name__}: {found}"
        raise PlanError(_NOT_ENTRYWISE.format(found)) from error
    got_leaves, got_tree = flatten_with_path(out)
    wanted_leaves, wanted_tree = flatten_with_path(wanted)
    if got_tree != wanted_tree:
        here, there = ({path for path, _ in x} for x in (got_leaves, wanted_leaves))
        first = min(here ^ there, default="its structure")
        found = f"{first!r} is in the state of one form alone, as with choices by rank"
        raise PlanError(_NOT_ENTRYWISE.format(found))
    for (path, got), (_, want) in zip(got_leaves, wanted_leaves):
        if np.shape(got) != np.shape(want):
            found = f"expected {path!r} of shape {np.shape(want)}, got {np.shape(got)}"
            raise PlanError(_NOT_ENTRYWISE.format(found))
    return out, move


def _mover(
    plan: Plan, tx: optax.GradientTransformation, params: PyTree
) -> Callable[[PyTree], PyTree]:
    """Return the function that moves states of an optimizer, whatever they hold."""
    import optax

    old = jax.eval_shape(lambda tree: tree, params)
    leaves, treedef = flatten_with_path(old)
    moves = tree_moves(leaves, plan)
    tree = jax.tree.unflatten(
        treedef, [_Opaque(path, moves.get(path)) for path, _ in leaves]
    )

    def move(leaf: Any, how: _Opaque) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # stands for any subtree of params
            return leaf
        # One number for a whole leaf stays, as in novograd and, of shape (1,),
        # scale_by_distance_over_gradients.
        if how.move is None or (
            not is_leaf_node(leaf)
            and np.shape(leaf) in ((), (1,))
            and np.shape(leaf) != how.move.rearrange.source
        ):
            return leaf
        return moved(how.path, leaf, how.move)

    def is_leaf(node: object) -> bool:
        return isinstance(node, optax.MaskedNode) or is_leaf_node(node)

    def followed(state: PyTree) -> PyTree:
        return map_leaves({"params": old, "opt_state": state}, plan)["opt_state"]

    def move_state(state: PyTree) -> PyTree:
        if isinstance(params, optax.LookaheadParams):
            # Its init takes pairs alone, which tree_map_params does not give it.
            return followed(state)
        with default_settings():  # it calls tx.init, which makes arrays
            try:
                return optax.tree_map_params(tx, move, state, tree, is_leaf=is_leaf)
            except PlanError:
                raise
            except Exception:
                # An init that computes with the params takes no placeholders, and a
                # state may have another structure than at first.
                return followed(state)

    return move_state


def check_optimizer(tx: object) -> None:
    """Refuse what isn't an optimizer, such as the function that makes one.

    Raises:
      PlanError: names the type.
    """
    if not callable(getattr(tx, "init", None)):
        raise PlanError(
            f"Expected tx= as an optax.GradientTransformation, got "
            f"{type(tx).__name__}. Pass the optimizer itself: tx=optax.adam(1e-3)."
        )


_NOT_ENTRYWISE = (
    "the optimizer state does not follow its parameters entry by entry: {}. Factored "
    "or matrix-wise statistics (adafactor, shampoo, muon, sm3, lbfgs) mean another "
    "thing in the other form; convert the params and start a fresh tx.init, or keep "
    "training in this form and convert at the end. A state of another optimizer or of "
    "other params looks alike: pass tx= and params= that made it"
)
_ANOTHER_UPDATE = (
    "the optimizer would go on otherwise in the other form: {}. It looks at the rank "
    "or the shape of a leaf, as a mask by ndim, adaptive_grad_clip or noise does: "
    "choose the leaves by name instead, or convert the params and start a fresh "
    "tx.init; check=False converts the state all the same"
)


_NOT_RUN = (
    "the optimizer's update could not be run on random gradients, which shows whether "
    "its updates agree in the other form: {}. Pass the keywords that it requires as "
    "probe_kwargs={{...}}; check=False converts the state without a check"
)


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Keeps a move from being taken for a subtree."""

    path: str
    move: Move | None
