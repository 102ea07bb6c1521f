"""Trees of parameters to the other form: params, variables, optimizer states, specs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax.core import meta
from flax.linen.partitioning import AxisMetadata as AxisNames
from jax.core import Tracer
from jax.sharding import PartitionSpec, Sharding

from ..kernels import Rearrangement
from ..meshes import over_mesh
from ..plan import Plan, PlanError
from .axis_names import move_names, move_sharding
from .variables import is_variable

Tree = TypeVar("Tree")


def convert_params(params: Tree, plan: Plan, *, strict: bool = True) -> Tree:
    """Moves every planned parameter of a tree into the plan's form.

    Entries are moved, never changed: :func:`restore_params` gives back the same bits.
    Works on params with or without the outer ``"params"`` level, full variables,
    ``FrozenDict``, an ``nnx.State`` or a pure dict of it, a ``TrainState`` (its
    optimizer state included), abstract trees of ``ShapeDtypeStruct``, trees of
    ``PartitionSpec`` or ``NamedSharding``, and boxed leaves, whose axis
    names move along. Everything else in the tree is passed through.

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

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> plan = fc.make_plan(model, x)
      >>> variables = model.init(jax.random.key(0), x)
      >>> fc.convert_params(variables, plan)["params"]["kernel"].shape
      (1, 4, 3)
    """
    if _is_train_state(params):
        return _convert_train_state(params, plan, strict)
    return _map_leaves(params, plan, strict)


def restore_params(params: Tree, plan: Plan, *, strict: bool = True) -> Tree:
    """Undoes :func:`convert_params`, to the bit.

    Same arguments, with the tree in the form that the plan goes to.
    """
    return convert_params(params, plan.inverse(), strict=strict)


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
    moves = _moves(old, plan, strict=True)
    leaves, treedef = flatten_with_path(old)
    tree = jax.tree.unflatten(treedef, [_Opaque(moves.get(path)) for path, _ in leaves])
    wanted = jax.eval_shape(tx.init, _map_leaves(old, plan, strict=True))

    def move(leaf: Any, how: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # stands for any subtree of params
            return leaf
        return how.value(leaf) if how.value else leaf

    def is_leaf(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode) or _is_leaf(node)

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


def convert_leaf(rearrange: Rearrangement, leaf: Any, stack_axes: Sequence[int] = ()):
    """Rearranges one leaf: an array, an abstract array, a box, or a sharding.

    Args:
      rearrange: how the entries of one layer move.
      leaf: array-like of shape ``rearrange.source``, with the stack axes added.
      stack_axes: axes that lifted transforms added, innermost first.

    Raises:
      ValueError: the shape does not fit, or the names of two axes would have to merge.
    """
    if is_variable(leaf):
        value = convert_leaf(rearrange, leaf.get_raw_value(), stack_axes)
        return leaf.replace(value, **move_metadata(rearrange, leaf, stack_axes))
    if isinstance(leaf, meta.AxisMetadata):
        boxed: Any = leaf
        if hasattr(boxed, "names"):
            names = move_names(rearrange, boxed.names, stack_axes)
            boxed = boxed.replace(names=names)
        inner = convert_leaf(rearrange, boxed.value, stack_axes)
        return boxed.replace(value=inner)
    if isinstance(leaf, PartitionSpec):
        return PartitionSpec(*move_names(rearrange, tuple(leaf), stack_axes))
    if isinstance(leaf, AxisNames):
        names: Any = leaf.names
        moved = PartitionSpec(*move_names(rearrange, tuple(names), stack_axes))
        return leaf.replace(names=moved)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(leaf, Sharding):
        return move_sharding(rearrange, leaf, stack_axes)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        out = jax.eval_shape(
            lambda a: _on_stack(rearrange, a, stack_axes),
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type),
        )
        if leaf.sharding is None:
            return out
        return out.update(sharding=convert_leaf(rearrange, leaf.sharding, stack_axes))
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if concrete and over_mesh(leaf):
        # Left to itself, XLA may gather what it reshapes.
        there = move_sharding(rearrange, leaf.sharding, stack_axes)
        move = jax.jit(_on_stack, static_argnums=(0, 2), out_shardings=there)
        return move(rearrange, leaf, tuple(stack_axes))
    return _on_stack(rearrange, leaf, stack_axes)


def move_metadata(
    rearrange: Rearrangement, variable: Any, stack_axes: Sequence[int] = ()
) -> dict[str, Any]:
    """What changes in the metadata of an ``nnx.Variable`` when its entries move.

    Raises:
      ValueError: the names of two axes would have to merge.
    """
    names = variable.get_metadata("out_sharding", None)
    if not names:
        return {}
    moved = move_names(rearrange, tuple(names), stack_axes)
    spec = isinstance(names, PartitionSpec)
    return {"out_sharding": PartitionSpec(*moved) if spec else moved}


def check_converted(shapes: Mapping[str, Sequence[int]], plan: Plan) -> None:
    """Refuses params that are still in the form that the plan comes from.

    Args:
      shapes: path and shape of each parameter.
      plan: the plan that the params should have gone through.

    Raises:
      PlanError: names the first that is not converted.
    """
    for path, layer in plan.items():
        key = "/".join(part for part in (path, layer.leaves[0][0]) if part)
        shape = list(shapes.get(key, ()))
        if len(shape) != len(layer.kernel.source) + len(layer.stack_axes):
            continue
        for axis in reversed(layer.stack_axes):
            del shape[axis]
        if tuple(shape) == layer.kernel.source != layer.kernel.target:
            raise PlanError(
                f"params {key!r} have shape {tuple(shapes[key])}: they are not "
                "converted yet; pass convert_params(params, plan)"
            )


def leaf_path(path: Sequence[Any]) -> str:
    """A key path as text: ``"params/encoder/kernel"``."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
    )


