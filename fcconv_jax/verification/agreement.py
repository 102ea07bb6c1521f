"""How far two forms agree: in float64, and in the precision that they run in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..params.leaves import leaf_path
from ..plan.paths import join_path
from ..tracing.arguments import is_key

Quantity = Literal["outputs", "layers", "gradients", "one step"]

# Two forms of one function add the same numbers in another order: in float64 that
# changes 1e-16 to 5e-15 of the largest value (models of 2 to 50 layers, gradients
# included). A real difference that any working precision could show is above 1e-9, an
# ulp of a float32 weight included. This lies between, far from both.
THRESHOLD = 1e-12
# A value that is nothing but rounding, such as the gradient of a bias that the next
# softmax takes out again, is measured by the largest value beside it.
_BESIDE = 1e-2
# The original's own error, measured in its working precision, shows how much the
# program magnifies rounding; in float64 it magnifies it as much, from a smaller ulp.
_MAGNIFIED = 64.0
# In working precision: the original's error times this, and a few units in the last
# place. PyTorch's inductor accepts what is within twice the original's error.
_TIMES = 2.0
_ULPS = 4.0


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One array of both forms, compared in float64.

    Attributes:
      quantity: what it is.
      path: which: ``"output"``, ``"fc1"``, ``"params/fc1/kernel"``.
      difference: the largest difference.
      scale: the largest value.
      allowed: the largest difference that passes.
      reason: what differs, where it does not pass.
      nonfinite: entries that are NaN or infinite in both alike, and so not compared.
      size: all of its entries.
    """

    quantity: Quantity
    path: str
    difference: float
    scale: float
    allowed: float
    reason: str = ""
    nonfinite: int = 0
    size: int = 0

    @property
    def unseen(self) -> bool:
        """Whether it has entries, and none that is finite: nothing was compared."""
        return 0 < self.size == self.nonfinite

    @property
    def note(self) -> str:
        """How many entries were not compared; empty where all were."""
        return nonfinite_note(self.path, self.nonfinite, self.size)

    @property
    def passed(self) -> bool:
        """Whether the two are the same but for float64's own rounding."""
        return not self.reason

    @property
    def digits(self) -> float:
        """To how many decimal digits of the largest value the two agree.

        16 is all that float64 holds, and what equal arrays are given.
        """
        if self.unseen:
            return 0.0
        if not self.difference:
            return 16.0
        if not (self.scale and math.isfinite(self.difference)):
            return 0.0
        return min(16.0, max(0.0, -math.log10(self.difference / self.scale)))


@dataclasses.dataclass(frozen=True)
class WorkingError:
    """The error of each form on one backend, against the float64 reference.

    Attributes:
      quantity: what was compared.
      path: which array.
      scale: the largest value.
      original: largest error of the original form, as a part of it.
      converted: that of the converted form.
      allowed: the largest error that passes for the converted form.
      reason: what is wrong, where it does not pass.
    """

    quantity: Quantity
    path: str
    scale: float
    original: float
    converted: float
    allowed: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the converted form is as good as the original."""
        return not self.reason


def nonfinite_note(path: str, nonfinite: int, size: int) -> str:
    """Return the sentence about entries of which nothing was compared.

    Example:
      >>> nonfinite_note("output", 3, 12)
      "'output': 3 of 12 entries (25%) are NaN or infinite, and were not compared"
      >>> nonfinite_note("output", 0, 12)
      ''
    """
    if not nonfinite:
        return ""
    share = 100 * nonfinite / size
    return (
        f"{path!r}: {nonfinite} of {size} entries ({share:.3g}%) are NaN or infinite, "
        "and were not compared"
    )


def named_leaves(tree: PyTree, root: str) -> list[tuple[str, Any]]:
    """Return the leaves of a tree with their paths, below ``root``.

    Example:
      >>> named_leaves({"a": 1, "b": [2, 3]}, "output")
      [('output/a', 1), ('output/b/0', 2), ('output/b/1', 3)]
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(join_path(root, leaf_path(path)), leaf) for path, leaf in leaves]


def agree(
    quantity: Quantity,
    wanted: Sequence[tuple[str, Any]],
    found: Sequence[tuple[str, Any]],
    magnified: Sequence[float | np.ndarray] | None = None,
) -> list[Agreement]:
    """Compare arrays of both forms that were computed in float64.

    Args:
      quantity: what they are.
      wanted: path and array of the original form.
      found: those of the converted form, in the same order.
      magnified: for each, the largest difference that the program's own magnifying of
        rounding explains, see :func:`magnified_rounding`; one for all or each entry.

    Example:
      >>> x = np.arange(3.0)
      >>> agree("outputs", [("y", x)], [("y", x + 1e-15)])[0].passed
      True
      >>> agree("outputs", [("y", x)], [("y", x * (1 + 1e-9))])[0].reason
      'expected 2 at (2,), got 2.000000002: they agree to 9.0 digits of the ...'
    """
    scales = [largest(array) for _, array in wanted]
    beside = _BESIDE * max(scales, default=0.0)
    extra = magnified or [0.0] * len(wanted)
    return [
        _agree(quantity, path, want, got, max(scale, beside), more)
        for (path, want), (_, got), scale, more in zip(
            wanted, found, scales, extra, strict=True
        )
    ]


