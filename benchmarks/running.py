"""What all groups share: races, quartiles, bounds, and a process for each case."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fcconv_jax as fc
from fcconv_jax.tuning.meters import race_times

# A case measures, and returns what it found: a dict that JSON knows.
Case = Callable[[], dict[str, Any]]
# The generations that are compiled for ahead of time.
TPUS = ("tpu:v4", "tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:7x")
# Rounds in which a short program shows how quick it is.
_TRIAL = 15
_SCRIPT = Path(__file__).with_name("__main__.py")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "libtpu")


class MissingError(Exception):
    """A case cannot run here, with the reason."""


def race(
    runs: Mapping[str, Callable[[], Any]],
    seconds: float,
    apart: float = 0.0,
    opponents: Collection[str] = (),
) -> dict[str, Any]:
    """Medians and quartiles in milliseconds, of runs in turns.

    Args:
      runs: by name, compiled.
      seconds: how long they may run.
      apart: as for :func:`fcconv_jax.tuning.meters.race_times`.
      opponents: likewise.
    """
    taken = race_times(runs, seconds, apart, _TRIAL, opponents)
    return {
        "milliseconds": {k: 1e3 * statistics.median(t) for k, t in taken.items()},
        "quartiles": {k: [1e3 * q for q in quartiles(t)] for k, t in taken.items()},
        "runs": {name: len(t) for name, t in taken.items()},
    }


def in_turns(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    remade: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each step in every round: what it costs with nothing in JAX's caches.

    The garbage collector runs between the steps and not in them, as in ``timeit``. The
    first round is not counted.

    Args:
      steps: by name.
      rounds: that are counted.
      clock: gives seconds.
      remade: names of functions that return the step; each round calls them again,
        uncounted.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            jax.clear_caches()
            if name in remade:
                step = step()
            gc.collect()
            gc.disable()
            start = clock()
            jax.block_until_ready(step())
            seconds = clock() - start
            gc.enable()
            if number:
                times[name].append(seconds)
    return times


def quartiles(values: list[float]) -> list[float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return values * 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def bound(what: str, value: float, most: float, unit: str = "x") -> dict[str, Any]:
    """A figure, and the most that it is to be."""
    return {"what": what, "value": value, "bound": most, "unit": unit}


def linen(model: nn.Module, *shape: int, dtype: Any = jnp.float32) -> Any:
    """A linen model, its variables, and an input of random numbers."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    return model, jax.jit(model.init)(jax.random.key(0), x), x


@dataclasses.dataclass(frozen=True)
class Forms:
    """A linen model or a function, in every form.

    Attributes:
      runs: the original, all layers to one form by the default plans, and tuned, where
        that is another program than the original.
      plan: the tuned one.
      seconds: that tuning took.
    """

    runs: dict[str, Callable[[], Any]]
    plan: fc.Plan
    seconds: float


def tuned(model: Any, params: Any, x: jax.Array, budget: float = 120.0) -> Forms:
    """Tunes a model, within about ``budget`` seconds, and makes its other forms."""
    start = time.perf_counter()
    plan = fc.tune(model, params, x, budget=budget)
    seconds = time.perf_counter() - start
    assert plan.tuning is not None
    print(plan.tuning.headline(), file=sys.stderr)
    is_module = isinstance(model, nn.Module)
    args = (x,) if is_module else (params, x)
    plans = {
        "all to conv": fc.make_plan(model, *args, to="conv"),
        "all to dense": fc.make_plan(model, *args, to="dense"),
    }
    plans = {name: each for name, each in plans.items() if len(each)}
    if plan or plan.options:
        plans["tuned"] = plan
    original = jax.jit(model.apply if is_module else model)
    runs: dict[str, Callable[[], Any]] = {
        "original": functools.partial(original, params, x)
    }
    for name, each in plans.items():
        converted: Any = fc.convert_model(model, each)
        call = converted.apply if is_module else converted
        runs[name] = functools.partial(call, fc.convert_params(params, each), x)
    return Forms(runs, plan, seconds)


def compare(
    runs: Mapping[str, Callable[[], Any]],
    original: str,
    most: Mapping[str, float],
    seconds: float,
    apart: float = 0.0,
    known: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, Any]:
    """Runs forms in turns, against bounds.

    Args:
      runs: by name; all give the same numbers.
      original: what the others are compared with.
      most: parts of the original's time that forms may take at most.
      seconds: of the race.
      apart: as for :func:`fcconv_jax.tuning.meters.race_times`.
      known: results of another library's runs, in JAX's order.
    """
    results = {name: np.asarray(r()) for name, r in runs.items() if name not in known}
    results |= known
    found = race(runs, seconds, apart, known)
    ms = found["milliseconds"]
    first = ms[original]
    return {
        **found,
        "errors": {
            name: largest_error(result, results[original])
            for name, result in results.items()
            if name != original
        },
        "bounds": [
            # What is not run because it is the original takes as long as that.
            bound(f"{name} / {original}", ms.get(name, first) / first, value)
            for name, value in most.items()
            if name != original
        ],
    }


