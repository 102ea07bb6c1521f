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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import jaxprs
from .perturbation import UnboundedError, run_shifted

# Root-sum-squares allowed by ``likely``.
_DEVIATIONS = 7
# Pairs of opposite random signs for the sampled part.
_SAMPLES = 4


def error_bounds(f: Callable[..., Any], *args: Any) -> ErrorModel:
    """Derives the rounding-error model of ``f`` at ``args``.

    Args:
      f: any JAX function of PyTrees of arrays: a model, its gradient, an optimizer
        step. It is traced once; its output is computed once, under ``jax.jit``.
      *args: PyTrees of arrays.

    Returns:
      The outputs and what bounds their errors.

    Raises:
      UnboundedError: floats go through a ``while`` loop, or a primitive without a rule
        cannot be differentiated (this may show only when a bound is asked for).

    Example:
      >>> import jax.numpy as jnp
      >>> model = error_bounds(lambda x: jnp.sum(x * x), jnp.ones(8))
      >>> float(model.outputs), bool(0 < model.bound(jnp.float32(1.0)) < 1e-4)
      (8.0, True)
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    treedef = jax.tree.structure(shape)
    flat = jax.tree.leaves(args)
    outputs = jax.tree.unflatten(treedef, jax.jit(_program(closed))(*flat))
    unmodelled: dict[str, None] = {}
    _, errors = jax.eval_shape(lambda a: run_shifted(closed, a, None, unmodelled), flat)
    inexact = tuple(
        i
        for i, leaf in enumerate(jax.tree.leaves(shape))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )

    def run(
        operands: list[Any], shifts: Any, measure: bool = True
    ) -> tuple[list[Any], Any]:
        outs, errors = run_shifted(closed, operands, shifts, {} if measure else None)
        return [outs[i] for i in inexact], errors

    named = _naming(unmodelled)
    jit = _quick_jit()
    remainder = named(jit(lambda a: _remainders(run, a)))(flat) if inexact else []
    return ErrorModel(
        outputs=outputs,
        unmodelled=tuple(unmodelled),
        inexact=inexact,
        # The operands are arguments: as constants they would be folded by XLA.
        first_order=functools.partial(
            named(jit(lambda a, cts: _first_order(run, errors, a, cts))), flat
        ),
        remainder=tuple(np.asarray(r).astype(np.float64) for r in remainder),
    )


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
    return [
        _compare_leaf(reference, number, path, leaf, other)
        for number, ((path, leaf), other) in enumerate(zip(want, jax.tree.leaves(got)))
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

    @property
    def tightness(self) -> float:
        """Bound over error at the worst coordinate; below 1 is a failure."""
        return self.bound / self.max_abs_error if self.max_abs_error else float("inf")


@dataclasses.dataclass(frozen=True)
class ErrorModel:
    """The outputs of a program and the bound on their errors.

    Attributes:
      outputs: what the program computed.
      unmodelled: primitives whose own rounding is not in the bound; empty is good.
      inexact: positions of the float leaves among the output leaves.
      first_order: for cotangents of the float leaves, the sum of |derivative| * error
        and the root of the sum of its squares.
      remainder: for each float leaf, samples (K, *shape) of the size of what is not
        first order, in float64.
    """

    outputs: Any
    unmodelled: tuple[str, ...]
    inexact: tuple[int, ...]
    first_order: Callable[[list[Any]], tuple[jax.Array, jax.Array]]
    remainder: tuple[np.ndarray, ...]

    def bound(self, cotangents: Any, *, programs: int = 2) -> float:
        """Bounds the error of ``sum(cotangents * outputs)``.

        Args:
          cotangents: PyTree like the outputs; leaves that are not floats are ignored.
          programs: 2 for the difference of two programs, 1 for the error of one
            against exact arithmetic.
        """
        leaves = jax.tree.leaves(cotangents)
        return self._bounds({i: leaves[i] for i in self.inexact}, programs)[0]

    def likely(self, cotangents: Any, *, programs: int = 2) -> float:
        """Bounds it with probability 1 - 5e-11 if rounding errors are independent.

        Takes and returns what ``bound`` does.
        """
        leaves = jax.tree.leaves(cotangents)
        return self._bounds({i: leaves[i] for i in self.inexact}, programs)[1]

    def _bounds(self, cotangents: dict[int, Any], programs: int) -> tuple[float, float]:
        """Both for some of the leaves; the others have cotangent 0."""
        # NumPy: as JAX operations these would compile anew for the shape of each leaf.
        flat = jax.tree.leaves(self.outputs)
        cts, sampled = [], 0.0
        for i, samples in zip(self.inexact, self.remainder):
            ct = np.asarray(cotangents.get(i, 0)).astype(flat[i].dtype)
            cts.append(np.broadcast_to(ct, flat[i].shape))
            if i in cotangents:
                weighted = samples * np.abs(ct).astype(samples.dtype)
                sampled += float(weighted.reshape(len(samples), -1).sum(1).max())
        total, root = map(float, self.first_order(cts))
        likely = min(programs * total, _DEVIATIONS * programs**0.5 * root)
        return programs * total + sampled, likely + sampled


def _compare_leaf(
    reference: ErrorModel, number: int, path: Any, want: Any, got: Any
) -> LeafComparison:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    fail = (float("inf"), (), 0.0, float("inf"), 0.0, False)
    if jnp.shape(want) != jnp.shape(got) or jnp.result_type(want) != (
        jnp.result_type(got)
    ):
        return LeafComparison(
            name,
            *fail,
            f"expected {jnp.result_type(want)}{jnp.shape(want)}, "
            f"got {jnp.result_type(got)}{jnp.shape(got)}",
        )
    if jnp.issubdtype(jnp.result_type(want), jax.dtypes.prng_key):
        want, got = jax.random.key_data(want), jax.random.key_data(got)
    a, b = np.asarray(want), np.asarray(got)
    if number not in reference.inexact:
        wrong = np.argwhere(a != b)
        if not len(wrong):
            return LeafComparison(name, 0.0, (), 0.0, 0.0, 0.0, True)
        index = tuple(int(i) for i in wrong[0])
        return LeafComparison(
            name, *fail, f"expected {a[index]} at {index}, got {b[index]}; no rounding"
        )
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(wide), b.astype(wide)
    finite = np.isfinite(a)
    wrong = np.argwhere(~np.where(finite, np.isfinite(b), _same(a, b)))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        return LeafComparison(
            name, *fail, f"expected {a[index]} at {index}, got {b[index]}"
        )
    if not a.size:
        return LeafComparison(name, 0.0, (), 0.0, 0.0, 0.0, True)
    difference = np.where(finite, b, 0) - np.where(finite, a, 0)
    return _bounded(reference, number, name, np.where(finite, a, 0), difference)


def _bounded(
    reference: ErrorModel, number: int, name: str, want: Any, difference: Any
) -> LeafComparison:
    error = abs(difference)
    size = abs(want)
    worst = _argmax(error)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = [
            _argmax(error / (size + size.mean())),
            _argmax(np.where(size > 0, error / size, 0)),
        ]

    def at(index: tuple[int, ...]) -> tuple[float, float]:
        one = np.zeros(want.shape, want.dtype)
        one[index] = 1
        return reference._bounds({number: one}, 2)

    bound, likely = at(worst)
    checks = [
        (
            error[worst],
            bound,
            f"differs by {{:.3g}} at {worst}, more than the bound {{:.3g}}",
        )
    ]
    l1_bound = 0.0
    if error[worst] > 0:
        # For complex y the functional is Re <c, y>, with c of modulus one.
        signs = np.where(error > 0, difference / np.where(error > 0, error, 1), 0)
        l1_bound = reference._bounds({number: signs.conj()}, 2)[0]
        if error.size > 1:
            text = "differences sum to {:.3g}, more than the bound {:.3g}"
            checks.append((error.sum(), l1_bound, text))
        for index in dict.fromkeys(relative):
            if index != worst:
                text = f"differs by {{:.3g}} at {index}, more than the bound {{:.3g}}"
                checks.append((error[index], at(index)[0], text))
    failed = [
        text.format(found, limit)
        for found, limit, text in checks
        if found and not (found <= limit < float("inf"))
    ]
    return LeafComparison(
        name,
        float(error[worst]),
        worst,
        bound,
        float(error.sum()),
        l1_bound,
        not failed,
        "; ".join(failed),
        likely,
    )


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _argmax(x: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(x), x.shape))


def _naming(unmodelled: dict[str, None]) -> Callable[[Callable], Callable]:
    """Makes a failure to differentiate name the primitives that may be its cause."""

    def wrap(f: Callable) -> Callable:
        def named(*operands: Any) -> Any:
            try:
                return f(*operands)
            except (ValueError, NotImplementedError) as error:
                if not unmodelled:
                    raise
                raise UnboundedError(
                    f"no derivative through {', '.join(unmodelled)}, which also has no "
                    "rounding rule: compare a function without it"
                ) from error

        return named

    return wrap


@functools.cache
def _quick_jit() -> Callable[[Callable], Any]:
    """``jit`` for programs that run a few times: their compile time is what counts."""
    if jax.default_backend() != "cpu":
        return jax.jit
    options: Any = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
    }
    quick = functools.partial(jax.jit, compiler_options=options)
    try:
        quick(lambda x: x)(0.0)
    except jax.errors.JaxRuntimeError:  # an XLA that no longer knows these options
        return jax.jit
    return quick


def _program(closed: Any) -> Callable[..., list[Any]]:
    return lambda *operands: jaxprs.evaluate(closed, operands)


def _first_order(
    run: Callable, shapes: Any, operands: list[Any], cotangents: list[Any]
) -> Any:
    zeros = jax.tree.map(lambda e: jnp.zeros(e.shape, e.dtype), shapes)
    _, pullback, errors = jax.vjp(lambda s: run(operands, s), zeros, has_aux=True)
    (slopes,) = pullback(cotangents)
    total, squares = jnp.zeros(()), jnp.zeros(())
    for slope, error in zip(jax.tree.leaves(slopes), jax.tree.leaves(errors)):
        # Results below the smallest normal number may be flushed to zero.
        size = jnp.abs(slope)
        error = jnp.abs(error) + jnp.finfo(size.dtype).tiny
        product = jnp.where(size == 0, 0, size * error)
        total += jnp.sum(product)
        squares += jnp.sum(jnp.square(product))
    return total, jnp.sqrt(squares)


def _remainders(run: Callable, operands: list[Any]) -> list[Any]:
    """Samples y(s) - y(0) - y'(0) s at |s| = twice the local errors."""
    _, errors = run(operands, None)
    leaves, treedef = jax.tree.flatten(errors)
    zeros = jax.tree.unflatten(treedef, [jnp.zeros_like(e) for e in leaves])

    def sample(key: jax.Array, sign: jax.Array) -> list[Any]:
        # One draw for all: hundreds of small ones take long to compile.
        ends = np.cumsum([0] + [e.size for e in leaves])
        signs = sign * jax.random.rademacher(key, (int(ends[-1]),), jnp.int8)
        shifts = jax.tree.unflatten(
            treedef,
            [
                2 * e * signs[start:end].reshape(e.shape).astype(e.dtype)
                for e, start, end in zip(leaves, ends, ends[1:])
            ],
        )
        y, linear = jax.jvp(
            lambda s: run(operands, s, measure=False)[0], (zeros,), (shifts,)
        )
        moved, _ = run(operands, shifts, measure=False)
        gaps = [m - a - t for m, a, t in zip(moved, y, linear)]
        # A run that was pushed out of the function's domain says nothing.
        return [jnp.where(jnp.isfinite(g), jnp.abs(g), 0) for g in gaps]

    keys = jax.random.split(jax.random.key(0), _SAMPLES)
    signs = jnp.tile(jnp.array([1, -1], jnp.int8), _SAMPLES)
    return lax.map(lambda pair: sample(*pair), (jnp.repeat(keys, 2), signs))
