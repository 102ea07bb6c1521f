"""fcconv restore: a converted checkpoint back to the bit."""

from __future__ import annotations

import typer

from .app import app, examples
from .options import (
    AllSteps,
    DryRun,
    NoCheck,
    Overwrite,
    Prefixes,
    Source,
    Step,
    Target,
)


@app.command(
    epilog=examples(
        "restore conv back",
        "restore conv back --overwrite",
        "restore run_conv run_back --step 9",
    )
)
def restore(
    src: Source,
    dst: Target,
    overwrite: Overwrite = False,
    step: Step = None,
    all_steps: AllSteps = False,
    prefixes: Prefixes = None,
    no_check: NoCheck = False,
    dry_run: DryRun = False,
) -> None:
    """Undo a conversion to the bit, with the plan that is stored in the checkpoint."""
    from ..checkpoints import restore_checkpoint

    report = restore_checkpoint(
        src,
        dst,
        overwrite=overwrite,
        step=step,
        all_steps=all_steps,
        prefix=prefixes or (),
        check=not no_check,
        dry_run=dry_run,
    )
    typer.echo(str(report))
