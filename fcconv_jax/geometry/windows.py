"""Windows: which inputs a convolution's taps read, in one spatial dimension."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jax import export

PaddingMode = Literal["zeros", "circular", "reflect"]
PaddingLike = str | int | Sequence[int | Sequence[int]]


def named_padding(
    name: str, size: int, kernel: int, stride: int, spread: int
) -> tuple[int, int]:
    """Return the (low, high) amounts of a padding name in one dimension.

    ``SAME`` and ``SAME_LOWER`` as in ``jax.lax.padtype_to_pads``; the others as in
    ``flax.linen.Conv``. All but ``VALID`` count the dilated kernel.

    Example:
      >>> named_padding("SAME", 5, 4, 1, 1), named_padding("CAUSAL", 5, 4, 1, 2)
      ((1, 2), (6, 0))
    """
    extent = (kernel - 1) * spread + 1
    if name == "VALID":
        return 0, 0
    if name == "CAUSAL":
        return extent - 1, 0
    if name in ("CIRCULAR", "REFLECT"):
        return (extent - 1) // 2, extent // 2
    # Of an odd total, SAME pads more at the end: TensorFlow's rule, and so JAX's.
    total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if name == "SAME" else (more, less)


def transposed_padding(
    name: str, kernel: int, stride: int, spread: int
) -> tuple[int, int]:
    """Return a transposed convolution's padding of the spaced inputs in one dimension.

    ``SAME`` and ``VALID`` as in ``jax.lax.conv_transpose``.

    Example:
      >>> transposed_padding("SAME", 4, 2, 1), transposed_padding("VALID", 2, 2, 1)
      ((2, 2), (1, 1))
    """
    extent = (kernel - 1) * spread + 1
    if name == "VALID":
        return extent - 1, stride - 1 + max(extent - stride, 0)
    total = extent + stride - 2
    low = extent - 1 if stride > extent - 1 else -(-total // 2)
    return low, total - low


def padding_pairs(
    padding: int | Sequence[int | Sequence[int]], rank: int
) -> tuple[tuple[int, int], ...]:
    """Read a padding given in numbers as one (low, high) pair per dimension.

    Raises:
      ValueError: there is another number of entries, or one is not an int or a pair.

    Example:
      >>> padding_pairs([1, (0, 2)], 2)
      ((1, 1), (0, 2))
    """
    wrong = ValueError(
        f"padding: expected an int, {rank} ints, {rank} (low, high) pairs, or a name, "
        f"got {padding!r:.60}. Pass padding='VALID' for none."
    )
    if not isinstance(padding, Sequence):
        try:
            both = whole_number(padding)
        except TypeError:
            raise wrong from None
        return ((both, both),) * rank
    if len(padding) != rank:
        raise wrong
    pairs = []
    for entry in padding:
        pair = tuple(entry) if isinstance(entry, Sequence) else (entry, entry)
        try:
            low, high = map(_size, pair)
        except (TypeError, ValueError):
            raise wrong from None
        pairs.append((low, high))
    return tuple(pairs)


def per_dimension(
    name: str, value: int | Sequence[int] | None, rank: int | None
) -> tuple[int, ...]:
    """Read an int (for every dimension), a tuple, or ``None`` (1) as a tuple.

    Raises:
      ValueError: the rank is another, or an entry isn't a positive int.

    Example:
      >>> per_dimension("strides", 2, rank=3)
      (2, 2, 2)
    """
    # Flax and JAX take None for strides and dilations of 1.
    optional = name not in ("input_shape", "kernel_size")
    given = 1 if value is None and optional else value
    entries = given if isinstance(given, Sequence) else (given,) * (rank or 1)
    try:
        numbers = tuple(map(_size, entries))
    except TypeError:
        raise ValueError(
            f"{name}: expected an int or a tuple of ints, got {value!r:.60}. Pass an "
            "int, or one for each dimension."
        ) from None
    check_sizes(name, numbers, len(numbers) if rank is None else rank)
    return numbers


def single(name: str, value: int) -> int:
    """Read a positive int.

    Raises:
      ValueError: it isn't one.

    Example:
      >>> single("groups", 2)
      2
    """
    try:
        number = whole_number(value)
    except TypeError:
        raise ValueError(
            f"{name}: expected an int, got {value!r:.60}. Pass {name}=1 or more."
        ) from None
    if number < 1:
        raise ValueError(
            f"{name}: expected at least 1, got {number}. Pass {name}=1 or more."
        )
    return number


def check_sizes(name: str, numbers: tuple[int, ...], rank: int) -> None:
    """Raise a ValueError that names the argument unless all are positive sizes."""
    if rank < 1:
        raise ValueError(
            f"{name}: expected at least one spatial dimension, got (). Pass the sizes "
            "without the batch and the channels."
        )
    if len(numbers) != rank:
        raise ValueError(
            f"{name}: expected {rank} entries, one per dimension of input_shape, or "
            f"one int, got {numbers}. Pass spatial sizes alone, without batch and "
            "channels."
        )
    if any(not is_symbolic(number) and number < 1 for number in numbers):
        raise ValueError(
            f"{name}: expected every entry to be at least 1, got {numbers}. Pass "
            "positive sizes."
        )


def is_symbolic(size: Any) -> bool:
    """Return whether a size is one of ``jax.export``'s symbols, or made of some."""
    return not isinstance(size, int) and export.is_symbolic_dim(size)


