"""Integers that a contraction sums without rounding, drawn so that no defect hides.

The draws of a certificate: random ones, wide ones and placement, see
:mod:`.certificate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .arithmetic import Arithmetic

# Significant bits that no format between float32 and bfloat16, TF32, float16 keeps.
WIDE_BITS = 12
# The placement proof runs only if it takes no more calls than this.
_PLACEMENT_CALLS = 64
_MISS = 1e-9


@dataclasses.dataclass(frozen=True)
class Draws:
    """Entries in [-size, size], at most ``terms`` matmuls a sum, ``probes`` draws."""

    size: int
    terms: int
    probes: int
    largest_entry: int

    @property
    def set_size(self) -> int:
        """How many integers an entry is drawn from."""
        return 2 * self.size + 1


def integers(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Draw integers in [-size, size]."""
    return rng.integers(-size, size, shape, endpoint=True)


def integer_limit(dtype: DTypeLike) -> int:
    """Return the largest N such that the dtype holds all integers up to N in size."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).max)
    info = jnp.finfo(dtype)
    return min(2 ** (info.nmant + 1), int(min(float(info.max), 2.0**62)))


def plan_draws(
    arithmetic: Arithmetic, limits: tuple[int, int], reduction: int, probes: int | None
) -> Draws:
    """Choose the integers that need the fewest calls for the wanted certainty."""
    entry = min(limits[0], arithmetic.exact_inputs)
    total = min(limits[1], arithmetic.exact_integers)
    best: tuple[int, int] | None = None
    plan = None
    for size in range(1, min(entry, math.isqrt(total)) + 1):
        # terms * size**2 from the matmuls and size from the bias.
        terms = min(reduction, (total - size) // size**2)
        # From some 2**15 on two draws bring a miss below 1e-9: larger integers save
        # none.
        if terms < 1 or size > 2**15:
            break
        needed = probes or math.ceil(math.log(_MISS) / math.log(2 / (2 * size + 1)))
        cost = (needed * math.ceil(reduction / terms), needed)
        # With the number of probes given, the largest set that keeps x dense is best.
        if best is None or cost < best or (cost == best and probes):
            best, plan = cost, Draws(size, terms, needed, min(entry, total))
    if plan is None:
        raise ValueError(
            f"no exact probe exists: sums of integers are exact only up to {total} and "
            f"entries up to {entry}; certify in a wider dtype"
        )
    return plan


def plan_wide_draws(
    arithmetic: Arithmetic, limits: tuple[int, int], reduction: int
) -> Draws | None:
    """Return draws of 12 bits on one side; None if the arithmetic can't keep them."""
    size = 2**WIDE_BITS - 1
    entry = min(limits[0], arithmetic.exact_inputs)
    total = min(limits[1], arithmetic.exact_integers)
    terms = min(reduction, (total - size) // size)  # and the bias
    return None if entry < size or terms < 1 else Draws(size, terms, 1, size)


def number_classes(
    x: jax.ShapeDtypeStruct, reduction: int, index: np.ndarray | None, plan: Draws
) -> np.ndarray | None:
    """Number the class of each entry of an example; None when x may be dense."""
    if plan.terms >= reduction:
        return None
    rest = tuple(x.shape[1:])
    size = math.prod(rest)
    if index is not None:
        if np.shape(index) != rest:
            raise ValueError(
                f"Expected reduction_index of shape {rest}, as x has it, got "
                f"{np.shape(index)}. Pass the class of each entry of one example."
            )
        flat = np.asarray(index).reshape(-1)
    elif size == reduction or (rest and rest[-1] % reduction == 0):
        flat = np.arange(size) % reduction
    else:
        flat = np.arange(size)
    return (flat // plan.terms).reshape(rest)


def random_draws(
    rng: np.random.Generator, shapes: Any, plan: Draws, classes: np.ndarray | None
) -> Iterator[tuple[Any, Any, Any]]:
    """Yield x, kernel and bias, all entries of one size."""
    sizes = (plan.size, plan.size, plan.size)
    for _ in range(plan.probes):
        yield from _draw(rng, shapes, sizes, classes)


def wide_draws(
    rng: np.random.Generator,
    shapes: Any,
    plan: Draws | None,
    classes: np.ndarray | None,
) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each side of the products large in turn."""
    for sizes in ((1, plan.size, plan.size), (plan.size, 1, plan.size)) if plan else ():
        yield from _draw(rng, shapes, sizes, classes)


def _draw(
    rng: np.random.Generator,
    shapes: Any,
    sizes: tuple[int, int, int],
    classes: np.ndarray | None,
) -> Iterator[tuple[Any, Any, Any]]:
    """Yield one draw of kernel and bias, and of x as a whole or class by class."""
    x, kernel, bias = shapes
    x_size, kernel_size, bias_size = sizes
    k = integers(rng, kernel.shape, kernel_size)
    b = None if bias is None else integers(rng, bias.shape, bias_size)
    if classes is None:
        yield integers(rng, x.shape, x_size), k, b
    else:
        # Every example holds every class in its turn; the examples differ in which.
        count = int(classes.max()) + 1
        for first in range(count):
            turn = (first + np.arange(x.shape[0])) % count
            mask = classes[None] == turn.reshape(-1, *[1] * classes.ndim)
            yield integers(rng, x.shape, x_size) * mask, k, b


def placement_draws(shapes: Any, plan: Draws) -> Iterator[tuple[Any, Any, Any]]:
    """Yield one-hot x, and kernels whose entries are their own numbers."""
    x, kernel, bias = shapes
    batch, size = x.shape[0], math.prod(x.shape[1:])
    # Entries are numbered from 1 in digits of this base, so that each one is exact.
    base = plan.largest_entry
    entries = max(math.prod(kernel.shape), math.prod(bias.shape) if bias else 0)
    digits = 1
    while base**digits <= entries:
        digits += 1
    if batch == 0 or (math.ceil(size / batch) + 1) * digits > _PLACEMENT_CALLS:
        return

    def digit(shape: tuple[int, ...], place: int) -> np.ndarray:
        numbers = np.arange(1, math.prod(shape) + 1).reshape(shape)
        return numbers // base**place % base

    for place in range(digits):
        k = digit(kernel.shape, place)
        none = None if bias is None else np.zeros(bias.shape, int)
        for first in range(0, size, batch):
            # The last call wraps around, to keep one shape and so one compiled program.
            xs = np.eye(size, dtype=int)[np.arange(first, first + batch) % size]
            yield xs.reshape(x.shape), k, none
        if bias is not None:
            zeros = np.zeros(x.shape, int)
            yield zeros, np.zeros(kernel.shape, int), digit(bias.shape, place)
