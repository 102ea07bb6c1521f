"""fcconv tune: finds a model's fastest forms, layouts and compiler options."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .options import AsJson, ModelName, Params, PlanOut, Rules
from .output import PLANS, check_destination, write_text
from .records import CallOptions, spread
from .steps import naming_inputs, parse_backends, read_model, with_random_inputs


class Goal(StrEnum):
    """The quantity to minimize."""

    LATENCY = "latency"
    MEMORY = "memory"
    CYCLES = "cycles"
    TRAINING = "training"


@app.command(
    epilog=examples(
        "tune model.py:Net --input 8,8,8,1 --budget 1",
        "tune model.py:Net --input 8,8,8,1 --timings cpu.json --out tuned.json",
        "tune model.py:Net --input 8,8,8,1 --objective memory --json",
        "tune model.py:Net --input 8,8,8,1 --objective training --budget 1",
    )
)
@spread
def tune(
    model: ModelName,
    call: CallOptions,
    params: Params = None,
    backend_for: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="BACKEND",
            help="The backend to tune for, such as cpu or tpu:v5e; by default JAX's. A "
            "backend that isn't present is tuned by its compiler's estimates.",
        ),
    ] = None,
    objective: Annotated[
        Goal | None,
        typer.Option(
            help="What to minimize; by default latency if the device is present, and "
            "cycles otherwise. training measures the loss (the sum of squared "
            "outputs) with its gradient."
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Approximate measuring time, in seconds.", min=0),
    ] = 120.0,
    timings: Annotated[
        Path | None,
        typer.Option(
            help="A file that stores this device's measurements, so that later runs "
            "return the same plan."
        ),
    ] = None,
    rules: Rules = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs and params.")] = 0,
    out: PlanOut = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model in its forms, and plan the fastest.

    Times every layer in each form and layout. Then times the whole model, with
    and without compiler options: unchanged, with all layers in one form, and with
    each layer in its fastest form. Finally tries the other forms of groups of
    equal layers within the model.

    The plan contains only changes that gain at least 2 % and more than the noise;
    it is empty if there are none. It is the fastest only for this device and these
    input sizes.
    """
    from ..backends.resolution import resolve, resolve_default
    from ..tuning.tune import tune as tune_model
    from .variables import load_variables

    check_destination("--out", out, PLANS)
    check_destination("--timings", timings, out=out)
    named = [backend_for] if backend_for else None
    (backend,) = parse_backends(named, "--for") or [None]
    bound = read_model(model, call)
    chosen = resolve_default() if backend is None else resolve(backend)
    if chosen.how == "executed":
        bound = with_random_inputs(bound, seed)
        with naming_inputs(bound):
            known = params is not None
            bound = load_variables(bound, params) if known else bound.drawn(seed)
    plan = tune_model(
        bound,
        backend=backend,
        objective=None if objective is None else objective.value,
        budget=budget,
        timings=timings,
        rules=rules or (),
    )
    assert plan.tuning is not None
    if out is not None:
        write_text(out, plan.to_json())
    if as_json:
        content = {"ratio": plan.tuning.ratio, "plan": json.loads(plan.to_json())}
        typer.echo(json.dumps(content))
        return
    typer.echo(str(plan.tuning))
    if plan.options:
        options = ", ".join(f"{name}={value!r}" for name, value in plan.options)
        typer.echo(f"\ncompiled with {options}")
