"""What follows a model's params elsewhere in a tree: copies, moments of optimizers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..messages.errors import PlanError
from .move import Leaf, Move, Parts, Shape

# Fields of optax's states, beside what has "opt" in its name.
_OPTAX = frozenset(
    """acc_grads avg_sq_grad cumulative_gradients e_g e_x exp_avg exp_avg_sq found_nan
    grad_momenta grad_sum grad_sum_of_squares grad_sum_sq hidden_state init_particles
    inner_state inner_states m1 m2 measure_states measurements momentum mu nu nu_max
    params0 prev_grads prev_updates previous_gradient step_sizes subgradients
    sum_of_squares trace v_col v_row velocity""".split()
)
# Fields that may also be names of layers, or of copies of the params: they count right
# above a copy, the words in a chain of optimizers only, whose states are numbered.
_LETTERS = frozenset("g m n s v x0 z".split())
_WORDS = frozenset("ema init_params last reward scale".split())


def copies(
    leaves: Mapping[Parts, Leaf],
    bases: Sequence[Parts],
    wanted: Mapping[Parts, Move],
    chosen: bool,
) -> Iterator[tuple[Parts, Move]]:
    """Yield the leaves outside of the params that follow planned ones."""
    model = _Model(leaves, bases, wanted, chosen)
    if not chosen:
        model.refuse_lists()
    for path, leaf in leaves.items():
        # Scalars, such as a step's number, are alike in both forms.
        if model.holds(path) or not leaf.shape:
            continue
        owner, exact = model.owner(path)
        if owner is None:
            if leaf.shape is not ... and model.may_hold_entries(path, leaf.shape):
                raise PlanError(
                    f"leaf {leaf.name!r} of shape {leaf.shape} may hold entries of "
                    "converted parameters in one vector, as optax.flatten's state "
                    "does. Save the params alone, convert them, and start with a fresh "
                    "tx.init."
                )
            continue
        if owner not in wanted or not model.mirrors(path, owner):
            continue
        original = leaves[bases[0] + owner]
        if not exact or not leaf.like(original):
            if leaf.shape == (1,):  # one number for a whole leaf, in optax
                continue
            raise PlanError(
                f"leaf {leaf.name!r} of shape {leaf.shape} belongs to "
                f"{original.name!r} of shape {original.shape}, which the plan "
                "converts, but does not follow it entry by entry, as with adafactor's "
                "factored statistics. Save the params alone, convert them, and start "
                "with a fresh tx.init."
            )
        yield path, wanted[owner]


class _Model:
    """The planned model among all that a tree holds."""

    def __init__(
        self,
        leaves: Mapping[Parts, Leaf],
        bases: Sequence[Parts],
        wanted: Mapping[Parts, Move],
        chosen: bool,
    ):
        self.leaves, self.bases, self.chosen = leaves, bases, chosen
        self.wanted = wanted
        self.inner = below(leaves, bases[0])
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
        """Return whether a leaf is one of the params."""
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
        # One verdict for a whole copy, and one error for all of its leaves.
        if group not in self._mirrors:
            self._mirrors[group] = self._follows(group, path)
        return self._mirrors[group]

    def _follows(self, group: Parts, path: Parts) -> bool:
        if _is_optimizer(group) or _is_field(group):
            return self._is_ours(group, path)
        if self.chosen:
            return False
        theirs = below(self.leaves, group)
        if alike(theirs, self.inner):
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
            "each copy."
        )

    def _is_ours(self, group: Parts, path: Parts) -> bool:
        """Return whether an optimizer's state is of this model, if there are others."""
        # Each model of a GAN has an optimizer: the state beside its params is its own.
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
            "Save the one to convert as a separate checkpoint."
        )

    def refuse_lists(self) -> None:
        """Refuse a list of the params' leaves, which have no names to move them by."""
        lists: dict[Parts, list[Leaf]] = {}
        for path, leaf in self.leaves.items():
            if path[-1:] and path[-1].isdecimal() and not self.holds(path):
                lists.setdefault(path[:-1], []).append(leaf)
        # A checkpoint keeps another order than a tree in memory.
        shapes = Counter(leaf.shape for leaf in self.inner.values())
        for group, found in lists.items():
            if Counter(leaf.shape for leaf in found) == shapes:
                raise PlanError(
                    f"{'/'.join(group)!r} is a list of {len(found)} leaves with the "
                    "shapes of the params, and may be a copy of them. Store it as a "
                    "tree like them, jax.tree.unflatten(jax.tree.structure(params), "
                    "leaves), or pass prefix= (--prefix), the levels above the params "
                    "to convert, if it isn't a copy."
                )

    def may_hold_entries(self, path: Parts, shape: Shape) -> bool:
        """Whether an array of no parameter may hold several, and would have to move."""
        if self._least is None:
            return False
        # Moves that keep the order of entries leave a flat array right as it is.
        size = math.prod(shape)
        return size == self._total or (_is_optimizer(path) and size >= self._least)


def _is_optimizer(path: Parts) -> bool:
    return any("opt" in part.lower() or part in _OPTAX for part in path)


def _is_field(group: Parts) -> bool:
    *above, field = group or ("",)
    chained = any(level.isdecimal() for level in above)
    return "params" not in above and (
        field in _LETTERS or (chained and field in _WORDS)
    )


def _root(base: Parts) -> Parts:
    """Return the levels above a model's variables."""
    return base[:-1] if base[-1:] == ("params",) else base


def _within(part: Parts, path: Parts) -> bool:
    n = len(part)
    return any(path[at : at + n] == part for at in range(len(path) - n + 1))


def below(leaves: Mapping[Parts, Leaf], base: Parts) -> dict[Parts, Leaf]:
    """Return the leaves below some levels, by their path there."""
    n = len(base)
    return {path[n:]: leaf for path, leaf in leaves.items() if path[:n] == base}


def alike(one: Mapping[Parts, Leaf], other: Mapping[Parts, Leaf]) -> bool:
    """Whether two trees have the same leaves, of the same shapes."""
    return one.keys() == other.keys() and all(
        leaf.like(other[path]) for path, leaf in one.items()
    )


def _unlike(one: Mapping[Parts, Leaf], other: Mapping[Parts, Leaf]) -> str:
    """Describe the first leaf in which a tree differs from another."""
    for path in (*other, *one):
        name = "/".join(path)
        if path not in one:
            return f"it lacks {name!r}"
        if path not in other:
            return f"only it has {name!r}"
        if not one[path].like(other[path]):
            return f"{name!r} has shape {one[path].shape}, not {other[path].shape}"
    return "they are alike"
