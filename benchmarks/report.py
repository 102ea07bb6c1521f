"""Tables in Markdown, from the results of all devices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FORMS = ("original", "all to conv", "all to dense", "tuned")
_NOTHING = "Not measured yet."
# What the README tells of, at batch 8.
_TOLD = {"vgg16-8": "VGG16", "vit-b-8": "ViT-B/16", "resnet50-8": "ResNet-50"}

Found = dict[str, Any]


def read(file: Path) -> list[Found]:
    """The results of a device; the files of other scripts have none."""
    return json.loads(file.read_text()).get("results", [])


def tables(folder: Path) -> dict[str, str]:
    """All tables, by name: ``models-cpu``, ``cycles``.

    Those of the CPU are always there, and say so where nothing is measured.
    """
    made = {f"{name}-cpu": _NOTHING for name in _TABLES} | {"cycles": _NOTHING}
    cycles = []
    for file in sorted(folder.glob("*.json")):
        results = sorted(read(file), key=_in_order)
        for name, (belongs, table) in _TABLES.items():
            if own := [found for found in results if belongs(found)]:
                made[f"{name}-{file.stem}"] = table(own)
        cycles += [found for found in results if found["group"] == "cycles"]
    if cycles:
        made["cycles"] = _cycles(cycles)
    return made


def _in_order(found: Found) -> list[tuple[bool, int, str]]:
    """Cases by name, numbers in them by size."""
    parts = re.split(r"(\d+)", found["case"])
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def readme(results: Sequence[Found]) -> str:
    """What the README says of tuning, from the results on the CPU."""
    ratios = {found["case"]: found["bounds"][0]["value"] for found in results}
    told = [f"{word} {ratios[c]:.2f}x" for c, word in _TOLD.items() if c in ratios]
    return (
        f"`tune` picks the form: {', '.join(told)} of the time at batch 8, a "
        f"convolution in a loop {ratios['loop-1000']:.1g}x; ViT-B "
        f"{ratios['vit-b-1']:.2f}x at batch 1"
    )


def _models(results: Sequence[Found]) -> str:
    return _times("model, batch", results, _FORMS)


def _layers(results: Sequence[Found]) -> str:
    names = list(dict.fromkeys(n for found in results for n in found["milliseconds"]))
    return _times("layer, batch", results, sorted(names, key=_place))


def _place(name: str) -> tuple[bool, bool, bool]:
    """The original first, then the other forms, tuned, and PyTorch's."""
    return name.startswith("PyTorch"), name == "tuned", name != "original"


def _times(title: str, results: Sequence[Found], names: Sequence[str]) -> str:
    rows = [[title, *names, "tuned / original", "bounds"]]
    for found in results:
        cells = [_time(found, name) for name in names]
        missed = [
            f"{each['what']} {_value(each)}, not {each['bound']:g}x"
            for each in found["bounds"]
            if each["value"] > each["bound"]
        ]
        verdict = f"**missed**: {'; '.join(missed)}" if missed else "hold"
        rows.append([found["case"], *cells, _value(found["bounds"][0]), verdict])
    return _markdown(rows)


def _costs(results: Sequence[Found]) -> str:
    rows = [["case", "what", "measured", "bound"]]
    for found in results:
        for each in found["bounds"]:
            rows.append([found["case"], each["what"], *_bound(each)])
    return _markdown(rows)


def _cycles(results: Sequence[Found]) -> str:
    rows = [["model", "original", "tuned", "form", "tuned / original", "bound"]]
    for found in results:
        cycles, choice = found["cycles"], found["tuning"]["choice"]
        both = [f"{cycles[name]:,.0f}" for name in ("as it is", choice)]
        rows.append([found["case"], *both, choice, *_bound(found["bounds"][0])])
    return _markdown(rows)


def _time(found: Found, name: str) -> str:
    """A median, and half of the interquartile range as a part of it, of many runs."""
    median = found["milliseconds"].get(name)
    if median is None:
        return "as it is" if name == "tuned" else "-"
    text = f"{median:,.4g} ms" if median < 1000 else f"{median:,.0f} ms"
    if found.get("runs", {}).get(name, 1) > 1:
        first, third = found["quartiles"][name]
        text += f" ±{(third - first) / 2 / median:.0%}"
    return text


def _bound(each: Found) -> tuple[str, str]:
    """A figure and its bound, which is marked where it does not hold."""
    missed = "" if each["value"] <= each["bound"] else ", **missed**"
    unit = each["unit"] if each["unit"] == "x" else f" {each['unit']}"
    return _value(each), f"{each['bound']:g}{unit}{missed}"


def _value(each: Found) -> str:
    value, unit = each["value"], each["unit"]
    if unit != "x":
        return f"{value:.3g} {unit}"
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _is_loop(found: Found) -> bool:
    return found["group"] == "layers" and "original" in found["milliseconds"]


# Which results belong into a table, and how they are shown.
_TABLES = {
    "models": (lambda found: found["group"] == "models", _models),
    "layers": (lambda f: f["group"] == "layers" and not _is_loop(f), _layers),
    "loops": (_is_loop, _layers),
    "costs": (lambda found: found["group"] == "costs", _costs),
}
