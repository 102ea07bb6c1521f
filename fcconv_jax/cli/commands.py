"""The command line: ``fcconv plan``, ``convert``, ``verify`` and so on.

A command's result goes to stdout; progress and messages go to stderr. Exit status 0
means that it succeeded, 1 that it failed or found a difference, 2 wrong usage. Whatever
is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .inputs import ArgumentError, parse_padding, parse_sizes
from .options import (
    AsJson,
    BackendFor,
    Backends,
    FileFormat,
    Inputs,
    Kwargs,
    Method,
    ModelName,
    Overwrite,
    Rules,
    Source,
    Target,
    ToForm,
)
from .output import print_plan, print_table, progress_bar, write_text
from .steps import (
    ModelCall,
    Wishes,
    parse_backends,
    plan_checkpoint,
    read_plan,
    require_layers,
    verify_checkpoint,
    verify_model,
)


class _Commands(TyperGroup):
    """Turns the errors that this package explains into one line and a status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except ValueError as error:
            from ..backends.name import BackendError
            from ..checkpoints import CheckpointError
            from ..plan import PlanError

            # A model's own ValueError keeps its traceback.
            if not isinstance(error, PlanError | CheckpointError | BackendError):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


def examples(*commands: str) -> str:
    """An epilog; in those of Typer a blank line stands for the end of a line."""
    return "\n\n".join(["Examples:", *(f"  fcconv {command}" for command in commands)])


