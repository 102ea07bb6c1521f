"""Finds every digit on a large canvas in one pass, with a classifier of single digits.

The classifier learns 8x8 digits and 8x8 crops without a complete digit. ``fc.slide``
runs it at every position of a canvas: it returns the same scores as on each crop, and
computes shared work once.

    python examples/detect_digits.py --help
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fcconv_jax as fc

Array = jax.Array
NOTHING = 10


class Detector(nn.Module):
    """Ten digits or none: two convolutions, and Dense layers after a flatten."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps crops ``(N, 8, 8, 1)`` to logits ``(N, 11)``."""
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID")(x))
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(11)(x)


def canvas(
    rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray, size: int
) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Draw a canvas ``(size, size, 1)`` of digits at random, without overlaps."""
    page = np.zeros((size, size, 1), np.float32)
    placed: list[tuple[int, int, int]] = []
    for _ in range(size * size // 150):
        y, x = (int(n) for n in rng.integers(0, size - 8, 2))
        if all(max(abs(y - v), abs(x - u)) >= 11 for v, u, _ in placed):
            which = int(rng.integers(len(digits)))
            page[y : y + 8, x : x + 8] = digits[which]
            placed.append((y, x, int(labels[which])))
    return page, placed


def crops_to_learn_from(
    rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray, pages: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return crops of digits, and crops at least 2 pixels off, with their labels."""
    xs, ys = [], []
    for _ in range(pages):
        page, placed = canvas(rng, digits, labels, 64)
        for y, x, label in placed:
            xs.append(page[y : y + 8, x : x + 8])
            ys.append(label)
            for _ in range(6):
                v, u = (int(n) for n in rng.integers(0, 56, 2))
                if all(max(abs(v - p), abs(u - q)) >= 2 for p, q, _ in placed):
                    xs.append(page[v : v + 8, u : u + 8])
                    ys.append(NOTHING)
    return np.stack(xs), np.asarray(ys)


def train(x: np.ndarray, y: np.ndarray, epochs: int) -> Any:
    """Train with Adam and return the variables."""
    model, tx = Detector(), optax.adam(2e-3)
    variables = model.init(jax.random.key(0), x[:1])
    state = tx.init(variables)

    @jax.jit
    def step(variables: Any, state: Any, x: Array, y: Array) -> Any:
        def loss(variables: Any) -> Array:
            logits: Any = model.apply(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(variables)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(variables, updates), state, value

    rng, value = np.random.default_rng(0), jnp.nan
    for epoch in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - 127, 128):
            rows = order[start : start + 128]
            variables, state, value = step(variables, state, x[rows], y[rows])
        print(f"  epoch {epoch + 1}/{epochs}  loss {value:.4f}", flush=True)
    return variables


def boxes(scores: np.ndarray, least: float = 0.9) -> list[tuple[int, int, int]]:
    """Return the positions of digits: local maxima of the confidence."""
    found: list[tuple[int, int, int]] = []
    best = scores[..., :NOTHING].max(-1)
    for flat in np.argsort(best, axis=None)[::-1]:
        y, x = (int(n) for n in np.unravel_index(flat, best.shape))
        if best[y, x] < least:
            break
        if all(max(abs(y - v), abs(x - u)) >= 6 for v, u, _ in found):
            found.append((y, x, int(scores[y, x, :NOTHING].argmax())))
    return found


def save_picture(path: Path, page: np.ndarray, scores: np.ndarray, found: Any) -> None:
    """Save the canvas with its boxes, next to the classifier's confidence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    left.imshow(page[..., 0], cmap="gray_r")
    for y, x, label in found:
        left.add_patch(Rectangle((x - 0.5, y - 0.5), 8, 8, fill=False, color="C3"))
        left.text(x, y - 1, str(label), color="C3", fontsize=8)
    left.set_title(f"{len(found)} digits found in one pass")
    shown = right.imshow(scores[..., :NOTHING].max(-1), cmap="magma", vmin=0, vmax=1)
    right.set_title("probability of a digit, by position")
    figure.colorbar(shown, ax=right, shrink=0.8)
    for axes in (left, right):
        axes.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def milliseconds(function: Any, rounds: int = 5) -> float:
    """Return the median time of a call."""
    jax.block_until_ready(function())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=192, help="of the canvas, pixels")
    parser.add_argument("--out", type=Path, default=Path("detected_digits.png"))
    options = parser.parse_args()

    data: Any = load_digits()
    digits = (data.images / 16.0).astype(np.float32)[..., None]
    rng = np.random.default_rng(0)
    print("training on crops")
    x, y = crops_to_learn_from(rng, digits[:1400], data.target[:1400], 60)
    variables = train(x, y, options.epochs)

    page, placed = canvas(rng, digits[1400:], data.target[1400:], options.size)
    model = Detector()

    def chances(variables: Any, x: Array) -> Array:
        logits: Any = model.apply(variables, x)
        return nn.softmax(logits)

    grid = fc.slide(chances, (8, 8), 1)
    print(grid.report(variables, page[None]))
    scores = np.asarray(grid(variables, page[None]))[0]
    found = boxes(scores)
    right = sum(
        any(max(abs(y - v), abs(x - u)) <= 1 and label == k for v, u, k in found)
        for y, x, label in placed
    )
    print(
        f"{right} of {len(placed)} digits found to within a pixel; {len(found)} boxes"
    )

    rows, columns = scores.shape[:2]
    single = jax.jit(chances)
    crops = np.lib.stride_tricks.sliding_window_view(page[..., 0], (8, 8))
    crops = np.ascontiguousarray(crops.reshape(-1, 8, 8, 1))
    one_by_one = np.asarray(single(variables, crops)).reshape(rows, columns, -1)
    error = abs(scores - one_by_one).max()
    print(f"largest difference from a batch of crops: {error:.1e}")
    shared = milliseconds(lambda: grid(variables, page[None]))
    batch = milliseconds(lambda: single(variables, crops))
    print(f"one pass {shared:.1f} ms, {rows * columns} crops {batch:.1f} ms: ", end="")
    print(f"{batch / shared:.1f}x")
    save_picture(options.out, page, scores, found)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
