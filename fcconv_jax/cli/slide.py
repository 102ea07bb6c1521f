"""fcconv slide: runs a classifier at every position of an image."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, examples
from .inputs import ArgumentError, load_model, parse_input, parse_sizes
from .options import Kwargs, Method, ModelName
from .output import check_destination, start_jax
from .records import CallOptions
from .steps import read_model

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from ..dense_prediction.images.base import Image
    from ..dense_prediction.slide import Slide
    from ..dense_prediction.write import TilesWritten
    from ..frontends.bound import BoundModel
    from .grid_files import ResultGrid
    from .images import Pixels, Scaling


@app.command(
    epilog=examples(
        "slide model.py:Net --params ckpt --window 8x8 --stride 2 canvas.png"
        " --out grid.npy --heatmap heat.png --class 3 --softmax",
    )
)
def slide(
    model: ModelName,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            help="The images: TIFF, OME-TIFF, SVS or NDPI (extra tiff), GeoTIFF (extra "
            "geotiff), any format of Pillow, or .npy arrays (H,W,C).",
        ),
    ],
    window: Annotated[
        str, typer.Option(help="Crop size in pixels, such as 224 or 224x160.")
    ],
    params: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT",
            help="A checkpoint with the model's params, in either form. Not needed for "
            "a model that holds its params.",
        ),
    ] = None,
    stride: Annotated[
        str | None,
        typer.Option(
            help="Step between crops in pixels, such as 8 or 8x4; by default the "
            "model's total stride."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the result, (N, rows, columns, ...), as .npy, .zarr, or a "
            "tiled TIFF with coordinates (.tif, extra geotiff)."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue a stopped run to the same --out, if there is one.",
        ),
    ] = False,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            help="Write a heat map over the image, with a legend. It shows the largest "
            "output at each position, or that of --class."
        ),
    ] = None,
    label: Annotated[
        int | None,
        typer.Option(
            "--class", help="The class that the heat map shows, counted from 0.", min=0
        ),
    ] = None,
    softmax: Annotated[
        bool,
        typer.Option(
            "--softmax/--raw",
            help="Show softmax probabilities or raw outputs in the heat map.",
        ),
    ] = False,
    top: Annotated[
        int,
        typer.Option(
            help="Print the positions of this many largest outputs, at least a window "
            "apart.",
            min=1,
        ),
    ] = 1,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|nodata",
            help="Compute only windows in which this image is nonzero; it may be "
            "smaller, with the same proportions. With nodata, compute only windows "
            "without a nodata pixel. The result is NaN elsewhere.",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Divide pixels by this. The default maps uint8 and uint16 to 0 to 1 "
            "and leaves floats unchanged.",
            min=1e-30,
            max=1e30,
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Subtract this from scaled pixels: one number, or one for each "
            "channel, such as 0.485,0.456,0.406."
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(help="Then divide by this: one number, or one for each channel."),
    ] = None,
    level: Annotated[
        int,
        typer.Option(
            help="Pyramid level of the file; 0 is the full resolution.", min=0
        ),
    ] = 0,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="ROW,COLUMN,HEIGHT,WIDTH",
            help="Use only this part, in pixels of the level.",
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            help="Channels to use, in this order, counted from 1, such as 4,3,2."
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="Convert the images to this Pillow mode first: RGB, L, ..."),
    ] = None,
    apply_tags: Annotated[
        bool | None,
        typer.Option(
            "--apply-tags/--ignore-tags",
            help="Apply the tags of the files to the pixels: a scale and offset of "
            "GDAL, or the orientation of TIFF and EXIF. By default, pixels are used as "
            "they are stored, with a note.",
        ),
    ] = None,
    memory: Annotated[
        int,
        typer.Option(help="Memory limit for a tile of a large image, in MiB.", min=1),
    ] = 384,
    kwargs: Kwargs = None,
    method: Method = None,
) -> None:
    """Run a classifier of crops over whole images; compute shared work once.

    The result at each position is the model's output for that crop alone.
    """
    start_jax()
    import jax
    import numpy as np

    from ..frontends.bind import frontend_of
    from .grid_files import bands_of, grid_file
    from .heatmap import Heat, check_class, write_heatmap
    from .images import Pixels, Scaling, open_images, open_mask

    read = [*images, *(Path(each) for each in (params, mask) if each)]
    _check_destinations(out, resume, heatmap, label, softmax, read)
    sizes = _sizes("--window", window)
    steps = None if stride is None else _sizes("--stride", stride)
    batch = open_images(images, level, region, bands, mode, apply_tags)
    _, height, width, channels = batch[0].shape
    if height < sizes[0] or width < sizes[1]:
        raise ArgumentError(
            f"--window: expected at most {height}x{width}, the size of {images[0]}, "
            f"got {sizes[0]}x{sizes[1]}. Pass the size of the model's crops, or a "
            "larger image."
        )
    where = open_mask(mask, batch, apply_tags)
    loaded = load_model(model)
    first = frontend_of(loaded.model).first_spatial_axis
    scaling = Scaling.parse(batch[0], scale, mean, std, 1 if first == 2 else -1)
    typer.echo(f"{batch[0].dtype} pixels, {scaling}", err=True)
    options = CallOptions([_crop(sizes, channels, first)], kwargs, method)
    bound = read_model(model, options)
    bound = _with_params(bound, params, images[0], sizes, channels, loaded.drawn)
    pixels = Pixels(batch, channels_first=first == 2)
    grid, variables = _scaled_grid(bound, scaling, pixels, sizes, steps, first)
    described = _described(grid, variables, pixels, batch[0])
    check_class(label, softmax, described.shape[3:])
    if where is not None and described.dtype.kind != "f":
        raise ArgumentError(
            f"--mask: expected float outputs, which hold NaN, got {described.dtype}. "
            "Drop --mask."
        )
    mesh = None
    if jax.local_device_count() > 1:
        mesh = jax.sharding.Mesh(jax.local_devices(), ("tiles",))
    with contextlib.ExitStack() as stack:
        result, record = np.empty(described.shape, described.dtype), None
        if out is not None:
            result, record = stack.enter_context(grid_file(out, described, resume))
        try:
            done = grid.write(
                variables,
                pixels,
                out=result,
                memory=memory << 20,
                resume=record,
                mask=where,
                # A value computed from nodata, such as -9999, means nothing.
                whole_windows=mask == "nodata",
                mesh=mesh,
            )
        except KeyboardInterrupt:
            if out is not None:
                typer.echo(
                    f"stopped: the finished tiles are in {out}.part. Run the same "
                    "command with --resume to continue",
                    err=True,
                )
            raise typer.Exit(130) from None
        _print_counts(done, masked=where is not None)
        _print_places(images, batch, result, described, top)
        heat = None
        if heatmap is not None:
            heat = Heat.of_rows(bands_of(result, 0), label, softmax)
    if out is not None:
        typer.echo(f"wrote {out}: {described.shape}", err=True)
    if heatmap is not None and heat is not None:  # its errors leave --out whole
        write_heatmap(heatmap, heat, batch[0], scaling.scale, sizes, described.stride)
        typer.echo(f"wrote {heatmap}", err=True)
        corner = batch[0].region[:2]
        typer.echo(f"{images[0]}: {heat.summary(described.stride, sizes, corner)}")


def _check_destinations(
    out: Path | None,
    resume: bool,
    heatmap: Path | None,
    label: int | None,
    softmax: bool,
    read: Sequence[Path],
) -> None:
    """Refuse outputs that can't be written, before anything is read."""
    from .grid_files import SUFFIXES, check_leftovers, is_zarr
    from .heatmap import check_heatmap

    # The check refuses folders; a zarr is one, and may be replaced.
    if out is None or not (out.suffix.lower() == ".zarr" and is_zarr(out)):
        check_destination("--out", out, SUFFIXES, read)
    if out is not None:
        check_leftovers(out)
    if resume and out is None:
        raise ArgumentError(
            "--resume: expected --out, the file to continue, got none. Pass --out FILE."
        )
    check_destination("--heatmap", heatmap, read=read, out=out)
    check_heatmap(heatmap, label, softmax)


