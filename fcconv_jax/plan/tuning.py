"""Results of tuning: the measurements, and the choice made from them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ..messages.reports import aligned

Objective = Literal["latency", "memory", "cycles"]

# By objective: what a figure counts, and units of it with their sizes.
_UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "latency": ((1.0, "ms"), (1e-3, "us"), (1e3, "s")),
    "memory": ((2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "bytes")),
    "cycles": ((1.0, "cycles"),),
}


# A median that may be off by its own size decides nothing; a percentage would suggest
# that it does (a busy machine gave ±11034 %).
_NOISY = 1.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured quantity: milliseconds, bytes of scratch memory, or cycles.

    Attributes:
      median: of all runs.
      low: lower end of a 95 % interval of the median.
      high: its upper end. Both are the figure itself where nothing is random.
      runs: one for each round of a race, where the quantity is random.
      race: names the race. Rounds of another cannot be compared.
    """

    median: float
    low: float
    high: float
    runs: tuple[float, ...] = dataclasses.field(default=(), compare=False, repr=False)
    race: str = dataclasses.field(default="", compare=False, repr=False)

    @classmethod
    def of(cls, runs: Sequence[float], race: str = "") -> Figure:
        """Return the median with its interval from the order statistics (binomial).

        Example:
          >>> Figure.of([3.0, 1.0, 2.0])
          Figure(median=2.0, low=1.0, high=3.0)
        """
        ordered = sorted(runs)
        # Runs below the median are a binomial count of deviation sqrt(n) / 2; 1.96 of
        # these hold 95 %.
        reach = 0.98 * math.sqrt(len(ordered))
        middle = (len(ordered) - 1) / 2
        low = max(math.floor(middle - reach), 0)
        high = min(math.ceil(middle + reach), len(ordered) - 1)
        median = statistics.median(ordered)
        return cls(median, ordered[low], ordered[high], tuple(runs), race)

    def beats(self, other: Figure, times: float = 1.0) -> bool:
        """Return whether it is smaller, beyond the noise.

        Figures of one race are compared round by round, because what disturbs a machine
        disturbs neighbouring runs alike: the interval of the ratio must be below 1.
        Of other figures the intervals must not meet.

        Example:
          >>> Figure(1.0, 0.9, 1.1).beats(Figure(1.5, 1.2, 1.9))
          True
          >>> busy = [1.0, 1.1, 3.0, 2.9, 9.0]
          >>> Figure.of(busy).beats(Figure.of([1.1 * t for t in busy]))
          True
        """
        if self.race == other.race and self.runs and other.runs:
            ratios = [mine / its for mine, its in zip(self.runs, other.runs)]
            return Figure.of(ratios).high < 1 / times
        return self.high * times < other.low

    def show(self, objective: Objective) -> str:
        """Return the median with its unit, and how far the interval goes from it.

        Example:
          >>> Figure(12.0, 11.4, 12.6).show("latency")
          '12 ms ±5%'
          >>> Figure(2.0, 1.9, 222.0).show("latency")
          '2 ms (too noisy to decide)'
        """
        size, unit = _unit(self.median, objective)
        text = f"{_short(self.median / size)} {unit}"
        spread = max(self.high - self.median, self.median - self.low)
        if spread > _NOISY * self.median:
            return f"{text} (too noisy to decide)"
        if spread > 0.005 * self.median:
            text += f" ±{spread / self.median:.0%}"
        return text


