"""What crops share: the layers, the arithmetic, and what is computed crop by crop."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class SlideReport:
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

    def __str__(self) -> str:
        count = "x".join(map(str, self.positions))
        window, step = "x".join(map(str, self.window)), "x".join(map(str, self.stride))
        lines = [f"{count} crops of {window}, {step} apart"]
        every = self.crop_flops * math.prod(self.positions)
        if self.shares:
            lines += [
                f"shared: {_short(self.flops)} FLOPs instead of {_short(every)}: "
                f"{self.ratio:.1f}x less",
                f"largest array: {_short(self.bytes)}B instead of "
                f"{_short(self.crop_bytes)}B",
            ]
        else:
            lines.append(
                f"a batch of crops: sharing would take {_short(self.flops)} FLOPs "
                f"instead of {_short(every)}"
            )
        if not self.exact:
            lines.append("padded around the image: not what the crops give alone")
        if self.left:
            lines.append("computed crop by crop from here on:")
            lines += [f"  {why}" + f" ({n} times)" * (n > 1) for why, n in self.left]
        return "\n".join(lines)


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.3g} {unit}"
        number /= 1000
    return ""