def whole_number(value: Any) -> int:
    """Return an integer of any type as an int.

    Raises:
      TypeError: it isn't one; True and False, which Python counts as 1 and 0, aren't.

    Example:
      >>> import numpy as np
      >>> whole_number(np.int64(3))
      3
    """
    if isinstance(value, bool):
        raise TypeError(f"Expected an int, got {value}.")
    return operator.index(value)


def _size(entry: Any) -> int:
    return entry if is_symbolic(entry) else whole_number(entry)


def times(sizes: Iterable[int]) -> str:
    """Write sizes as in ``7x7``."""
    return "x".join(map(str, sizes))


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One spatial dimension of a convolution.

    Args:
      size: inputs.
      kernel: taps.
      stride: step between output positions.
      low: padding before the inputs.
      high: padding after them.
      holes: input dilation.
      spread: kernel dilation.
      mode: what the padding holds.

    Example:
      >>> Dimension(7, 7, 2, 1, 1, 1, 1, "zeros").output
      2
    """

    size: int
    kernel: int
    stride: int
    low: int
    high: int
    holes: int
    spread: int
    mode: PaddingMode

    @property
    def dilated(self) -> int:
        """Size of the input with its holes."""
        return (self.size - 1) * self.holes + 1

    @property
    def padded(self) -> int:
        """Size of the input with holes and padding."""
        return self.dilated + self.low + self.high

    @property
    def extent(self) -> int:
        """Padded inputs between a window's first tap and its last, both counted."""
        return (self.kernel - 1) * self.spread + 1

    @property
    def output(self) -> int:
        """Output positions."""
        return (self.padded - self.extent) // self.stride + 1

    @property
    def reaches_padding(self) -> bool:
        """Whether the windows start elsewhere than at the input or run past it."""
        last = (self.output - 1) * self.stride + self.extent
        return self.low != 0 or last > self.dilated

    @property
    def reads_in_order(self) -> bool:
        """Whether position ``i``, tap ``j`` reads input ``i * kernel + j`` throughout.

        In closed form: the place ``i * stride + j * spread - low`` must stand for
        ``holes * (i * kernel + j)``. Zeros stand for nothing, so the two are equal;
        circular padding repeats with the period ``size`` and reflection with
        ``2 * (size - 1)``, forwards and backwards.
        """
        if self.output * self.kernel > self.size:
            return False
        period, turns = 0, (1,)
        if self.mode == "circular":
            period = self.size
        elif self.mode == "reflect":
            # A single input mirrors to itself, with a period of 1 and not of 0.
            period, turns = max(2 * (self.size - 1), 1), (1, -1)

        def agree(a: int, b: int) -> bool:
            return (a - b) % period == 0 if period else a == b

        return agree(self.low, 0) and any(
            (self.kernel == 1 or agree(self.spread, turn * self.holes))
            and (
                self.output == 1 or agree(self.stride, turn * self.holes * self.kernel)
            )
            for turn in turns
        )

    @property
    def picks_in_order(self) -> bool:
        """Whether its one tap reads every ``stride``-th input, from the first on."""
        return (
            self.kernel == self.holes == 1
            and self.output == -(-self.size // self.stride)
            and not self.reaches_padding
        )

    @property
    def writes_in_order(self) -> bool:
        """Whether output ``i * kernel + j`` is tap ``kernel - 1 - j`` of input ``i``.

        Then each input has a window of outputs to itself. A single input has one
        whatever the stride.
        """
        apart = self.size == 1 or self.holes == self.kernel
        return (
            self.mode == "zeros"
            and apart
            and (self.spread == 1 or self.kernel == 1)
            and self.low == self.kernel - 1
            and self.output == self.size * self.kernel
            and (self.stride == 1 or self.output == 1)
        )

    def source(self, place: int) -> int | None:
        """Input index at a place of the padded input, ``None`` if there is none."""
        place -= self.low
        if self.mode == "circular":
            return place % self.size
        if self.mode == "reflect":
            place %= max(2 * (self.size - 1), 1)
            return min(place, 2 * (self.size - 1) - place)
        if 0 <= place < self.dilated and place % self.holes == 0:
            return place // self.holes
        return None
