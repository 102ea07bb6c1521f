"""Trains a digit classifier, converts its checkpoint, verifies and compares both forms.

A Conv + flatten + Dense classifier is trained on scikit-learn's 8x8 digits and saved
as an Orbax checkpoint. fcconv_jax converts the checkpoint to conv form; a plain Flax
model written with ``nn.Conv`` loads it and returns the same predictions.

    python examples/digits.py --help
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fcconv_jax as fc

Array = jax.Array


class Digits(nn.Module):
    """A small classifier of 8x8 digits with two Dense layers after a flatten."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Maps images ``(N, 8, 8, 1)`` to logits ``(N, 10)``."""
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = nn.relu(nn.Dense(64, name="fc1")(x))
        return nn.Dense(10, name="fc2")(x)


class ConvDigits(nn.Module):
    """The same network, written by hand without Dense layers or fcconv_jax."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, 8, 8, 1)`` to logits ``(N, 10)``."""
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(64, (4, 4), padding="VALID", name="fc1")(x))
        return nn.Conv(10, (1, 1), name="fc2")(x).reshape(x.shape[0], 10)


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Load scikit-learn's 1797 handwritten digits; a quarter is held out."""
    digits: Any = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    parts: Any = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    x, test_x, y, test_y = parts
    return x, y, test_x, test_y


def train(x: np.ndarray, y: np.ndarray, epochs: int, batch: int = 64) -> TrainState:
    """Train with Adam and return the state, optimizer moments included."""
    model = Digits()
    params = model.init(jax.random.key(0), x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(2e-3))

    @jax.jit
    def step(state: TrainState, x: Array, y: Array, key: Array) -> Any:
        def loss(params: Any) -> Array:
            logits = state.apply_fn(
                {"params": params}, x, train=True, rngs={"dropout": key}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    rng, value = np.random.default_rng(0), jnp.nan
    for epoch in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - batch + 1, batch):
            rows = order[start : start + batch]
            key = jax.random.fold_in(jax.random.key(1), int(state.step))
            state, value = step(state, x[rows], y[rows], key)
        print(f"  epoch {epoch + 1}/{epochs}  loss {value:.4f}", flush=True)
    return state


def milliseconds(functions: dict[str, Any], rounds: int = 50) -> dict[str, float]:
    """Return the median run time of each function, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function().block_until_ready()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function().block_until_ready()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def save_picture(
    path: Path, x: np.ndarray, y: np.ndarray, dense: np.ndarray, conv: np.ndarray
) -> None:
    """Save a figure of 24 digits with both models' predictions; mistakes are red."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wrong = np.flatnonzero(dense != y)
    right = np.setdiff1d(np.arange(len(y)), wrong)
    shown = np.concatenate([wrong[:4], right])[:24]
    figure, axes = plt.subplots(3, 8, figsize=(10, 4.8))
    for axis, i in zip(axes.flat, shown):
        axis.imshow(x[i, ..., 0], cmap="gray_r")
        axis.set_title(
            f"dense {dense[i]}  conv {conv[i]}",
            fontsize=9,
            color="black" if dense[i] == y[i] else "crimson",
        )
        axis.set_axis_off()
    figure.suptitle("Both forms make the same predictions (red: both are wrong)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run all steps; raise if a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "out",
        help="folder for checkpoints, report and picture (default: examples/out)",
    )
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    print("1. Train Conv + flatten + Dense on 1347 handwritten digits")
    x, y, test_x, test_y = load_data()
    state = train(x, y, options.epochs)
    dense_dir, conv_dir = out / "digits_dense", out / "digits_conv"
    for folder in (dense_dir, conv_dir):
        shutil.rmtree(folder, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            dense_dir, {"params": state.params, "opt_state": state.opt_state}
        )
    print(f"   saved {dense_dir.name}")

    print("\n2. Trace the model once and plan its conversion")
    model = Digits()
    plan = fc.make_plan(model, test_x[:1])
    print(plan)

    print("\n3. Convert the checkpoint, optimizer state included")
    fc.convert_checkpoint(dense_dir, conv_dir, plan)
    print(f"   wrote {conv_dir.name}")

    print("\n4. Verify it on this machine")
    report = fc.verify(model, state.params, test_x[:8], plan=plan)
    print(report)
    (out / "report.md").write_text(report.to_markdown())
    if not report.passed:
        raise SystemExit("the two forms differ")

    print("\n5. Load it into a plain nn.Conv model, written without fcconv_jax")
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(conv_dir)["params"]
    for name in ("fc1", "fc2"):
        print(f"   {name}/kernel {params[name]['kernel'].shape}")
    dense = jax.jit(lambda x: model.apply({"params": state.params}, x))
    conv = jax.jit(lambda x: ConvDigits().apply({"params": params}, x))
    predictions = {
        "dense": np.asarray(dense(test_x)).argmax(-1),
        "conv": np.asarray(conv(test_x)).argmax(-1),
    }
    speed = milliseconds({"dense": lambda: dense(test_x), "conv": lambda: conv(test_x)})
    print("   form   accuracy  ms for 450 digits")
    for form, predicted in predictions.items():
        accuracy = (predicted == test_y).mean()
        print(f"   {form:5}  {accuracy:8.2%}  {speed[form]:8.2f}")
    if not (predictions["dense"] == predictions["conv"]).all():
        raise SystemExit("the predictions differ")
    save_picture(out / "digits.png", test_x, test_y, **predictions)
    print(f"\nAll predictions agree. See digits.png and report.md in {options.out}")


if __name__ == "__main__":
    main()
