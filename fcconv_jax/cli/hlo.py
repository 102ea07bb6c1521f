"""The command ``fcconv hlo``: the two compiled programs of a layer, side by side."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, examples
from .inputs import ArgumentError
from .options import AsJson, Inputs, Kwargs, Method, ModelName, Rules, ToForm
from .output import print_columns
from .steps import PlanOptions, parse_backends, plan_model, read_model

if TYPE_CHECKING:
    from ..backends.layer_comparison import LayerPrograms
    from ..backends.steps import Step
    from ..plan import Form


@app.command(
    epilog=examples(
        "hlo model.py:Net fc1 --input 8,8,8,1",
        "hlo model.py:Net fc1 --input 8,8,8,1 --backend tpu:v5e",
        "hlo model.py:Net fc1 --input 8,8,8,1 --dtype bfloat16 --json",
    )
)
def hlo(
    model: ModelName,
    layer: Annotated[
        str, typer.Argument(metavar="LAYER", help="Its path, as 'fcconv plan' has it.")
    ],
    inputs: Inputs = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A backend: cpu, cuda:h100, tpu:v6e, ... One that is not present is "
            "compiled for ahead of time, if its compiler is installed (the extras "
            "tpu-aot and cuda-aot); JAX's default unless said.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Of input and parameters: bfloat16, ...; that of the layer's "
            "parameters unless said.",
        ),
    ] = None,
    to: ToForm = None,
    rules: Rules = None,
    kwargs: Kwargs = None,
    method: Method = None,
    as_json: AsJson = False,
) -> None:
    """Show what a backend makes of one layer in each form, side by side.

    Each form is compiled as a program of its own, on the input that the layer
    has in the model. Shown are the steps that compute or move data: what a
    fusion is made of, calls into libraries, copies to another layout; shapes
    with the order of their axes in memory, fastest first. A device that is
    present also runs and times them.
    """
    from ..backends.layer_programs import compile_layers, find_layer
    from ..backends.resolution import resolve_default
    from ..progress import shown

    bound = read_model(model, inputs, kwargs, method)
    given = parse_backends([backend] if backend else None)
    chosen = given[0] if given else resolve_default().backend
    made = plan_model(bound, PlanOptions(to, rules, str(chosen)))
    path = find_layer(made, layer)
    with shown(None) as tell:
        found = compile_layers(
            made,
            chosen,
            only=[path],
            params=bound.shapes,
            dtype=dtype and _dtype(dtype),
            progress=tell,
        )
    programs = found[path]
    typer.echo(programs.to_json() if as_json else _head(programs))
    if not as_json:
        _print_programs(programs)
        typer.echo(programs.verdict)


def _dtype(name: str) -> object:
    import jax.numpy as jnp

    try:
        return jnp.dtype(name)
    except TypeError:
        raise ArgumentError(
            f"--dtype {name!r} is no dtype such as float32 or bfloat16"
        ) from None


def _head(programs: LayerPrograms) -> str:
    return (
        f"{programs.path or '(root)'}: {programs.layer.layer}, {programs.layer.case}, "
        f"on {programs.dense.backend} ({programs.dense.device})"
    )


def _print_programs(programs: LayerPrograms) -> None:
    forms: tuple[Form, Form] = ("dense", "conv")
    cells = [
        [f"{form}: {programs.show_cost(form)}", *map(_describe, programs.steps[form])]
        for form in forms
    ]
    print_columns(list(itertools.zip_longest(*cells, fillvalue="")))


def _describe(step: Step) -> str:
    """A step in three lines: what, of what, at what price."""
    from ..backends.layer_comparison import mebibytes
    from ..backends.steps import short_layout

    price = [mebibytes(step.bytes)]
    if step.cycles is not None:
        price.insert(0, f"{step.cycles:,} cycles")
    if step.relayout:
        price.append("another layout")
    operands = " ".join(map(short_layout, step.operands))
    return "\n".join(
        (
            str(step),
            f"  {operands}",
            f"  -> {short_layout(step.result)}",
            f"  {', '.join(price)}",
        )
    )
