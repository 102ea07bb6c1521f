"""Resumes training in the faster form, and gives the checkpoint back in the old one.

A classifier of scikit-learn's digits is trained for a while and saved with Orbax,
optimizer state included. `fc.tune` times the training step in each form; the checkpoint
is converted, and training resumes in both forms from both checkpoints: the losses
coincide. What was trained in the new form is restored to the old one. Runs with a linen
TrainState in a CheckpointManager, and with an nnx.Optimizer.

    python examples/resume_training.py --help
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
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
    """A small classifier of 8x8 digits that begins with patches of 2x2."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, 8, 8, 1)`` to logits ``(N, 10)``."""
        x = nn.relu(nn.Conv(32, (2, 2), (2, 2), padding="VALID", name="conv")(x))
        x = nn.relu(nn.Dense(64, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="fc2")(x)


class NnxDigits(nnx.Module):
    """The same classifier in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        patch = (2, 2)
        self.conv = nnx.Conv(1, 32, patch, patch, padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.fc2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, 8, 8, 1)`` to logits ``(N, 10)``."""
        x = nnx.relu(self.conv(x))
        return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))


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


Losses = list[float]


def timed(step: Callable[[Any, Any], float], first: int, more: int) -> Losses:
    """Run steps; return their losses and print the median time of one."""
    losses, seconds = [], []
    for x, y in batches(first, first + more):
        start = time.perf_counter()
        losses.append(step(x, y))
        seconds.append(time.perf_counter() - start)
    print(f"  {1e3 * statistics.median(seconds):.2f} ms per step")
    return losses


def run_linen(out: Path, until: int, more: int, budget: float) -> dict[str, Losses]:
    """Train and resume a TrainState; return the losses after resuming in each form."""
    runs = {"original": out / "linen", "tuned": out / "linen_tuned"}
    model, x = Digits(), batches(0, 1)[0][0]
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=TX)
    for each in batches(0, until):
        state, _ = linen_step(state, *each)
    with ocp.CheckpointManager(runs["original"]) as manager:
        manager.save(until, args=ocp.args.StandardSave(state))

    plan = fc.make_plan(model, x, to="dense")
    if budget:
        found = fc.tune(model, params, x, objective="training", budget=budget)
        print(found.tuning)
        plan = found if len(found) else plan  # on this machine, nothing is faster
    report = fc.convert_checkpoint(runs["original"], runs["tuned"], plan, step=until)
    print(report)

    tuned: Any = fc.convert_model(model, plan)
    forms = {
        "original": (model, params),
        "tuned": (tuned, fc.convert_params(params, plan)),
    }
    losses, trained = {}, {}
    for name, (module, like) in forms.items():
        start = TrainState.create(apply_fn=module.apply, params=like, tx=TX)
        with ocp.CheckpointManager(runs[name]) as manager:
            state = manager.restore(until, args=ocp.args.StandardRestore(start))

            def step(x: Array, y: Array) -> float:
                nonlocal state
                state, loss = linen_step(state, x, y)
                return float(loss)

            losses[name] = timed(step, until, more)
            manager.save(until + more, args=ocp.args.StandardSave(state))
        trained[name] = state

    # What the tuned form has learned, in the old form.
    back = out / "linen_back"
    fc.restore_checkpoint(runs["tuned"], back, step=until + more)
    with ocp.CheckpointManager(back) as manager:
        args = ocp.args.StandardRestore(trained["original"])
        state = manager.restore(until + more, args=args)
    apart = abs(
        model.apply({"params": state.params}, x)
        - tuned.apply({"params": trained["tuned"].params}, x)
    ).max()
    print(f"  given back: outputs {apart:.0e} apart")
    assert apart < 1e-4
    return losses


def run_nnx(out: Path, until: int, more: int, budget: float) -> dict[str, Losses]:
    """Train and resume an NNX model; return the losses after resuming in each form."""
    runs = {"original": out / "nnx", "tuned": out / "nnx_tuned"}
    model = NnxDigits(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    plan = fc.make_plan(model, batches(0, 1)[0][0], to="dense")
    for x, y in batches(0, until):
        nnx_step(model, optimizer, x, y)

    def saved(model: nnx.Module, optimizer: nnx.Optimizer) -> dict[str, Any]:
        states = {"params": nnx.state(model), "optimizer": nnx.state(optimizer)}
        return {name: nnx.to_pure_dict(state) for name, state in states.items()}

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(runs["original"], saved(model, optimizer))
    print(fc.convert_checkpoint(runs["original"], runs["tuned"], plan))

    def go_on(run: Path, model: Any) -> Losses:
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(run, saved(model, optimizer))
        for part, name in ((model, "params"), (optimizer, "optimizer")):
            state = nnx.state(part)
            nnx.replace_by_pure_dict(state, tree[name])
            nnx.update(part, state)
        return timed(lambda x, y: float(nnx_step(model, optimizer, x, y)), until, more)

    fresh = NnxDigits(nnx.Rngs(1))
    tuned = fc.convert_model(NnxDigits(nnx.Rngs(1)), plan)
    return {
        "original": go_on(runs["original"], fresh),
        "tuned": go_on(runs["tuned"], tuned),
    }


def save_picture(path: Path, found: dict[str, dict[str, Losses]], at: int) -> None:
    """Plot the losses of both forms over each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(10, 3.6), sharey=True)
    for axis, (name, losses) in zip(axes, found.items()):
        steps = np.arange(at, at + len(losses["original"]))
        axis.plot(steps, losses["original"], color="tab:blue", linewidth=4, alpha=0.4)
        axis.plot(steps, losses["tuned"], color="black", linewidth=1, linestyle="--")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.legend(["resumed as it was", "resumed in the faster form"])
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
    parser.add_argument(
        "--budget",
        type=float,
        default=20.0,
        help="seconds for tuning; 0 takes every convolution to dense",
    )
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    runs: dict[str, Callable[[Path, int, int, float], dict[str, Losses]]] = {
        "linen, TrainState": run_linen,
        "NNX, nnx.Optimizer": run_nnx,
    }
    found = {}
    for name, run in runs.items():
        print(f"\n{name}: {options.steps} steps, convert, {options.steps} more")
        found[name] = run(out, options.steps, options.steps, options.budget)
    print("\nfront end           first loss  last loss  largest difference")
    for name, losses in found.items():
        old, new = (np.array(losses[form]) for form in ("original", "tuned"))
        apart = np.abs(old - new).max()
        print(f"{name:18}  {old[0]:10.4f}  {old[-1]:9.4f}  {apart:18.1e}")
        if apart > 1e-3:
            raise SystemExit("the losses of the two forms differ")
    save_picture(out / "losses.png", found, options.steps)
    print(f"\nThe losses coincide. See losses.png in {options.out}")


if __name__ == "__main__":
    main()
