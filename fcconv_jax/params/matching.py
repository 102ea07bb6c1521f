"""Which leaves a plan moves: one rule for trees, states and checkpoints.

A model's params may be there several times: a target network, a running average, an
optimizer's moments. Every copy moves, wherever it lies; what is a copy in part only is
refused by name, because moving half of it, or none, would give wrong numbers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)

from ..messages.errors import PlanError
from ..plan import Plan, check_plan
from .copies import alike, below, copies
from .move import Leaf, Move, Parts


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
    prefix: str | Sequence[str] = (),
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
      prefix: levels above the params to move, one for each copy; others stay.
      separator: at which paths were split, beside ``/``.
      strict: whether a planned leaf that is missing is an error.

    Raises:
      PlanError: a planned leaf is missing or has another shape; several trees fit the
        plan and are not alike; a leaf may be a copy, but is not one entry by entry.
    """
    check_plan(plan)
    wanted = planned_moves(plan, separator)
    if not wanted:
        return {}
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    given = list(map(_levels, prefixes))
    bases = given or _bases(wanted, leaves)
    tied = {
        _levels(f"{path}/{name}") for path, layer in plan.items() for name in layer.tied
    }
    # A tied kernel may be stored under its owner's path alone.
    for base in bases:
        _require([path for path in wanted if path not in tied], leaves, base, strict)
    # Optimizer states follow the params, and may have no such level above them.
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
    moves |= copies(leaves, bases, wanted, chosen=bool(given))
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


def _levels(path: str) -> Parts:
    return tuple(filter(None, path.split("/")))


def _bases(
    wanted: Mapping[Parts, Move], leaves: Mapping[Parts, Leaf]
) -> Sequence[Parts]:
    """The levels above the planned parameters, one for each copy that is as good."""
    order, ranks = ranked_prefixes(
        wanted, leaves, lambda path, end: wanted[end].fits(leaves[path].shape)
    )
    if not order:
        # Nothing fits: these levels make the error name the path that a reader expects.
        return [("params",) if any(p[:1] == ("params",) for p in leaves) else ()]
    best = [prefix for prefix in order if ranks[prefix] == ranks[order[0]]]
    trees = [below(leaves, prefix) for prefix in best]
    for prefix, tree in zip(best, trees):
        if not alike(tree, trees[0]):
            raise PlanError(
                f"the plan fits under {'/'.join(best[0])!r} and under "
                f"{'/'.join(prefix)!r}, which differ. Pass prefix= (--prefix), the "
                "levels above the params to convert, once for each."
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
    others = len(missing) - 1
    more = (
        f" ({others} more {'is' if others == 1 else 'are'} missing)" if others else ""
    )
    found = close or names[:5]
    all_missing = len(missing) == len(wanted)
    raise PlanError(
        f"no leaf {name!r}, which the plan converts{more}; "
        + (f"close to it: {found}. " if found else "the tree is empty. ")
        + "Use the plan of the model that has these params"
        + ("" if all_missing else ", or strict=False to convert what is there")
    )
