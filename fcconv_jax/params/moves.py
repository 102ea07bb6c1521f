"""Which leaves of a tree a plan moves, and how."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ..errors import PlanError
from ..kernels import Rearrangement
from ..meshes import over_mesh
from ..plan import Plan
from .leaves import convert_leaf, flatten_with_path


@dataclasses.dataclass(frozen=True)
class Move:
    """How one leaf of a tree moves."""

    path: str
    rearrange: Rearrangement
    stack_axes: tuple[int, ...]
    to_grouped_conv: bool = False

    def __call__(self, leaf: Any) -> Any:
        """The leaf in the other form; a PlanError names it where it cannot go."""
        if self.to_grouped_conv and over_mesh(leaf):
            raise PlanError(
                f"leaf {self.path!r} is sharded as {getattr(leaf, 'sharding', leaf)}, "
                "and its layer becomes a grouped convolution, which XLA partitions "
                "wrongly: leave the layer out with a rule, or convert it on one device"
            )
        try:
            return convert_leaf(self.rearrange, leaf, self.stack_axes)
        except ValueError as error:
            raise PlanError(
                f"leaf {self.path!r}: {error}. {self._hint(leaf)}"
            ) from None

    def _hint(self, leaf: Any) -> str:
        """What a leaf of another shape probably is."""
        shape = list(getattr(leaf, "shape", ()))
        if len(shape) == len(self.rearrange.target) + len(self.stack_axes):
            for axis in reversed(self.stack_axes):
                del shape[axis]
        if tuple(shape) == self.rearrange.target:
            return (
                "It has the shape that it would get: it is in this form already, "
                "converted before or never. Pass the tree in the other form"
            )
        return (
            "The plan is of another model, or of inputs of another size: make it with "
            "the model and the inputs of these params"
        )


def find_moves(tree: Any, plan: Plan, strict: bool) -> Mapping[str, Move]:
    """How each planned leaf of the tree moves, by its path in the tree."""
    found = [path for path, _ in flatten_with_path(tree)[0]]
    wanted = {
        "/".join(part for part in (path, name) if part): (
            leaf,
            layer.stack_axes,
            layer.groups > 1 and layer.to == "conv",
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
    moves = {paths[key]: Move(paths[key], *how) for key, how in wanted.items()}
    # Axis names beside the params, by flax.linen.partitioning.param_with_axes.
    for key, how in wanted.items():
        names = f"params_axes/{key}_axes"
        moves[names] = Move(names, *how)
    return moves


def _prefix(wanted: Mapping[str, Any], found: Sequence[str]) -> str:
    """The outer level to look under: none, or the collection ``params``."""
    if any(key in wanted for key in found):
        return ""
    inner = any(
        f"{path}/".removeprefix("params/").rstrip("/") in wanted for path in found
    )
    return "params/" if inner else ""


def map_leaves(tree: Any, plan: Plan, strict: bool) -> Any:
    """The tree with each planned leaf moved; an array held twice is moved once."""
    moves = find_moves(tree, plan, strict)
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
