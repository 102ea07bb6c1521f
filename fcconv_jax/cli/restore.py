"""fcconv restore: undoes a conversion, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .options import SourceCheckpoint, TargetCheckpoint
from .output import start_jax
from .records import TransferOptions, spread
from .steps import read_plan


@app.command(
    epilog=examples(
        "restore conv back",
        "restore conv back --overwrite",
        "restore run_conv run_back --step 9",
        "restore run_conv run_back2 --plan plan.json",
    )
)
@spread
def restore(
    src: SourceCheckpoint,
    dst: TargetCheckpoint,
    transfer: TransferOptions,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="The plan of the conversion, if SRC doesn't contain it."
        ),
    ] = None,
) -> None:
    """Undo a conversion, bit for bit.

    Uses the plan stored in the checkpoint. Steps that training saved after the
    conversion don't contain it; for them, --plan is used, or else the plan of an
    earlier step in the same folder.
    """
    start_jax()
    from ..checkpoints import restore_checkpoint

    made = None if plan_file is None else read_plan(plan_file)
    report = restore_checkpoint(src, dst, made, **transfer.arguments())
    typer.echo(str(report))
