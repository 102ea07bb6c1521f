"""fcconv restore: a converted checkpoint back to the bit."""

from __future__ import annotations

import typer

from .app import app, examples
from .options import Overwrite, Source, Target
from .output import progress_bar


@app.command(epilog=examples("restore conv back", "restore conv back --overwrite"))
def restore(src: Source, dst: Target, overwrite: Overwrite = False) -> None:
    """Undo a conversion to the bit, with the plan that is stored in the checkpoint."""
    from ..checkpoints import restore_checkpoint

    with progress_bar("restoring") as tell:
        report = restore_checkpoint(
            src,
            dst,
            overwrite=overwrite,
            progress=lambda done, total, name: tell(name, done, total),
        )
    typer.echo(str(report))
