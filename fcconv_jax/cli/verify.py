"""fcconv verify: both forms of a model, proved equal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .inputs import ArgumentError
from .options import (
    AsJson,
    BackendFor,
    Backends,
    Inputs,
    Kwargs,
    Method,
    ModelName,
    Rules,
    ToForm,
)
from .output import write_text
from .steps import ModelCall, Wishes, parse_backends, verify_checkpoint, verify_model


@app.command(
    epilog=examples(
        "verify model.py:Net --input 2,8,8,1",
        "verify model.py:Net --input 2,8,8,1 --checkpoint ckpt --out report.md",
        "verify model.py:Net --input 2,8,8,1 --no-gradients --json",
        "verify model.py:Net --input 2,8,8,1 --backend cpu --backend tpu:v6e",
    )
)
def verify(
    model: ModelName,
    inputs: Inputs = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Take the parameters from here; from either form, as a converted "
            "checkpoint holds its plan. Drawn at random unless said."
        ),
    ] = None,
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

    Exit status 0 when every check passes, 1 when one does not.
    """
    if as_json and as_markdown:
        raise ArgumentError("give one of --json and --markdown")
    wishes = Wishes(to, rules, backend_for)
    call = ModelCall.read(model, inputs, kwargs, method)
    options = {
        "gradients": gradients,
        "backends": parse_backends(backends),
        "timeout": timeout,
    }
    if checkpoint is None:
        report = verify_model(call, call.plan(wishes), seed, options)
    else:
        report = verify_checkpoint(call, checkpoint, wishes, seed, options)
    if out is not None:
        to_json = out.suffix == ".json"
        write_text(out, report.to_json() if to_json else report.to_markdown())
    if as_json:
        typer.echo(report.to_json())
    else:
        typer.echo(report.to_markdown() if as_markdown else str(report))
    if not report.passed:
        raise typer.Exit(1)
