"""A model's variables, found among the leaves of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..frontends.bound import BoundModel


class Found(NamedTuple):
    """Variables from a checkpoint, in the model's form and, if converted, as read."""

    original: Mapping[str, Any]
    converted: Mapping[str, Any] | None


def load_variables(bound: BoundModel, checkpoint: Path) -> BoundModel:
    """The call with the variables in a checkpoint of either form."""
    from ..checkpoints import read_checkpoint

    found = find_variables(read_checkpoint(checkpoint), bound, str(checkpoint))
    return bound.with_variables(found.original)


def find_variables(checkpoint: Checkpoint, bound: BoundModel, file: str) -> Found:
    """The variables of a model, found in a checkpoint's tree.

    All params are required, and all other variables that the call reads, such as the
    statistics of a BatchNorm. What the call does not read may be missing.

    Args:
      checkpoint: as read; the variables may lie below other levels (``params``,
        ``model/params``), beside an optimizer state.
      bound: the model, on inputs that may be abstract.
      file: the checkpoint's name, for errors.

    Raises:
      CheckpointError: it is of another model: a leaf is missing, has another shape, or
        is one that the model lacks; the message names it.
    """
    import jax
    import numpy as np

    from ..messages.errors import CheckpointError
    from ..params.matching import ranked_prefixes
    from ..params.trees import convert_params, restore_params

    wanted = bound.shapes
    if checkpoint.plan is not None:
        wanted = convert_params(wanted, checkpoint.plan)
    names = [tuple(name.split("/")) for name in bound.stored_paths(wanted)]
    leaves, treedef = jax.tree.flatten(wanted)
    # Params alone need not stand below a level called "params".
    bare = not bound.stores_collections
    if not bare and wanted.keys() == {"params"}:
        bare, names = True, [name[1:] for name in names]
    params = len(jax.tree.leaves(wanted["params"]))
    found = checkpoint_leaves(checkpoint)
    prefixes, _ = ranked_prefixes(set(names), found)
    prefix = prefixes[0] if prefixes else ()
    other = f"{file} is not a checkpoint of this model: "
    values = []
    for number, (name, leaf) in enumerate(zip(names, leaves)):
        text = "/".join(prefix + name)
        value = found.get(prefix + name)
        shape = getattr(value, "shape", None)
        if shape != leaf.shape:
            is_param = name[0] == "params" if not bare else number < params
            if not is_param and not bound.reads[number]:
                own = jax.tree.leaves(bound.variables)[number]
                abstract = isinstance(own, jax.ShapeDtypeStruct)
                value = np.zeros(leaf.shape, leaf.dtype) if abstract else own
            elif value is None:
                raise CheckpointError(
                    f"{other}it has no leaf {text!r}, the model has one of shape "
                    f"{leaf.shape}; it has {['/'.join(p) for p in found][:5]}"
                )
            else:
                raise CheckpointError(
                    f"{other}leaf {text!r} has shape {shape}, the model's has "
                    f"{leaf.shape}"
                )
        values.append(value)
    known = set(names)
    top = prefix if bare else (*prefix, "params")
    for path in found:
        if path[: len(top)] == top and path[len(prefix) :] not in known:
            raise CheckpointError(
                f"{other}it has the leaf {'/'.join(path)!r}, which the model lacks"
            )
    variables = jax.tree.unflatten(treedef, values)
    if checkpoint.plan is None:
        return Found(variables, None)
    return Found(restore_params(variables, checkpoint.plan), variables)


def checkpoint_leaves(checkpoint: Checkpoint) -> dict[tuple[str, ...], Any]:
    """The leaves of a checkpoint by path, out of the boxes that some sit in."""
    from ..checkpoints.checkpoint import iter_leaves

    leaves = {}
    for path, leaf in iter_leaves(checkpoint.tree):
        if checkpoint.format == "safetensors":
            path = split_key(path[0], checkpoint.tree)
        boxed = len(path) > 1 and path[-1] in ("value", "raw_value")
        leaves[path[:-1] if boxed else path] = leaf
    return leaves


def split_key(key: str, keys: Any) -> tuple[str, ...]:
    """The levels in a safetensors key, as the keys of its file are separated."""
    from ..checkpoints.nesting import key_separator

    return tuple(key.split(key_separator(list(keys))))
