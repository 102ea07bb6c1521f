"""Dense prediction: a function of one crop at every position of an image."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from ..backends.options import pool_options
from ..frontends.bind import bind_crops
from ..frontends.jitted import Jitted
from ..messages.progress import ProgressOption
from ..messages.user_code import explained
from ..tracing import arguments
from .program import (
    AllCrops,
    crop_sharding,
    image_stride,
    own_stride,
    reaches_matmul_as_integer,
)
from .report import SlideReport
from .tiles import Sliced, dtype_of, middle_crop
from .write import TilesWritten, WriteOptions, write_tiles


def slide(
    model: object,
    window: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    axes: int | Sequence[int] | None = None,
    padding: Literal["crops", "image"] = "crops",
) -> Slide:
    """Return a function that evaluates a model of crops on every crop of an image.

    The result at each position is that of the model on this crop alone, including its
    zero padding and norms, but work that overlapping crops share is computed once.
    Convolutions, pools, dense layers behind a flatten, global pools, attention within
    windows that crops have in common (Swin) and elementwise operations are shared.
    From the first operation in which crops differ everywhere (a norm over space, a
    position embedding, other attention), each crop is computed separately, in a
    batch. So is the whole model if sharing wouldn't be faster.
    ``grid.report(...)`` shows which operation that is.

    Args:
      model: a linen Module or its ``apply``, an NNX model, a function such as
        ``f(params, crops)`` whose last positional argument is the crops, or any of
        these converted by :func:`fcconv_jax.convert_model`. It takes a batch of crops
        and returns arrays with the batch first. Dropout must be off.
      window: spatial size of a crop, such as ``(224, 224)``, with one number for each
        axis that slides. A single int is the length of a 1-D crop (audio).
      stride: step between crops in pixels; an int applies to all axes. The default is
        the network's total stride (the product of the strides of its layers), or the
        window if that is smaller or no step is found at which crops share anything.
      axes: the axes of the image that slide; by default those behind the batch.
      padding: ``"crops"`` pads each crop inside the network, as the model does.
        ``"image"`` pads around the image only, as a network does that runs over the
        whole image. This is cheaper, but **a different function** near the border of
        each crop; ``fc.compare(exact, cheaper, args)`` shows by how much they differ.
        It requires a stride that is a multiple of the network's.

    Returns:
      A :class:`Slide`. Call it like the model, with images in place of crops. For
      images ``(N, H, W, C)`` and a model with output ``(N, ...)``, it returns
      ``(N, rows, columns, ...)``, where ``rows = (H - h) // stride + 1``. It is
      jitted, and can be differentiated, mapped and sharded.

    Raises:
      TypeError: the model is of another kind.
      ValueError: the window or stride isn't positive.

    Source:
      Sermanet et al., *OverFeat* (2014); Long et al., *Fully Convolutional
      Networks* (2015). They pad at the image's border only, which changes the results
      of a padded network; ``padding="crops"`` doesn't.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
      ...         return nn.Dense(10)(x.reshape(x.shape[0], -1))
      >>> model, crop = Net(), jnp.ones((1, 8, 8, 1))
      >>> variables = model.init(jax.random.key(0), crop)
      >>> grid = slide(model, window=(8, 8), stride=2)
      >>> images = jax.random.normal(jax.random.key(1), (3, 20, 32, 1))
      >>> scores = grid(variables, images)
      >>> scores.shape
      (3, 7, 13, 10)
      >>> there = model.apply(variables, images[:, 4:12, 6:14])
      >>> bool(jnp.allclose(scores[:, 2, 3], there, atol=1e-5))
      True
    """
    sizes = _sizes("window", window)
    places = None if axes is None else _axes(axes, sizes)
    steps = None if stride is None else _sizes("stride", stride, len(sizes))
    if padding not in ("crops", "image"):
        raise ValueError(
            f"padding: expected 'crops' or 'image', got {padding!r:.60}. Pass "
            "padding='crops', which is exact."
        )
    return Slide(model, sizes, steps, places, padding)


class Slide:
    """A model evaluated on every crop of images; returned by :func:`slide`.

    Args:
      model: takes a batch of crops as its last positional argument.
      window: size of a crop along each axis that slides.
      stride: step along each; None for the model's total stride.
      axes: the axes of the images that slide; None for those behind the batch, or
        behind the channels if the model's library puts these first.
      padding: ``"crops"`` or ``"image"``, as for :func:`slide`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> grid = fc.slide(lambda x: x.sum((1, 2)), window=(2, 2), stride=1)
      >>> grid(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, ..., 0]
      Array([[ 8., 12.],
             [20., 24.]], dtype=float32)
    """

    def __init__(
        self,
        model: object,
        window: tuple[int, ...],
        stride: tuple[int, ...] | None,
        axes: tuple[int, ...] | None = None,
        padding: Literal["crops", "image"] = "crops",
    ) -> None:
        # What a model holds itself is read again at each call, so it may be trained.
        bound = bind_crops(model)
        self.function, self._complete = bound.function, bound.complete
        self._bind, self._checked = bound.bind, set[Hashable]()
        first = bound.first_spatial_axis
        self.padding: Literal["crops", "image"] = padding
        self.window = window
        self.stride = stride
        behind = tuple(range(first, first + len(window)))
        self.axes = behind if axes is None else axes
        self._given = model, window, stride, axes, padding
        self._name = f"slide_{_name(self.function)}"
        # Most programs hold no pool that XLA may get wrong, and compile without the
        # options for those, which cost up to a third of the time. _on replaces this at
        # the first that does.
        self._call = Jitted(self._run_without_pools, self._name)

    def __reduce__(self) -> tuple[type[Slide], tuple[object, ...]]:
        # Compiled programs don't pickle, and the next process has devices of its own.
        return Slide, self._given

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Evaluate the model on every crop; outputs are ``(N, *positions, ...)``.

        Args:
          *args: the model's arguments, with images in place of crops.
          **kwargs: its keyword arguments.

        Raises:
          ValueError: an image is smaller than the window, or an output of the function
            doesn't have the batch first.
          PlanError: torchax's result for a PyTorch Module differs from PyTorch's.
        """
        args = self._complete(args)
        if args and _is_lazy(args[-1]):
            raise TypeError(
                "Expected images as a JAX or NumPy array, got a "
                f"{type(args[-1]).__name__}. Pass it to grid.write(..., out=...), "
                "which reads one tile at a time."
            )
        if self._bind is not None:
            self._check_library(args, kwargs)
        try:
            return self._call(*args, **kwargs)
        except _PoolsError:
            return self._on("__call__", args, kwargs)

    def each_crop(self, *args: PyTree, **kwargs: PyTree) -> Callable[..., PyTree]:
        """Return a function with the same results that computes each crop separately.

        The work that crops share depends on the size of the images. This function is
        one program for all sizes, including symbolic ones.

        Args:
          *args: as in a call.
          **kwargs: as in a call.

        Raises:
          ValueError: with ``padding="image"``, the result isn't a function of crops.
        """
        if self.padding == "image":
            raise ValueError(
                "Expected padding='crops' for images of any size, got padding='image', "
                "whose positions and phases are constants of one size. Drop "
                "any_size=True, or pass fc.slide(model, window=...) without padding=."
            )
        stride = self._program(self._complete(args), kwargs).stride
        ways = sorted(zip(self.axes, self.window, stride))

        def run(*args: Any, **kwargs: Any) -> PyTree:
            *before, crops = self._complete(args)
            places = {}
            for number, (axis, size, step) in enumerate(ways):
                # Those before it have an axis of positions in front of the crop's own.
                at = places[axis] = axis + number
                last = crops.shape[at] - size + 1
                rows = [
                    jax.lax.slice_in_dim(crops, i, last + i, step, at)
                    for i in range(size)
                ]
                crops = jnp.stack(rows, at + 1)
            first = [0, *(places[axis] for axis in self.axes)]
            rest = [i for i in range(crops.ndim) if i not in first]
            crops = crops.transpose([*first, *rest])
            lead = crops.shape[: len(first)]
            crops = crops.reshape(-1, *crops.shape[len(first) :])
            outs = self.function(*before, crops, **kwargs)
            return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), outs)

        return run

    def lower(self, *args: PyTree, **kwargs: PyTree) -> jax.stages.Lowered:
        """Lower the call, as ``jax.jit`` does."""
        return self._on("lower", self._complete(args), kwargs)

    def eval_shape(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Return the shapes and dtypes of a call, as ``jax.eval_shape`` does."""
        return self._on("eval_shape", self._complete(args), kwargs)

    def write(
        self,
        *args: PyTree,
        out: PyTree,
        memory: int = 384 * 2**20,
        resume: str | Path | None = None,
        progress: ProgressOption = None,
        mask: Sliced | None = None,
        whole_windows: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        **kwargs: PyTree,
    ) -> TilesWritten:
        """Evaluate the model on images of any size, a tile of positions at a time.

        While a tile is computed, threads read the next one and write the last one.

        Args:
          *args: as in a call. The images may be any object with ``shape``, ``dtype``
            and slicing: a ``numpy.memmap``, or an array of zarr, h5py, dask or
            TensorStore. Only the pixels of one tile are read at a time.
          out: an array, or a PyTree of arrays, to which the result is written tile by
            tile; of the result's shape and any of these types. If it is stored in
            chunks or shards, a tile covers whole ones, unless it is smaller than one.
          memory: estimated bytes that one tile may take. The whole process takes two to
            three times as much, plus the libraries, because tiles are read ahead and
            written in the background.
          resume: path of a file that records the finished tiles, with digests of the
            model, params, images and output. A stopped run resumes from it; a
            completed run removes it.
          progress: called with a phase, the tiles done and the tiles in all; None for a
            bar on stderr, False for none.
          mask: an array over the axes that slide, of the images' size or smaller,
            nonzero where the image is of interest. Positions whose window contains no
            such pixel are NaN, and tiles of only such positions aren't computed.
          whole_windows: whether windows that the mask covers only in part are NaN, too.
            Pass True if the mask marks the pixels that hold data.
          mesh: devices that share the tiles; None for the default device. With devices
            of several processes (``jax.distributed``), every process makes this call
            and writes its own tiles. No two write the same chunk or shard.
          **kwargs: as in a call.

        Returns:
          The number of tiles, and of those that were skipped or resumed.

        Raises:
          ValueError: ``out`` can't hold the result, a single window takes more than
            ``memory``, or ``resume`` records a run with other params, or another
            model, image, window, stride or output; the message names which.
        """
        plain = Slide(self.function, self.window, self.stride, self.axes, self.padding)
        given = self._complete(args)
        options = WriteOptions(memory, resume, progress, mask, whole_windows, mesh)
        options.check()
        self._check_library(given, kwargs)
        return write_tiles(plain, given, kwargs, out, options)

    def report(self, *args: PyTree, **kwargs: PyTree) -> SlideReport:
        """Report what crops would share and what that saves; no computation runs.

        Args:
          *args: as in a call; arrays may be abstract.
          **kwargs: as in a call.
        """
        *before, images = self._complete(args)
        if _is_lazy(images) or isinstance(images, np.ndarray):
            images = jax.ShapeDtypeStruct(images.shape, dtype_of(images))
        program = self._program([*before, images], kwargs)
        around = program.image_flops if self.padding == "crops" else None
        return dataclasses.replace(program.report, image_flops=around)

    def __repr__(self) -> str:
        window = "x".join(map(str, self.window))
        step = "its own stride" if self.stride is None else f"stride {self.stride}"
        return f"<{_name(self.function)} on every crop of {window}, {step}>"

    def _check_library(self, args: Sequence[PyTree], kwargs: PyTree) -> None:
        """Compare one crop of each shape and dtype with the model's own library."""
        if self._bind is None:
            return
        *before, images = args
        _check(images, self.window, self.axes, self._given[3] is None)
        leaves = jax.tree.leaves((args, kwargs))
        if any(
            isinstance(leaf, Tracer) or not getattr(leaf, "is_fully_addressable", True)
            for leaf in leaves
        ):
            return  # within another jit, or in part on other hosts
        call = (*before, middle_crop(self, images))
        arrays, static = arguments.split((call, kwargs))
        key = repr(static), *((each.shape, each.dtype) for each in arrays)
        if key not in self._checked:
            self._bind(*call, **kwargs).check_library()
            self._checked.add(key)

    def _on(self, method: str, args: Sequence[PyTree], kwargs: PyTree) -> Any:
        try:
            return getattr(self._call, method)(*args, **kwargs)
        except _PoolsError:
            self._call = Jitted(
                self._run,
                self._name,
                options=lambda: pool_options(jax.default_backend()),
            )
        return getattr(self._call, method)(*args, **kwargs)

    def _run(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self._program(args, kwargs).run()

    def _run_without_pools(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        program = self._program(args, kwargs)
        if pool_options(jax.default_backend()) and program.needs_guard:
            raise _PoolsError
        return program.run()

    def _program(self, args: Sequence[Any], kwargs: PyTree) -> AllCrops:
        *before, images = args
        _check(images, self.window, self.axes, self._given[3] is None)
        leaves, static = arguments.split((tuple(before), dict(kwargs)))

        def call(leaves: Sequence[Any], crops: Any) -> Any:
            before, kwargs = static.merge(leaves)
            return self.function(*before, crops, **kwargs)

        crop = list(images.shape)
        for axis, size in zip(self.axes, self.window):
            crop[axis] = size
        with explained():
            like = jax.ShapeDtypeStruct(
                tuple(crop), images.dtype, sharding=crop_sharding(images, self.axes)
            )
            jaxpr, out = jax.make_jaxpr(call, return_shape=True)(leaves, like)
        if reaches_matmul_as_integer(jaxpr):
            warnings.warn(
                f"The images are {images.dtype} and reach the model's first layer "
                "unscaled. If it was trained on pixels from 0 to 1, pass "
                "images / 255 (`fcconv slide` divides by default).",
                stacklevel=2,
            )
        around = self.padding == "image"
        if around:
            stride = image_stride(jaxpr, leaves, like, self.axes, self.stride)
        else:
            stride = self.stride or own_stride(jaxpr, leaves, like, self.axes)
        return AllCrops(
            jaxpr, out, leaves, images, self.window, stride, self.axes, around
        )


class _PoolsError(Exception):
    """A program has a pool that XLA may get wrong without options."""


def _check(
    images: Any, window: Sequence[int], axes: Sequence[int], by_default: bool
) -> None:
    shape = getattr(images, "shape", None)
    if shape is None or len(shape) <= max(axes):
        raise ValueError(
            f"Expected images with the axes {tuple(axes)} as the last positional "
            f"argument, got {shape if shape is not None else type(images).__name__}. "
            "Pass the model's params first, and the images with the batch in front."
        )
    if by_default and len(window) == 1 and len(shape) > 3:
        raise ValueError(
            f"window: expected a size for each of the axes of images {tuple(shape)}, "
            f"got {window[0]}. Pass window=({window[0]}, {window[0]}), or axes=1 to "
            "slide along the first axis only."
        )
    for axis, size in zip(axes, window):
        if shape[axis] < size:
            fix = "Pad them, or pass a smaller window."
            if len(shape) == 1 + len(window):  # no channels, or no batch
                fix += " If this is one image (H, W, C), pass images[None]."
            raise ValueError(
                f"Expected images of at least {tuple(window)} along the axes "
                f"{tuple(axes)}, got {tuple(shape)}. {fix}"
            )


def _is_lazy(images: object) -> bool:
    """Return whether images lie in a file, or anywhere but in memory."""
    return not isinstance(images, jax.Array | np.ndarray) and all(
        hasattr(images, name) for name in ("shape", "dtype", "__getitem__")
    )


def _sizes(name: str, value: int | Sequence[int], rank: int = 1) -> tuple[int, ...]:
    found: tuple[Any, ...] = _entries(value) or (value,) * rank
    sizes = tuple(map(operator.index, found)) if _whole(found) else ()
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"{name}: expected positive ints, got {value!r}. Pass {name}=32, or a "
            "tuple with one for each axis."
        )
    if name == "stride" and len(sizes) != rank:
        raise ValueError(
            f"stride: expected one int or {rank}, got {value!r}. Pass one for each "
            "axis of the window."
        )
    return sizes


def _axes(axes: int | Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    found: tuple[Any, ...] = _entries(axes) or (axes,)
    wrong = not _whole(found) or len(found) != len(window) or min(found) < 0
    if wrong or len(set(found)) < len(found):
        raise ValueError(
            f"axes: expected {len(window)} axes counted from 0, got {axes!r}. Pass "
            f"axes={tuple(range(1, 1 + len(window)))}."
        )
    return tuple(map(operator.index, found))


def _entries(value: Any) -> tuple[Any, ...]:
    several = isinstance(value, Sequence | np.ndarray) and np.ndim(value) == 1
    return tuple(value) if several and not isinstance(value, str) else ()


def _whole(numbers: Sequence[Any]) -> bool:
    return all(hasattr(n, "__index__") and not isinstance(n, bool) for n in numbers)


def _name(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)
