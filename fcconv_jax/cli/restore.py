"""fcconv restore: undoes a conversion, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .options import (
    AllSteps,
    DryRun,
    FollowLinks,
    NoCheck,
    Overwrite,
    Prefixes,
    Source,
    Step,
    Target,
)
from .output import start_jax
from .steps import read_plan


@app.command(
    epilog=examples(
        "restore conv back",
        "restore conv back --overwrite",
        "restore run_conv run_back --step 9",
        "restore run_conv run_back2 --plan plan.json",
    )
)
def restore(
    src: Source,
    dst: Target,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="The plan of the conversion, if SRC does not hold it."
        ),
    ] = None,
    overwrite: Overwrite = False,
    step: Step = None,
    all_steps: AllSteps = False,
    prefixes: Prefixes = None,
    no_check: NoCheck = False,
    dry_run: DryRun = False,
    follow_links: FollowLinks = False,
) -> None:
    """Undo a conversion, bit for bit.

    The plan is the one stored in the checkpoint. Steps that training saved
    after the conversion do not hold it: they take that of an earlier step in
    the same folder, or --plan.
    """
    start_jax()
    from ..checkpoints import restore_checkpoint

    report = restore_checkpoint(
        src,
        dst,
        None if plan_file is None else read_plan(plan_file),
        overwrite=overwrite,
        step=step,
        all_steps=all_steps,
        prefix=prefixes or (),
        check=not no_check,
        dry_run=dry_run,
        follow_links=follow_links,
    )
    typer.echo(str(report))
