"""What crops share: the layers, the arithmetic, and what is computed crop by crop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ..messages.reports import Report


@dataclasses.dataclass(frozen=True)
class SlideReport(Report):
    """What :func:`fcconv_jax.slide` will do on images of one shape.

    Args:
      window: size of a crop.
      stride: step between crops.
      positions: how many crops along each axis.
      crop_flops: of the function on one crop (of a batch).
      flops: of the shared program.
      crop_bytes: largest array of all crops in a batch.
      bytes: largest array of the shared program.
      left: why crops stopped sharing, and how often.
      shares: whether the shared program is taken; else a batch of crops.
      exact: whether it is the function of each crop; not with ``padding="image"``.

    Example:
      >>> SlideReport((8, 8), (4, 4), (3, 5), 100.0, 500.0, 64, 32, (), True).ratio
      3.0
    """

    window: tuple[int, ...]
    stride: tuple[int, ...]
    positions: tuple[int, ...]
    crop_flops: float
    flops: float
    crop_bytes: int
    bytes: int
    left: tuple[tuple[str, int], ...]
    shares: bool
    exact: bool = True

    @property
    def ratio(self) -> float:
        """How many times less arithmetic than on each crop."""
        return self.crop_flops * math.prod(self.positions) / max(self.flops, 1.0)

    def content(self) -> dict[str, object]:
        """What :meth:`to_json` writes."""
        return {**super().content(), "ratio": self.ratio}

    @property
    def headline(self) -> str:
        """How many crops there are, and of what size."""
        count = "x".join(map(str, self.positions))
        window, step = "x".join(map(str, self.window)), "x".join(map(str, self.stride))
        return f"{count} crops of {window}, {step} apart"

    @property
    def details(self) -> Iterator[str]:
        """The arithmetic and the memory, and what stops sharing."""
        every = self.crop_flops * math.prod(self.positions)
        if self.shares:
            yield (
                f"shared: {_short(self.flops)} FLOPs instead of {_short(every)}: "
                f"{self.ratio:.1f}x less"
            )
            yield (
                f"largest array: {_short(self.bytes)}B instead of "
                f"{_short(self.crop_bytes)}B"
            )
        else:
            yield (
                f"a batch of crops: sharing would take {_short(self.flops)} FLOPs "
                f"instead of {_short(every)}"
            )
        if not self.exact:
            yield "padded around the image: not what the crops give alone"
        if self.left:
            yield "computed crop by crop from here on:"
            for why, times in self.left:
                yield f"  {why}" + f" ({times} times)" * (times > 1)


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.3g} {unit}"
        number /= 1000
    return ""
