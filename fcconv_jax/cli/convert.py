"""fcconv convert: converts a checkpoint to the other form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .inputs import ArgumentError
from .options import SourceCheckpoint, TargetCheckpoint
from .output import start_jax
from .records import CallOptions, PlanOptions, TransferOptions, given, spread
from .steps import (
    plan_checkpoint,
    plan_model,
    read_model,
    read_plan,
    require_layers,
)


@app.command(
    epilog=examples(
        "convert ckpt conv --model model.py:Net --input 1,8,8,1",
        "convert ckpt conv2 --plan plan.json",
        "convert ckpt conv3 --rule 'fc1=4x4:HWC' --rule 'fc2=1x1'",
        "convert run run_conv --plan plan.json --all-steps",
        "convert ckpt conv4 --plan plan.json --dry-run",
    )
)
@spread
def convert(
    src: SourceCheckpoint,
    dst: TargetCheckpoint,
    call: CallOptions,
    plan_options: PlanOptions,
    transfer: TransferOptions,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan from 'fcconv plan --out'.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="Plan this model, as 'plan' does."),
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="Format of DST; by default from its suffix, or SRC's."
        ),
    ] = None,
) -> None:
    """Convert a checkpoint to the other form, and store the plan in it.

    The plan comes from a file (--plan), from the model's code (--model and
    --input), or from rules alone (--rule), which must give each window and
    order; ambiguous kernels are refused by name. SRC isn't modified. DST is
    written to a temporary name and renamed in one step: whenever the command
    ends, DST is either unchanged or complete.
    """
    start_jax()
    from ..checkpoints import check_target, convert_checkpoint
    from ..checkpoints.formats import format_named

    if (plan_file is None) == (model is None) and (plan_file or not plan_options.rules):
        raise ArgumentError(
            "Expected one source of the plan. Pass --plan FILE, --model MODULE:NAME "
            "with --input, or --rule alone."
        )
    if plan_file is not None and given(plan_options):
        raise ArgumentError(
            "Expected --plan alone, which already contains the form of every layer, "
            "got --to, --rule or --for. Drop them; to convert back, run fcconv restore "
            "--plan."
        )
    if model is None and given(call):
        raise ArgumentError(
            "Expected --model with --input, --kwarg and --method, got none. Pass "
            "--model MODULE:NAME."
        )
    made = None if plan_file is None else read_plan(plan_file)
    check_target(src, dst, overwrite=transfer.overwrite)
    if file_format is not None:
        format_named(file_format)
    if model is not None:
        made = plan_model(read_model(model, call), plan_options)
    elif made is None:
        made = plan_checkpoint(src, plan_options, transfer.step)
    require_layers(made)
    report = convert_checkpoint(
        src, dst, made, format=file_format, **transfer.arguments()
    )
    typer.echo(str(report))
