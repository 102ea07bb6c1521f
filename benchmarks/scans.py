"""A pyramidal TIFF in a file, tile by tile, beside a loop over patches in PyTorch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fcconv_jax as fc

# Bounds: memory in GiB, idle share of the time, and the gain over the loop of patches.
_MEMORY, _IDLE, _GAIN = 1.6, 0.10, 10.0
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


def large(model: nn.Module, size: int, crop: int, step: int, memory: int) -> bool:
    """Print what a scan takes, and whether the bounds hold.

    Args:
      model: takes crops ``(N, crop, crop, 3)`` from 0 to 1.
      size: pixels a side of the scan.
      crop: of a crop.
      step: between crops.
      memory: of a tile, in bytes.
    """
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, crop, crop, 3)))

    def scores(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x.astype(jnp.float32) / 255)

    grid = fc.slide(scores, (crop, crop), step)
    side = (size - crop) // step + 1
    options: dict[str, Any] = {"memory": memory, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scan.tif")
        write_scan(file, size)
        image = fc.open_image(file)
        out = np.lib.format.open_memmap(
            f"{folder}/out.npy", "w+", np.float32, (1, side, side, 10)
        )
        # Compiles, and warms the disk; the last tile has its own place.
        grid.write(variables, image, out=out, **options)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        taken: dict[str, list[float]] = {"file": [], "memory": []}
        sources = {"file": image, "memory": _InMemory(image.shape)}
        for name in ("memory", "file") * 2:  # in turns
            start = time.perf_counter()
            grid.write(variables, sources[name], out=out, **options)
            taken[name].append(time.perf_counter() - start)
        most = most_memory()
        seconds, least = min(taken["file"]), min(taken["memory"])
        idle = max(0.0, 1 - least / seconds)
        patch = _patch_seconds(variables, image, out, crop, step)
    gain = patch * side * side / seconds
    holds = most < _MEMORY and idle < _IDLE and gain >= _GAIN
    print(
        f"large: {side}x{side} crops of {crop} from a {size}x{size} TIFF: "
        f"{seconds:.0f} s; {most:.2f} GiB at most (bound {_MEMORY}); "
        f"{100 * idle:.0f} % longer than without a file (bound {100 * _IDLE:.0f} %); "
        f"{gain:.0f}x quicker than a loop over patches in PyTorch, "
        f"{1e3 * patch:.2f} ms each (bound {_GAIN:.0f}x): "
        f"{'holds' if holds else 'MISSED'}",
        flush=True,
    )
    return holds


def _patch_seconds(
    variables: Any, image: Any, out: np.ndarray[Any, Any], crop: int, step: int
) -> float:
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
    places = [(n // side * step, n % side * step) for n in range(_PATCHES)]
    with torch.inference_mode():
        start = 0.0
        for first in range(-_BATCH, _PATCHES, _BATCH):  # the first batch warms up
            if first == 0:
                start = time.perf_counter()
            some = places[max(first, 0) : max(first, 0) + _BATCH]
            pixels = np.concatenate(
                [image[:, i : i + crop, j : j + crop] for i, j in some]
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