app = typer.Typer(
    name="fcconv",
    cls=_Commands,
    help="Turn trained Flax models from Dense to Conv and back: same code, same "
    "numbers, proved.",
    epilog="Each command has examples in its own --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fcconv {version('fcconv-jax')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "plan model.py:Net --input 1,8,8,1",
        "plan model.py:Net --input 1,8,8,1 --rule 'fc1=4x4:HWC' --out plan.json",
        "plan model.py:Net --input 1,8,8,1 --rule fc2=auto --rule '*=skip'",
        "plan model.py:Net --input 1,8,8,1 --rule '*<10000=skip' --for tpu:v5e",
        "plan model.py:Net --input 1,8,8,1 --kwarg train=false --json",
    )
)
def plan(
    model: ModelName,
    inputs: Inputs = None,
    to: ToForm = None,
    rules: Rules = None,
    backend_for: BackendFor = None,
    kwargs: Kwargs = None,
    method: Method = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the plan to this file, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers of a model convert, how, and why the others do not.

    The model is traced on abstract inputs; nothing is computed.
    """
    wishes = Wishes(to, rules, backend_for)
    made = ModelCall.read(model, inputs, kwargs, method).plan(wishes)
    if out is not None:
        write_text(out, made.to_json())
    if as_json:
        typer.echo(made.to_json())
    else:
        print_plan(made)


@app.command(
    epilog=examples(
        "convert ckpt conv --model model.py:Net --input 1,8,8,1",
        "convert ckpt conv2 --plan plan.json",
        "convert ckpt conv3 --rule 'fc1=4x4' --rule 'fc2=1x1'",
    )
)
def convert(
    src: Source,
    dst: Target,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan from 'fcconv plan --out'.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="Plan from this model, as 'plan'."),
    ] = None,
    inputs: Inputs = None,
    to: ToForm = None,
    rules: Rules = None,
    backend_for: BackendFor = None,
    kwargs: Kwargs = None,
    method: Method = None,
    overwrite: Overwrite = False,
    file_format: Annotated[
        FileFormat | None,
        typer.Option(
            "--format", help="Format of DST; by its suffix or that of SRC unless said."
        ),
    ] = None,
) -> None:
    """Convert a checkpoint to the other form, with the plan stored in it.

    The plan comes from a file (--plan), from the model's code (--model and
    --input), or, without code, from rules alone (--rule): these take each
    window at your word, and refuse by name what may be no Dense layer. The
    source is left as it is.
    """
    from ..checkpoints import convert_checkpoint

    wishes = Wishes(to, rules, backend_for)
    if (plan_file is None) == (model is None) and (plan_file or not rules):
        raise ArgumentError(
            "give one of --plan FILE, --model MODULE:NAME with --input, or --rule alone"
        )
    if plan_file is not None and wishes.any:
        raise ArgumentError(
            "--to, --rule and --for do not go with --plan, which has decided"
        )
    if model is None and (inputs or kwargs or method):
        raise ArgumentError("--input, --kwarg and --method need --model")
    if plan_file is not None:
        made = read_plan(plan_file)
    elif model is not None:
        made = ModelCall.read(model, inputs, kwargs, method).plan(wishes)
    else:
        made = plan_checkpoint(src, wishes)
    require_layers(made)
    with progress_bar("converting") as tell:
        report = convert_checkpoint(
            src,
            dst,
            made,
            overwrite=overwrite,
            progress=lambda done, total, name: tell(name, done, total),
            format=file_format.value if file_format else None,
        )
    typer.echo(str(report))


@app.command(epilog=examples("restore conv back", "restore conv back --overwrite"))
def restore(src: Source, dst: Target, overwrite: Overwrite = False) -> None:
    """Undo a conversion to the bit, with the plan that is stored in the checkpoint."""
    from ..checkpoints import restore_checkpoint

    with progress_bar("restoring") as tell:
        report = restore_checkpoint(
            src,
            dst,
            overwrite=overwrite,
            progress=lambda done, total, name: tell(name, done, total),
        )
    typer.echo(str(report))


@app.command(
    epilog=examples(
        "verify model.py:Net --input 2,8,8,1",
        "verify model.py:Net --input 2,8,8,1 --checkpoint ckpt --out report.md",
        "verify model.py:Net --input 2,8,8,1 --no-gradients --json",
        "verify model.py:Net --input 2,8,8,1 --backend cpu --backend tpu:v6e",
    )
)
def verify(
    model: ModelName,
    inputs: Inputs = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Take the parameters from here; from either form, as a converted "
            "checkpoint holds its plan. Drawn at random unless said."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random inputs and parameters.")] = 0,
    to: ToForm = None,
    rules: Rules = None,
    backend_for: BackendFor = None,
    kwargs: Kwargs = None,
    method: Method = None,
    backends: Backends = None,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds for each backend that is compiled ahead of time."),
    ] = 600.0,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients/--no-gradients",
            help="Compare gradients and one optimizer step too.",
        ),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the report here: JSON to *.json, else Markdown."),
    ] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown.")
    ] = False,
) -> None:
    """Prove that the two forms of a model are equal on this machine.

    With --backend, on others too: one that is not present is compiled for
    ahead of time, which shows what becomes of both forms, and proves no more.

    Exit status 0 when every check passes, 1 when one does not.
    """
    if as_json and as_markdown:
        raise ArgumentError("give one of --json and --markdown")
    wishes = Wishes(to, rules, backend_for)
    call = ModelCall.read(model, inputs, kwargs, method)
    options = {
        "gradients": gradients,
        "backends": parse_backends(backends),
        "timeout": timeout,
    }
    if checkpoint is None:
        report = verify_model(call, call.plan(wishes), seed, options)
    else:
        report = verify_checkpoint(call, checkpoint, wishes, seed, options)
    if out is not None:
        to_json = out.suffix == ".json"
        write_text(out, report.to_json() if to_json else report.to_markdown())
    if as_json:
        typer.echo(report.to_json())
    else:
        typer.echo(report.to_markdown() if as_markdown else str(report))
    if not report.passed:
        raise typer.Exit(1)


@app.command(name="inspect", epilog=examples("inspect ckpt", "inspect conv --json"))
def inspect_(src: Source, as_json: AsJson = False) -> None:
    """List what a checkpoint holds: leaves, dtypes, shapes, bytes, the stored plan."""
    from ..checkpoints import inspect_checkpoint

    info = inspect_checkpoint(src)
    if as_json:
        content = {
            "path": str(info.path),
            "format": info.format,
            "leaves": [
                {
                    "path": leaf.path,
                    "dtype": leaf.dtype,
                    "shape": leaf.shape,
                    "bytes": leaf.nbytes,
                }
                for leaf in info.leaves
            ],
            "bytes": info.nbytes,
            "plan": info.plan and json.loads(info.plan.to_json()),
        }
        typer.echo(json.dumps(content))
        return
    typer.echo(
        f"{info.path}: {info.format}, {len(info.leaves)} leaves, {info.nbytes} bytes"
    )
    rows = [
        (leaf.path, leaf.dtype, str(leaf.shape), str(leaf.nbytes))
        for leaf in info.leaves
    ]
    print_table(("leaf", "dtype", "shape", "bytes"), rows)
    if info.plan is None:
        typer.echo("never converted: it holds no plan")
    else:
        typer.echo("converted, with this plan:")
        print_plan(info.plan)


@app.command(
    epilog=examples(
        "explain --input 7x7 --kernel 7x7 --stride 2",
        "explain --input 7x7 --kernel 7x7 --padding 1",
        "explain --input 224x224 --kernel 16 --stride 16 --groups 3 --json",
    )
)
def explain(
    input_size: Annotated[
        str, typer.Option("--input", metavar="SIZE", help="Spatial size: 7x7.")
    ],
    kernel: Annotated[
        str, typer.Option(metavar="SIZE", help="Kernel: 7x7, or 7 for every dimension.")
    ],
    stride: Annotated[str, typer.Option(metavar="SIZE", help="Strides.")] = "1",
    padding: Annotated[
        str,
        typer.Option(
            metavar="PADDING",
            help="VALID, SAME, CIRCULAR, ...; 1; 1,2 per dimension; 0:1,0:1 low:high.",
        ),
    ] = "VALID",
    input_dilation: Annotated[
        str, typer.Option(metavar="SIZE", help="Spacing of the inputs.")
    ] = "1",
    kernel_dilation: Annotated[
        str, typer.Option(metavar="SIZE", help="Spacing of the kernel's taps.")
    ] = "1",
    groups: Annotated[int, typer.Option(help="Groups of channels.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say whether a convolution is a Dense layer, and why, or why not.

    Both answers are a success: the exit status is 0.
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
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    typer.echo(json.dumps(found.to_json()) if as_json else equivalence.explain(found))


def main() -> None:
    """Runs the command line; the entry point ``fcconv``."""
    app()
