"""Tables in Markdown, from the results of one device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FORMS = ("original", "all to conv", "all to dense", "tuned")


def read(file: Path, group: str) -> list[dict[str, Any]]:
    """The results of one group; those of other scripts have none."""
    results = json.loads(file.read_text()).get("results", ())
    return [found for found in results if found["group"] == group]


def table(group: str, results: Sequence[dict[str, Any]]) -> str:
    """The results of one group, as a table."""
    return GROUPS[group](results)


def _models(results: Sequence[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [
        ("model, batch", *_FORMS, "tuned / original", "bound")
    ]
    for found in results:
        ms, quartiles = found["milliseconds"], found.get("quartiles", {})
        cells = [_time(ms.get(name), quartiles.get(name)) for name in _FORMS]
        rows.append((found["case"], *cells, *_bound(found, "tuned / original")))
    return _markdown(rows)


def _layers(results: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(k for found in results for k in found["milliseconds"]))
    rows: list[tuple[str, ...]] = [
        ("layer, batch", *names, "tuned / original", "bound")
    ]
    for found in results:
        ms, quartiles = found["milliseconds"], found.get("quartiles", {})
        cells = [_time(ms.get(name), quartiles.get(name)) for name in names]
        what = f"tuned / {found.get('original', 'original')}"
        rows.append((found["case"], *cells, *_bound(found, what)))
    return _markdown(rows)


def _cycles(results: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for found in results for name in found["cycles"]))
    rows: list[tuple[str, ...]] = [("model", *names, "tuned / original", "bound")]
    for found in results:
        cycles = found["cycles"]
        cells = [f"{cycles[name]:,.0f}" if name in cycles else "-" for name in names]
        rows.append((found["case"], *cells, *_bound(found, "tuned / original")))
    return _markdown(rows)


def _time(median: float | None, quartiles: Sequence[float] | None) -> str:
    """A median with its interquartile range."""
    if median is None:
        return "-"
    text = f"{median:,.4g} ms"
    if quartiles:
        text += f" ({quartiles[0]:,.4g} to {quartiles[1]:,.4g})"
    return text


def _bound(found: dict[str, Any], what: str) -> tuple[str, str]:
    """A figure and its bound, which is marked where it does not hold."""
    each = next(each for each in found["bounds"] if each["what"] == what)
    missed = "" if each["value"] <= each["bound"] else ", **missed**"
    return f"{each['value']:.3f}x", f"{each['bound']:g}x{missed}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


# How the results of a group are shown.
GROUPS = {"models": _models, "layers": _layers, "cycles": _cycles}
