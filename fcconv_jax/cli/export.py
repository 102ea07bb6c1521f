"""fcconv export: writes a model as a file for an edge runtime, and verifies it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, examples
from .inputs import ArgumentError
from .options import AsJson, AsMarkdown, ModelName, Params, ReportFile, Rules
from .output import REPORTS, check_destination, show_report, start_jax
from .records import CallOptions, spread
from .steps import read_model, read_plan, require_inputs, with_random_inputs

if TYPE_CHECKING:
    from ..export.report import ExportReport


class FileForm(StrEnum):
    """The form of the layers in the file."""

    CONV = "conv"
    DENSE = "dense"
    MIX = "mix"


@app.command(
    epilog=examples(
        "export model.py:Net --input 1,8,8,1 --params ckpt --out net.tflite",
        "export model.py:Net --input 1,224,224,3 --params ckpt --chip ethos-u55"
        " --compare --out net.tflite",
        "export model.py:Net --input 1,8,8,1 --params ckpt --int8"
        " --calibrate data.npz --out net.tflite",
    )
)
@spread
def export(
    model: ModelName,
    out: Annotated[
        Path,
        typer.Option(
            help="The file to write; the suffix selects the runtime: .tflite, .onnx, "
            ".xml (OpenVINO), .vmfb (IREE), .mlpackage, .stablehlo."
        ),
    ],
    call: CallOptions,
    params: Params = None,
    to: Annotated[
        FileForm | None,
        typer.Option(
            help="The form of the layers; the default is mix with --chip, and conv "
            "otherwise."
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="The runtime, such as litert or onnx; must match the suffix of --out."
        ),
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option(
            "--chip",  # else, up to Typer 0.27, it is --CHIP, as its metavar
            metavar="CHIP",
            # No list: the names are in export/chips.py, which --help doesn't import.
            help="The chip to export for, such as ethos-u55 or edgetpu. It decides "
            "each layer's form; an unknown name prints the list.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A plan from 'fcconv plan --out', instead of --to and --rule."
        ),
    ] = None,
    rules: Rules = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize to int8; needs --calibrate.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA.npz",
            help="Calibration data: an array for each input, with examples along the "
            "first axis. An array named labels holds their classes, to report the "
            "accuracy.",
        ),
    ] = None,
    unroll: Annotated[
        int, typer.Option(help="Unroll loops of up to this many steps.", min=0)
    ] = 0,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold/--no-fold",
            help="Fold norms into the layers. --no-fold keeps every weight's bits.",
        ),
    ] = True,
    any_batch: Annotated[
        bool,
        typer.Option("--any-batch", help="Accept any batch size."),
    ] = False,
    any_size: Annotated[
        bool,
        typer.Option("--any-size", help="Accept images of any size."),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Round weights to float16 (LiteRT, ONNX) or bfloat16 (ONNX).",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also export the other forms, to compare sizes and times."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random inputs and params.")] = 0,
    report: ReportFile = None,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Write a model as a file for an edge runtime, and verify the file.

    Checks that the weights in the file are the checkpoint's bits, that each layer
    extracted from it equals integer arithmetic in its runtime, and that the whole
    file agrees with the model in float64.

    The exit status is 0 if every check passes, and 1 otherwise.
    """
    from ..export.chips import chip_of
    from ..export.export import export as write
    from ..export.runtimes import runtime_of
    from .variables import load_variables

    if int8 != (calibrate is not None):
        raise ArgumentError(
            "Expected --int8 and --calibrate together, got one of them. Pass both, or "
            "neither."
        )
    if as_json and as_markdown:
        raise ArgumentError("Expected --json or --markdown, got both. Pass one.")
    # Both raise for unknown names: sooner than the model is read.
    runtime_of(out, runtime)
    if chip is not None:
        chip_of(chip)
    check_destination("--out", out)
    check_destination("--report", report, REPORTS)
    if plan is not None and (to or rules):
        raise ArgumentError(
            "Expected --plan alone, which already contains the form of every layer, "
            "got --to or --rule. Drop them."
        )
    given = None if plan is None else read_plan(plan)
    arrays = None if calibrate is None else _read_arrays(calibrate)
    labels = None if arrays is None else arrays.pop("labels", None)
    bound = require_inputs(read_model(model, call))
    if params is not None:
        bound = load_variables(bound, params)
    bound = with_random_inputs(bound, seed)
    if params is None:
        bound = bound.drawn(seed)
    chosen = to or (FileForm.MIX if chip else FileForm.CONV)
    found = write(
        bound,
        path=out,
        runtime=runtime,
        to=chosen.value,
        plan=given,
        chip=chip,
        rules=rules or (),
        unroll=unroll,
        fold=fold,
        any_batch=any_batch,
        any_size=any_size,
        weights=weights,
        calibrate=None if arrays is None else list(arrays.values()),
        labels=labels,
        compare=compare,
    )
    show_report(found, report, as_json, as_markdown)


def _read_arrays(file: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # NumPy's, and those of tokenize, zipfile and zlib
        raise ArgumentError(
            f"--calibrate: expected a file written by np.savez, got {file} ({error}). "
            "Write the inputs with np.savez(file, *inputs)."
        ) from None


def is_exported(text: str) -> bool:
    """Return whether an argument names a file for an edge runtime.

    Example:
      >>> is_exported("net.tflite"), is_exported("net.py:Net")
      (True, False)
    """
    from ..export.runtimes import runtimes

    return text.endswith(tuple(each.suffix for each in runtimes().values()))


def verify_exported(
    file: str,
    against: Path | None,
    model: str | None,
    call: CallOptions,
    seed: int,
) -> ExportReport:
    """Return the report on a file, compared with a checkpoint.

    Raises:
      ArgumentError: no checkpoint is given to check it against.
    """
    from flax.traverse_util import unflatten_dict

    from ..checkpoints import read_checkpoint
    from ..export.verify_file import verify_file
    from ..params.moves import map_leaves
    from .variables import checkpoint_leaves, load_variables

    if against is None:
        raise ArgumentError(
            f"{file}: expected the checkpoint to compare it with, got none. Pass "
            "--against CKPT, and --model with --input to compare the outputs, too."
        )
    if model is None and (call.inputs or call.kwargs or call.method):
        raise ArgumentError(
            "Expected --model with --input, --kwarg and --method, got none. Pass "
            "--model MODULE:NAME to compare the outputs."
        )
    if model is not None:
        bound = load_variables(require_inputs(read_model(model, call)), against)
        return verify_file(file, model=with_random_inputs(bound, seed))
    start_jax()
    saved = read_checkpoint(against)
    tree = unflatten_dict(_below_params(checkpoint_leaves(saved)))
    if saved.plan is not None:
        tree = map_leaves(tree, saved.plan.inverse())
    return verify_file(file, tree)


def _below_params(leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """Return the variables among a checkpoint's leaves, without what is above them."""
    ends = {path[: path.index("params")] for path in leaves if "params" in path}
    # An optimizer state has params of its own, deeper down.
    above = min(ends, key=len, default=None)
    if above is None:
        return {("params", *path): leaf for path, leaf in leaves.items()}
    kept = {path: leaf for path, leaf in leaves.items() if path[: len(above)] == above}
    return {path[len(above) :]: leaf for path, leaf in kept.items()}
