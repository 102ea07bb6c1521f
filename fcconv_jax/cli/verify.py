"""fcconv verify: both forms of a model, proved equal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .export import is_exported, verify_exported
from .inputs import ArgumentError
from .options import (
    AsJson,
    BackendFor,
    Backends,
    Inputs,
    Kwargs,
    Method,
    ModelName,
    Prefixes,
    Rules,
    Step,
    ToForm,
)
from .output import show_report
from .steps import (
    Wishes,
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
        "verify model.py:Net --input 2,8,8,1 --checkpoint ckpt --out report.md",
        "verify model.py:Net --input 2,8,8,1 --no-gradients --json",
        "verify model.py:Net --input 2,8,8,1 --backend cpu --backend tpu:v6e",
        "verify ckpt conv",
    )
)
def verify(
    model: ModelName,
    other: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DST]",
            help="With MODULE:NAME a checkpoint too: compare the two, entry by entry, "
            "through the plan that is stored in one of them.",
        ),
    ] = None,
    inputs: Inputs = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Take the parameters from here; from either form, as a converted "
            "checkpoint holds its plan. Drawn at random unless said."
        ),
    ] = None,
    step: Step = None,
    prefixes: Prefixes = None,
    seed: Annotated[int, typer.Option(help="Of random inputs and parameters.")] = 0,
    to: ToForm = None,
    rules: Rules = None,
    backend_for: BackendFor = None,
    kwargs: Kwargs = None,
    method: Method = None,
    backends: Backends = None,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds for each backend that is compiled ahead of time."),
    ] = 600.0,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients/--no-gradients",
            help="Compare gradients and one optimizer step too.",
        ),
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT",
            help="Of a file that fcconv export wrote, in the place of the model: the "
            "checkpoint that it is held against.",
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODULE:NAME",
            help="Of such a file: its model, to compare the whole of it on --input.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the report here: JSON to *.json, else Markdown."),
    ] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown.")
    ] = False,
) -> None:
    """Prove that the two forms of a model are equal on this machine.

    With --backend, on others too: one that is not present is compiled for
    ahead of time, which shows what becomes of both forms, and proves no more.

    Two checkpoints in place of a model are compared by what they hold, without
    the model's code, whatever their formats and sizes.

    In the place of the model, a file that fcconv export wrote, such as net.tflite
    with --against CKPT: its weights, each layer in its runtime, and the whole file.

    Exit status 0 when every check passes, 1 when one does not.
    """
    if as_json and as_markdown:
        raise ArgumentError("give one of --json and --markdown")
    if other is not None:
        if inputs or checkpoint or to or rules or backend_for or kwargs or backends:
            raise ArgumentError("two checkpoints are compared with no other option")
        compared = compare_checkpoints(Path(model), other, step, prefixes)
        show_report(compared, out, as_json, as_markdown)
        return
    if is_exported(model):
        file = verify_exported(model, against, code, inputs, kwargs, method, seed)
        show_report(file, out, as_json, as_markdown)
        return
    wishes = Wishes(to, rules, backend_for)
    bound = read_model(model, inputs, kwargs, method)
    options = {
        "gradients": gradients,
        "backends": parse_backends(backends),
        "timeout": timeout,
    }
    if checkpoint is None:
        report = verify_model(bound, plan_model(bound, wishes), seed, options)
    else:
        report = verify_checkpoint(bound, checkpoint, wishes, seed, options, step)
    show_report(report, out, as_json, as_markdown)
