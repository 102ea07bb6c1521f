"""Which leaves of a checkpoint a plan moves, found by path and shape alone."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from ..kernels import Rearrangement
from ..params.leaves import convert_leaf
from ..plan import Plan
from .checkpoint import Parts
from .entries import Moved

Shape = tuple[int, ...]

# Fields of optax's states, beside what has "opt" in its name.
_OPTAX = frozenset(
    "mu nu trace inner_state inner_states acc_grads sum_of_squares avg_sq_grad "
    "prev_grads momentum velocity v_row v_col grad_momenta hidden_state".split()
)


@dataclasses.dataclass(frozen=True)
class Found:
    """A leaf of a checkpoint, as far as matching goes.

    Args:
      name: what the file calls it.
      shape: of the array; None where it is none.
    """

    name: str
    shape: Shape | None


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

    def __call__(self, leaf: Any) -> Moved:
        """The leaf with its entries still to be moved.

        Raises:
          ValueError: its shape does not fit.
          CheckpointError: entries smaller than a byte would have to change places.
        """
        leaf = Moved.of(leaf)
        n = len(self.stack_axes)
        if n and not all(0 <= axis <= i for i, axis in enumerate(self.stack_axes)):
            # A stack along an inner axis is moved in memory, by itself.
            return Moved.of(convert_leaf(self.rearrange, leaf.array(), self.stack_axes))
        whole = self.rearrange.stacked(leaf.shape[:n]) if n else self.rearrange
        if leaf.shape != whole.source:
            raise ValueError(f"expected shape {whole.source}, got {leaf.shape}")
        if not leaf.itemsize and not whole.is_reshape:
            raise CheckpointError(
                f"of dtype {leaf.dtype}, whose entries are smaller than a byte, would "
                "have to be transposed; expected a dtype of whole bytes. Widen it first"
            )
        return dataclasses.replace(leaf, move=whole)


def find_moves(
    leaves: Mapping[Parts, Found],
    plan: Plan,
    file: str,
    prefixes: Sequence[Parts] = (),
    separator: str = "/",
) -> dict[Parts, Move]:
    """The leaves that a plan moves, and how.

    A planned parameter is looked for under one common prefix: none, ``params``, or
    whatever level the checkpoint puts above it. Outside of that prefix, a leaf whose
    path ends in the parameter's path is a mirror of it if it lies in an optimizer's
    state, or in a tree that is the model's leaf by leaf (a running average): it moves
    along when it has the parameter's shape, stays when it is a scalar, and is refused
    otherwise. The params of another model stay.

    Args:
      leaves: of the checkpoint by path, split into levels.
      plan: what to move.
      file: the file, for errors.
      prefixes: the levels above the params of the planned model, one for each copy.
      separator: at which the file's names were split, and the plan's are.

    Raises:
      CheckpointError: a planned leaf is missing, has another shape, or is mirrored by
        one of another shape; the prefix is ambiguous; or an array outside of the
        params may hold entries of planned ones in a shape of its own.
    """
    wanted = {
        tuple(re.split(f"[/{separator}]", path)): Move(rearrange, layer.stack_axes)
        for key, layer in plan.items()
        for name, rearrange in layer.leaves
        for path in ["/".join(part for part in (key, name) if part)]
    }
    if not wanted:
        return {}
    bases = list(prefixes) or [_prefix(list(wanted), leaves, file)]
    for base in bases:
        _require(list(wanted), leaves, base, file)
    while all(path[0] == "params" and len(path) > 1 for path in wanted):
        bases = [(*base, "params") for base in bases]
        wanted = {path[1:]: move for path, move in wanted.items()}
    moves = {
        base + path: _checked(move, leaves[base + path], file)
        for base in bases
        for path, move in wanted.items()
    }
    model = _Model(leaves, bases, wanted, bool(prefixes))
    for path, leaf in leaves.items():
        if model.holds(path) or not leaf.shape:
            continue
        owner, exact = model.owner(path)
        if owner is None:
            if model.may_hold_entries(path, leaf.shape):
                raise CheckpointError(
                    f"{file}: leaf {leaf.name!r} of shape {leaf.shape} may hold "
                    "entries of parameters that the plan moves, one after the other, "
                    "as optax.flatten does; save the params alone, convert those, and "
                    "start a fresh tx.init"
                )
            continue
        if owner not in wanted or not model.mirrors(path, owner, file):
            continue
        original = leaves[bases[0] + owner]
        if not exact or leaf.shape != original.shape:
            raise CheckpointError(
                f"{file}: leaf {leaf.name!r} of shape {leaf.shape} belongs to "
                f"{original.name!r} of shape {original.shape}, which the plan "
                "converts, but does not follow it entry by entry, as with the factored "
                "statistics of adafactor; save the params alone, convert those, and "
                "start a fresh tx.init"
            )
        moves[path] = wanted[owner]
    return moves


class _Model:
    """The planned model among all that a checkpoint holds.

    Args:
      leaves: of the checkpoint.
      bases: the levels above its params, one for each copy.
      wanted: the paths below that the plan moves.
      chosen: whether the user named the bases.
    """

    def __init__(
        self,
        leaves: Mapping[Parts, Found],
        bases: Sequence[Parts],
        wanted: Mapping[Parts, Move],
        chosen: bool,
    ):
        self.leaves, self.bases, self.chosen = leaves, bases, chosen
        self.inner = _below(leaves, bases[0])
        moved = [move.rearrange for move in wanted.values()]
        self._least = min(
            (math.prod(m.source) for m in moved if not m.is_reshape), default=None
        )
        self._total = sum(math.prod(leaf.shape or ()) for leaf in self.inner.values())
        self._mirrors: dict[Parts, bool] = {}

    def holds(self, path: Parts) -> bool:
        """Whether a leaf is one of the params."""
        return any(path[: len(base)] == base for base in self.bases)

    def owner(self, path: Parts) -> tuple[Parts | None, bool]:
        """The parameter that a leaf outside of the params belongs to.

        Also whether the leaf stands in the parameter's place, not somewhere below it.
        The longest ending that is a parameter's path counts, so that
        ``mu/block/fc/kernel`` belongs to ``block/fc/kernel`` and not to ``fc/kernel``.
        """
        for end in range(len(path), 0, -1):
            for start in range(end):
                if path[start:end] in self.inner:
                    return path[start:end], end == len(path)
        return None, True

    def mirrors(self, path: Parts, owner: Parts, file: str) -> bool:
        """Whether a leaf follows the planned model's parameter.

        Raises:
          CheckpointError: this cannot be told.
        """
        starts = range(len(path) - len(owner) + 1)
        start = next(n for n in starts if path[n : n + len(owner)] == owner)
        group = path[:start]
        if group not in self._mirrors:
            self._mirrors[group] = self._follows(group, path, file)
        return self._mirrors[group]

    def _follows(self, group: Parts, path: Parts, file: str) -> bool:
        if _is_optimizer(group):
            return self._is_ours(group, path, file)
        if self.chosen:
            return False
        theirs = _below(self.leaves, group)
        if {p: x.shape for p, x in theirs.items()} == {
            p: x.shape for p, x in self.inner.items()
        }:
            return True
        if group[-1:] == ("params",):
            return False
        raise CheckpointError(
            f"{file}: leaf {self.leaves[path].name!r} may be of another model, or "
            "follow the planned one's; pass prefix= (--prefix), the levels above the "
            f"params to convert: {'/'.join(self.bases[0])!r}"
        )

    def _is_ours(self, group: Parts, path: Parts, file: str) -> bool:
        """Whether an optimizer's state is of this model, where there are others."""
        here = _root(self.bases[0])
        others = {
            _root(found[: found.index("params") + 1])
            for found in self.leaves
            if "params" in found and not self.holds(found) and not _is_optimizer(found)
        } - {_root(base) for base in self.bases}
        for roots in (
            [r for r in (here, *others) if group[: len(r)] == r],
            [r for r in (here, *others) if r and _within(r, group)],
        ):
            if roots:
                deepest = max(roots, key=len)
                if deepest or not any(_within(r, group) for r in others):
                    return deepest == here
        if not others:
            return True
        raise CheckpointError(
            f"{file}: leaf {self.leaves[path].name!r} may follow the params of several "
            "models; save the one you mean as a checkpoint of its own"
        )

    def may_hold_entries(self, path: Parts, shape: Shape) -> bool:
        """Whether an array of no parameter may hold several, and would have to move."""
        if self._least is None:
            return False
        size = math.prod(shape)
        return size == self._total or (_is_optimizer(path) and size >= self._least)


