"""fcconv convert: converts a checkpoint to the other form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .inputs import ArgumentError
from .options import (
    AllSteps,
    BackendFor,
    DryRun,
    FollowLinks,
    Inputs,
    Kwargs,
    Method,
    NoCheck,
    Overwrite,
    Prefixes,
    Rules,
    Source,
    Step,
    Target,
    ToForm,
)
from .output import start_jax
from .steps import (
    PlanOptions,
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
def convert(
    src: Source,
    dst: Target,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan from 'fcconv plan --out'.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="Plan this model, as 'plan' does."),
    ] = None,
    inputs: Inputs = None,
    to: ToForm = None,
    rules: Rules = None,
    backend_for: BackendFor = None,
    kwargs: Kwargs = None,
    method: Method = None,
    overwrite: Overwrite = False,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="Format of DST; by default from its suffix, or SRC's."
        ),
    ] = None,
    step: Step = None,
    all_steps: AllSteps = False,
    prefixes: Prefixes = None,
    no_check: NoCheck = False,
    dry_run: DryRun = False,
    follow_links: FollowLinks = False,
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

    plan_options = PlanOptions(to, rules, backend_for)
    if (plan_file is None) == (model is None) and (plan_file or not rules):
        raise ArgumentError(
            "give one of --plan FILE, --model MODULE:NAME with --input, or --rule alone"
        )
    if plan_file is not None and plan_options.any:
        raise ArgumentError(
            "--to, --rule and --for do not go with --plan, which has decided the form "
            "of every layer. To go back by a plan: fcconv restore --plan"
        )
    if model is None and (inputs or kwargs or method):
        raise ArgumentError("--input, --kwarg and --method need --model")
    given = None if plan_file is None else read_plan(plan_file)
    check_target(src, dst, overwrite=overwrite)
    if file_format is not None:
        format_named(file_format)
    if given is not None:
        made = given
    elif model is not None:
        made = plan_model(read_model(model, inputs, kwargs, method), plan_options)
    else:
        made = plan_checkpoint(src, plan_options, step)
    require_layers(made)
    report = convert_checkpoint(
        src,
        dst,
        made,
        overwrite=overwrite,
        format=file_format,
        step=step,
        all_steps=all_steps,
        prefix=prefixes or (),
        check=not no_check,
        dry_run=dry_run,
        follow_links=follow_links,
    )
    typer.echo(str(report))
