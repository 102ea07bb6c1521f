"""Makes the table of exported networks from ``benchmarks/results/exports.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fcconv_jax.export.runtimes import runtimes as known_runtimes


def table(file: Path) -> str:
    """Return the table in Markdown, and the reasons of cells without a verified file.

    Args:
      file: what ``benchmarks/exports.py`` wrote.
    """
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    runtimes = dict.fromkeys(name for row in found.values() for name in row)
    titles = {name: each.title for name, each in known_runtimes().items()}
    lines = [
        "| network | runtime | verdict | operators | KiB | largest error | export, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    reasons = []
    for runtime in runtimes:
        verdicts = [row.get(runtime, {}).get("verdict") for row in found.values()]
        good = "written, not run" if "written, not run" in verdicts else "verified"
        count = f"{verdicts.count(good)} of {len(found)} {good}"
        lines.append(f"| **{titles[runtime]}** | | {count} | | | | |")
        for name, row in found.items():
            if (cell := row.get(runtime)) is None:
                continue
            lines.append(f"| {name} | {titles[runtime]} | {_cells(cell)} |")
            if cell["reason"]:
                reasons.append(f"- {name}, {titles[runtime]}: {cell['reason']}")
    return "\n".join([*lines, "", *reasons]) + "\n"


def _cells(cell: dict[str, Any]) -> str:
    if "bytes" not in cell:
        return f"{cell['verdict']} | | | | "
    error = "" if cell["error"] is None else f"{cell['error']:.1e}"
    size = f"{cell['bytes'] / 1024:,.0f}"
    figures = cell["verdict"], cell["operators"], size, error, cell["seconds"]
    return " | ".join(map(str, figures))
