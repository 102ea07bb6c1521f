"""Options and arguments that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class To(enum.StrEnum):
    """The form to go to."""

    CONV = "conv"
    DENSE = "dense"


class FileFormat(enum.StrEnum):
    """The format of a checkpoint."""

    ORBAX = "orbax"
    MSGPACK = "msgpack"
    SAFETENSORS = "safetensors"


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="The model: pkg.module:NAME or path/to/file.py:NAME, where NAME is a "
        "linen or NNX Module, a class of one that needs no arguments (but rngs), or a "
        "function without arguments that makes one, or makes (function, params).",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="An input of the model, such as 1,28,28,1 or 2,16:int32; float32 unless "
        "said. Once for each positional argument.",
    ),
]
Kwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--kwarg", metavar="NAME=VALUE", help="A keyword argument: train=false."
    ),
]
Method = Annotated[
    str | None, typer.Option(help="The method to call instead of __call__.")
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="PATTERN=WINDOW[:ORDER]",
        help="The window of the layers at the paths that PATTERN matches: head=7x7, "
        "'block_*=1x1', head=7x7:CHW; or their layout: '*=keep'; or PATTERN=skip; or "
        "PATTERN=auto, as the trace says. 'PATTERN<SIZE=...' is for kernels of fewer "
        "entries. The first that matches counts.",
    ),
]
BackendFor = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="BACKEND",
        help="Lay the convolutions out as this backend runs them best: cpu, "
        "cuda:h100, tpu:v5e; any runs everywhere. The backend at hand if not given.",
    ),
]
ToForm = Annotated[
    To | None,
    typer.Option(help="The form to go to; conv, or what a given plan says."),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="A backend: cpu, gpu, cuda:h100, tpu, tpu:v6e, tpu:v5e:16x16, rocm, ... "
        "It is executed if it is present, else compiled ahead of time if its compiler "
        "is installed (the extras tpu-aot and cuda-aot), else lowered. Once for each; "
        "JAX's default unless said.",
    ),
]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="Orbax directory, Flax msgpack or safetensors file, or a folder of such "
        "files, as from the Hugging Face hub.",
    ),
]
Target = Annotated[
    Path, typer.Argument(metavar="DST", help="Where to write the new checkpoint.")
]
PlanOut = Annotated[
    Path | None, typer.Option("--out", help="Write the plan to this file, as JSON.")
]
Step = Annotated[
    str | None,
    typer.Option(
        help="Which step of a directory that holds several, as a CheckpointManager's; "
        "the latest unless said."
    ),
]
AllSteps = Annotated[
    bool, typer.Option("--all-steps", help="Every step of such a directory.")
]
Prefixes = Annotated[
    list[str] | None,
    typer.Option(
        "--prefix",
        metavar="LEVELS",
        help="The levels above the params to convert, such as gen/params, where a "
        "checkpoint holds several models. Once for each copy of one model.",
    ),
]
NoCheck = Annotated[
    bool,
    typer.Option(
        "--no-check", help="Do not compare what was written with SRC, entry by entry."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Write nothing; say what would be done."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint at DST.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")
]
