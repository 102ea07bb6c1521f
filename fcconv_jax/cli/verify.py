"""fcconv verify: verifies that both forms of a model, or two checkpoints, agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, examples
from .export import is_exported, verify_exported
from .inputs import ArgumentError
from .options import (
    AsJson,
    AsMarkdown,
    Backends,
    CheckpointStep,
    ModelName,
    Params,
    Prefixes,
    ReportFile,
    To,
)
from .output import REPORTS, check_destination, show_report, start_jax
from .records import CallOptions, PlanOptions, given, spread
from .steps import parse_backends, plan_model, read_model, with_random_inputs

if TYPE_CHECKING:
    from ..frontends.bound import BoundModel
    from ..plan import Plan
    from ..verification.report import VerifyReport


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
    step: CheckpointStep = None,
    prefixes: Prefixes = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs and params.")] = 0,
    backends: Backends = None,
    timeout: Annotated[
        float,
        typer.Option(
            help="Time limit for compiling ahead of time, in seconds per backend.",
            min=1,
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
            help="The checkpoint to compare an exported file with.",
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODULE:NAME",
            help="The model of an exported file, to compare the outputs on --input.",
        ),
    ] = None,
    out: ReportFile = None,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Verify that both forms of a model are equivalent on this machine.

    With --backend, verify on other backends, too. If one isn't present, both
    forms are compiled ahead of time, but not executed.

    Given two checkpoints instead of a model, compare their entries, without
    the model's code, in any format and of any size.

    Given a file written by fcconv export, such as net.tflite with --against
    CKPT, check its weights, each layer in its runtime, and the whole file.

    The exit status is 0 if every check passes, 3 if no layer was converted, and
    1 otherwise.
    """
    if as_json and as_markdown:
        raise ArgumentError("Expected --json or --markdown, got both. Pass one.")
    check_destination("--out", out, REPORTS)
    on = parse_backends(backends)
    if other is not None:
        if params or backends or given(call) or given(plan_options):
            raise ArgumentError(
                "Expected two checkpoints alone, got options for a model as well. Drop "
                "--params, --backend, --input, --kwarg, --method, --to, --rule and "
                "--for."
            )
        start_jax()
        from ..checkpoints import verify_checkpoint

        compared = verify_checkpoint(model, other, step=step, prefix=prefixes or ())
        show_report(compared, out, as_json, as_markdown)
        return
    if not is_exported(model) and (against or code):
        raise ArgumentError(
            "Expected a file written by fcconv export with --against or --model, got "
            f"{model}. Pass --params CKPT to verify a model with a checkpoint's params."
        )
    if is_exported(model):
        if given(plan_options) or params:
            raise ArgumentError(
                "Expected --against with an exported file, which contains its plan, "
                "got --params, --to, --rule or --for. Pass --against CKPT."
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
        report = _verify_model(bound, plan_model(bound, plan_options), seed, options)
    else:
        report = _verify_checkpoint(bound, params, plan_options, seed, options, step)
    show_report(report, out, as_json, as_markdown)
    if not report.planned:
        raise typer.Exit(3)


def _verify_model(
    bound: BoundModel, made: Plan, seed: int, options: Mapping[str, Any]
) -> VerifyReport:
    """Return the report on a model with random parameters and inputs.

    If nothing is executed, shapes take their place.
    """
    from ..backends.resolution import resolve
    from ..verification.verify import verify

    backends = options["backends"]
    # Nothing is executed then, so a model that doesn't fit this machine can be planned.
    if backends and all(resolve(backend).how != "executed" for backend in backends):
        bound = bound.with_variables(bound.shapes)
    else:
        bound = with_random_inputs(bound, seed).drawn(seed)
    return verify(bound, plan=made, **options)


def _verify_checkpoint(
    bound: BoundModel,
    checkpoint: Path,
    plan_options: PlanOptions,
    seed: int,
    options: Mapping[str, Any],
    step: str | None = None,
) -> VerifyReport:
    """Return the report on a model with a checkpoint's parameters in either form."""
    from ..checkpoints import read_checkpoint
    from ..verification.verify import verify
    from .variables import find_variables

    saved = read_checkpoint(checkpoint, step)
    made = saved.plan or plan_model(bound, plan_options)
    if saved.plan is not None:
        if given(plan_options):
            raise ArgumentError(
                "Expected no --to, --rule or --for with the converted checkpoint "
                f"{checkpoint}, which contains its plan. Drop them."
            )
        # A stored plan may mix both forms; one plan of the code has one.
        for form in dict.fromkeys(layer.to for layer in made.values()):
            now = plan_model(bound, PlanOptions(To(form)))
            _print_differences(made, now, checkpoint)
    found = find_variables(saved, bound, str(checkpoint))
    bound = with_random_inputs(bound, seed).with_variables(found.original)
    return verify(bound, plan=made, converted_params=found.converted, **options)


def _print_differences(stored: Plan, traced: Plan, checkpoint: Path) -> None:
    """Report where a stored plan, such as one from rules, differs from the code's."""
    for path in stored.keys() & traced.keys():
        then, now = stored[path], traced[path]
        if (then.window, then.order) != (now.window, now.order):
            typer.echo(
                f"note: {checkpoint} has {path!r} with the window {then.window} "
                f"{then.order}, the model's code has {now.window} {now.order}; a "
                "handwritten model must flatten as the checkpoint does",
                err=True,
            )
