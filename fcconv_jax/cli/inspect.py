"""fcconv inspect: lists the contents of a checkpoint."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, examples
from .inputs import ArgumentError
from .options import AsJson, CheckpointStep, SourceCheckpoint
from .output import human, print_plan, print_table, start_jax

if TYPE_CHECKING:
    from ..checkpoints import LeafInfo


@app.command(
    name="inspect",
    epilog=examples(
        "inspect ckpt", "inspect ckpt --match '*/kernel'", "inspect conv --json"
    ),
)
def inspect_(
    src: SourceCheckpoint,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="List only leaves whose path matches, such as '*kernel'.",
        ),
    ] = None,
    step: CheckpointStep = None,
    as_json: AsJson = False,
) -> None:
    """List a checkpoint's leaves with dtypes, shapes and sizes, and the stored plan.

    Leaves are grouped by the first part of their path, with the size of each group. A
    summary follows.
    """
    start_jax()
    from ..checkpoints import inspect_checkpoint

    info = inspect_checkpoint(src, step)
    leaves = [
        leaf for leaf in info.leaves if not match or fnmatchcase(leaf.path, match)
    ]
    if match and not leaves:
        raise ArgumentError(
            f"--match: no leaf of {src} matches {match!r}. Pass a pattern for "
            f"{[leaf.path for leaf in info.leaves[:5]]}, ..."
        )
    if as_json:
        content = {
            "path": str(info.path),
            "format": info.format,
            "leaves": [
                {
                    "path": leaf.path,
                    "dtype": leaf.dtype,
                    "shape": leaf.shape,
                    "bytes": leaf.nbytes,
                }
                for leaf in leaves
            ],
            "bytes": sum(leaf.nbytes for leaf in leaves),
            "plan": info.plan and json.loads(info.plan.to_json()),
        }
        typer.echo(json.dumps(content))
        return
    print_table(("leaf", "dtype", "shape", "size"), _rows(leaves))
    if info.plan is not None:
        typer.echo("converted, with this plan:")
        print_plan(info.plan)
    else:
        typer.echo("not converted: no plan is stored")
    typer.echo(f"{info.path}: {info.format}, {_summary(leaves)}")


def _rows(leaves: Sequence[LeafInfo]) -> list[tuple[str, str, str, str]]:
    """Return the leaves that hold arrays, below the names and sizes of their groups."""
    groups: dict[str, list[LeafInfo]] = {}
    for leaf in leaves:
        if _holds_array(leaf):
            groups.setdefault(leaf.path.partition("/")[0], []).append(leaf)
    rows = []
    for group, members in groups.items():
        if len(groups) > 1 and members[0].path != group:
            size = human(sum(leaf.nbytes for leaf in members))
            rows.append((f"{group}/", "", f"{len(members)} leaves", size))
        rows += [
            (leaf.path, leaf.dtype, str(leaf.shape), human(leaf.nbytes))
            for leaf in members
        ]
    return rows


def _holds_array(leaf: LeafInfo) -> bool:
    return leaf.dtype not in ("None", "NoneType", "none")


def _summary(leaves: Sequence[LeafInfo]) -> str:
    """How many leaves and parameters there are, of which dtypes, and their size."""
    arrays = [leaf for leaf in leaves if _holds_array(leaf)]
    entries: Counter[str] = Counter()
    for leaf in arrays:
        entries[leaf.dtype] += math.prod(leaf.shape)
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in entries.most_common())
    empty = len(leaves) - len(arrays)
    empty_words = f", {empty} empty" if empty else ""
    total = human(sum(leaf.nbytes for leaf in leaves))
    return f"{len(arrays)} leaves{empty_words}, {total}: {dtypes}"
