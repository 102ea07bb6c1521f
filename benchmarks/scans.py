"""A pyramidal TIFF in a file, tile by tile, beside a loop over patches in PyTorch."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fcconv_jax as fc

# Bounds: memory in GiB, idle share of the time, and the gain over the loop of patches.
_MEMORY, _IDLE, _GAIN = 1.6, 0.10, 10.0
_TILE_MEMORY = 2**28
_CROP, _STEP = 128, 8
# A side of the part that takes turns with one in memory, and how often.
_PART, _ROUNDS = 2048, 3
_TILE = 256
# Patches of the loop that are timed; all of them would take days.
_PATCHES, _BATCH = 512, 64


def write_scan(file: Path, size: int) -> None:
    """Write a tiled JPEG TIFF with a pyramid, as scanners do: smooth noise."""
    import tifffile

    def tiles(size: int) -> Iterator[np.ndarray[Any, Any]]:
        rng = np.random.default_rng(size)
        across = -(-size // _TILE)
        coarse = rng.integers(0, 256, (64, _TILE // 8, _TILE // 8, 3), np.uint8)
        some = coarse.repeat(8, 1).repeat(8, 2)
        for number in range(across * across):
            yield some[number * 7919 % 64]

    options: dict[str, Any] = {
        "tile": (_TILE, _TILE),
        "photometric": "rgb",
        "compression": "jpeg",
    }
    with tifffile.TiffWriter(file, bigtiff=True) as tif:
        sizes = [size // step for step in (1, 4, 16)]
        for level, each in enumerate(sizes):
            more: dict[str, Any] = {"subifds": 2} if level == 0 else {"subfiletype": 1}
            shape = (each, each, 3)
            tif.write(tiles(each), shape=shape, dtype=np.uint8, **options, **more)


class _InMemory:
    """An image of the same size without a file: every part is of the same pixels."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.dtype = shape, np.dtype(np.uint8)

    def __getitem__(self, where: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        size = [len(range(*w.indices(n))) for w, n in zip(where, self.shape)]
        return np.full(size, 100, np.uint8)


class Patches(nn.Module):
    """Few FLOPs: patches of 8x8, and their average over a crop."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps crops ``(N, 128, 128, 3)`` to scores ``(N, 10)``."""
        x = nn.relu(nn.Conv(8, (8, 8), (8, 8), padding="VALID")(x))
        return nn.Dense(10)(nn.avg_pool(x, (16, 16)).reshape(x.shape[0], -1))


def _grid(model: nn.Module) -> tuple[fc.Slide, Any]:
    crop = jnp.zeros((1, _CROP, _CROP, 3))
    variables = jax.jit(model.init)(jax.random.key(1), crop)

    def scores(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x.astype(jnp.float32) / 255)

    return fc.slide(scores, (_CROP, _CROP), _STEP), variables


def large(model: nn.Module, size: int, whole: nn.Module) -> dict[str, Any]:
    """Measure what a scan takes, against bounds.

    A part of the scan takes turns with an image in memory: the difference is due to the
    file, on a busy machine, too. Then the whole scan is run once.

    Args:
      model: of a part; takes crops ``(N, 128, 128, 3)`` from 0 to 1.
      size: pixels a side of the scan.
      whole: the network of the whole scan, likewise.
    """
    grid, variables = _grid(model)
    options: dict[str, Any] = {"memory": _TILE_MEMORY}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scan.tif")
        write_scan(file, size)
        part = min(size, _PART)
        sources: dict[str, Any] = {"memory": _InMemory((1, part, part, 3))}
        sources["file"] = fc.open_image(file, region=(0, 0, part, part))
        side = (part - _CROP) // _STEP + 1
        out = np.zeros((1, side, side, 10), np.float32)
        taken: dict[str, list[float]] = {name: [] for name in sources}
        for number in range(_ROUNDS + 1):
            for name, source in sources.items():
                start = time.perf_counter()
                grid.write(variables, source, out=out, progress=False, **options)
                if number:  # the first one compiles, and warms the disk
                    taken[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(each) for name, each in taken.items()}
        patch = _patch_seconds(variables, sources["file"], out)
        counted = side * side
        grid, variables = _grid(whole)
        side = (size - _CROP) // _STEP + 1
        shape = 1, side, side, 10
        out = np.lib.format.open_memmap(f"{folder}/out.npy", "w+", np.float32, shape)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        start, image = time.perf_counter(), fc.open_image(file)
        grid.write(variables, image, out=out, progress=_rate(), **options)
        seconds, most = time.perf_counter() - start, most_memory()
    return {
        "pixels": size,
        "crops": side,
        "network": type(whole).__name__,
        "seconds": round(seconds),
        "gibibytes": round(most, 2),
        "idle": round(max(0.0, 1 - medians["memory"] / medians["file"]), 3),
        "times": round(patch * counted / medians["file"], 1),
    }


def holds(found: dict[str, Any]) -> bool:
    """Return whether the bounds hold."""
    idle, gain = found["idle"] < _IDLE, found["times"] >= _GAIN
    return idle and gain and found["gibibytes"] < _MEMORY


def _rate() -> Callable[[str, int, int], None]:
    """Return what prints how many tiles are done, and how much memory it took."""
    start = time.perf_counter()

    def show(what: str, done: int, total: int) -> None:
        if done % 20 == 0:
            seconds = time.perf_counter() - start
            text = f"{done} of {total} {what}, {seconds:.0f} s, {most_memory():.2f} GiB"
            print(text, file=sys.stderr, flush=True)

    return show


def _patch_seconds(variables: Any, image: Any, out: np.ndarray[Any, Any]) -> float:
    """Time one patch of a loop: read a batch, run the same network, as MONAI does."""
    import torch  # pyright: ignore[reportMissingImports]

    functional: Any = torch.nn.functional
    params = variables["params"]
    weights = {
        name: [torch.tensor(np.asarray(layer[key])) for key in ("kernel", "bias")]
        for name, layer in params.items()
    }

    def network(x: Any) -> Any:
        for number in range(6):
            kernel, bias = weights[f"Conv_{number}"]
            x = functional.relu(functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias))
            if number % 2:
                x = functional.max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # the order of Flax
        (kernel, bias), (last, last_bias) = weights["Dense_1"], weights["Dense_0"]
        return functional.relu(x @ kernel + bias) @ last + last_bias

    side, found = out.shape[2], torch.zeros(0)
    places = [(n // side * _STEP, n % side * _STEP) for n in range(_PATCHES)]
    with torch.inference_mode():
        start = 0.0
        for first in range(-_BATCH, _PATCHES, _BATCH):  # the first batch warms up
            if first == 0:
                start = time.perf_counter()
            some = places[max(first, 0) : max(first, 0) + _BATCH]
            pixels = np.concatenate(
                [image[:, i : i + _CROP, j : j + _CROP] for i, j in some]
            )
            found = network(torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255)
        seconds = time.perf_counter() - start
    same = out[0].reshape(-1, 10)[_PATCHES - _BATCH : _PATCHES]
    scale = float(found.abs().max())
    np.testing.assert_allclose(same, found.numpy(), atol=1e-4 * scale)
    return seconds / _PATCHES


def most_memory() -> float:
    """GiB that this process held at most."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("VmHWM:")[2].split()[0]) / 2**20
