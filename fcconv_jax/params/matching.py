"""Which leaves a plan moves: one rule for trees, states and checkpoints.

A model's params may be there several times: a target network, a running average, an
optimizer's moments. Every copy moves, wherever it lies; what is a copy in part only is
refused by name, because moving half of it, or none, would give wrong numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from types import EllipsisType

from ..errors import PlanError
from ..kernels import Rearrangement
from ..plan import Plan
from ..plan.paths import inner_shape

Parts = tuple[str, ...]
Shape = tuple[int, ...]

# Fields of optax's states, beside what has "opt" in its name.
_OPTAX = frozenset(
    "mu nu trace inner_state inner_states acc_grads sum_of_squares avg_sq_grad "
    "prev_grads momentum velocity v_row v_col grad_momenta hidden_state".split()
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf, as far as matching goes.

    Args:
      name: what errors call it.
      shape: of the array; ``...`` if unknown, as of a sharding; None if it is not one.
    """

    name: str
    shape: Shape | EllipsisType | None

    def like(self, other: Leaf) -> bool:
        """Whether both may have the same shape."""
        return self.shape == other.shape or ... in (self.shape, other.shape)


@dataclasses.dataclass(frozen=True)
class Move:
    """How one leaf moves: a rearrangement below the axes of a scanned stack."""

    rearrange: Rearrangement
    stack_axes: tuple[int, ...] = ()
    to_grouped_conv: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every entry where it is, as for most biases."""
        return self.rearrange.is_reshape and (
            self.rearrange.source == self.rearrange.target
        )

    def fits(self, shape: Shape | EllipsisType | None) -> bool:
        """Whether a leaf of this shape can move."""
        return shape is ... or (
            shape is not None
            and inner_shape(shape, self.stack_axes, self.rearrange.source)
            == self.rearrange.source
        )

    def refusal(self, leaf: Leaf) -> str:
        """Why a leaf of another shape cannot move."""
        source, target = self.rearrange.source, self.rearrange.target
        count = len(self.stack_axes)
        stacked = f" below {count} stacked axes" if count else ""
        done = isinstance(leaf.shape, tuple) and (
            inner_shape(leaf.shape, self.stack_axes, target) == target
            or len(leaf.shape) == len(target) + count != len(source) + count
        )
        why = (
            "It is in this form already, converted before or never. Pass the tree in "
            "the other form, or restore this one (fcconv restore --plan)"
            if done
            else "The plan is of another model, or of inputs of another size. Make it "
            "with the model and the inputs of these params"
        )
        got = "no array" if leaf.shape is None else f"shape {leaf.shape}"
        return f"leaf {leaf.name!r}: expected shape {source}{stacked}, got {got}. {why}"


def planned_moves(plan: Plan, separator: str = "/") -> dict[Parts, Move]:
    """Return how each leaf of a plan moves, by the levels of its path."""
    return {
        tuple(filter(None, re.split(f"[/{re.escape(separator)}]", f"{path}/{name}"))): (
            Move(rearrange, layer.stack_axes, layer.groups > 1 and layer.to == "conv")
        )
        for path, layer in plan.items()
        for name, rearrange in layer.leaves
    }


def find_moves(
    leaves: Mapping[Parts, Leaf],
    plan: Plan,
    *,
    prefixes: Sequence[Parts] = (),
    separator: str = "/",
    strict: bool = True,
) -> dict[Parts, Move]:
    """Return the leaves that a plan moves, and how.

    The params are looked for under one common prefix: none, ``params``, or whatever
    levels the tree has above them. A tree elsewhere with the same leaves of the same
    shapes is a copy and moves, too. A leaf of an optimizer's state whose path ends in a
    planned one's moves if it has its shape, stays if it is a scalar, and is refused
    otherwise. The params of another model stay.

    Args:
      leaves: of the tree, by path.
      plan: what to move.
      prefixes: levels above the params to move, one for each copy; others stay.
      separator: at which paths were split, beside ``/``.
      strict: whether a planned leaf that is missing is an error.

    Raises:
      PlanError: a planned leaf is missing or has another shape; several trees fit the
        plan and are not alike; a leaf may be a copy, but is not one entry by entry.
    """
    wanted = planned_moves(plan, separator)
    if not wanted:
        return {}
    bases = list(prefixes) or _bases(wanted, leaves)
    tied = {
        tuple(filter(None, f"{path}/{name}".split("/")))
        for path, layer in plan.items()
        for name in layer.tied
    }
    for base in bases:
        _require([path for path in wanted if path not in tied], leaves, base, strict)
    while all(path[:1] == ("params",) and len(path) > 1 for path in wanted):
        bases = [(*base, "params") for base in bases]
        wanted = {path[1:]: move for path, move in wanted.items()}
    moves = {
        base + path: move
        for base in bases
        for path, move in wanted.items()
        if base + path in leaves
    }
    for path, move in moves.items():
        if not move.fits(leaves[path].shape):
            raise PlanError(move.refusal(leaves[path]))
    moves |= _copies(leaves, bases, wanted, chosen=bool(prefixes))
    return moves | _axis_names(leaves, moves)


def _axis_names(leaves: Mapping[Parts, Leaf], moves: Mapping[Parts, Move]):
    """Axis names beside the params, by ``flax.linen.partitioning``."""
    out = {}
    for path, move in moves.items():
        for level, part in enumerate(path[:-1]):
            if part == "params":
                names = *path[:level], "params_axes", *path[level + 1 : -1]
                names = *names, f"{path[-1]}_axes"
                if names in leaves:
                    out[names] = move
    return out


def _copies(
    leaves: Mapping[Parts, Leaf],
    bases: Sequence[Parts],
    wanted: Mapping[Parts, Move],
    chosen: bool,
) -> Iterator[tuple[Parts, Move]]:
    """The leaves outside of the params that follow planned ones."""
    model = _Model(leaves, bases, wanted, chosen)
    for path, leaf in leaves.items():
        if model.holds(path) or not leaf.shape:
            continue
        owner, exact = model.owner(path)
        if owner is None:
            if leaf.shape is not ... and model.may_hold_entries(path, leaf.shape):
                raise PlanError(
                    f"leaf {leaf.name!r} of shape {leaf.shape} may hold entries of "
                    "parameters that the plan moves, one after the other, as "
                    "optax.flatten does. Save the params alone, convert those, and "
                    "start a fresh tx.init"
                )
            continue
        if owner not in wanted or not model.mirrors(path, owner):
            continue
        original = leaves[bases[0] + owner]
        if not exact or not leaf.like(original):
            raise PlanError(
                f"leaf {leaf.name!r} of shape {leaf.shape} belongs to "
                f"{original.name!r} of shape {original.shape}, which the plan "
                "converts, but does not follow it entry by entry, as with the factored "
                "statistics of adafactor. Save the params alone, convert those, and "
                "start a fresh tx.init"
            )
        yield path, wanted[owner]


class _Model:
    """The planned model among all that a tree holds.

    Args:
      leaves: of the tree.
      bases: the levels above its params, one for each copy.
      wanted: the paths below that the plan moves.
      chosen: whether the user named the bases.
    """

    def __init__(
        self,
        leaves: Mapping[Parts, Leaf],
        bases: Sequence[Parts],
        wanted: Mapping[Parts, Move],
        chosen: bool,
    ):
        self.leaves, self.bases, self.chosen = leaves, bases, chosen
        self.wanted = wanted
        self.inner = _below(leaves, bases[0])
        moved = [move.rearrange for move in wanted.values()]
        self._least = min(
            (math.prod(m.source) for m in moved if not m.is_reshape), default=None
        )
        self._total = sum(
            math.prod(leaf.shape)
            for leaf in self.inner.values()
            if isinstance(leaf.shape, tuple)
        )
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

    def mirrors(self, path: Parts, owner: Parts) -> bool:
        """Whether a leaf follows the planned model's parameter.

        Raises:
          PlanError: this cannot be told.
        """
        starts = range(len(path) - len(owner) + 1)
        start = next(n for n in starts if path[n : n + len(owner)] == owner)
        group = path[:start]
        if group not in self._mirrors:
            self._mirrors[group] = self._follows(group, path)
        return self._mirrors[group]

    def _follows(self, group: Parts, path: Parts) -> bool:
        if _is_optimizer(group):
            return self._is_ours(group, path)
        if self.chosen:
            return False
        theirs = _below(self.leaves, group)
        if _alike(theirs, self.inner):
            return True
        # Another model's params stay, unless every planned layer is there, too.
        if group[-1:] == ("params",) and not all(
            path in theirs and theirs[path].like(self.inner[path])
            for path in self.wanted
        ):
            return False
        raise PlanError(
            f"{'/'.join(group)!r} may be a copy of {'/'.join(self.bases[0])!r}, which "
            f"the plan converts, or another model's: {_unlike(theirs, self.inner)}. "
            "Pass prefix= (--prefix), the levels above the params to convert, once for "
            "each copy"
        )

    def _is_ours(self, group: Parts, path: Parts) -> bool:
        """Whether an optimizer's state is of this model, if there are others."""
        here = {_root(base) for base in self.bases}
        others = {
            _root(found[: found.index("params") + 1])
            for found in self.leaves
            if "params" in found and not self.holds(found) and not _is_optimizer(found)
        } - here
        for roots in (
            [r for r in (*here, *others) if group[: len(r)] == r],
            [r for r in (*here, *others) if r and _within(r, group)],
        ):
            if roots:
                deepest = max(roots, key=len)
                if deepest or not any(_within(r, group) for r in others):
                    return deepest in here
        if not others:
            return True
        raise PlanError(
            f"leaf {self.leaves[path].name!r} may follow the params of several models. "
            "Save the one you mean as a checkpoint of its own"
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


def _below(leaves: Mapping[Parts, Leaf], base: Parts) -> dict[Parts, Leaf]:
    n = len(base)
    return {path[n:]: leaf for path, leaf in leaves.items() if path[:n] == base}


def _alike(one: Mapping[Parts, Leaf], other: Mapping[Parts, Leaf]) -> bool:
    """Whether two trees have the same leaves, of the same shapes."""
    return one.keys() == other.keys() and all(
        leaf.like(other[path]) for path, leaf in one.items()
    )


def ranked_prefixes(
    wanted: Collection[Parts],
    found: Iterable[Parts],
    fits: Callable[[Parts, Parts], bool] = lambda path, end: True,
) -> tuple[list[Parts], dict[Parts, tuple[int, int, bool, int]]]:
    """Return the levels above wanted paths, the best first, and the rank of each.

    The best has most of the paths that fit; then one that ends in ``params`` comes
    before others, and a shallow one before deep ones.

    Args:
      wanted: paths that are looked for.
      found: paths of a tree.
      fits: whether a found path, with this wanted end, is right in other respects.
    """
    hits: dict[Parts, list[int]] = {}  # how many fit, and how many are there
    for path in found:
        # A parameter that is the whole tree has no name of its own.
        whole = () in wanted and path in ((), ("params",))
        for start in range(len(path) + whole):
            if path[start:] in wanted:
                count = hits.setdefault(path[:start], [0, 0])
                count[0] += fits(path, path[start:])
                count[1] += 1
    ranks = {
        prefix: (-fit, -there, bool(prefix) and prefix[-1] != "params", len(prefix))
        for prefix, (fit, there) in hits.items()
    }
    return sorted(hits, key=ranks.__getitem__), ranks


def _unlike(one: Mapping[Parts, Leaf], other: Mapping[Parts, Leaf]) -> str:
    """The first leaf in which a tree differs from another."""
    for path in (*other, *one):
        name = "/".join(path)
        if path not in one:
            return f"it lacks {name!r}"
        if path not in other:
            return f"only it has {name!r}"
        if not one[path].like(other[path]):
            return f"{name!r} has shape {one[path].shape}, not {other[path].shape}"
    return "they are alike"


def _bases(
    wanted: Mapping[Parts, Move], leaves: Mapping[Parts, Leaf]
) -> Sequence[Parts]:
    """The levels above the planned parameters, one for each copy that is as good."""
    order, ranks = ranked_prefixes(
        wanted, leaves, lambda path, end: wanted[end].fits(leaves[path].shape)
    )
    if not order:
        return [("params",) if any(p[:1] == ("params",) for p in leaves) else ()]
    best = [prefix for prefix in order if ranks[prefix] == ranks[order[0]]]
    trees = [_below(leaves, prefix) for prefix in best]
    for prefix, tree in zip(best, trees):
        if not _alike(tree, trees[0]):
            raise PlanError(
                f"the plan fits under {'/'.join(best[0])!r} and under "
                f"{'/'.join(prefix)!r}, which are not alike. Pass prefix= (--prefix), "
                "the levels above the params to convert, once for each"
            )
    return best


def _require(
    wanted: Sequence[Parts], leaves: Mapping[Parts, Leaf], base: Parts, strict: bool
) -> None:
    missing = [base + path for path in wanted if base + path not in leaves]
    if not missing or (not strict and len(missing) < len(wanted)):
        return
    name, names = "/".join(missing[0]), ["/".join(path) for path in leaves]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
    all_missing = len(missing) == len(wanted)
    raise PlanError(
        f"no leaf {name!r}, which the plan converts{more}; close to it: "
        f"{close or names[:5]}. Use the plan of the model that has these params"
        + ("" if all_missing else ", or strict=False to convert what is there")
    )
