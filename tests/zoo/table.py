"""Runs the whole zoo and writes the table of its page."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import fcconv_jax as fc

from .entry import Entry, Subject
from .examine import Findings, as_function, examine

PAGE = Path(__file__).parents[2] / "docs" / "gallery" / "zoo.md"
BEGIN, END = "<!-- zoo -->", "<!-- /zoo -->"
_HEADER = (
    "| model | converted layers | remaining weight matmuls | planning / trace |\n"
    "| --- | --- | --- | --- |"
)


def names_in(text: str) -> list[tuple[str, str]]:
    """Group and name of each row of the table in a text."""
    table = text.partition(BEGIN)[2].partition(END)[0]
    found, group = [], ""
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if heading := re.fullmatch(r"\*\*(\S+)\*\*.*", cells[0]):
            group = heading[1]
        elif name := re.fullmatch(r"`(\w+)`", cells[0]):
            found.append((group, name[1]))
    return found


def row(entry: Entry, findings: Findings, ratio: float) -> str:
    """One line of the table."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(findings.kinds.items()))
    left = collections.Counter(short(why or "") for why in dict(findings.left).values())
    reasons = "; ".join(f"{n} {why}" for why, n in sorted(left.items()))
    return f"| `{entry.name}` | {kinds or 'none'} | {reasons} | {ratio:.1f}x |"


def short(reason: str) -> str:
    """The first clause of a reason, without shapes.

    Example:
      >>> short("the table of an Embed, (83, 24): read by index; a head ...")
      'the table of an Embed'
    """
    clause = re.split(r"[:;]", reason)[0]
    return re.sub(r",? \(\d[\d, ]*\)", "", clause).replace("|", "/")


def planning_ratio(subject: Subject) -> float:
    """CPU time of planning over that of tracing, each the best of three."""
    model, inputs, kwargs = subject.model, subject.inputs, dict(subject.kwargs)
    params, run = as_function(model, subject.variables)

    def best(f: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            jax.clear_caches()
            start = time.process_time()
            f()
            times.append(time.process_time() - start)
        return min(times)

    traced = best(lambda: jax.make_jaxpr(lambda p: run(p, *inputs, **kwargs))(params))
    return best(lambda: fc.make_plan(model, *inputs, **kwargs)) / traced


def line_of(name: tuple[str, str]) -> tuple[str, tuple[str, ...]]:
    """Examines the model of this group and name: its row, and what failed."""
    from .everyone import everyone

    (entry,) = (e for e in everyone() if (e.group, e.name) == name)
    try:
        with entry.shim():
            subject = entry.build()
            findings = examine(subject)
            line = row(entry, findings, planning_ratio(subject))
    except Exception as error:
        # The other models still have their say.
        return f"| {entry.name} | | | |", (f"{type(error).__name__}: {error}",)
    jax.clear_caches()
    return line, findings.failures


def main() -> int:
    """Examines the models; status 1 if one of them fails."""
    from .everyone import everyone

    parser = argparse.ArgumentParser(prog="python tests/zoo", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="only these models; then the page stays as it is"
    )
    parser.add_argument("--jobs", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    names = [
        (e.group, e.name)
        for e in everyone()
        if not options.names or e.name in options.names
    ]
    lines, groups, failed = [_HEADER], [""], 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, context) as pool:
        for (group, name), (line, failures) in zip(names, pool.map(line_of, names)):
            done = len(lines) - len(groups) + 1
            print(f"[{done}/{len(names)}] {name}", file=sys.stderr, flush=True)
            if group != groups[-1]:
                groups.append(group)
                lines.append(f"| **{group}** | | | |")
            lines.append(line)
            print(line, flush=True)
            for failure in failures:
                failed += 1
                print(f"FAILED: {failure}", file=sys.stderr, flush=True)
    if not options.names and not failed:
        before, rest = PAGE.read_text().split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(before + "\n".join([BEGIN, *lines, END]) + after)
    return int(failed > 0)