def as_record(plan: fc.Plan, seconds: float) -> dict[str, Any]:
    """What tuning found, in so many seconds; not why layers have one form only."""
    assert plan.tuning is not None
    content = plan.tuning.content()
    del content["left"]
    return {
        "tuning_seconds": seconds,
        "options": dict(plan.options),
        "tuning": content,
    }


def largest_error(found: Any, want: Any) -> float:
    """The largest difference, as a part of the largest entry."""
    found, want = (np.asarray(array).astype(np.float64) for array in (found, want))
    return float(np.abs(found - want).max() / np.abs(want).max())


def versions() -> dict[str, str]:
    """Of Python, and of the packages that are here."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def measure(group: str, case: str, run: Case) -> dict[str, Any]:
    """Runs a case of a group in this process."""
    start = time.perf_counter()
    try:
        found = run()
    except MissingError as missing:
        return {"case": case, "missing": str(missing)}
    return {
        "case": case,
        "group": group,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": versions(),
        "seconds": time.perf_counter() - start,
        **found,
    }


def alone(cases: list[str]) -> Iterator[dict[str, Any]]:
    """Runs each case in a process of its own; what it found, or that it failed."""
    for number, case in enumerate(cases):
        print(f"[{number + 1}/{len(cases)}] {case}", file=sys.stderr, flush=True)
        command = [sys.executable, _SCRIPT, "--alone", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            yield {"case": case, "failed": f"exit status {done.returncode}"}
        else:
            yield json.loads(done.stdout.splitlines()[-1])


def holds(found: Mapping[str, Any]) -> bool:
    """Whether a case ran, where it can, and holds all its bounds."""
    if "failed" in found:
        return False
    return all(each["value"] <= each["bound"] for each in found.get("bounds", ()))


def show(found: Mapping[str, Any]) -> str:
    """A case in a few lines: its figures, and its bounds."""
    if "missing" in found:
        return f"{found['case']}: not run: {found['missing']}"
    if "failed" in found:
        return f"{found['case']}: FAILED with {found['failed']}"
    lines = [f"{found['case']} ({found['seconds']:.0f} s)"]
    for name, ms in found.get("milliseconds", {}).items():
        low, high = found["quartiles"][name]
        error = found.get("errors", {}).get(name)
        text = f"  {name:24} {ms:10.4g} ms, {low:.4g} to {high:.4g}"
        lines.append(text + ("" if error is None else f", error {error:.0e}"))
    for name, cycles in found.get("cycles", {}).items():
        lines.append(f"  {name:24} {cycles:14,.0f} cycles")
    for name, why in found.get("left out", {}).items():
        lines.append(f"  {name:24} left out: {why}")
    for each in found["bounds"]:
        verdict = "holds" if each["value"] <= each["bound"] else "MISSED"
        unit = each["unit"] if each["unit"] == "x" else f" {each['unit']}"
        lines.append(
            f"  {each['what']}: {each['value']:.3g}{unit}; bound "
            f"{each['bound']:g}{unit}: {verdict}"
        )
    return "\n".join(lines)


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Puts a case into the file of its device, in the place of an earlier run."""
    device = found["device"].replace(" ", "-").replace(":", "-").lower()
    file = folder / f"{device}.json"
    known = json.loads(file.read_text())["results"] if file.exists() else []
    results = [each for each in known if each["case"] != found["case"]] + [found]
    folder.mkdir(parents=True, exist_ok=True)
    content = {"device": found["device"], "results": results}
    file.write_text(json.dumps(content, indent=1) + "\n")


def cpu_seconds(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of interleaved calls, in CPU seconds of all threads."""
    taken: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            taken[key].append(time.process_time() - start)
    return {key: statistics.median(times) for key, times in taken.items()}


def write_row(
    file: Path, table: str, order: Collection[str], row: Mapping[str, Any]
) -> None:
    """Puts a row into a table of a file, in the place of an earlier run.

    Args:
      file: of several tables.
      table: its name in the file.
      order: the names of its rows, which are in their first column.
      row: begins with its name.
    """
    results = json.loads(file.read_text(encoding="utf-8"))
    rows = {next(iter(each.values())): each for each in [*results.get(table, []), row]}
    results[table] = [rows[name] for name in order if name in rows]
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
