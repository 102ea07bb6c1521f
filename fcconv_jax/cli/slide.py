"""fcconv slide: runs a classifier at every position of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, examples
from .inputs import ArgumentError
from .options import Kwargs, Method, ModelName
from .output import check_destination, start_jax
from .steps import read_model


@app.command(
    epilog=examples(
        "slide model.py:Net --params ckpt --window 8x8 --stride 2 canvas.png"
        " --out grid.npy --heatmap heat.png",
    )
)
def slide(
    model: ModelName,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...", help="Images that Pillow reads, or .npy arrays (H,W,C)."
        ),
    ],
    params: Annotated[
        Path, typer.Option(help="Checkpoint with the model's params.", metavar="CKPT")
    ],
    window: Annotated[str, typer.Option(help="Size of a crop, such as 224x224.")],
    stride: Annotated[
        str | None,
        typer.Option(
            help="Step between crops, such as 8 or 8x4; by default the model's own."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the result as .npy: (N, rows, columns, ...)."),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(help="Write a picture of the largest output at each place."),
    ] = None,
    scale: Annotated[
        float,
        typer.Option(help="Divide pixels by this; 255 maps them to 0 to 1.", min=1e-30),
    ] = 255.0,
    memory: Annotated[
        int,
        typer.Option(help="Memory limit for a tile of a large image, in MiB.", min=1),
    ] = 1024,
    kwargs: Kwargs = None,
    method: Method = None,
) -> None:
    """Run a classifier of crops over whole images; compute shared work once.

    The result at each position equals the model's on that crop alone.
    """
    check_destination("--out", out, (".npy",))
    check_destination("--heatmap", heatmap)
    start_jax()
    import jax
    import numpy as np

    from ..dense_prediction.slide import slide as make_grid
    from .images import read_image, write_heatmap
    from .variables import load_variables

    sizes = _sizes("--window", window)
    steps = None if stride is None else _sizes("--stride", stride)
    batch = [read_image(file) for file in images]
    if len({image.shape for image in batch}) > 1:
        raise ArgumentError("images of several sizes: run the command for each size")
    pixels = np.stack(batch).astype(np.float32) / np.float32(scale)
    crop = ",".join(map(str, (1, *sizes, pixels.shape[-1])))
    bound = load_variables(read_model(model, [crop], kwargs, method), params)
    step = steps[0] if steps and len(steps) == 1 else steps
    grid = make_grid(bound, sizes, step)
    report = grid.report(pixels)
    typer.echo(str(report), err=True)
    one = jax.ShapeDtypeStruct((len(pixels), *sizes, pixels.shape[-1]), pixels.dtype)
    each = grid.eval_shape(one)
    if not isinstance(each, jax.ShapeDtypeStruct):
        raise ArgumentError("the model returns several arrays: use fcconv_jax.slide")
    shape = (len(pixels), *report.positions, *each.shape[1 + len(sizes) :])
    if out is None:
        result = np.empty(shape, each.dtype)
    else:
        result = np.lib.format.open_memmap(out, "w+", np.dtype(each.dtype), shape)
    grid.write(pixels, out=result, memory=memory << 20)
    if out is not None:
        typer.echo(f"wrote {out}: {shape}", err=True)
    if heatmap is not None:
        write_heatmap(heatmap, result[0], pixels[0])
        typer.echo(f"wrote {heatmap}", err=True)
    for file, scores in zip(images, result.reshape(len(pixels), -1)):
        *place, label = np.unravel_index(int(scores.argmax()), shape[1:])
        y, x = (int(p) * s for p, s in zip(place, report.stride))
        typer.echo(f"{file}: largest output {label}, {scores.max():.4g}, at {y},{x}")


def _sizes(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise ArgumentError(
            f"{option}: expected sizes such as 224x224, got {text!r}"
        ) from None
