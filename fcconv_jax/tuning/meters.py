"""Measures programs against each other: run time, scratch memory, or cycles."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..backends.compilation import Compiling, Program, abstract
from ..backends.options import correct_options
from ..backends.resolution import Resolution
from ..backends.timing import seconds_of
from ..messages.errors import BackendError
from ..plan import Options
from ..plan.tuning import Figure, Objective
from .timings import Timings

# Among programs this near to the best one, the plainest is taken.
AS_GOOD = 1.02
_LEAST_ROUNDS = 5
# Between two slow programs: with 5, each round would have to agree. With 15, 12 do.
_SETTLING_ROUNDS = 15
_MAX_ROUNDS = 101
# Rounds before what is slower by half leaves the race.
_TRIAL_ROUNDS = 3
_LONG = 0.05
_SLOWER = 1.5
# Beyond this the first run alone settles it.
_HOPELESS = 4.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A program, with the options that it is compiled with."""

    program: Program
    options: Options = ()


class Meter:
    """Measures programs on one backend."""

    def __init__(
        self,
        resolution: Resolution,
        objective: Objective,
        timings: Timings,
        timeout: float,
    ):
        self._resolution = resolution
        self._objective = objective
        self.timings = timings
        self._timeout = timeout
        self._compiled: dict[str, Any] = {}

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        seconds: float,
        again: str = "",
        settle: bool = False,
    ) -> dict[str, Figure]:
        """Return the figure of each program; programs that are the same one share it.

        Args:
          candidates: by name.
          seconds: how long they may run.
          again: a word that tells a repeated measurement of run times from the first;
            other figures stay what they are.
          settle: as for :func:`race`.
        """
        # Sizes and cycles don't vary, so a second measurement would show nothing new.
        if self._objective != "latency":
            again = ""
        with jax.default_device(self._resolution.device):
            # Known by their programs: candidates that lower to one text share a figure.
            lowered = {name: _lower(c.program) for name, c in candidates.items()}
        keys = {
            name: f"{_key(lowered[name].as_text(), each.options)} {again}".rstrip()
            for name, each in candidates.items()
        }
        wanted = {
            key: name
            for name, key in reversed(keys.items())
            if self.timings.get(key) is None
        }
        if wanted:
            new = {key: candidates[name] for key, name in wanted.items()}
            if self._resolution.how == "executed":
                texts = {key: lowered[name] for key, name in wanted.items()}
                found = self._present(new, texts, seconds, settle)
            else:
                found = self._absent(new)
            self.timings.add(found)
        figures = {name: self.timings.get(key) for name, key in keys.items()}
        return {name: f for name, f in figures.items() if f is not None}

    def _present(
        self,
        candidates: Mapping[str, Candidate],
        lowered: Mapping[str, Any],
        seconds: float,
        settle: bool,
    ) -> dict[str, Figure]:
        same = {key: key.partition(" ")[0] for key in candidates}  # measured again
        correct = correct_options(jax.default_backend())
        # XLA compiles outside of Python's lock, on two cores more than half as long.
        with ThreadPoolExecutor(2) as pool:
            compiling = {
                same[key]: pool.submit(
                    lowered[key].compile,
                    compiler_options=correct | dict(candidate.options),
                )
                for key, candidate in candidates.items()
                if same[key] not in self._compiled
            }
            self._compiled |= {key: each.result() for key, each in compiling.items()}
        compiled = {key: self._compiled[same[key]] for key in candidates}
        if self._objective == "memory":
            return {
                key: _exactly(program.memory_analysis().temp_size_in_bytes)
                for key, program in compiled.items()
            }
        runs = {
            key: functools.partial(program, *self._placed(candidates[key].program.args))
            for key, program in compiled.items()
        }
        return race(runs, seconds, settle)

    def _placed(self, args: PyTree) -> Any:
        """Put the arguments on the device; draw random numbers for abstract ones."""

        def place(leaf: Any) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                leaf = np.resize(_numbers().astype(leaf.dtype), leaf.shape)
            if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding):
                return leaf
            return jax.device_put(leaf, self._resolution.device)

        return jax.tree.map(place, args)

    def _absent(self, candidates: Mapping[str, Candidate]) -> dict[str, Figure]:
        programs = {key: candidate.program for key, candidate in candidates.items()}
        chosen = self._resolution
        with Compiling(programs, [chosen], timeout=self._timeout) as compiling:
            (outcome,) = compiling.results().values()
        if isinstance(outcome, BackendError):
            raise outcome
        field = "temp_bytes" if self._objective == "memory" else "cycles"
        found = {key: getattr(outcome[key], field) for key in programs}
        if None in found.values():
            raise BackendError(
                f"{chosen.backend}: its compiler doesn't report {field} ahead of time. "
                'Pass objective="memory", or tune where the device is present.'
            )
        return {key: _exactly(value) for key, value in found.items()}


