"""The file of measurements that ``tune(timings=)`` reads and adds to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.install import replacing, updating
from ..files.strict_json import loads
from ..messages.errors import PlanError
from ..plan.tuning import Figure, Objective

_FORMAT = "fcconv_jax.timings"
# Larger than any time, size or cycle count; 1e999 in JSON would be infinite.
_MOST = 1e30


class Timings:
    """Figures by program: a known figure is not measured again.

    Each addition is merged with what the file holds by then, so that several runs may
    share it. If two measured one program, the first figure stays. The file is replaced
    as a whole: a full disk or a kill loses nothing that it held.

    Args:
      file: a JSON file, made if it is missing. None keeps figures in memory only.
      objective: the measured quantity.
      device: the device and the version of its compiler. Figures of another one are
        refused.

    Raises:
      PlanError: the file is damaged, is of another device, or cannot be written.
    """

    def __init__(self, file: Path | None, objective: Objective, device: str):
        self._file = file and file.resolve()  # a link stays a link
        self._objective: Objective = objective
        self._device = f"{objective} on {device}"
        self._known: dict[str, Figure] = {}
        self._passed: set[str] = set()
        self._measured: set[str] = set()
        if self._file is not None:
            if not self._file.parent.is_dir():
                raise PlanError(
                    f"{file}: no such folder. Create it, or pass another timings=."
                )
            self._merge(self._file)

    def get(self, key: str) -> Figure | None:
        """Return the figure of a program, if it is known."""
        return self._known.get(key)

    def add(self, found: Mapping[str, Figure]) -> None:
        """Keep figures, except of programs that have one."""
        # The first figure stays, so that a plan doesn't change between runs.
        self._known = {**found, **self._known}
        self._write()

    def passes_over(self, what: str, left: float) -> bool:
        """Return whether time for something is out, or was out in an earlier run.

        It is recorded, and passed over again in the next run. What was measured in an
        earlier run takes no time, and is never passed over.
        """
        if what in self._measured:
            return False
        if left <= 0 and what not in self._passed:
            self._passed.add(what)
            self._write()
        return what in self._passed

    def finish(self, what: str) -> None:
        """Note that all figures of something are known."""
        if what not in self._measured:
            self._measured.add(what)
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            with updating(self._file):
                self._merge(self._file)
                with replacing(self._file) as fresh:
                    fresh.write_text(json.dumps(self._content(), indent=1) + "\n")
        except OSError as error:
            raise PlanError(
                f"{self._file}: can't be written ({error.strerror}); the measurements "
                "of earlier runs are kept. Make room, or pass another timings=."
            ) from None

    def _content(self) -> dict[str, Any]:
        known = self._known.items()
        return {
            "format": _FORMAT,
            "version": 1,
            "device": self._device,
            "figures": {key: dataclasses.asdict(figure) for key, figure in known},
            "no time for": sorted(self._passed - self._measured),
            "measured": sorted(self._measured),
        }

    def _merge(self, file: Path) -> None:
        """Take in what the file holds; its figures win."""
        if not file.exists():
            return
        try:
            # A pipe or a device would never end.
            if not file.is_file():
                raise ValueError("not a regular file")
            content = loads(file.read_bytes())
            if content["format"] != _FORMAT or content["version"] != 1:
                raise ValueError("another format or version")
            entries, passed = content["figures"].items(), content["no time for"]
            figures = {key: _figure(entry, self._objective) for key, entry in entries}
            measured = content["measured"]
            texts = [*passed, *measured, content["device"]]
            if not all(isinstance(each, str) for each in texts):
                raise TypeError("expected text")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise PlanError(
                f"{file}: expected a file of timings, got something else ({error!r}). "
                "Delete it to measure again, or pass another timings=."
            ) from None
        if content["device"] != self._device:
            raise PlanError(
                f"Expected timings of {self._device}, got those of "
                f"{content['device']} in {file}. Pass another file for each device "
                "and version."
            )
        self._known |= figures
        self._passed |= set(passed)
        self._measured |= set(measured)


def _figure(entry: Any, objective: Objective) -> Figure:
    figure = Figure(**{**entry, "runs": tuple(entry.get("runs", ()))})
    values = (figure.low, figure.median, figure.high, *figure.runs)
    if any(type(value) not in (int, float) for value in values) or not (
        isinstance(figure.race, str)
    ):
        raise TypeError(f"expected numbers, got {entry}")
    # A program may need no scratch memory; but all take time.
    least = min(values) >= 0 if objective == "memory" else min(values) > 0
    if not (least and values[0] <= values[1] <= values[2] and max(values) < _MOST):
        raise ValueError(f"{entry} is not a possible {objective}")
    low, median, high, *runs = map(float, values)
    return Figure(median, low, high, tuple(runs), figure.race)
