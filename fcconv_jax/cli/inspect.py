"""fcconv inspect: what a checkpoint holds."""

from __future__ import annotations

import json

import typer

from .app import app, examples
from .options import AsJson, Source
from .output import print_plan, print_table


@app.command(name="inspect", epilog=examples("inspect ckpt", "inspect conv --json"))
def inspect_(src: Source, as_json: AsJson = False) -> None:
    """List what a checkpoint holds: leaves, dtypes, shapes, bytes, the stored plan."""
    from ..checkpoints import inspect_checkpoint

    info = inspect_checkpoint(src)
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
                for leaf in info.leaves
            ],
            "bytes": info.nbytes,
            "plan": info.plan and json.loads(info.plan.to_json()),
        }
        typer.echo(json.dumps(content))
        return
    typer.echo(
        f"{info.path}: {info.format}, {len(info.leaves)} leaves, {info.nbytes} bytes"
    )
    rows = [
        (leaf.path, leaf.dtype, str(leaf.shape), str(leaf.nbytes))
        for leaf in info.leaves
    ]
    print_table(("leaf", "dtype", "shape", "bytes"), rows)
    if info.plan is None:
        typer.echo("never converted: it holds no plan")
    else:
        typer.echo("converted, with this plan:")
        print_plan(info.plan)
