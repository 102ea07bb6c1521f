"""fcconv tune: which form, layout and compiler options a model runs best with."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .options import AsJson, Inputs, Kwargs, Method, ModelName, PlanOut, Rules
from .output import write_text
from .steps import parse_backends, read_model, with_random_inputs


class Goal(StrEnum):
    """What is to be small."""

    LATENCY = "latency"
    MEMORY = "memory"
    CYCLES = "cycles"


@app.command(
    epilog=examples(
        "tune model.py:Net --input 8,8,8,1 --budget 1",
        "tune model.py:Net --input 8,8,8,1 --timings cpu.json --out tuned.json",
        "tune model.py:Net --input 8,8,8,1 --objective memory --json",
    )
)
def tune(
    model: ModelName,
    inputs: Inputs = None,
    backend_for: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="BACKEND",
            help="Measure on this backend, such as cpu or tpu:v5e; one that is not "
            "present by what its compiler estimates. JAX's default if not given.",
        ),
    ] = None,
    objective: Annotated[
        Goal | None,
        typer.Option(
            help="latency where the device is present, else cycles, if not given."
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="About how many seconds to measure.")
    ] = 120.0,
    timings: Annotated[
        Path | None,
        typer.Option(
            help="Measurements of this device, read and added to, so that the same "
            "plan comes out every time."
        ),
    ] = None,
    rules: Rules = None,
    seed: Annotated[int, typer.Option(help="Of random inputs and parameters.")] = 0,
    kwargs: Kwargs = None,
    method: Method = None,
    out: PlanOut = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model in its forms, and plan the one that runs best.

    Every layer is measured in each form and layout, and the whole model as it is,
    converted in one direction, and layer by layer; with and without compiler
    options; then layers that are alike, in the model. What the plan takes is better
    beyond the noise, by 2 % at least, else it is empty.
    Made for one device and these input sizes.
    """
    from ..backends.resolution import resolve, resolve_default
    from ..tuning.tune import tune as tune_model

    bound = read_model(model, inputs, kwargs, method)
    (backend,) = parse_backends([backend_for] if backend_for else None) or [None]
    chosen = resolve_default() if backend is None else resolve(backend)
    if chosen.how == "executed":
        bound = with_random_inputs(bound, seed).drawn(seed)
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
        told = ", ".join(f"{name}={value!r}" for name, value in plan.options)
        typer.echo(f"\ncompiled with {told}")
