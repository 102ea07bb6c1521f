"""Geometry: where a convolution's taps fall, every choice resolved to numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

from .windows import (
    Dimension,
    PaddingLike,
    PaddingMode,
    check_sizes,
    is_symbolic,
    named_padding,
    padding_pairs,
    per_dimension,
    single,
    times,
    transposed_padding,
)

Case = Literal[
    "pointwise",
    "full_window",
    "patchify",
    "unpatchify",
    "phases",
    "grouped",
    "unrolled",
]

_PADDING_NAMES = ("VALID", "SAME", "SAME_LOWER", "CIRCULAR", "REFLECT", "CAUSAL")


def resolve_transposed(
    input_shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
) -> ConvGeometry:
    """Resolve a transposed convolution to the convolution that computes it.

    That convolution steps by 1 over inputs spaced by ``strides``, as
    ``jax.lax.conv_transpose`` runs it.

    Args:
      input_shape: as for :func:`classify`.
      kernel_size: taps per dimension.
      strides: outputs from one input to the next.
      padding: ``"SAME"``, ``"VALID"``, or amounts as ``flax.linen.ConvTranspose``
        takes them: zeros around the spaced inputs.
      kernel_dilation: spacing of the taps.
      groups: ``feature_group_count``.

    Raises:
      ValueError: as :func:`classify`; also for other padding names.

    Example:
      >>> resolve_transposed((4, 5), 2, strides=2).output_shape
      (8, 10)
    """
    sizes = per_dimension("input_shape", input_shape, None)
    rank = len(sizes)
    kernel = per_dimension("kernel_size", kernel_size, rank)
    steps = per_dimension("strides", strides, rank)
    spread = per_dimension("kernel_dilation", kernel_dilation, rank)
    if isinstance(padding, str):
        name = padding.upper()
        if name not in ("SAME", "VALID"):
            raise ValueError(
                "padding: expected SAME, VALID or (low, high) pairs for a transposed "
                f"convolution, got {padding!r}. Pass the pairs."
            )
        padding = [
            transposed_padding(name, *numbers) for numbers in zip(kernel, steps, spread)
        ]
    return resolve_geometry(sizes, kernel, 1, padding, steps, spread, groups)


def resolve_geometry(
    input_shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "VALID",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
) -> ConvGeometry:
    """Resolve :func:`classify`'s arguments to numbers per dimension.

    The amounts of the named paddings are those of ``flax.linen.Conv`` and
    ``jax.lax.conv_general_dilated``.

    Raises:
      ValueError: as :func:`classify`.

    Example:
      >>> resolve_geometry((5, 6), 3, strides=2, padding="SAME").padding
      ((1, 1), (0, 1))
    """
    sizes = per_dimension("input_shape", input_shape, None)
    rank = len(sizes)
    kernel = per_dimension("kernel_size", kernel_size, rank)
    steps = per_dimension("strides", strides, rank)
    holes = per_dimension("input_dilation", input_dilation, rank)
    spread = per_dimension("kernel_dilation", kernel_dilation, rank)
    mode: PaddingMode = "zeros"
    if isinstance(padding, str):
        name = padding.upper()
        if name not in _PADDING_NAMES:
            raise ValueError(
                f"padding: expected one of {', '.join(_PADDING_NAMES)}, an int, or "
                f"(low, high) pairs, got {padding!r}. Pass padding='VALID' for none."
            )
        if name != "VALID" and any(d != 1 for d in holes):
            raise ValueError(
                f"padding: {name} isn't defined with input_dilation {holes} (JAX "
                "refuses it, too). Pass (low, high) pairs."
            )
        if name == "CAUSAL" and rank != 1:
            raise ValueError(
                f"padding: CAUSAL is for one dimension, input_shape has {rank}. Pass "
                "(low, high) pairs."
            )
        # The other names are amounts of zeros; these two fill the same amounts.
        if name in ("CIRCULAR", "REFLECT"):
            mode = "circular" if name == "CIRCULAR" else "reflect"
        pads = tuple(
            named_padding(name, *numbers)
            for numbers in zip(sizes, kernel, steps, spread)
        )
    else:
        pads = padding_pairs(padding, rank)
    count = single("groups", groups)
    return ConvGeometry(sizes, kernel, steps, pads, mode, holes, spread, count)


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """A convolution's spatial geometry, every choice resolved to numbers.

    Args:
      input_shape: spatial sizes of the input.
      kernel_size: taps per dimension.
      strides: step between output positions.
      padding: ``(low, high)`` per dimension; negative numbers crop, as in
        ``jax.lax.conv_general_dilated``.
      padding_mode: the values of the padding.
      input_dilation: spacing of the inputs; 1 unless the padding is zeros.
      kernel_dilation: spacing of the taps.
      groups: ``feature_group_count``.

    Raises:
      ValueError: the numbers don't define a convolution; names the argument.

    Example:
      >>> resolve_geometry(5, 3, strides=2).output_shape
      (2,)
      >>> resolve_geometry(5, 3, strides=2, padding=1).reads(0)
      ((None, 0, 1), (1, 2, 3), (3, 4, None))
    """

    input_shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: PaddingMode
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    def __post_init__(self):
        rank = len(self.input_shape)
        for name in (
            "input_shape",
            "kernel_size",
            "strides",
            "input_dilation",
            "kernel_dilation",
        ):
            check_sizes(name, getattr(self, name), rank)
        if self.groups < 1:
            raise ValueError(
                f"groups: expected at least 1, got {self.groups}. Pass groups=1."
            )
        if len(self.padding) != rank:
            raise ValueError(
                f"padding: expected {rank} (low, high) pairs, one per dimension, got "
                f"{len(self.padding)}. Pass a pair for each dimension."
            )
        if self.padding_mode not in get_args(PaddingMode):
            raise ValueError(
                f"padding_mode: expected one of {', '.join(get_args(PaddingMode))}, "
                f"got {self.padding_mode!r}. Pass padding_mode='zeros'."
            )
        if self.padding_mode != "zeros" and any(d != 1 for d in self.input_dilation):
            raise ValueError(
                f"padding: expected input_dilation 1 with {self.padding_mode}, got "
                f"{self.input_dilation}. Pass zeros as (low, high) pairs."
            )
        if self.padding_mode != "zeros" and min(map(min, self.padding)) < 0:
            raise ValueError(
                f"padding: expected 0 or more with {self.padding_mode}, got "
                f"{self.padding}. Crop the input before the layer."
            )
        for i, d in enumerate(self.dimensions):
            # A model that is traced with a symbolic size has a kernel that fits.
            if not is_symbolic(d.padded) and d.padded < d.extent:
                raise ValueError(
                    f"kernel_size: {d.kernel} taps"
                    + f" with kernel_dilation {d.spread}" * (d.spread > 1)
                    + f" span {d.extent} inputs in dimension {i}, but the padded "
                    f"input has {max(d.padded, 0)}. Use a smaller kernel or more "
                    "padding."
                )

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The geometry, one dimension at a time."""
        return tuple(
            Dimension(size, kernel, stride, low, high, holes, spread, self.padding_mode)
            for size, kernel, stride, (low, high), holes, spread in zip(
                self.input_shape,
                self.kernel_size,
                self.strides,
                self.padding,
                self.input_dilation,
                self.kernel_dilation,
            )
        )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Spatial sizes of the output."""
        return tuple(d.output for d in self.dimensions)

    @property
    def covered_shape(self) -> tuple[int, ...]:
        """Leading part of the input that a same-parameter case reads.

        What lies beyond is the remainder that the windows drop.
        """
        if self.base in ("pointwise", "unpatchify"):
            return self.input_shape
        return tuple(d.output * d.kernel for d in self.dimensions)

    @property
    def subsample(self) -> str:
        """The inputs that a pointwise convolution reads, if its strides skip any."""
        if self.base != "pointwise" or self.output_shape == self.input_shape:
            return ""
        index = ", ".join(f"::{s}" if s > 1 else ":" for s in self.strides)
        return f"x[:, {index}]"

    @property
    def window_elements(self) -> int:
        """Taps in one window."""
        return math.prod(self.kernel_size)

    @property
    def input_elements(self) -> int:
        """Spatial positions of the input."""
        return math.prod(self.input_shape)

    @property
    def output_elements(self) -> int:
        """Spatial positions of the output."""
        return math.prod(self.output_shape)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution: steps of 1 over spaced inputs."""
        steps = [d.stride for d in self.dimensions if d.output > 1]
        spaced = [d for d in self.dimensions if d.holes > 1]
        # Taps spread like the inputs undo the spacing: a plain convolution again.
        undone = any(d.spread == d.holes and d.kernel > 1 for d in spaced)
        return bool(spaced) and set(steps) <= {1} and not undone

    @property
    def base(self) -> Case:
        """The case of one group; ``"unrolled"`` if no Dense has the same parameters."""
        if not all(d.reads_in_order for d in self.dimensions):
            if all(d.picks_in_order for d in self.dimensions):
                return "pointwise"  # of the inputs that the strides leave
            windows = all(d.writes_in_order for d in self.dimensions)
            return "unpatchify" if windows else "unrolled"
        # A 1x1 kernel on a 1x1 input is also a full window, but pointwise is true of
        # inputs of every size.
        if self.window_elements == 1 and self.output_shape == self.input_shape:
            return "pointwise"
        if self.kernel_size == self.input_shape:
            return "full_window"
        return "patchify"

    def reads(self, dimension: int) -> tuple[tuple[int | None, ...], ...]:
        """Input index that each (output position, tap) of a dimension reads.

        ``None`` stands for padding zeros and for holes of the input dilation.
        """
        d = self.dimensions[dimension]
        return tuple(
            tuple(d.source(i * d.stride + j * d.spread) for j in range(d.kernel))
            for i in range(d.output)
        )

    def __str__(self) -> str:
        words = [
            f"input {times(self.input_shape)}",
            f"kernel {times(self.kernel_size)}",
        ]
        if self.transposed:
            # Its strides are the spacing of the inputs, its padding surrounds them.
            words.append(f"transposed strides {times(self.input_dilation)}")
        else:
            words.append(f"strides {times(self.strides)}")
        words.append(_padding_words(self))
        if any(d != 1 for d in self.input_dilation) and not self.transposed:
            words.append(f"input dilation {times(self.input_dilation)}")
        if any(d != 1 for d in self.kernel_dilation):
            words.append(f"kernel dilation {times(self.kernel_dilation)}")
        if self.groups > 1:
            words.append(f"groups {self.groups}")
        return f"{', '.join(words)} -> output {times(self.output_shape)}"


def _padding_words(geometry: ConvGeometry) -> str:
    if not any(any(pads) for pads in geometry.padding):
        return "no padding"
    mode = "" if geometry.padding_mode == "zeros" else f" ({geometry.padding_mode})"
    return f"padding {', '.join(map(str, geometry.padding))}{mode}"
