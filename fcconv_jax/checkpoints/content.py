"""Two checkpoints compared leaf by leaf, by what they hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..messages.errors import CheckpointError
from ..messages.reports import Report, Table
from ..plan import Plan, in_words
from .checkpoint import Checkpoint, is_array, iter_leaves
from .entries import LazyLeaf
from .extents import Advance


@dataclasses.dataclass(frozen=True)
class LeafDifference:
    """A leaf in which two checkpoints differ."""

    path: str
    what: str


@dataclasses.dataclass(frozen=True)
class ContentReport(Report):
    """Report of :func:`verify_checkpoint`.

    Attributes:
      src: path of the first checkpoint.
      dst: path of the second.
      plan: the plan that converts ``src`` to ``dst``; None if their forms are the same.
      leaves: the number of leaves that were compared.
      moved: how many of them the plan converts.
      nbytes: bytes of all entries.
      differences: the leaves in which they differ.
    """

    src: Path
    dst: Path
    plan: Plan | None
    leaves: int
    moved: int
    nbytes: int
    differences: tuple[LeafDifference, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """Each leaf that differs, and how."""
        return tuple(f"{d.path!r}: {d.what}" for d in self.differences)

    @property
    def headline(self) -> str:
        """Whether they hold the same bits, each in its form."""
        form = f" to {in_words(self.plan.to)}" if self.plan else ""
        if self.passed:
            return (
                f"SAME: {self.leaves} leaves, {self.nbytes} bytes, bit for bit; "
                f"{self.moved} of them moved{form}"
            )
        return (
            f"DIFFERENT: {len(self.differences)} of {self.leaves} leaves; "
            f"{self.moved} of them moved{form}"
        )

    @property
    def tables(self) -> Sequence[Table]:
        """The leaves that differ."""
        rows = [(d.path, d.what) for d in self.differences]
        return [[("leaf", "difference"), *rows]] if rows else []

    def content(self) -> dict[str, object]:
        """Return the content of :meth:`to_json`."""
        content = {**super().content(), "to": self.plan and self.plan.to}
        del content["plan"]
        return content


def differences(
    meant: Checkpoint, found: Checkpoint, scratch: Path | None, advance: Advance
) -> Iterator[LeafDifference]:
    """Yield the leaves in which one checkpoint is not what another says it should be.

    Args:
      meant: with the moves that lead to what is expected.
      found: of the same names.
      scratch: folder for large arrays that cannot be read in the order wanted; None
        to hold them in memory.
      advance: called with the number of bytes compared since.
    """
    want = {"/".join(parts): leaf for parts, leaf in iter_leaves(meant.tree)}
    have = {"/".join(parts): leaf for parts, leaf in iter_leaves(found.tree)}
    for name in [*want, *(have.keys() - want.keys())]:
        if name not in have:
            yield LeafDifference(name, "is missing")
        elif name not in want:
            yield LeafDifference(name, "is not expected")
        else:
            what = _difference(want[name], have[name], scratch, advance)
            if what:
                yield LeafDifference(name, what)


def _difference(want: Any, have: Any, scratch: Path | None, advance: Advance) -> str:
    if not isinstance(want, LazyLeaf) and not isinstance(have, LazyLeaf):
        # Formats keep scalars in ways of their own.
        return "" if _same_value(want, have) else f"{have!r:.60}, expected {want!r:.60}"
    if not is_array(want) or not is_array(have):
        return f"{_kind(have)}, expected {_kind(want)}"
    want, have = LazyLeaf.of(want), LazyLeaf.of(have)
    if (want.shape, want.dtype) != (have.shape, have.dtype):
        return f"{_kind(have)}, expected {_kind(want)}"
    try:
        differs = want.differs(have.entries, scratch, advance)
    except CheckpointError as error:
        return str(error)
    return f"{_kind(have)}: other entries" if differs else ""


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}" if is_array(leaf) else f"{leaf!r:.60}"


def _same_value(want: Any, have: Any) -> bool:
    if isinstance(want, np.generic) and isinstance(have, np.generic):
        # As bytes: NaN doesn't equal itself, and -0 equals 0.
        return want.dtype == have.dtype and want.tobytes() == have.tobytes()
    if isinstance(want, float) and isinstance(have, float):
        both_nan = math.isnan(want) and math.isnan(have)
        return both_nan or (want == have)
    # In Python True equals 1, and 1 equals 1.0.
    return type(want) is type(have) and want == have