def flatten_with_path(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves with their paths as text, and the structure; boxes count as leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return [(leaf_path(path), leaf) for path, leaf in leaves], treedef


@dataclasses.dataclass(frozen=True)
class _Move:
    """How one leaf of a tree moves."""

    path: str
    rearrange: Rearrangement
    stack_axes: tuple[int, ...]
    to_grouped_conv: bool = False

    def __call__(self, leaf: Any) -> Any:
        if self.to_grouped_conv and over_mesh(leaf):
            raise PlanError(
                f"leaf {self.path!r} is sharded as {getattr(leaf, 'sharding', leaf)}, "
                "and its layer becomes a grouped convolution, which XLA partitions "
                "wrongly: leave the layer out with a rule, or convert it on one device"
            )
        try:
            return convert_leaf(self.rearrange, leaf, self.stack_axes)
        except ValueError as error:
            ndim = len(self.rearrange.target) + len(self.stack_axes)
            done = len(getattr(leaf, "shape", ())) == ndim
            hint = "; it may be converted already" if done else ""
            raise PlanError(f"leaf {self.path!r}: {error}{hint}") from None


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Keeps a value from being taken for a subtree."""

    value: Callable[[Any], Any] | None


def _is_leaf(node: Any) -> bool:
    boxes = meta.AxisMetadata | AxisNames | PartitionSpec | Sharding
    return isinstance(node, boxes) or is_variable(node)


def _moves(tree: Any, plan: Plan, strict: bool) -> Mapping[str, _Move]:
    """How each planned leaf of the tree moves, by its path in the tree."""
    found = [path for path, _ in flatten_with_path(tree)[0]]
    wanted = {
        "/".join(part for part in (path, name) if part): (
            leaf,
            layer.stack_axes,
            layer.groups > 1 and plan.to == "conv",
        )
        for path, layer in plan.items()
        for name, leaf in layer.leaves
    }
    prefix = _prefix(wanted, found)
    tied = {
        "/".join(part for part in (path, name) if part)
        for path, layer in plan.items()
        for name in layer.tied
    }
    # A parameter that is the whole tree has no name of its own.
    paths = {key: (prefix + key).rstrip("/") for key in wanted}
    present = set(found)
    missing = [
        path for key, path in paths.items() if path not in present and key not in tied
    ]
    if missing and strict:
        close = difflib.get_close_matches(missing[0], found, n=3, cutoff=0.4)
        more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise PlanError(
            f"the tree lacks {missing[0]!r}, which the plan converts{more}; close to "
            f"it: {close or found[:5]}. Pass the tree that the model was planned with, "
            "or strict=False to convert what is there"
        )
    moves = {paths[key]: _Move(paths[key], *how) for key, how in wanted.items()}
    # Axis names beside the params, by flax.linen.partitioning.param_with_axes.
    for key, how in wanted.items():
        names = f"params_axes/{key}_axes"
        moves[names] = _Move(names, *how)
    return moves


def _prefix(wanted: Mapping[str, Any], found: Sequence[str]) -> str:
    """The outer level to look under: none, or the collection ``params``."""
    if any(key in wanted for key in found):
        return ""
    inner = any(
        f"{path}/".removeprefix("params/").rstrip("/") in wanted for path in found
    )
    return "params/" if inner else ""


def _map_leaves(tree: Any, plan: Plan, strict: bool) -> Any:
    moves = _moves(tree, plan, strict)
    leaves, treedef = flatten_with_path(tree)
    tied: dict[Any, Any] = {}
    out = []
    for path, leaf in leaves:
        if path in moves:
            key = (id(leaf), moves[path].rearrange, moves[path].stack_axes)
            if key not in tied:
                tied[key] = moves[path](leaf)
            leaf = tied[key]
        out.append(leaf)
    return jax.tree.unflatten(treedef, out)


def _on_stack(rearrange: Rearrangement, array: Any, stack_axes: Sequence[int]) -> Any:
    """Applies the rearrangement below the axes that lifted transforms added."""
    if not stack_axes:
        return rearrange(array)
    source = list(range(len(rearrange.source)))
    target = list(range(len(rearrange.target)))
    for label, axis in enumerate(stack_axes):
        for axes in (source, target):
            axes.insert(axis if axis >= 0 else axis + len(axes) + 1, -1 - label)
    if array.ndim != len(source):
        raise ValueError(
            f"expected {len(source)} axes (a stack of {rearrange.source}), got shape "
            f"{tuple(array.shape)}"
        )
    n = len(stack_axes)
    lead = tuple(array.shape[source.index(-1 - label)] for label in range(n))
    to_front = [source.index(-1 - label) for label in range(n)]
    to_front += [source.index(i) for i in range(len(rearrange.source))]
    back = [n + label if label >= 0 else -1 - label for label in target]
    stacked = rearrange.stacked(lead)
    return stacked(array.transpose(to_front)).transpose(back)


def _is_train_state(tree: Any) -> bool:
    return all(hasattr(tree, name) for name in ("params", "opt_state", "tx", "replace"))


def _convert_train_state(state: Any, plan: Plan, strict: bool) -> Any:
    return state.replace(
        params=_map_leaves(state.params, plan, strict),
        opt_state=convert_opt_state(
            state.opt_state, plan, tx=state.tx, params=state.params
        ),
    )
