"""Measures on this device, against bounds: all, or the groups and cases that are named.

    python benchmarks [GROUP|CASE ...] [--out DIRECTORY]
    python benchmarks --list
    python benchmarks vit-b-8 --for tpu:v5e

Each case runs in a process of its own, and its calls take turns. Medians are shown,
with their quartiles and the bounds; the exit status is 1 if a bound does not hold. With
``--out``, the figures go to DIRECTORY/<device>.json, where those of other cases stay.
With ``--for``, the figures are cycles that XLA estimates for a TPU that is not present.
A case may be a pattern, such as ``'vit-b-*'``. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import costs
import cycles
import layers
import models
import peers
import training
from running import TPUS, Case, alone, holds, measure, show, write

GROUPS: dict[str, dict[str, Case]] = {
    "layers": layers.CASES,
    "models": models.CASES,
    "costs": costs.CASES,
    "training": training.CASES,
    "cycles": cycles.CASES,
    "operators": peers.COUNTED,
    "peers": peers.CASES,
}
_ALL = {case: run for group in GROUPS.values() for case, run in group.items()}


def chosen(names: Sequence[str], backend: str | None) -> list[str]:
    """The cases of groups, names and patterns.

    Raises:
      SystemExit: a name stands for nothing.
    """
    if backend:
        known = [case for case in cycles.CASES if case.endswith(f" for {backend}")]
        names = [name if name in GROUPS else f"{name} for {backend}" for name in names]
        if not known:
            sys.exit(f"--for {backend}: it is one of {', '.join(TPUS)}")
        names = names or ["cycles"]
    else:
        known = list(_ALL)
    found: dict[str, None] = {}
    for name in names or GROUPS:
        group = GROUPS.get(name, _ALL)
        pattern = "*" if name in GROUPS else name
        cases = [c for c in known if c in group and fnmatch.fnmatch(c, pattern)]
        if not cases:
            sys.exit(f"no group or case is called {name!r}: see --list")
        found |= dict.fromkeys(cases)
    return list(found)


def main() -> int:
    """Runs the cases, each in its own process."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="GROUP|CASE")
    parser.add_argument("--out", type=Path, metavar="DIRECTORY")
    parser.add_argument("--list", action="store_true", help="list groups and cases")
    parser.add_argument("--for", dest="backend", metavar="BACKEND")
    parser.add_argument("--alone", choices=_ALL, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for group, cases in GROUPS.items():
            print("\n  ".join([group, *cases]))
        return 0
    if args.alone:
        group = next(g for g, cases in GROUPS.items() if args.alone in cases)
        print(json.dumps(measure(group, args.alone, _ALL[args.alone])))
        return 0
    failed = False
    for found in alone(chosen(args.names, args.backend)):
        print(show(found), flush=True)
        failed |= not holds(found)
        if args.out and "bounds" in found:
            write(args.out, found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