def race(
    runs: Mapping[str, Callable[[], Any]], seconds: float, settle: bool = False
) -> dict[str, Figure]:
    """Run times in turns, in milliseconds, with an interval of the median.

    Args:
      runs: by name, the original first, which stays to the end unless it is slow.
      seconds: how long they may run.
      settle: whether to run at least 15 rounds, however slow they are, unless all but
        one program are slower by 2 % beyond the noise before that.

    Example:
      >>> list(race({"a": lambda: 1, "b": lambda: 2}, 0.01))
      ['a', 'b']
    """
    original = next(iter(runs))
    stays, least = ((), _SETTLING_ROUNDS) if settle else ((original,), _LEAST_ROUNDS)
    times = race_times(runs, seconds, stays=stays, least=least)
    name_of_race = uuid.uuid4().hex
    return {
        name: Figure.of([1e3 * t for t in taken], name_of_race)
        for name, taken in times.items()
    }


def race_times(
    runs: Mapping[str, Callable[[], Any]],
    seconds: float,
    apart: float = 0.0,
    trial: int = _TRIAL_ROUNDS,
    opponents: Collection[str] = (),
    stays: Collection[str] | None = None,
    least: int = _LEAST_ROUNDS,
) -> dict[str, list[float]]:
    """Return the seconds of every run, in turns; each round starts with the next one.

    Programs more than 1.5x slower than the fastest stop after a few rounds. The others
    run until the time is over, at least 5 and at most 101 times.

    Args:
      runs: by name.
      seconds: how long they may run.
      apart: where it is not 0, each run waits for so many seconds, and follows one of
        the same program that is not counted. Then threads of another library, which
        may spin for a while, have come to rest, and no program has a better neighbour.
      trial: rounds before what is slower leaves; of a long program 3 will do.
      opponents: runs that may be quicker, without making the others leave.
      stays: if given, all but these also leave once they are slower by 2 %, beyond the
        noise, so that those that are nearly as quick get more rounds.
      least: rounds that are run even if the time is over.

    Example:
      >>> all(race_times({"a": lambda: 1, "b": lambda: 2}, 0.01).values())
      True
    """

    def quickest(seconds: Mapping[str, float]) -> float:
        return min(t for name, t in seconds.items() if name not in opponents)

    first = {name: seconds_of(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    running = dict(runs)
    begin = time.perf_counter()
    for number in range(_MAX_ROUNDS):
        if number >= least and time.perf_counter() - begin > seconds:
            break
        if number == 0:
            best = quickest(first)
            # A first run may read memory in; none is slower by that alone when long.
            slow = [name for name, t in first.items() if t > max(_HOPELESS * best, 1.0)]
            for name in slow:
                times[name].append(first[name])
                del running[name]
        # The place in a round changes, so that no program always follows the same one.
        turn = number % len(running)
        order = [*running.items()]
        for name, run in order[turn:] + order[:turn]:
            if apart:
                time.sleep(apart)
                seconds_of(run)
            times[name].append(seconds_of(run))
        middle = {name: statistics.median(times[name]) for name in running}
        best = quickest(middle)
        is_long = best > _LONG
        is_over = number + 1 >= (_TRIAL_ROUNDS if is_long else trial)
        if is_over or is_long:  # One run may be slow by chance, but not hopelessly.
            most = (_SLOWER if is_over else _HOPELESS) * best
            running = {n: r for n, r in running.items() if middle[n] <= most}
        if stays is not None and number >= _LEAST_ROUNDS - 1:
            leader = Figure.of(times[min(running, key=lambda name: middle[name])])
            running = {
                name: run
                for name, run in running.items()
                if name in stays or not leader.beats(Figure.of(times[name]), AS_GOOD)
            }
        if len(running) == 1 and number >= _LEAST_ROUNDS - 1:
            break
    return times


def _exactly(value: float) -> Figure:
    return Figure(float(value), float(value), float(value))


@functools.cache
def _numbers() -> np.ndarray:
    """Random numbers; large arrays repeat them, as their run time does not mind."""
    return np.random.default_rng(0).standard_normal(1 << 16, np.float32)


def _lower(program: Program) -> Any:
    args = jax.tree.map(lambda leaf: abstract(leaf, None), program.args)
    return jax.jit(program.function).lower(*args)


def _key(text: str, options: Options) -> str:
    told = json.dumps([text, sorted(options), ""])  # as in files that are kept
    return hashlib.sha256(told.encode()).hexdigest()[:20]
