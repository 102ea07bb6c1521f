"""A model's variables, found among the leaves of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..frontends.bound import BoundModel
    from ..params.move import Parts


class Found(NamedTuple):
    """Variables from a checkpoint, in the model's form and, if converted, as read."""

    original: Mapping[str, Any]
    converted: Mapping[str, Any] | None


def load_variables(bound: BoundModel, checkpoint: Path) -> BoundModel:
    """Return the call with the variables in a checkpoint of either form."""
    from ..checkpoints import read_checkpoint

    found = find_variables(read_checkpoint(checkpoint), bound, str(checkpoint))
    return bound.with_variables(found.original)


def find_variables(checkpoint: Checkpoint, bound: BoundModel, file: str) -> Found:
    """Find the variables of a model in a checkpoint's tree.

    All params are required, and all other variables that the call reads, such as the
    statistics of a BatchNorm. What the call does not read may be missing. What the
    checkpoint has and the call does not read is listed on stderr.

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
    from ..params.moves import map_leaves

    wanted = bound.shapes
    if checkpoint.plan is not None:
        wanted = map_leaves(wanted, checkpoint.plan)
    names = [bound.levels(name) for name in bound.stored_paths(wanted)]
    leaves, treedef = jax.tree.flatten(wanted)
    # Params alone need not stand below a level called "params".
    bare = not bound.stores_collections
    if not bare and wanted.keys() == {"params"}:
        bare, names = True, [name[1:] for name in names]
    params = len(jax.tree.leaves(wanted["params"]))
    found = {
        bound.levels("/".join(path)): leaf
        for path, leaf in checkpoint_leaves(checkpoint).items()
    }
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
                # The call doesn't read it, so any values do.
                abstract = isinstance(own, jax.ShapeDtypeStruct)
                value = np.zeros(leaf.shape, leaf.dtype) if abstract else own
            elif value is None:
                raise CheckpointError(
                    f"{other}expected the leaf {text!r} of shape {leaf.shape}, got "
                    f"{['/'.join(p) for p in found][:5]}, ... Pass a checkpoint of "
                    "this model."
                )
            else:
                raise CheckpointError(
                    f"{other}expected the leaf {text!r} of shape {leaf.shape}, got "
                    f"{shape}. Pass a checkpoint of this model."
                )
        values.append(value)
    top = prefix if bare else (*prefix, "params")
    unread = {prefix + name for name, read in zip(names, bound.reads) if not read}
    more = found.keys() - {prefix + name for name in names}
    for path in sorted(more):
        if path[: len(top)] == top and _is_param(path[len(prefix) :], names, bound):
            raise CheckpointError(
                f"{other}it has the leaf {'/'.join(path)!r}, which the model lacks. "
                "Pass the model of these params."
            )
    _list_unread(file, found, found.keys() & (unread | more))
    variables = jax.tree.unflatten(treedef, values)
    if checkpoint.plan is None:
        return Found(variables, None)
    return Found(map_leaves(variables, checkpoint.plan.inverse()), variables)


def _is_param(path: Parts, names: Collection[Parts], bound: BoundModel) -> bool:
    """Return whether a leaf below a model's params is a param that the model lacks.

    NNX keeps other variables there, too, such as values that a module has sown. These
    stand beside the params of a module that the model has.
    """
    if not bound.mixes_variables or path[-1] in (
        "kernel",
        "bias",
        "scale",
        "embedding",
    ):
        return True
    return all(path[:-1] != name[:-1] for name in names)


def _list_unread(file: str, paths: Iterable[Parts], unread: Collection[Parts]) -> None:
    """List the leaves of a checkpoint that a call does not read, by level."""
    read = {p[:n] for p in paths if p not in unread for n in range(len(p) + 1)}
    groups: Counter[str] = Counter()
    for path in sorted(unread):
        # The outermost level of which nothing is read stands for all below it.
        above = next(n for n in range(1, len(path) + 1) if path[:n] not in read)
        groups["/".join(path[:above])] += 1
    shown = [f"{name} ({n} leaves)" if n > 1 else name for name, n in groups.items()]
    if len(shown) > 8:
        shown = [*shown[:8], f"and {len(shown) - 8} more"]
    if shown:
        typer.echo(
            f"note: the call doesn't use these leaves of {file}: {', '.join(shown)}",
            err=True,
        )


def checkpoint_leaves(checkpoint: Checkpoint) -> dict[tuple[str, ...], Any]:
    """Return the leaves of a checkpoint by path, without the boxes around some."""
    from ..checkpoints.checkpoint import iter_leaves
    from ..checkpoints.formats import FORMATS
    from ..plan.paths import BOXES

    leaves = {}
    for path, leaf in iter_leaves(checkpoint.tree):
        if FORMATS[checkpoint.format].flat:
            path = split_key(path[0], checkpoint.tree)
        boxed = len(path) > 1 and path[-1] in BOXES
        leaves[path[:-1] if boxed else path] = leaf
    return leaves


def split_key(key: str, keys: Any) -> tuple[str, ...]:
    """Return the levels in a safetensors key, by the separator of its file's keys."""
    from ..checkpoints.nesting import key_separator

    return tuple(key.split(key_separator(list(keys))))
