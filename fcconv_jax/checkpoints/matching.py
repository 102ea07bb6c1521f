"""Which leaves of a checkpoint a plan moves, found by path and shape alone."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from ..kernels import Rearrangement
from ..params.leaves import convert_leaf
from ..plan import Plan
from .checkpoint import CheckpointError, Format, Parts
from .formats import key_separator

Shape = tuple[int, ...]

# What holds the array of a boxed parameter (nn.Partitioned, nnx.Variable).
_BOX = {"value", "raw_value"}


@dataclasses.dataclass(frozen=True)
class Move:
    """How one leaf moves: a rearrangement below the axes of a scanned stack."""

    rearrange: Rearrangement
    stack_axes: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every entry where it is, as for most biases."""
        return self.rearrange.is_reshape and (
            self.rearrange.source == self.rearrange.target
        )

    def __call__(self, leaf: Any) -> Any:
        """Moves the entries of the leaf."""
        return convert_leaf(self.rearrange, leaf, self.stack_axes)


def leaf_name(parts: Parts) -> str:
    """A leaf's path as text; a safetensors key is one part and stays as it is."""
    return "/".join(parts)


def find_moves(
    shapes: Mapping[Parts, Shape | None], plan: Plan, format: Format, file: str
) -> dict[Parts, Move]:
    """The leaves that a plan moves, and how.

    A planned parameter is looked for under one common prefix: none, ``params``, or
    whatever level the checkpoint puts above it. Outside of that prefix, a leaf whose
    path ends in the parameter's path is a mirror of it (a moment of an optimizer, a
    running average): it moves along when it has the parameter's shape, stays when it
    is a scalar, and is refused otherwise.

    Args:
      shapes: shape of each leaf by its path in the tree; None where it is no array.
      plan: what to move.
      format: of the checkpoint; the keys of a safetensors file are split at ``/``,
        or at ``.`` where no key has a ``/``.
      file: the file, for errors.

    Raises:
      CheckpointError: a planned leaf is missing, has another shape, or is mirrored by
        one of another shape, or the prefix is ambiguous.
    """
    flat = format == "safetensors"
    separator = key_separator([parts[0] for parts in shapes]) if flat else "/"
    wanted = {
        tuple(re.split("[/.]" if separator == "." else "/", path)): Move(
            rearrange, layer.stack_axes
        )
        for key, layer in plan.items()
        for name, rearrange in layer.leaves
        for path in ["/".join(part for part in (key, name) if part)]
    }
    found: dict[Parts, Parts] = {}
    for parts in shapes:
        split = tuple(parts[0].split(separator)) if flat else parts
        found[split[:-1] if split[-1:] and split[-1] in _BOX else split] = parts
    if not wanted:
        return {}
    prefix = _prefix(list(wanted), found, file)
    while all(path[0] == "params" and len(path) > 1 for path in wanted):
        prefix = (*prefix, "params")
        wanted = {path[1:]: move for path, move in wanted.items()}
    moves = {}
    for path, move in wanted.items():
        parts = found[prefix + path]
        moves[parts] = _checked(move, leaf_name(parts), shapes[parts], file)
    inner = {path[len(prefix) :] for path in found if path[: len(prefix)] == prefix}
    for path, parts in found.items():
        if path[: len(prefix)] == prefix:
            continue
        owner, exact = _owner(path, inner, wanted)
        shape = shapes[parts]
        if owner is None or not shape:
            continue
        original = found[prefix + owner]
        if not exact or shape != shapes[original]:
            raise CheckpointError(
                f"{file}: leaf {leaf_name(parts)!r} of shape {shape} belongs to "
                f"{leaf_name(original)!r} of shape {shapes[original]}, which the plan "
                "converts, but does not follow it entry by entry, as with the factored "
                "statistics of adafactor; save the params alone, convert those, and "
                "start a fresh tx.init"
            )
        moves[parts] = wanted[owner]
    return moves


def _prefix(wanted: list[Parts], found: Mapping[Parts, Parts], file: str) -> Parts:
    """The levels above the planned parameters."""
    hits: dict[Parts, int] = {}
    for path in found:
        for want in wanted:
            if path[len(path) - len(want) :] == want:
                prefix = path[: len(path) - len(want)]
                hits[prefix] = hits.get(prefix, 0) + 1
    # The shallowest prefix first; one that ends in "params" before any other.
    ranks = {
        prefix: (-count, bool(prefix) and prefix[-1] != "params", len(prefix))
        for prefix, count in hits.items()
    }
    order = sorted(hits, key=ranks.__getitem__)
    best = (
        order[0]
        if order
        else ("params",)
        if any(p[0] == "params" for p in found)
        else ()
    )
    missing = [want for want in wanted if best + want not in found]
    if missing:
        name = leaf_name(best + missing[0])
        names = [leaf_name(path) for path in found]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{file}: no leaf {name!r}, which the plan converts{more}; close to it: "
            f"{close or names[:5]}. Use the plan of the model that was saved here"
        )
    if len(order) > 1 and ranks[order[0]] == ranks[order[1]]:
        raise CheckpointError(
            f"{file}: the plan fits under {leaf_name(order[0])!r} and under "
            f"{leaf_name(order[1])!r}; save the one you mean as a checkpoint of its own"
        )
    return best


def _owner(
    path: Parts, inner: set[Parts], wanted: Mapping[Parts, Move]
) -> tuple[Parts | None, bool]:
    """The planned parameter that a leaf outside of the params belongs to.

    Also whether the leaf stands in the parameter's place, not somewhere below it. The
    longest ending that is a parameter's path counts, so that ``mu/block/fc/kernel``
    belongs to ``block/fc/kernel`` and not to ``fc/kernel``.
    """
    for end in range(len(path), 0, -1):
        for start in range(end):
            if path[start:end] in inner:
                owner = path[start:end]
                return (owner if owner in wanted else None), end == len(path)
    return None, True


def _checked(move: Move, name: str, shape: Shape | None, file: str) -> Move:
    source = move.rearrange.source
    if shape is None:
        raise CheckpointError(
            f"{file}: leaf {name!r} is no array, but the plan converts it from shape "
            f"{source}"
        )
    n = len(move.stack_axes)
    inner = list(shape)
    if len(shape) == len(source) + n:
        for axis in reversed(move.stack_axes):
            inner.pop(axis)
    if tuple(inner) != source:
        stacked = f" below {n} stacked axes" if n else ""
        done = tuple(inner) == move.rearrange.target
        why = (
            "it is converted already"
            if done or len(shape) == len(move.rearrange.target) + n != len(source) + n
            else "use the plan of the model that was saved here"
        )
        raise CheckpointError(
            f"{file}: leaf {name!r} has shape {shape}, the plan converts {source}"
            f"{stacked}; {why}"
        )
    return move
