"""Run times of programs that are compared: measured in turns, so that drift cancels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

_ROUNDS = (5, 101)
_SECONDS = 0.2


def milliseconds(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median run time of each function, in milliseconds.

    Each runs once to warm up, then all in turn: at least 5 times, at most 101 times or
    0.2 seconds.

    Example:
      >>> list(milliseconds({"fast": lambda: 1, "slow": lambda: 2}))
      ['fast', 'slow']
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    begin = time.perf_counter()
    for number in range(_ROUNDS[1]):
        if number >= _ROUNDS[0] and time.perf_counter() - begin > _SECONDS:
            break
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the time of one run, until its results are ready.

    Example:
      >>> seconds_of(lambda: None) < 1
      True
    """
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
