"""fcconv compare: checks whether two models compute the same function."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app, examples
from .options import AsJson, ModelName
from .records import CallOptions, spread
from .steps import naming_inputs, read_model, with_random_inputs


@app.command(
    epilog=examples(
        "compare old.py:Net new.py:Net --input 2,8,8,1",
        "compare linen_model.py:make nnx_model.py:make --input 2,8,8,1 --json",
    )
)
@spread
def compare(
    first: ModelName,
    second: ModelName,
    call: CallOptions,
    seed: Annotated[int, typer.Option(help="Seed of random inputs and params.")] = 0,
    gradients: Annotated[
        bool | None,
        typer.Option(
            "--gradients/--no-gradients",
            help="Compare gradients, too; by default if that takes only seconds.",
        ),
    ] = None,
    values_only: Annotated[
        bool,
        typer.Option(
            "--values-only",
            help="Compare the numbers only; accept another structure, shape or dtype.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check whether two models compute the same function.

    Compares structure, names, shapes and dtypes of the outputs first. Then runs
    both in float64, where two forms of one function agree to about 15 digits,
    and in their own precision. Two linen Modules get the same random params;
    NNX models and functions hold their own. To compare a port, pass a function
    that returns the ported model with its params.

    The exit status is 0 if they compute the same function, and 1 otherwise.
    """
    from ..verification.compare import compare as compare_programs

    models = [read_model(name, call) for name in (first, second)]
    drawn = []
    for model in models:
        with naming_inputs(model):
            drawn.append(with_random_inputs(model, seed).drawn(seed))
    f, g = drawn
    found = compare_programs(f, g, gradients=gradients, values_only=values_only)
    typer.echo(found.to_json() if as_json else str(found))
    if not found.passed:
        raise typer.Exit(1)