def _is_optimizer(path: Parts) -> bool:
    return any("opt" in part.lower() or part in _OPTAX for part in path)


def _root(base: Parts) -> Parts:
    """The levels above a model's variables."""
    return base[:-1] if base[-1:] == ("params",) else base


def _within(part: Parts, path: Parts) -> bool:
    n = len(part)
    return any(path[at : at + n] == part for at in range(len(path) - n + 1))


def _below(leaves: Mapping[Parts, Found], base: Parts) -> dict[Parts, Found]:
    n = len(base)
    return {path[n:]: leaf for path, leaf in leaves.items() if path[:n] == base}


def _prefix(wanted: list[Parts], found: Mapping[Parts, Found], file: str) -> Parts:
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
    if len(order) > 1 and ranks[order[0]] == ranks[order[1]]:
        raise CheckpointError(
            f"{file}: the plan fits under {'/'.join(order[0])!r} and under "
            f"{'/'.join(order[1])!r}; pass prefix= (--prefix), the levels above the "
            "params to convert, once for each"
        )
    if order:
        return order[0]
    return ("params",) if any(p[0] == "params" for p in found) else ()


def _require(
    wanted: list[Parts], found: Mapping[Parts, Found], base: Parts, file: str
) -> None:
    missing = [want for want in wanted if base + want not in found]
    if missing:
        name = "/".join(base + missing[0])
        names = ["/".join(path) for path in found]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{file}: no leaf {name!r}, which the plan converts{more}; close to it: "
            f"{close or names[:5]}. Use the plan of the model that was saved here"
        )


def _checked(move: Move, leaf: Found, file: str) -> Move:
    source, name, shape = move.rearrange.source, leaf.name, leaf.shape
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
