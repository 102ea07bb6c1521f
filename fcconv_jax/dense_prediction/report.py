"""Report on a dense predictor: the work that crops share, and where sharing ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ..messages.reports import Report


@dataclasses.dataclass(frozen=True)
class SlideReport(Report):
    """Report of :meth:`fcconv_jax.Slide.report` for images of one shape.

    Attributes:
      window: size of a crop.
      stride: step between crops.
      positions: number of crops along each axis.
      crop_flops: FLOPs of the model on one crop (of a batch).
      flops: FLOPs of the program that shares work.
      crop_bytes: size of the largest array, if all crops are one batch.
      bytes: size of the largest array in the program that shares work.
      left: the operations at which sharing ends, with reasons, and how often each does.
      shares: whether the program that shares work is used, or a batch of crops.
      gain: estimated speedup of the program that shares work over that batch.
      copied: number of entries that it copies to arrange the shared work.
      exact: whether the result is the model's on each crop; False with
        ``padding="image"``.
      image_flops: FLOPs with ``padding="image"``, which is a different function; the
        rest is due to entries near each crop's border. None if the stride forbids it.

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
        """How many times fewer FLOPs than with each crop computed separately."""
        return self.crop_flops * math.prod(self.positions) / max(self.flops, 1.0)

    def content(self) -> dict[str, object]:
        """Return the content of :meth:`to_json`."""
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
            yield "padded around the image: other results than on single crops"
        if self.left:
            yield "sharing ends at:"
            for why, times in self.left:
                yield f"  {why}" + f" ({times} times)" * (times > 1)


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.3g} {unit}"
        number /= 1000
    return ""
