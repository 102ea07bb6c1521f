"""What crops share: the layers, the arithmetic, and what is computed crop by crop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ..messages.reports import Report


@dataclasses.dataclass(frozen=True)
class SlideReport(Report):
    """What :func:`fcconv_jax.slide` will do on images of one shape.

    Attributes:
      window: size of a crop.
      stride: step between crops.
      positions: how many crops along each axis.
      crop_flops: of the function on one crop (of a batch).
      flops: of the shared program.
      crop_bytes: largest array of all crops in a batch.
      bytes: largest array of the shared program.
      left: why crops stopped sharing, and how often.
      shares: whether the shared program is taken; else a batch of crops.
      gain: how many times less time it is estimated to take than that batch.
      copied: entries that it copies, to lay out what crops share.
      exact: whether it is the function of each crop; not with ``padding="image"``.
      image_flops: of the other function that ``padding="image"`` gives; the rest is due
        to entries near each crop's border. None where the stride forbids it.

    Example:
      >>> size, positions = (8, 8), (3, 5)
      >>> flops = 100.0, 500.0
      >>> SlideReport(size, (4, 4), positions, *flops, 64, 32, (), True, 2.5, 9).ratio
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
    gain: float
    copied: int
    exact: bool = True
    image_flops: float | None = None

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
        work = f"{_short(self.flops)} FLOPs instead of {_short(every)}"
        if not every:
            work = "no FLOPs in matmuls or convolutions"
        if self.shares:
            less = f": {self.ratio:.1f}x less" if every else ""
            yield f"shared: {work}{less}; estimated speedup {self.gain:.1f}x"
            if self.image_flops:
                borders = self.flops / max(self.image_flops, 1.0)
                yield (
                    f"borders of crops: {borders:.1f}x the FLOPs of padding='image'; "
                    f"{_short(self.copied).rstrip()} entries copied"
                )
            yield (
                f"largest array: {_short(self.bytes)}B instead of "
                f"{_short(self.crop_bytes)}B"
            )
        else:
            yield (
                f"a batch of crops: sharing would take {work}, "
                f"estimated speedup {self.gain:.2f}x"
            )
        if not self.exact:
            yield "padded around the image: not what the crops give alone"
        if self.left:
            yield "crops part at:"
            for why, times in self.left:
                yield f"  {why}" + f" ({times} times)" * (times > 1)


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.3g} {unit}"
        number /= 1000
    return ""