def _agree(
    quantity: Quantity,
    path: str,
    want: Any,
    got: Any,
    scale: float,
    extra: float | np.ndarray,
) -> Agreement:
    if is_key(want):
        want, got = (np.asarray(jax.random.key_data(key)) for key in (want, got))
    want, got = np.asarray(want), np.asarray(got)
    if want.shape != got.shape:
        shapes = f"expected shape {want.shape}, got {got.shape}"
        return Agreement(quantity, path, math.inf, scale, 0.0, shapes)
    if not np.issubdtype(want.dtype, np.inexact):
        far = abs(want.astype(np.float64) - got.astype(np.float64))
        # Whole numbers beyond 2**53 may differ by less than float64 shows.
        off = np.where(want == got, 0.0, np.maximum(far, 1.0))
        nonfinite, limit = 0, np.zeros(want.shape)
    else:
        off, nonfinite = off_by(want, got)
        limit = np.broadcast_to(np.maximum(THRESHOLD * scale, extra), off.shape)
    worst, allowed = float(off.max(initial=0.0)), float(limit.max(initial=0.0))
    beyond = off > limit
    found = Agreement(quantity, path, worst, scale, allowed, "", nonfinite, off.size)
    if found.unseen and quantity in ("outputs", "layers"):
        return dataclasses.replace(found, reason="nothing was compared")
    if not beyond.any():
        return found
    worst_at = int(np.where(beyond, off, -1.0).argmax())
    index = tuple(int(i) for i in np.unravel_index(worst_at, off.shape))
    reason = (
        f"expected {_short(want[index])} at {index}, got {_short(got[index])}: they "
        f"agree to {found.digits:.1f} digits of the largest value in float64, "
        f"{-math.log10(THRESHOLD):.0f} are expected of two forms of one function"
    )
    return dataclasses.replace(found, reason=reason)


def off_by(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the difference of each entry, infinite where only one is a number.

    And how many entries are NaN or infinite in both alike.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        off = abs(want - got)
    alike = (want == got) | (np.isnan(want) & np.isnan(got))
    odd = ~np.isfinite(want) | ~np.isfinite(got)
    off = np.where(alike, 0.0, np.where(odd, np.inf, off))
    return off, int((odd & alike).sum())


def magnified_rounding(error: WorkingError, unit: float) -> float:
    """Return the float64 difference that a program's magnified rounding explains."""
    return _MAGNIFIED * error.original * error.scale * 2.0**-53 / unit


def working_errors(
    quantity: Quantity,
    reference: Sequence[tuple[str, Any]],
    originals: Sequence[Sequence[Any]],
    converted: Sequence[Any],
) -> list[WorkingError]:
    """Compare both forms, as a backend computed them, with the reference.

    Args:
      quantity: what the arrays are.
      reference: path and array in float64.
      originals: the original form's arrays: on the inputs, and on inputs and params
        that were moved by an ulp, which separates a lucky error from a typical one.
      converted: the converted form's arrays.

    Returns:
      One entry for each array of floats.
    """
    beside = _BESIDE * max((largest(y) for _, y in reference), default=0.0)
    found = []
    for number, (path, want) in enumerate(reference):
        mine = [np.asarray(arrays[number]) for arrays in originals if not is_key(want)]
        if is_key(want) or not jnp.issubdtype(mine[0].dtype, jnp.inexact):
            continue  # integers are compared in the reference alone
        got = np.asarray(converted[number])
        found.append(
            _working_error(quantity, path, np.asarray(want), mine, got, beside)
        )
    return found


def _working_error(
    quantity: Quantity,
    path: str,
    want: np.ndarray,
    mine: Sequence[np.ndarray],
    got: np.ndarray,
    beside: float,
) -> WorkingError:
    eps = float(jnp.finfo(mine[0].dtype).eps)
    wide = np.complex128 if np.iscomplexobj(want) else np.float64
    first, *others = [array.astype(wide) for array in mine]
    got = got.astype(wide).reshape(want.shape)
    finite = np.isfinite(want) & np.isfinite(first)
    scale = max(largest(want[finite]), beside) or 1.0

    def error(array: np.ndarray) -> float:
        off = abs(np.where(finite, array - want, 0.0))
        return float(off.max(initial=0.0)) / scale

    with np.errstate(invalid="ignore"):
        own, theirs = error(first), error(got)
        typical = max(
            [own, *(error(x) for x in others if np.isfinite(x[finite]).all())]
        )
    allowed = _TIMES * typical + _ULPS * eps
    reason = ""
    if not (finite | _alike(first, got)).all():
        index = tuple(int(i) for i in np.argwhere(~(finite | _alike(first, got)))[0])
        reason = (
            f"expected {first[index].item()!r} at {index}, got {got[index].item()!r}"
        )
    elif not theirs <= allowed:  # also where it is NaN
        reason = (
            f"expected an error of at most {allowed:.1e} of the largest value (the "
            f"original's is {typical:.1e}, in {mine[0].dtype}), got {theirs:.1e}: the "
            "converted form is computed in a lower precision"
        )
    return WorkingError(quantity, path, scale, own, theirs, allowed, reason)


def _short(value: Any) -> str:
    """A number with as many digits as show the difference."""
    number = value.item()
    # A difference beyond the threshold of 1e-12 shows in 13 digits.
    return f"{number:.13g}" if isinstance(number, float) else repr(number)


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def largest(array: Any) -> float:
    """Return the size of the largest finite entry."""
    if is_key(array):
        return 0.0
    array = np.asarray(array)
    if not array.size or array.dtype == object:
        return 0.0
    sizes = abs(array.astype(np.complex128 if np.iscomplexobj(array) else np.float64))
    return float(np.where(np.isfinite(sizes), sizes, 0.0).max())


def unseen(array: np.ndarray) -> bool:
    """Whether an array of floats has entries, and none that is finite."""
    inexact = jnp.issubdtype(array.dtype, jnp.inexact)
    return bool(inexact and array.size and not np.isfinite(array).any())