@dataclasses.dataclass(frozen=True)
class TunedLayer:
    """Figures and choice of a group of equal layers.

    Attributes:
      paths: of the layers.
      what: the layer and its sizes, in words.
      figures: the figure of each form and layout, by name, the original's first; empty
        for layers that were not measured.
      choice: name of the chosen one, or why there was nothing to choose.
      forward: figures of the forward pass alone, if a training step was tuned.
    """

    paths: tuple[str, ...]
    what: str
    figures: tuple[tuple[str, Figure], ...]
    choice: str
    forward: tuple[tuple[str, Figure], ...] = ()

    @property
    def gain(self) -> float | None:
        """Figure of the choice, as a part of the original's."""
        found = dict(self.figures)
        if self.choice not in found:
            return None
        return _part(found[self.choice], self.figures[0][1])


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a plan was chosen.

    Attributes:
      backend: the backend that it was chosen for.
      device: the device that ran the programs, or that they were compiled for.
      objective: the minimized quantity.
      versions: the versions of JAX and jaxlib.
      programs: figures of the whole model in each form that was tried, by name; the
        original comes first, without options.
      choice: name of the chosen program.
      layers: figures of single layers.
      left: path and reason of each layer that has only one form.
      why: if the original was chosen, why.
      training: whether the figures are those of a training step, value and gradient.
      forward: figures of the forward pass alone, if ``training``.

    Example:
      >>> tried = {"as it is": Figure(2.0, 1.9, 2.1), "all to conv": Figure(1.0, 1, 1)}
      >>> programs = tuple(tried.items())
      >>> Tuning("cpu", "cpu", "latency", "jax", programs, "all to conv", ()).ratio
      0.5
    """

    backend: str
    device: str
    objective: Objective
    versions: str
    programs: tuple[tuple[str, Figure], ...]
    choice: str
    layers: tuple[TunedLayer, ...]
    left: tuple[tuple[str, str], ...] = ()
    why: str = ""
    training: bool = False
    forward: tuple[tuple[str, Figure], ...] = ()

    @property
    def before(self) -> Figure:
        """The original."""
        return self.programs[0][1]

    @property
    def after(self) -> Figure:
        """The figure of the chosen program."""
        return dict(self.programs)[self.choice]

    @property
    def ratio(self) -> float:
        """The chosen program's figure relative to the original's; at most 1."""
        return _part(self.after, self.before)

    def headline(self) -> str:
        """Return the gain of the whole model, in one line."""
        before, after = self.before.median, self.after.median
        size, unit = _unit(before, self.objective)
        text = (
            f"{self.ratio:.2f}x: {_short(before / size)} -> {_short(after / size)} "
            f"{unit} {'for a training step ' * self.training}on {self.device}"
        )
        return f"{text} ({self.why})" if self.why else text

    def __str__(self) -> str:
        lines = [self.headline(), ""]
        rows = [("whole model", self.objective, "", "")]
        if self.training:
            rows = [("whole model", "training step", "forward", "")]
        forward = dict(self.forward)
        for name, figure in self.programs:
            taken = "<- chosen" if name == self.choice else ""
            alone = forward[name].show(self.objective) if name in forward else ""
            rows.append((name, figure.show(self.objective), alone, taken))
        if not self.training:
            rows = [(name, figure, taken) for name, figure, _, taken in rows]
        lines += aligned(rows)
        if self.layers:
            lines += ["", *aligned(self.table())]
        if self.left:
            lines += ["", f"{len(self.left)} with only one form"]
            width = max(len(path or "(root)") for path, _ in self.left)
            lines += [
                f"{(path or '(root)').ljust(width)}  {why}" for path, why in self.left
            ]
        return "\n".join(lines)

    def table(self) -> list[tuple[str, ...]]:
        """Return the layers as rows of text, below a row of headings."""
        rows = [("layers", "what", "original", "other forms", "chosen", "gain")]
        for layer in self.layers:
            first = layer.paths[0] or "(root)"
            more = len(layer.paths) - 1
            forward = dict(layer.forward)
            own, *others = [
                (
                    name,
                    figure.show(self.objective),
                    *(
                        [f"(forward {forward[name].show(self.objective)})"]
                        if name in forward
                        else []
                    ),
                )
                for name, figure in layer.figures
            ] or [("", "-")]
            gain = layer.gain
            rows.append(
                (
                    f"{first} and {more} more" if more else first,
                    layer.what,
                    " ".join(own).strip(),
                    ", ".join(" ".join(other) for other in others) or "-",
                    layer.choice,
                    "" if gain is None else f"{gain:.2f}x",
                )
            )
        return rows

    def content(self) -> dict[str, object]:
        """Return the record as what JSON knows."""
        return {
            **dataclasses.asdict(self),
            "programs": _named(self.programs),
            "forward": _named(self.forward),
            "layers": [
                {
                    **dataclasses.asdict(layer),
                    "figures": _named(layer.figures),
                    "forward": _named(layer.forward),
                }
                for layer in self.layers
            ],
            "left": dict(self.left),
        }

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Tuning:
        """Read what :meth:`content` wrote; raises TypeError or KeyError else."""
        layers = tuple(
            TunedLayer(
                tuple(entry["paths"]),
                entry["what"],
                _figures(entry["figures"]),
                entry["choice"],
                _figures(entry["forward"]),
            )
            for entry in content["layers"]
        )
        rest = {
            **content,
            "programs": _figures(content["programs"]),
            "forward": _figures(content["forward"]),
            "layers": layers,
            "left": tuple(content["left"].items()),
        }
        return cls(**rest)


def _part(figure: Figure, of: Figure) -> float:
    """Return one figure as a part of another; scratch memory may be none in both."""
    return figure.median / of.median if of.median else 1.0


def _named(figures: Iterable[tuple[str, Figure]]) -> dict[str, Any]:
    """Return figures without their single runs, which would fill a plan's file."""
    return {
        name: {"median": each.median, "low": each.low, "high": each.high}
        for name, each in figures
    }


def _figures(entries: Mapping[str, Any]) -> tuple[tuple[str, Figure], ...]:
    return tuple((name, Figure(**entry)) for name, entry in entries.items())


def _unit(value: float, objective: str) -> tuple[float, str]:
    units = _UNITS[objective]
    fitting = [unit for unit in units if 1 <= value / unit[0] < 1000]
    return fitting[0] if fitting else units[0]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
