"""Resumes training in the other form, from a checkpoint in the middle of a run.

A classifier of scikit-learn's digits is trained for a while and saved with Orbax,
optimizer state included. The checkpoint is converted, and training resumes in both
forms from both checkpoints; the losses coincide. Runs with a linen TrainState in a
CheckpointManager, and with an nnx.Optimizer.

    python examples/resume_training.py --help
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import fcconv_jax as fc

Array = jax.Array
TX = optax.adamw(optax.cosine_decay_schedule(2e-3, 400), weight_decay=1e-3)


class Digits(nn.Module):
    """A small classifier of 8x8 digits that flattens channels first."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, 8, 8, 1)`` to logits ``(N, 10)``."""
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv")(x))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64, name="fc1")(x))
        return nn.Dense(10, name="fc2")(x)


class NnxDigits(nnx.Module):
    """The same classifier in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.fc1 = nnx.Linear(4 * 4 * 16, 64, rngs=rngs)
        self.fc2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, 8, 8, 1)`` to logits ``(N, 10)``."""
        x = nnx.relu(self.conv(x))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.fc2(nnx.relu(self.fc1(x)))


def batches(first: int, last: int, size: int = 64) -> list[tuple[Any, Any]]:
    """Return the batches of some steps; a step always has the same batch."""
    digits: Any = load_digits()
    x = (digits.images / 16.0).astype(np.float32)[..., None]
    y = digits.target.astype(np.int32)
    picked = (
        np.random.default_rng(step).permutation(len(x))[:size]
        for step in range(first, last)
    )
    return [(x[rows], y[rows]) for rows in picked]


def cross_entropy(logits: Array, y: Array) -> Array:
    """Return the mean loss of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def linen_step(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Array]:
    """Update a TrainState by one step."""

    def loss(params: Any) -> Array:
        return cross_entropy(state.apply_fn({"params": params}, x), y)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


@nnx.jit
def nnx_step(model: nnx.Module, optimizer: nnx.Optimizer, x: Array, y: Array) -> Array:
    """Update an NNX model by one step, in place."""

    def loss(model: Any) -> Array:
        return cross_entropy(model(x), y)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def run_linen(out: Path, until: int, more: int) -> dict[str, list[float]]:
    """Train and resume a TrainState; return the losses after resuming in each form."""
    dense, conv = out / "linen", out / "linen_conv"
    model = Digits()
    params = model.init(jax.random.key(0), batches(0, 1)[0][0])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=TX)
    for x, y in batches(0, until):
        state, _ = linen_step(state, x, y)
    with ocp.CheckpointManager(dense) as manager:
        manager.save(until, args=ocp.args.StandardSave(state))

    plan = fc.make_plan(model, batches(0, 1)[0][0])
    print(fc.convert_checkpoint(dense, conv, plan, step=until))

    def go_on(run: Path, start: TrainState) -> list[float]:
        with ocp.CheckpointManager(run) as manager:
            state = manager.restore(until, args=ocp.args.StandardRestore(start))
        losses = []
        for x, y in batches(until, until + more):
            state, loss = linen_step(state, x, y)
            losses.append(float(loss))
        return losses

    # The structures to restore into: a new TrainState, and its conv form.
    start = TrainState.create(apply_fn=model.apply, params=params, tx=TX)
    return {
        "dense": go_on(dense, start),
        "conv": go_on(conv, fc.convert_train_state(start, plan, model)),
    }


def run_nnx(out: Path, until: int, more: int) -> dict[str, list[float]]:
    """Train and resume an NNX model; return the losses after resuming in each form."""
    dense, conv = out / "nnx", out / "nnx_conv"
    model = NnxDigits(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    plan = fc.make_plan(model, batches(0, 1)[0][0])
    for x, y in batches(0, until):
        nnx_step(model, optimizer, x, y)

    def saved(model: nnx.Module, optimizer: nnx.Optimizer) -> dict[str, Any]:
        states = {"params": nnx.state(model), "optimizer": nnx.state(optimizer)}
        return {name: nnx.to_pure_dict(state) for name, state in states.items()}

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(dense, saved(model, optimizer))
    print(fc.convert_checkpoint(dense, conv, plan))

    def go_on(run: Path, model: Any) -> list[float]:
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(run, saved(model, optimizer))
        for part, name in ((model, "params"), (optimizer, "optimizer")):
            state = nnx.state(part)
            nnx.replace_by_pure_dict(state, tree[name])
            nnx.update(part, state)
        return [
            float(nnx_step(model, optimizer, x, y))
            for x, y in batches(until, until + more)
        ]

    fresh = NnxDigits(nnx.Rngs(1))
    return {
        "dense": go_on(dense, fresh),
        "conv": go_on(conv, fc.convert_model(NnxDigits(nnx.Rngs(1)), plan)),
    }


def save_picture(path: Path, found: dict[str, dict[str, list[float]]], at: int) -> None:
    """Plot the losses of both forms over each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(10, 3.6), sharey=True)
    for axis, (name, losses) in zip(axes, found.items()):
        steps = np.arange(at, at + len(losses["dense"]))
        axis.plot(steps, losses["dense"], color="tab:blue", linewidth=4, alpha=0.4)
        axis.plot(steps, losses["conv"], color="black", linewidth=1, linestyle="--")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.legend(["resumed as Dense", "resumed as Conv"])
    axes[0].set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run both; raise if the losses differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=100, help="steps before and after converting"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "out" / "resume",
        help="folder for checkpoints and picture (default: examples/out/resume)",
    )
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    runs: dict[str, Callable[[Path, int, int], dict[str, list[float]]]] = {
        "linen, TrainState": run_linen,
        "NNX, nnx.Optimizer": run_nnx,
    }
    found = {}
    for name, run in runs.items():
        print(f"\n{name}: {options.steps} steps, convert, {options.steps} more")
        found[name] = run(out, options.steps, options.steps)
    print("\nfront end           first loss  last loss  largest difference")
    for name, losses in found.items():
        dense, conv = (np.array(losses[form]) for form in ("dense", "conv"))
        apart = np.abs(dense - conv).max()
        print(f"{name:18}  {dense[0]:10.4f}  {dense[-1]:9.4f}  {apart:18.1e}")
        if apart > 1e-3:
            raise SystemExit("the losses of the two forms differ")
    save_picture(out / "losses.png", found, options.steps)
    print(f"\nThe losses coincide. See losses.png in {options.out}")


if __name__ == "__main__":
    main()
