"""How far two programs for the same function may differ: derived, not a guessed rtol.

Take a program y = f(args) as a list of equations. Equation e computes its output with a
local error of at most e_e (see ``rounding``). To first order the functional <c, y> then
errs by at most

    first_order(c) = sum over e of  < |d<c, y> / ds_e| , e_e >,

where s_e is a perturbation added to the output of e. One reverse pass gives all the
derivatives (a linearised running error analysis; Higham, *Accuracy and Stability of
Numerical Algorithms*, ch. 3; Linnainmaa 1976). Two programs that differ in the order
and the grouping of roundings each err by that much: they differ by at most twice it.

The bound is for the worst case, all errors conspiring, and grows loose with depth and
width. If the local errors are taken as independent and of mean zero (Higham and Mary,
*A New Approach to Probabilistic Rounding Error Analysis*, 2019), Hoeffding's inequality
gives a far smaller one, ``likely``: 7 root-sum-squares, exceeded with probability at
most 2 exp(-49 / 2) < 5e-11. Constant or repeated data breaks the independence, so it
tells how remarkable a difference is, and never fails a comparison by itself.

What the first order cannot see: a mask that flips because its input lies on the kink
(the gradient of relu, the argmax of a max pool), or a division by something close to
nothing (Adam's first step where the gradient is about epsilon). That part is
*sampled*, not derived: the program runs with all perturbations at twice their worst
size and random signs, and what differs from the linear prediction is added to the
bound. For smooth programs it is rounding noise.

Not covered: algorithms that regroup products and not only sums (Winograd and FFT
convolutions), which a backend may choose for windows larger than 1x1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .compiling import BackgroundProgram
from .sensitivity import Functional, Sensitivity

# Root-sum-squares allowed by ``likely``.
_DEVIATIONS = 7


def error_bounds(f: Callable[..., Any], *args: Any) -> ErrorModel:
    """Derives the rounding-error model of ``f`` at ``args``.

    Args:
      f: any JAX function of PyTrees of arrays: a model, its gradient, an optimizer
        step. It is traced once. It and its error model compile in the background, and
        run when they are asked for something.
      *args: PyTrees of arrays.

    Returns:
      The outputs and what bounds their errors.

    Raises:
      UnboundedError: floats go through a ``while`` loop, or a primitive without a rule
        cannot be differentiated.

    Example:
      >>> import jax.numpy as jnp
      >>> model = error_bounds(lambda x: jnp.sum(x * x), jnp.ones(8))
      >>> float(model.outputs), bool(0 < model.bound(jnp.float32(1.0)) < 1e-4)
      (8.0, True)
    """
    flat, treedef = jax.tree.flatten(args)
    program = BackgroundProgram(
        lambda flat: f(*jax.tree.unflatten(treedef, flat)), flat
    )
    inexact = tuple(
        i
        for i, leaf in enumerate(jax.tree.leaves(program.out_info))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )
    return ErrorModel(program, Sensitivity(program.jaxpr, flat, inexact), inexact)


def compare(reference: ErrorModel, got: Any) -> list[LeafComparison]:
    """Compares the outputs of another program for the same function.

    A few functionals are bounded for every float leaf: its coordinate with the largest
    difference, those with the largest difference for their size (so that small outputs
    are tested too), and the sum of all absolute differences (there a pattern is caught
    that rounding cannot cause, though each of its entries might be). Leaves without
    rounding must be equal, NaN and infinity must be at the same places.

    Args:
      reference: the model of the program that is right.
      got: outputs of the other program, in the same structure.

    Returns:
      One comparison for each leaf, in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: the tree structures differ.

    Example:
      >>> import jax.numpy as jnp
      >>> model = error_bounds(lambda x: jnp.sum(x * x), jnp.ones(8))
      >>> [leaf.passed for leaf in compare(model, jnp.float32(8.000001))]
      [True]
      >>> print(compare(model, jnp.float32(8.1))[0].reason)
      differs by 0.1 at (), more than the bound 1e-05
    """
    want = jax.tree_util.tree_leaves_with_path(reference.outputs)
    if jax.tree.structure(got) != jax.tree.structure(reference.outputs):
        raise ValueError(
            f"outputs differ in structure: expected "
            f"{jax.tree.structure(reference.outputs)}, got {jax.tree.structure(got)}"
        )
    found = [
        _compare_leaf(reference, number, path, leaf, other)
        for number, ((path, leaf), other) in enumerate(zip(want, jax.tree.leaves(got)))
    ]
    open_ = [each for each in found if isinstance(each, _Difference)]
    functionals = [f for each in open_ for f in each.functionals()]
    weights = {each.number: each.signs for each in open_}
    # One run for all of them.
    bounds = iter(reference.bounds(functionals, weights) if functionals else [])
    return [
        each.judged(bounds) if isinstance(each, _Difference) else each for each in found
    ]


@dataclasses.dataclass(frozen=True)
class LeafComparison:
    """One output leaf of two programs, compared.

    Attributes:
      path: path of the leaf in the outputs, joined with '/'.
      max_abs_error: largest absolute difference.
      index: where it is.
      bound: the bound at that coordinate.
      likely_bound: the bound there if rounding errors are independent.
      l1_error: sum of all absolute differences.
      l1_bound: the bound on it.
      passed: whether every tested functional is within its (finite) bound.
      reason: what was found when not passed, else ''.
      nonfinite: entries that are NaN or infinite, the same in both: they tell nothing.
    """

    path: str
    max_abs_error: float
    index: tuple[int, ...]
    bound: float
    l1_error: float
    l1_bound: float
    passed: bool
    reason: str = ""
    likely_bound: float = 0.0
    nonfinite: int = 0

    @property
    def tightness(self) -> float:
        """Bound over error at the worst coordinate; below 1 is a failure."""
        return self.bound / self.max_abs_error if self.max_abs_error else float("inf")

    @property
    def likely_tightness(self) -> float:
        """Likely bound over error there; below 1 is remarkable."""
        if not self.max_abs_error:
            return float("inf")
        return self.likely_bound / self.max_abs_error


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorModel:
    """The outputs of a program and the bound on their errors.

    Attributes:
      program: the program.
      sensitivity: how local errors reach its outputs.
      inexact: positions of the float leaves among the output leaves.
    """

    program: BackgroundProgram
    sensitivity: Sensitivity
    inexact: tuple[int, ...]

    @functools.cached_property
    def outputs(self) -> Any:
        """What the program computed."""
        return self.program(self.sensitivity.operands)

    @property
    def unmodelled(self) -> tuple[str, ...]:
        """Primitives whose own rounding is not in the bound; empty is good."""
        return self.sensitivity.unmodelled

    def bound(self, cotangents: Any, *, programs: int = 2) -> float:
        """Bounds the error of ``sum(cotangents * outputs)``.

        Args:
          cotangents: PyTree like the outputs; leaves that are not floats are ignored.
          programs: 2 for the difference of two programs, 1 for the error of one
            against exact arithmetic.
        """
        return self._both(cotangents, programs)[0]

    def likely(self, cotangents: Any, *, programs: int = 2) -> float:
        """Bounds it with probability 1 - 5e-11 if rounding errors are independent.

        Takes and returns what ``bound`` does.
        """
        return self._both(cotangents, programs)[1]

    def _both(self, cotangents: Any, programs: int) -> tuple[float, float]:
        leaves = jax.tree.leaves(cotangents)
        weights = {i: np.asarray(leaves[i]) for i in self.inexact}
        return self.bounds([Functional()], weights, programs)[0]

    def bounds(
        self,
        functionals: Sequence[Functional],
        weights: Mapping[int, Any],
        programs: int = 2,
    ) -> list[tuple[float, float]]:
        """Both bounds for several functionals at once.

        Args:
          functionals: their leaves are numbered among all output leaves.
          weights: for each such leaf its weights; 0 where there are none.
          programs: as for :meth:`bound`.
        """
        flat = jax.tree.leaves(self.program.out_info)
        full = []
        for i in self.inexact:
            # NumPy: as JAX operations these would compile anew for each shape.
            w = np.asarray(weights.get(i, 0)).astype(flat[i].dtype)
            full.append(np.broadcast_to(w, flat[i].shape))
        number = {leaf: j for j, leaf in enumerate(self.inexact)}
        inner = [
            Functional(None if f.leaf is None else number[f.leaf], f.place)
            for f in functionals
        ]
        found = []
        for f, total, root in zip(inner, *self.sensitivity.first_order(inner, full)):
            sampled = self._sampled(f, full)
            likely = min(programs * total, _DEVIATIONS * programs**0.5 * root)
            found.append((float(programs * total + sampled), float(likely + sampled)))
        return found

    def _sampled(self, functional: Functional, weights: Sequence[Any]) -> float:
        total = 0.0
        for j, samples in enumerate(self.sensitivity.remainder):
            if functional.leaf not in (None, j):
                continue
            rows = samples.reshape(len(samples), -1)
            if functional.place is None:
                size = np.abs(weights[j]).astype(rows.dtype).reshape(-1)
                total += float((rows * size).sum(1).max())
            else:
                total += float(rows[:, functional.place].max())
        return total


def _compare_leaf(
    reference: ErrorModel, number: int, path: Any, want: Any, got: Any
) -> LeafComparison | _Difference:
    name = jax.tree_util.keystr(path, simple=True, separator="/")

    def fail(reason: str) -> LeafComparison:
        return LeafComparison(
            name, float("inf"), (), 0.0, float("inf"), 0.0, False, reason
        )

    if jnp.shape(want) != jnp.shape(got) or jnp.result_type(want) != (
        jnp.result_type(got)
    ):
        return fail(
            f"expected {jnp.result_type(want)}{jnp.shape(want)}, "
            f"got {jnp.result_type(got)}{jnp.shape(got)}"
        )
    if jnp.issubdtype(jnp.result_type(want), jax.dtypes.prng_key):
        want, got = jax.random.key_data(want), jax.random.key_data(got)
    a, b = np.asarray(want), np.asarray(got)
    if number not in reference.inexact:
        wrong = np.argwhere(a != b)
        if not len(wrong):
            return LeafComparison(name, 0.0, (), 0.0, 0.0, 0.0, True)
        index = tuple(int(i) for i in wrong[0])
        return fail(f"expected {a[index]} at {index}, got {b[index]}; no rounding")
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(wide), b.astype(wide)
    finite = np.isfinite(a)
    wrong = np.argwhere(~np.where(finite, np.isfinite(b), _same(a, b)))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        return fail(f"expected {a[index]} at {index}, got {b[index]}")
    nonfinite = int(a.size - finite.sum())
    if nonfinite == a.size:
        return LeafComparison(name, 0.0, (), 0.0, 0.0, 0.0, True, nonfinite=nonfinite)
    difference = np.where(finite, b, 0) - np.where(finite, a, 0)
    return _Difference(name, number, np.where(finite, a, 0), difference, nonfinite)


@dataclasses.dataclass(frozen=True, eq=False)
class _Difference:
    """A float leaf whose difference is known and whose bounds are not yet."""

    name: str
    number: int
    want: np.ndarray
    difference: np.ndarray
    nonfinite: int

    @functools.cached_property
    def error(self) -> np.ndarray:
        return abs(self.difference)

    @functools.cached_property
    def signs(self) -> np.ndarray:
        # For complex y the functional is Re <c, y>, with c of modulus one.
        error = self.error
        signs = np.where(error > 0, self.difference / np.where(error > 0, error, 1), 0)
        return signs.conj()

    @functools.cached_property
    def places(self) -> list[tuple[int, ...]]:
        """The largest difference, and the largest ones for their size."""
        size = abs(self.want)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = [
                _argmax(self.error / (size + size.mean())),
                _argmax(np.where(size > 0, self.error / size, 0)),
            ]
        worst = _argmax(self.error)
        found = dict.fromkeys([worst, *relative] if self.error[worst] > 0 else [worst])
        return list(found)

    def functionals(self) -> list[Functional]:
        shape = self.want.shape
        flat = [int(np.ravel_multi_index(i, shape)) if i else 0 for i in self.places]
        whole = [Functional(self.number)] if self.error[self.places[0]] > 0 else []
        return [Functional(self.number, place) for place in flat] + whole

    def judged(self, bounds: Iterator[tuple[float, float]]) -> LeafComparison:
        limits = [next(bounds) for _ in self.places]
        worst, (bound, likely) = self.places[0], limits[0]
        error = self.error
        checks = [
            (error[index], limit, f"differs by {{:.3g}} at {index}")
            for index, (limit, _) in zip(self.places, limits)
        ]
        l1_bound = 0.0
        if error[worst] > 0:
            l1_bound = next(bounds)[0]
            if error.size > 1:
                checks.append((error.sum(), l1_bound, "differences sum to {:.3g}"))
        failed = [
            text.format(found) + _against(limit)
            for found, limit, text in checks
            if found and not (found <= limit < float("inf"))
        ]
        return LeafComparison(
            self.name,
            float(error[worst]),
            worst,
            bound,
            float(error.sum()),
            l1_bound,
            not failed,
            "; ".join(failed),
            likely,
            self.nonfinite,
        )


def _against(limit: float) -> str:
    if limit < float("inf"):
        return f", more than the bound {limit:.3g}"
    return (
        ", and no finite bound exists: the magnitudes that are summed overflow, or the "
        "program goes through infinities or NaN"
    )


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _argmax(x: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(x), x.shape))
