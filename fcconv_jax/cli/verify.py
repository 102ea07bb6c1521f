"""fcconv verify: verifies that both forms of a model, or two checkpoints, agree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .export import is_exported, verify_exported
from .inputs import ArgumentError
from .options import (
    AsJson,
    Backends,
    ModelName,
    Params,
    Prefixes,
    Step,
)
from .output import REPORTS, check_destination, show_report
from .records import CallOptions, PlanOptions, given, spread
from .steps import (
    compare_checkpoints,
    parse_backends,
    plan_model,
    read_model,
    verify_checkpoint,
    verify_model,
)


@app.command(
    epilog=examples(
        "verify model.py:Net --input 2,8,8,1",
        "verify model.py:Net --input 2,8,8,1 --params ckpt --out report.md",
        "verify model.py:Net --input 2,8,8,1 --no-gradients --json",
        "verify model.py:Net --input 2,8,8,1 --backend cpu --backend tpu:v6e",
        "verify ckpt conv",
    )
)
@spread
def verify(
    model: ModelName,
    call: CallOptions,
    plan_options: PlanOptions,
    other: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DST]",
            help="A second checkpoint, if MODULE:NAME is one: compare them entry by "
            "entry, through the plan stored in one of them.",
        ),
    ] = None,
    params: Params = None,
    step: Step = None,
    prefixes: Prefixes = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs and params.")] = 0,
    backends: Backends = None,
    timeout: Annotated[
        float,
        typer.Option(
            help="Time limit per backend compiled ahead of time, in seconds.", min=1
        ),
    ] = 600.0,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients/--no-gradients",
            help="Also compare gradients and one optimizer step.",
        ),
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT",
            help="With a file written by fcconv export as the model: the checkpoint "
            "to compare it with.",
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODULE:NAME",
            help="With such a file: its model, to compare the outputs on --input.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the report to this file, as JSON (*.json) or Markdown."
        ),
    ] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown.")
    ] = False,
) -> None:
    """Verify that both forms of a model are equivalent on this machine.

    With --backend, on other backends, too. For one that is not present, both
    forms are compiled ahead of time, but not executed.

    Given two checkpoints instead of a model, compare their entries, without
    the model's code, in any format and of any size.

    Given a file written by fcconv export, such as net.tflite with --against
    CKPT, check its weights, each layer in its runtime, and the whole file.

    The exit status is 0 if every check passes, 3 if no layer was converted, and
    1 otherwise.
    """
    if as_json and as_markdown:
        raise ArgumentError("give one of --json and --markdown")
    check_destination("--out", out, REPORTS)
    on = parse_backends(backends)
    if other is not None:
        if params or backends or given(call) or given(plan_options):
            raise ArgumentError("two checkpoints are compared with no other option")
        compared = compare_checkpoints(Path(model), other, step, prefixes)
        show_report(compared, out, as_json, as_markdown)
        return
    if not is_exported(model) and (against or code):
        raise ArgumentError(
            f"--against and --model go with a file of fcconv export, got {model}. Pass "
            "--params CKPT to verify a model with a checkpoint's params"
        )
    if is_exported(model):
        if given(plan_options) or params:
            raise ArgumentError(
                "--params, --to, --rule and --for do not go with an exported file, "
                "which has its plan. Pass --against CKPT"
            )
        file = verify_exported(model, against, code, call, seed)
        show_report(file, out, as_json, as_markdown)
        return
    bound = read_model(model, call)
    options = {
        "gradients": gradients,
        "backends": on,
        "timeout": timeout,
    }
    if params is None:
        report = verify_model(bound, plan_model(bound, plan_options), seed, options)
    else:
        report = verify_checkpoint(bound, params, plan_options, seed, options, step)
    show_report(report, out, as_json, as_markdown)
    if not report.planned:
        raise typer.Exit(3)
