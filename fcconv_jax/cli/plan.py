"""fcconv plan: shows which layers convert, and why others don't."""

from __future__ import annotations

import typer

from .app import app, examples
from .options import (
    AsJson,
    ModelName,
    PlanOut,
)
from .output import PLANS, check_destination, print_plan, write_text
from .records import CallOptions, PlanOptions, spread
from .steps import plan_model, read_model


@app.command(
    epilog=examples(
        "plan model.py:Net --input 1,8,8,1",
        "plan model.py:Net --input 1,8,8,1 --rule 'fc1=4x4:HWC' --out plan.json",
        "plan model.py:Net --input 1,8,8,1 --rule fc2=auto --rule '*=skip'",
        "plan model.py:Net --input 1,8,8,1 --rule '*<10000=skip' --for tpu:v5e",
        "plan model.py:Net --input 1,8,8,1 --kwarg train=false --json",
    )
)
@spread
def plan(
    model: ModelName,
    call: CallOptions,
    plan_options: PlanOptions,
    out: PlanOut = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers of a model convert, how, and why others don't.

    Traces the model on abstract inputs; no computation runs.
    """
    check_destination("--out", out, PLANS)
    made = plan_model(read_model(model, call), plan_options)
    if out is not None:
        write_text(out, made.to_json())
    if as_json:
        typer.echo(made.to_json())
    else:
        print_plan(made)