def _scaled_grid(
    bound: BoundModel,
    scaling: Scaling,
    pixels: Pixels,
    sizes: tuple[int, int],
    steps: tuple[int, int] | None,
    first: int,
) -> tuple[Slide, Any]:
    """Return the model on every crop of scaled pixels, and its variables."""
    from ..dense_prediction.slide import slide as make_grid
    from ..dense_prediction.tiles import middle_crop
    from ..frontends.bind import bind_crops

    on_crops = bind_crops(bound)

    def scaled(variables: PyTree, crops: Any) -> Any:
        return on_crops.function(variables, scaling(crops))

    (variables,) = on_crops.complete(())
    grid = make_grid(scaled, sizes, steps, axes=(first, first + 1))
    if on_crops.bind is not None:
        crop = scaling(middle_crop(grid, pixels))
        # The grid's own check would see a plain function, which has no library to be
        # compared with.
        on_crops.bind(variables, crop).check_library()
    return grid, variables


def _described(
    grid: Slide, variables: PyTree, pixels: Pixels, image: Image
) -> ResultGrid:
    """Return what the result is; print how it will be computed."""
    import jax
    import numpy as np

    from ..dense_prediction.tiles import one_window
    from .grid_files import ResultGrid

    like = jax.ShapeDtypeStruct(pixels.shape, pixels.dtype)
    report = grid.report(variables, like)
    typer.echo(str(report), err=True)
    # Behind the positions, one window's outputs have the axes and sizes that all have.
    each = grid.eval_shape(variables, one_window(grid, pixels))
    if not isinstance(each, jax.ShapeDtypeStruct):
        raise ArgumentError(
            "Expected a model that returns one array, got several. Use "
            "fcconv_jax.slide in Python."
        )
    # .npy files have no name for bfloat16.
    known = np.dtype(each.dtype).isbuiltin == 1
    dtype = np.dtype(each.dtype if known else np.float32)
    sizes, step = grid.window, report.stride
    shape = (pixels.shape[0], *report.positions, *each.shape[3:])
    return ResultGrid(
        shape, dtype, sizes, step, image.transform.grid(sizes, step), image.crs
    )


