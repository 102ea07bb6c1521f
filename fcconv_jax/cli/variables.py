"""A model's variables, found among the leaves of a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..params.variables import is_nnx_module

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from .steps import ModelCall


def abstract_variables(call: ModelCall) -> Any:
    """A model's variables as shapes and dtypes, without computing any."""
    import flax.linen as nn
    import jax

    if not isinstance(call.model, nn.Module):
        return jax.eval_shape(lambda: random_variables(call, (), 0))
    init = functools.partial(call.model.init, **call.options)
    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), *call.specs))


def random_variables(call: ModelCall, arrays: Sequence[Any], seed: int) -> Any:
    """A model's variables: a linen Module's at random, else those that it came with."""
    import flax.linen as nn
    import jax

    from ..frontends.kinds import frontend_of

    if isinstance(call.model, nn.Module):
        return call.model.init(jax.random.key(seed), *arrays, **call.options)
    return frontend_of(call.model, "fcconv").variables(call.model, call.params)


def as_params(model: Any, variables: Any) -> Any:
    """Variables as ``verify`` takes them for a model of that kind."""
    import flax.linen as nn

    if variables is None or isinstance(model, nn.Module):
        return variables
    params = variables["params"]
    if not is_nnx_module(model):
        return params
    from flax import nnx

    return nnx.restore_int_paths(params)


def checkpoint_params(call: ModelCall, checkpoint: Path) -> Any:
    """The params in a checkpoint of either form, as the original model takes them."""
    from ..checkpoints import read_checkpoint
    from ..params.trees import convert_params, restore_params

    saved = read_checkpoint(checkpoint)
    wanted = abstract_variables(call)
    if saved.plan is None:
        found = find_variables(saved, wanted, str(checkpoint))
    else:
        wanted = convert_params(wanted, saved.plan)
        found = find_variables(saved, wanted, str(checkpoint))
        found = restore_params(found, saved.plan)
    return as_params(call.model, found)


def find_variables(checkpoint: Checkpoint, wanted: Any, file: str) -> dict[str, Any]:
    """The model's variables, found in a checkpoint's tree.

    Args:
      checkpoint: as read; its params may lie below other levels (``params``,
        ``model/params``), beside an optimizer state.
      wanted: variables with the shapes that the model has.
      file: the checkpoint's name, for errors.

    Raises:
      CheckpointError: it is of another model: a leaf is missing, has another shape, or
        is one that the model lacks; the message names it.
    """
    from ..errors import CheckpointError

    want = dict(_leaves(wanted))
    collections = {path[0] for path in want}
    # Params alone need not stand below a level called "params".
    bare = collections == {"params"}
    inner = {path[1:] if bare else path: leaf for path, leaf in want.items()}
    found = checkpoint_leaves(checkpoint)
    prefix = _prefix(list(inner), list(found))
    other = f"{file} is not a checkpoint of this model: "
    variables: dict[str, Any] = {}
    for path, leaf in inner.items():
        name = "/".join(prefix + path)
        if prefix + path not in found:
            raise CheckpointError(
                f"{other}it has no leaf {name!r}, the model has one of shape "
                f"{leaf.shape}; it has {['/'.join(p) for p in found][:5]}"
            )
        value = found[prefix + path]
        if getattr(value, "shape", None) != leaf.shape:
            raise CheckpointError(
                f"{other}leaf {name!r} has shape {getattr(value, 'shape', None)}, the "
                f"model's has {leaf.shape}"
            )
        node = variables
        *levels, last = ("params", *path) if bare else path
        for level in levels:
            node = node.setdefault(level, {})
        node[last] = value
    params = prefix if bare else (*prefix, "params")
    for path in found:
        if path[: len(params)] == params and path[len(prefix) :] not in inner:
            raise CheckpointError(
                f"{other}it has the leaf {'/'.join(path)!r}, which the model lacks"
            )
    return variables


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
    from ..checkpoints.formats import key_separator

    return tuple(key.split(key_separator(list(keys))))


def _leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(tuple(str(key.key) for key in path), leaf) for path, leaf in leaves]


def _prefix(
    wanted: Sequence[tuple[str, ...]], found: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
    """The levels above the variables: where most of them are, and the shallowest."""
    known, hits = set(wanted), {}
    for path in found:
        for end in range(len(path)):
            if path[end:] in known:
                hits[path[:end]] = hits.get(path[:end], 0) + 1
    ranks = {
        prefix: (-count, bool(prefix) and prefix[-1] != "params", len(prefix))
        for prefix, count in hits.items()
    }
    return min(hits, key=ranks.__getitem__, default=())
