"""One pass beside a loop over patches in PyTorch, as MONAI and TIAToolbox run it.

    python benchmarks/patches.py [NAME ...] --out benchmarks/results

Both run the same PyTorch Module at the network's own stride, on an image in memory. The
loop cuts patches, stacks them and calls the Module, in batches of 4 and of 16: the
quickest counts. Calls are interleaved in one process; medians of CPU seconds; float32.
Run it on idle cores: on busy ones, PyTorch's threads wait by spinning, which counts.
The Module needs the extra ``torch``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from running import cpu_seconds, write_row

import fcconv_jax as fc

_SIDE, _ROUNDS = 10, 3
_BATCHES = (4, 16)


class Plain(torch.nn.Module):
    """Three times two convolutions 3x3 without padding and a pool; a head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for before, width in ((3, 16), (16, 32), (32, 64)):
            for size in (before, width):
                layers += [torch.nn.Conv2d(size, width, 3), torch.nn.ReLU()]
            layers.append(torch.nn.MaxPool2d(2))
        head = (
            torch.nn.Linear(64 * 12 * 12, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 10),
        )
        self.layers = torch.nn.Sequential(*layers, torch.nn.Flatten(), *head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps crops ``(N, 3, 128, 128)`` to scores ``(N, 10)``."""
        return self.layers(x)


class Block(torch.nn.Module):
    """A residual block of ResNet-18."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
        self.inner = torch.nn.Sequential(
            conv(before, width, 3, stride, 1, bias=False),
            norm(width),
            torch.nn.ReLU(),
            conv(width, width, 3, 1, 1, bias=False),
            norm(width),
        )
        self.beside = torch.nn.Sequential()
        if stride > 1 or before != width:
            self.beside.append(conv(before, width, 1, stride, bias=False))
            self.beside.append(norm(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(N, before, n, n)`` to ``(N, width, m, m)``."""
        return torch.relu(self.inner(x) + self.beside(x))


class ResNet18(torch.nn.Module):
    """ResNet-18 as torchvision has it (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = [
            torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            torch.nn.BatchNorm2d(64),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(3, 2, 1),
        ]
        before = 64
        for width in (64, 128, 256, 512):
            for stride in (1 if width == 64 else 2, 1):
                layers.append(Block(before, width, stride))
                before = width
        self.layers = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps crops ``(N, 3, 224, 224)`` to scores ``(N, 1000)``."""
        return self.head(self.layers(x).mean((2, 3)))


# Network, crop, its own stride, and the bound on the gain.
CASES: dict[str, tuple[type[torch.nn.Module], int, int, float]] = {
    "plain network": (Plain, 128, 8, 10),
    "ResNet-18": (ResNet18, 224, 32, 3),
}


def loop(
    module: torch.nn.Module,
    image: np.ndarray[Any, Any],
    crop: int,
    step: int,
    count: int,
) -> torch.Tensor:
    """Run a Module on every crop of an image, so many at a time."""
    places = [(i * step, j * step) for i in range(_SIDE) for j in range(_SIDE)]
    found = []
    with torch.inference_mode():
        for first in range(0, len(places), count):
            some = places[first : first + count]
            patches = [image[0, :, i : i + crop, j : j + crop] for i, j in some]
            found.append(module(torch.from_numpy(np.stack(patches))))
    return torch.cat(found)


def measure(name: str) -> dict[str, Any]:
    """Return the medians of both, and the gain."""
    make, crop, step, bound = CASES[name]
    torch.manual_seed(0)
    module = make().eval()
    size = crop + step * (_SIDE - 1)
    image = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    grid = fc.slide(module, (crop, crop), step)
    on_device = jax.device_put(image)
    runs: dict[str, Callable[[], Any]] = {"slide": functools.partial(grid, on_device)}
    for count in _BATCHES:
        runs[f"by {count}"] = functools.partial(loop, module, image, crop, step, count)
    want = runs["by 4"]().numpy()
    got = np.asarray(runs["slide"]()).reshape(want.shape)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert error < 1e-4, (name, error)
    medians = {key: 1e3 * each for key, each in cpu_seconds(runs, _ROUNDS).items()}
    gain = min(medians[f"by {count}"] for count in _BATCHES) / medians["slide"]
    return {
        "case": name,
        "crop": crop,
        "stride": step,
        "milliseconds": {key: round(each, 1) for key, each in medians.items()},
        "times": round(gain, 2),
        "bound": bound,
    }


def main() -> int:
    """Measure the cases that are named, or all, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CASES], metavar="NAME")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    every = True
    for name in options.names or CASES:
        found = measure(name)
        every &= found["times"] >= found["bound"]
        print(found, flush=True)
        if options.out is not None:
            write_row(options.out / "slide.json", "patches", CASES, found)
    return int(not every)


if __name__ == "__main__":
    sys.exit(main())