def _print_counts(done: TilesWritten, masked: bool) -> None:
    if done.resumed:
        typer.echo(f"{done.resumed} of {done.tiles} tiles were finished", err=True)
    if masked:
        typer.echo(
            f"skipped {done.skipped} of {done.tiles} tiles without any of the mask",
            err=True,
        )


def _print_places(
    images: Sequence[Path],
    batch: Sequence[Image],
    result: Any,
    grid: ResultGrid,
    top: int,
) -> None:
    from .places import largest_places, place_text

    for number, (file, image) in enumerate(zip(images, batch)):
        places = largest_places(result, number, top, grid.window, grid.stride)
        if not places:
            typer.echo(f"{file}: no position has an output other than NaN")
        for place in places:
            typer.echo(f"{file}: {place_text(place, image, grid.window, grid.stride)}")


def _with_params(
    bound: BoundModel,
    params: Path | None,
    image: Path,
    sizes: Sequence[int],
    channels: int,
    drawn: bool,
) -> BoundModel:
    """Return the model with the params of a checkpoint, or with its own."""
    import jax

    from ..messages.errors import CheckpointError
    from .variables import load_variables

    if params is None:
        leaves = jax.tree.leaves(bound.variables)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise ArgumentError(
                "Expected params, got a model without any. Pass --params CKPT."
            )
        own = "the model's own"
        if drawn:
            own = "random, from rngs=nnx.Rngs(0). Pass --params CKPT for trained ones"
        typer.echo(f"params: {own}", err=True)
        return bound
    try:
        return load_variables(bound, params)
    except CheckpointError:
        # A checkpoint that fits other images is right, and the image isn't.
        for other, name in ((1, "L"), (3, "RGB"), (4, "RGBA")):
            try:
                crop = parse_input(_crop(sizes, other, bound.first_spatial_axis))
                load_variables(bound.with_arrays([crop]), params)
            except Exception:  # a model may refuse these channels in any way
                continue
            raise ArgumentError(
                f"Expected an image with {other} channels for the model in {params}, "
                f"got {image} with {channels}. Pass --mode {name} to convert it."
            ) from None
        raise


def _crop(sizes: Sequence[int], channels: int, first_spatial_axis: int) -> str:
    shape = [1, *sizes]
    shape.insert(1 if first_spatial_axis == 2 else 3, channels)
    return ",".join(map(str, shape))


def _sizes(option: str, text: str) -> tuple[int, int]:
    found = parse_sizes(option, text)
    sizes = (found, found) if isinstance(found, int) else found
    if len(sizes) != 2 or min(sizes) < 1:
        raise ArgumentError(
            f"{option}: expected a size such as 224 or 224x160, got {text!r}. Pass "
            "positive sizes."
        )
    return sizes
