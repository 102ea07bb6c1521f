"""fcconv compare: whether two models are one function."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app, examples
from .inputs import random_inputs
from .options import AsJson, Inputs, Kwargs, Method, ModelName
from .steps import ModelCall


@app.command(
    epilog=examples(
        "compare old.py:Net new.py:Net --input 2,8,8,1",
        "compare linen_model.py:make nnx_model.py:make --input 2,8,8,1 --json",
    )
)
def compare(
    first: ModelName,
    second: ModelName,
    inputs: Inputs = None,
    seed: Annotated[int, typer.Option(help="Of random inputs and parameters.")] = 0,
    kwargs: Kwargs = None,
    method: Method = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether two models that give other numbers are other functions.

    Both are run in float64, where two forms of one function agree to about 15
    digits, and as they are. Two linen Modules are given the same random
    params; NNX models and functions bring their own, so a port is compared by
    a function that makes the ported model with its params.

    Exit status 0 when they are one function, 1 when they are not.
    """
    from ..verification.compare import compare as compare_programs
    from .variables import random_variables

    calls = [ModelCall.read(name, inputs, kwargs, method) for name in (first, second)]
    arrays = random_inputs(calls[0].specs, seed)
    args = []
    for call in calls:
        variables = random_variables(call, arrays, seed)
        args.append(_arguments(call, variables, arrays))
    found = compare_programs(
        *(call.model for call in calls),
        *args,
        f_kwargs=calls[0].options,
        g_kwargs=calls[1].options,
    )
    typer.echo(found.to_json() if as_json else str(found))
    if not found.passed:
        raise typer.Exit(1)


def _arguments(call: ModelCall, variables: object, arrays: list) -> list:
    """What a model is called with: an NNX model holds its params itself."""
    from ..frontends.kinds import kind_of

    kind = kind_of(call.model, "compare")
    first = {"linen": [variables], "nnx": [], "function": [call.params]}[kind]
    return [*first, *arrays]
