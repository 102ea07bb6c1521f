"""Options and arguments shared by several commands."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class To(enum.StrEnum):
    """The form to convert to."""

    CONV = "conv"
    DENSE = "dense"


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="The model: pkg.module:NAME or path/to/file.py:NAME. NAME is a linen or "
        "NNX Module, a Module class without required arguments (except rngs), or a "
        "function without arguments that returns a Module or (function, params).",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="Shape and dtype of an input, such as 1,28,28,1 or 2,16:int32; float32 by "
        "default. Repeat for each positional argument.",
    ),
]
Kwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--kwarg",
        metavar="NAME=VALUE",
        help="A keyword argument of the model, such as train=false.",
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
        help="A rule for the layers whose path matches PATTERN: a window (head=7x7, "
        "'block_*=1x1', head=7x7:CHW), a layout ('*=keep'), skip, phases (for "
        "transposed convolutions), or auto, which keeps the planner's choice. "
        "'PATTERN<SIZE=...' matches kernels with fewer entries. The first match wins.",
    ),
]
BackendFor = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="BACKEND",
        help="Use the best layouts for this backend: cpu, cuda:h100, tpu:v5e, or any. "
        "The default is the current backend.",
    ),
]
ToForm = Annotated[
    To | None,
    typer.Option(
        help="The form to convert to; by default conv, or the form of the given plan."
    ),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="A backend: cpu, gpu, cuda:h100, tpu, tpu:v6e, tpu:v5e:16x16, rocm, ... "
        "Programs are executed if it is present, compiled ahead of time if its "
        "compiler is installed (extras tpu-aot and cuda-aot), and lowered otherwise. "
        "Repeat for several backends; the default is JAX's default backend.",
    ),
]
SourceCheckpoint = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="An Orbax directory, a Flax msgpack or safetensors file, or a folder of "
        "such files, such as one from the Hugging Face hub.",
    ),
]
TargetCheckpoint = Annotated[
    Path, typer.Argument(metavar="DST", help="Where to write the new checkpoint.")
]
Params = Annotated[
    Path | None,
    typer.Option(
        metavar="CKPT",
        help="A checkpoint with the model's params, in either form. The default is "
        "random params, or those that the model holds.",
    ),
]
PlanOut = Annotated[
    Path | None, typer.Option("--out", help="Write the plan to this file, as JSON.")
]
CheckpointStep = Annotated[
    str | None,
    typer.Option(
        help="The step to use from a directory with several, such as a "
        "CheckpointManager's. The default is the latest."
    ),
]
AllSteps = Annotated[
    bool,
    typer.Option("--all-steps", help="Use every step of a directory with several."),
]
Prefixes = Annotated[
    list[str] | None,
    typer.Option(
        "--prefix",
        metavar="LEVELS",
        help="The path of the params to convert, such as gen/params, if the checkpoint "
        "holds several models. Repeat for each copy of a model.",
    ),
]
NoCheck = Annotated[
    bool,
    typer.Option("--no-check", help="Skip the comparison of the result with SRC."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Write nothing; print what would change."),
]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Copy the files that links out of the folder SRC lead to.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint at DST.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout.")]
AsMarkdown = Annotated[
    bool, typer.Option("--markdown", help="Print the report as Markdown.")
]
ReportFile = Annotated[
    Path | None,
    typer.Option(help="Write the report to this file, as JSON (*.json) or Markdown."),
]
