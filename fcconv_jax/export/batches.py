"""Files for any batch size: files of two sizes show what depends on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..frontends.bound import BoundModel
from ..messages.errors import ExportError
from .proof import Proof, reference_of, whole_errors
from .shipped import Shipped

# With axes of one, fewer moves would be needed than other sizes need.
SIZES = (2, 3)
TRIED = (1, 3, 5)


def with_batch(bound: BoundModel, size: int) -> BoundModel:
    """Return the same call on inputs of another batch size, repeated or cut.

    Raises:
      ExportError: the inputs' first axes have several sizes.
    """
    arrays = [np.asarray(x) for x in bound.arrays]
    sizes = {x.shape[0] if x.ndim else None for x in arrays}
    if len(sizes) != 1 or None in sizes:
        raise ExportError(
            "Expected inputs whose first axis is the batch for any_batch=True, got "
            f"{', '.join(str(x.shape) for x in arrays)}. Drop any_batch=True."
        )
    return bound.with_arrays([np.resize(x, (size, *x.shape[1:])) for x in arrays])


def of_any_batch(operation: str, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the numbers that an operation is given, -1 for what the batch decides.

    Args:
      operation: for the message.
      one: the numbers for the first of :data:`SIZES`.
      other: those for the second.

    Raises:
      ExportError: they don't grow with the batch in one place.

    Example:
      >>> of_any_batch("RESHAPE", np.array([2, 12]), np.array([3, 12]))
      array([-1, 12])
    """
    first, second = SIZES
    if one.shape == other.shape and one.dtype.kind == "i":
        off = np.flatnonzero(one != other)
        if len(off) == 1 and (one[off] * second == other[off] * first).all():
            found = one.copy()
            found[off] = -1
            return found
    raise depends(operation)


def depends(operation: str) -> ExportError:
    """Return the error for an operation that is another one for each batch size."""
    return ExportError(
        f"Expected a model for any batch size, got one whose {operation} depends on "
        "the size. Drop any_batch=True to export it for one size."
    )


def tried(bound: BoundModel, shipped: Shipped, names: Any, proof: Proof) -> Proof:
    """Return a proof to which runs of the file with other batch sizes are added."""
    failures, notes, outputs = list(proof.failures), list(proof.notes), [*proof.outputs]
    for size in TRIED:
        reference, _ = reference_of(with_batch(bound, size))
        if reference is None:
            notes.append(f"batch size {size}: not run, for lack of a reference")
            continue
        try:
            for error in whole_errors(shipped, reference, names):
                path = f"{error.path}, batch size {size}"
                outputs.append(dataclasses.replace(error, path=path))
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            failures.append(f"batch size {size}: the file does not run: {first}")
    return dataclasses.replace(
        proof,
        outputs=tuple(outputs),
        failures=tuple(failures),
        notes=(*notes, f"for any batch size; run with {TRIED}"),
    )
