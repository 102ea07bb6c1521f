"""fcconv explain: whether a convolution is equivalent to a Dense layer, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app, examples
from .inputs import ArgumentError, parse_padding, parse_sizes
from .options import AsJson


@app.command(
    epilog=examples(
        "explain --input 7x7 --kernel 7x7 --stride 2",
        "explain --input 7x7 --kernel 7x7 --padding 1",
        "explain --input 224x224 --kernel 16 --stride 16 --groups 3 --json",
        "explain --input 14x14 --kernel 16 --stride 16 --transposed",
    )
)
def explain(
    input_size: Annotated[
        str,
        typer.Option(
            "--input", metavar="SIZE", help="Spatial size of the input, such as 7x7."
        ),
    ],
    kernel: Annotated[
        str, typer.Option(metavar="SIZE", help="Kernel: 7x7, or 7 for every dimension.")
    ],
    stride: Annotated[str, typer.Option(metavar="SIZE", help="Strides.")] = "1",
    padding: Annotated[
        str,
        typer.Option(
            "--padding",  # else, up to Typer 0.27, it is --PADDING, as its metavar
            metavar="PADDING",
            help="VALID, SAME, CIRCULAR, ..., or numbers: 1 for every dimension, 1,2 "
            "for each, or 0:1,0:1 as low:high for each.",
        ),
    ] = "VALID",
    input_dilation: Annotated[
        str, typer.Option(metavar="SIZE", help="Spacing of the inputs.")
    ] = "1",
    kernel_dilation: Annotated[
        str, typer.Option(metavar="SIZE", help="Spacing of the kernel's taps.")
    ] = "1",
    groups: Annotated[int, typer.Option(help="Groups of channels.")] = 1,
    transposed: Annotated[
        bool,
        typer.Option(
            "--transposed",
            help="The convolution is transposed; strides are outputs per input.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show whether a convolution is equivalent to a Dense layer, and why.

    The exit status is 0 whether or not it is equivalent.
    """
    from ..geometry import classify as equivalence

    try:
        found = equivalence.classify(
            parse_sizes("--input", input_size),
            parse_sizes("--kernel", kernel),
            strides=parse_sizes("--stride", stride),
            padding=parse_padding(padding),
            input_dilation=parse_sizes("--input-dilation", input_dilation),
            kernel_dilation=parse_sizes("--kernel-dilation", kernel_dilation),
            groups=groups,
            transposed=transposed,
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    typer.echo(found.to_json() if as_json else equivalence.explain(found))
