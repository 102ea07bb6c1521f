"""Equivalence: which convolutions hold a dense layer's parameters, and why.

Everything here is arithmetic on small integers; no array is made. A convolution
has a dense layer's parameters exactly when, in every dimension, output position
``i`` reads input ``i * kernel + j`` with tap ``j``: each tap meets a real input,
positions share none, and none is skipped (Raschka, *Machine Learning Q and AI*,
ch. 12). A single tap may skip inputs: a Dense on every ``stride``-th input.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from ..messages.flags import check_flags, check_kind
from .convolution import (
    Case,
    ConvGeometry,
    resolve_geometry,
    resolve_transposed,
)
from .reasons import why_it_fails, why_it_holds
from .windows import PaddingLike, per_dimension, times


def classify(
    input_shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "VALID",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
) -> Equivalence:
    """Find the dense layer equivalent to a convolution, or why there is none.

    Args:
      input_shape: spatial sizes of the input, such as ``(height, width)``; an int
        is one dimension.
      kernel_size: taps per dimension; an int holds for every dimension.
      strides: step between output positions, per dimension or one int.
      padding: as in ``flax.linen.Conv``: a name (``"VALID"``, ``"SAME"``,
        ``"SAME_LOWER"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"``), one int, an
        int per dimension, or a ``(low, high)`` pair per dimension.
      input_dilation: spacing of the inputs (``lhs_dilation``).
      kernel_dilation: spacing of the kernel's taps (``rhs_dilation``).
      groups: ``feature_group_count``.
      transposed: whether it is a transposed convolution, such as
        ``flax.linen.ConvTranspose``: ``strides`` are then outputs per input, and
        ``padding`` is ``"SAME"``, ``"VALID"``, or zeros around the spaced inputs.

    Returns:
      The case, with the reason in words.

    Raises:
      ValueError: a size is not positive, ranks differ, the padding is unknown, or
        the kernel does not fit into the padded input.

    Source:
      Raschka, *Machine Learning Q and AI* (2024), ch. 12.

    Example:
      >>> classify((7, 7), (7, 7), strides=2).case
      'full_window'
      >>> classify((8, 8), 1, strides=2).reason[-62:]
      'the Dense on the strided subsample x[:, ::2, ::2], 4x4 of 8x8.'
      >>> classify((14, 14), 16, strides=16, transposed=True).case
      'unpatchify'
    """
    check_flags(transposed=transposed)
    if transposed:
        if any(d != 1 for d in per_dimension("input_dilation", input_dilation, None)):
            raise ValueError(
                "input_dilation: expected 1 for a transposed convolution (its strides "
                f"space the inputs), got {input_dilation}. Pass strides alone."
            )
        return _classify(
            resolve_transposed(
                input_shape, kernel_size, strides, padding, kernel_dilation, groups
            ),
            transposed,
        )
    geometry = resolve_geometry(
        input_shape,
        kernel_size,
        strides,
        padding,
        input_dilation,
        kernel_dilation,
        groups,
    )
    return _classify(geometry)


def explain(equivalence: Equivalence) -> str:
    """Explain an equivalence in plain text, with the shapes of both kernels.

    Args:
      equivalence: from :func:`classify`.

    Returns:
      Lines: the geometry in input positions, the case, why it holds or fails, the fix
      if there is one, what the dense side does, and the kernels' shapes in input
      channels ``C`` and output channels ``O``.

    Raises:
      TypeError: ``equivalence`` is of another type.

    Source:
      Raschka, *Machine Learning Q and AI* (2024), ch. 12, and its exercises.

    Example:
      >>> print(explain(classify(16, 4, strides=4)))
      input 16, kernel 4, strides 4, no padding -> output 4
      case: patchify (the Dense and the Conv hold the same parameters)
      why: The windows of 4 lie side by side, so each input is read by one position.
      dense side: space-to-depth into 4 windows, then Dense on each
      kernels: Dense (4*C, O) <-> Conv (4, C, O)
    """
    wanted = "what classify returns"
    check_kind("the equivalence", equivalence, Equivalence, wanted, "classify(7, 7)")
    same = "the Dense and the Conv hold the same parameters"
    if not equivalence.same_parameters:
        same = "no Dense holds the same parameters"
    label = equivalence.case
    if equivalence.case == "grouped":
        label = f"grouped, each group {equivalence.base}"
    dense, conv = _kernel_shapes(equivalence)
    lines = [
        str(equivalence.geometry),
        f"case: {label} ({same})",
        f"why: {equivalence.reason}",
        f"fix: {equivalence.fix}",
        f"dense side: {_dense_side(equivalence)}",
        f"kernels: Dense {dense} <-> Conv {conv}",
    ]
    return "\n".join(line for line in lines if line != "fix: ")


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Result of :func:`classify`.

    Args:
      case: one of :data:`Case`; ``"unrolled"`` means no Dense has the same
        parameters.
      base: for ``"grouped"``, the case of each group; otherwise ``case``.
      reason: why the case holds, or the first condition that fails.
      fix: what would make a Dense equivalent; empty if one is.
      geometry: the classified convolution.

    Example:
      >>> classify(4, 4, groups=2).base
      'full_window'
    """

    case: Case
    base: Case
    reason: str
    fix: str
    geometry: ConvGeometry

    @property
    def same_parameters(self) -> bool:
        """Whether the Dense's entries are the Conv's, each exactly once."""
        return self.case != "unrolled"

    def to_json(self) -> str:
        """Return the equivalence as JSON text."""
        geometry = dataclasses.asdict(self.geometry)
        geometry["output_shape"] = self.geometry.output_shape
        content = {
            "case": self.case,
            "base": self.base,
            "same_parameters": self.same_parameters,
            "reason": self.reason,
            "fix": self.fix,
            "geometry": geometry,
        }
        return json.dumps(content)

    def __str__(self) -> str:
        text = f"{self.case}: {self.reason}"
        return f"{text} {self.fix}" if self.fix else text


def _classify(geometry: ConvGeometry, transposed: bool = False) -> Equivalence:
    base = geometry.base
    if base == "unrolled":
        return Equivalence(base, base, *why_it_fails(geometry, transposed), geometry)
    case = "grouped" if geometry.groups > 1 else base
    return Equivalence(case, base, why_it_holds(geometry), "", geometry)


def _dense_side(equivalence: Equivalence) -> str:
    geometry = equivalence.geometry
    output = times(geometry.output_shape)
    dense = "Dense"
    if equivalence.case == "grouped":
        dense = f"{geometry.groups} Denses, one per group of channels,"
    if equivalence.base == "pointwise":
        subsample = f" of {geometry.subsample}" * bool(geometry.subsample)
        return f"{dense} on the last axis, at every position{subsample}"
    if equivalence.base == "full_window":
        return f"flatten the window (row-major, channel last), then {dense}".rstrip(",")
    if equivalence.base == "unpatchify":
        window = times(geometry.kernel_size)
        return f"{dense} on each input, then depth-to-space of {window} windows"
    if equivalence.base == "patchify":
        return f"space-to-depth into {output} windows, then {dense} on each"
    return "flatten the whole input, then a Dense with repeated entries and zeros"


def _kernel_shapes(equivalence: Equivalence) -> tuple[str, str]:
    geometry = equivalence.geometry
    g = geometry.groups
    channels, out = (f"C/{g}", f"O/{g}") if g > 1 else ("C", "O")
    taps = geometry.window_elements
    rows = channels if taps == 1 else f"{taps}*{channels}"
    if equivalence.base == "unpatchify":
        rows, out = channels, f"{taps}*{out}"
    dense = f"({g}, {rows}, {out})" if g > 1 else f"({rows}, {out})"
    if not equivalence.same_parameters:
        dense = f"({geometry.input_elements}*C, {geometry.output_elements}*O)"
    return dense, f"({', '.join(map(str, geometry.kernel_size))}, {channels}, O)"
