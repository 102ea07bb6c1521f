"""Dense prediction: what a function of one crop says at every place of an image."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..backends.options import convolution_options
from ..frontends.bind import bind_crops
from ..frontends.jitted import Jitted
from ..progress import ProgressOption
from ..tracing import arguments
from ..tracing.cost import flops, largest
from ..tracing.jaxprs import jaxpr_as_fun, opened
from ..tracing.user_code import explained
from . import costs
from .interpreter import Interpreter
from .maps import crops
from .report import SlideReport
from .tiles import write_tiles
from .values import Grid, Part, Value, all_own, array_of

# Positions that a search for the default stride looks at, along each axis.
_LOOKED_AT = 65


def slide(
    model: Any,
    window: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    axes: int | Sequence[int] | None = None,
    padding: Literal["crops", "image"] = "crops",
) -> Slide:
    """Turns a function of one crop into one of whole images: its value on every crop.

    The result is that of the function on each crop by itself, zero padding inside the
    network, norms and all; what crops have in common is computed once. Convolutions,
    pools, dense layers behind a flatten, global pools and everything that works entry
    by entry are shared. From where crops differ everywhere on (a norm over space, a
    position embedding, attention) each crop is computed by itself, in a batch; so is
    the whole function where sharing would not pay. ``grid.report(...)`` shows which.

    Args:
      model: a function ``f(params, crops)`` (what is before the crops may be anything,
        or absent), the ``apply`` of a linen Module or the Module itself, an NNX model,
        or any of them converted by :func:`fcconv_jax.convert_model`. It takes a batch
        of crops and returns arrays with the batch first. Dropout is to be off.
      window: spatial size of a crop, such as ``(224, 224)``: one number for each axis
        that slides; one alone is the length of a 1-D crop (audio).
      stride: step between crops in pixels; an int holds for all axes. None takes the
        network's own total stride: the smallest step at which crops share its last
        layer.
      axes: the axes of the image that slide; those behind the batch by default.
      padding: where the zeros of padded layers lie: around each of the ``"crops"``, as
        the function has them, or around the ``"image"`` alone, as a network has that is
        run over the image as a whole. The latter is cheaper and **another function**
        near the border of each crop; ``fc.compare(exact, cheaper, args)`` says by how
        much. Its stride must be a multiple of the network's.

    Returns:
      A :class:`Slide`, called as the model is called, with images in the place of
      crops. For images ``(N, H, W, C)`` and an output ``(N, ...)`` of the model it
      returns ``(N, rows, columns, ...)``, where ``rows = (H - h) // stride + 1``.
      Jitted; it can be differentiated, mapped and sharded.

    Raises:
      TypeError: the model is of another kind.
      ValueError: the window or stride isn't positive.

    Source:
      Sermanet et al., *OverFeat* (2014); Long et al., *Fully Convolutional
      Networks* (2015), who share zero padding at the image's border only, which
      changes the numbers of a padded network. Here they stay.

    Example:
      >>> import flax.linen as nn
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
    places = tuple(range(1, 1 + len(sizes))) if axes is None else _axes(axes, sizes)
    steps = None if stride is None else _sizes("stride", stride, len(sizes))
    if padding not in ("crops", "image"):
        raise ValueError(f"padding: expected 'crops' or 'image', got {padding!r}")
    function, held = bind_crops(model)
    return Slide(function, sizes, steps, places, padding, held)


class Slide:
    """A function on every crop of images; made by :func:`slide`.

    Args:
      function: takes a batch of crops last among its positional arguments.
      window: size of a crop along each axis that slides.
      stride: step along each; None for the function's own.
      axes: those axes of the images.
      padding: where padding lies.
      held: returns what the function takes first and the caller does not pass: the
        variables of a model that holds them, read anew at each call.

    Example:
      >>> import fcconv_jax as fc
      >>> grid = fc.slide(lambda x: x.sum((1, 2)), window=(2, 2), stride=1)
      >>> grid(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, ..., 0]
      Array([[ 8., 12.],
             [20., 24.]], dtype=float32)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        window: tuple[int, ...],
        stride: tuple[int, ...] | None,
        axes: tuple[int, ...],
        padding: Literal["crops", "image"] = "crops",
        held: Callable[[], tuple[Any, ...]] = tuple,
    ):
        self._held = held
        self.padding: Literal["crops", "image"] = padding
        self.function = function
        self.window = window
        self.stride = stride
        self.axes = axes
        self._call = Jitted(
            self._run,
            f"slide_{_name(function)}",
            options=lambda: convolution_options(jax.default_backend()),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function on every crop: outputs ``(N, *positions, ...)``.

        Args:
          *args: what the function takes, with images in the place of crops.
          **kwargs: the function's.

        Raises:
          ValueError: an image is smaller than the window, or an output of the function
            has not the batch first.
        """
        return self._call(*self._held(), *args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the call, as ``jax.jit`` does."""
        return self._call.lower(*self._held(), *args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes that a call returns, as ``jax.jit`` has it."""
        return self._call.eval_shape(*self._held(), *args, **kwargs)

    def write(
        self,
        *args: Any,
        out: Any,
        memory: int = 2**30,
        resume: str | Path | None = None,
        progress: ProgressOption = None,
        **kwargs: Any,
    ) -> None:
        """Runs over images of any size, a tile of positions at a time.

        Args:
          *args: as in a call; the images may be anything that is read by slices and
            has a ``shape`` and ``dtype``, such as a ``numpy.memmap`` or a zarr array.
          out: where the result is written as it comes: an array, or a PyTree of arrays,
            of the result's shape, likewise.
          memory: bytes that a tile may take; an estimate decides its size.
          resume: a file that keeps which tiles are done; a run that was stopped goes on
            from there, and removes it at its end.
          progress: called with what is done, how many tiles are, and of how many; None
            for a bar on stderr, False for none.
          **kwargs: as in a call.

        Raises:
          ValueError: ``out`` has another shape than the result, or a window alone takes
            more than ``memory``.
        """
        plain = Slide(self.function, self.window, self.stride, self.axes, self.padding)
        given = (*self._held(), *args)
        write_tiles(plain, given, kwargs, out, memory, resume, progress)

    def report(self, *args: Any, **kwargs: Any) -> SlideReport:
        """Says what crops would share, before anything runs.

        Args:
          *args: as in a call; arrays may be abstract.
          **kwargs: as in a call.
        """
        return self._program((*self._held(), *args), kwargs).report

    def __repr__(self) -> str:
        window = "x".join(map(str, self.window))
        step = "its own stride" if self.stride is None else f"stride {self.stride}"
        return f"<{_name(self.function)} on every crop of {window}, {step}>"

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self._program(args, kwargs).run()

    def _program(self, args: Sequence[Any], kwargs: Any) -> _Program:
        *before, images = args
        _check(images, self.window, self.axes)
        leaves, static = arguments.split((tuple(before), dict(kwargs)))

        def call(leaves: Sequence[Any], crops: Any) -> Any:
            before, kwargs = static.merge(leaves)
            return self.function(*before, crops, **kwargs)

        crop = list(images.shape)
        for axis, size in zip(self.axes, self.window):
            crop[axis] = size
        with explained():
            like = jax.ShapeDtypeStruct(
                tuple(crop), images.dtype, sharding=_crop_sharding(images, self.axes)
            )
            jaxpr, out = jax.make_jaxpr(call, return_shape=True)(leaves, like)
        stride = self.stride or own_stride(jaxpr, leaves, like, self.axes)
        around = self.padding == "image"
        return _Program(
            jaxpr, out, leaves, images, self.window, stride, self.axes, around
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """A traced function of a crop, on the crops of images."""

    jaxpr: Any
    out: Any
    leaves: Sequence[Any]
    images: Any
    window: tuple[int, ...]
    stride: tuple[int, ...]
    axes: tuple[int, ...]
    padded_outside: bool

    def run(self) -> Any:
        """The outputs, with the batch first and then the positions."""
        operands = (*jax.tree.leaves(self.leaves), self.images)
        if self.report.shares:
            outs = jaxpr_as_fun(self._shared[0])(*operands)
        else:
            outs = self._outputs(True, *operands)
        shapes, tree = jax.tree.flatten(self.out)
        for shape in shapes:
            if not shape.shape or shape.shape[0] != self.images.shape[0]:
                raise ValueError(
                    f"slide expected outputs with the batch of {self.images.shape[0]} "
                    f"first, got one of shape {shape.shape} from crops. Return one row "
                    "for each crop"
                )
        return jax.tree.unflatten(
            tree, [jnp.moveaxis(out, len(self.axes), 0) for out in outs]
        )

    @functools.cached_property
    def report(self) -> SlideReport:
        """Report of what is shared and saved."""
        jaxpr, left = self._shared
        positions = tuple(
            (self.images.shape[axis] - size) // step + 1
            for axis, size, step in zip(self.axes, self.window, self.stride)
        )
        count = math.prod(positions)
        one, whole = flops(self.jaxpr), flops(jaxpr)
        return SlideReport(
            window=self.window,
            stride=self.stride,
            positions=positions,
            crop_flops=one,
            flops=whole,
            crop_bytes=largest(self.jaxpr) * count,
            bytes=largest(jaxpr),
            left=tuple(left.items()),
            shares=self.padded_outside or one * count >= costs.WORTH_WHOLE * whole,
            exact=not self.padded_outside,
        )

    @functools.cached_property
    def _shared(self) -> tuple[Any, Counter[str]]:
        """The trace of the shared program, and why sharing stopped."""
        left: Counter[str] = Counter()
        run = functools.partial(self._outputs, False, left=left)
        operands = (*jax.tree.leaves(self.leaves), self.images)
        return jax.make_jaxpr(run)(*operands), left

    def _outputs(
        self, own: bool, *operands: Any, left: Counter[str] | None = None
    ) -> list[Any]:
        mesh = _explicit_mesh(self.jaxpr)
        counts = [
            (self.images.shape[axis] - size) // step + 1
            for axis, size, step in zip(self.axes, self.window, self.stride)
        ]

        def run(*operands: Any) -> list[Any]:
            *leaves, images = operands
            value = image_value(
                images, self.window, self.stride, self.axes, self.padded_outside
            )
            interpreter = Interpreter(
                Counter() if left is None else left, placed=mesh is None
            )
            outs = interpreter.run(
                self.jaxpr, [*leaves, all_own(value) if own else value]
            )
            return [_on_all(out, counts) for out in outs]

        shardings = [
            _with_free_axes(var.aval.sharding, len(counts))
            for var in opened(self.jaxpr)[0].outvars
        ]
        return _automatic(run, mesh, shardings)(*operands)


def _crop_sharding(images: Any, axes: Sequence[int]) -> NamedSharding | None:
    """Placement of a crop on an Explicit mesh: whole along the axes that slide."""
    aval = images if isinstance(images, jax.ShapeDtypeStruct) else jax.typeof(images)
    sharding = getattr(aval, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not _is_explicit(sharding):
        return None
    spec = [*sharding.spec, *(None,) * (len(images.shape) - len(sharding.spec))]
    for axis in axes:
        spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _is_explicit(sharding: Any) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


def _explicit_mesh(jaxpr: Any) -> Any:
    """The mesh whose axes a trace has in its types; None if it has none."""
    body, _ = opened(jaxpr)
    known = (getattr(var.aval, "sharding", None) for var in body.invars)
    return next((each.mesh for each in known if each and _is_explicit(each)), None)


def _with_free_axes(sharding: Any, count: int) -> NamedSharding:
    spec = PartitionSpec(*(None,) * count, *sharding.spec)
    return NamedSharding(sharding.mesh, spec)


def _automatic(run: Callable[..., Any], mesh: Any, out: Any) -> Callable[..., Any]:
    """Lets the compiler place what is inside a function on an Explicit mesh.

    A crop's array fixes which of its axes are placed where; what crops share has other
    axes, whose placement would have to be stated at each reshape.
    """
    if mesh is None:
        return run
    axes = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types)
        if kind == AxisType.Explicit
    ]
    return jax.sharding.auto_axes(run, axes=tuple(axes), out_sharding=out)


def image_value(
    images: Any,
    window: Sequence[int],
    stride: Sequence[int],
    axes: Sequence[int],
    padded_outside: bool = False,
) -> Value:
    """Images, as what their crops share."""
    parts = [Part(size) for size in images.shape]
    for index, (axis, size, step) in enumerate(zip(axes, window, stride)):
        map_ = crops(images.shape[axis], size, step)
        parts[axis] = Part(size, map_, Grid(index, padded_outside))
    return Value(images, (), tuple(parts), (1,) * len(parts))


def own_stride(
    jaxpr: Any, leaves: Any, crop: jax.ShapeDtypeStruct, axes: Sequence[int]
) -> tuple[int, ...]:
    """The smallest step at which crops share the last layer of a function."""
    shape = list(crop.shape)
    for axis in axes:
        shape[axis] += _LOOKED_AT - 1
    window = [crop.shape[axis] for axis in axes]
    found: dict[Grid, Any] = {}

    mesh = _explicit_mesh(jaxpr)

    def look(leaves: Any, images: Any) -> tuple[()]:
        value = image_value(images, window, (1,) * len(axes), axes)
        interpreter = Interpreter(Counter(), placed=mesh is None)
        interpreter.run(jaxpr, [*jax.tree.leaves(leaves), value])
        found.update(interpreter.maps)
        return ()

    images = jax.ShapeDtypeStruct(tuple(shape), crop.dtype, sharding=crop.sharding)
    jax.eval_shape(_automatic(look, mesh, ()), leaves, images)
    steps = []
    for index, size in enumerate(window):
        map_ = found.get(Grid(index))
        steps.append(size if map_ is None else _first_shared(map_, size))
    return tuple(steps)


def _first_shared(map_: Any, otherwise: int) -> int:
    for step in range(1, len(map_)):
        if np.intersect1d(map_[0], map_[step]).size:
            return step
    return otherwise


def _on_all(value: Value, counts: Sequence[int]) -> Any:
    """The arrays of all crops, also where they do not differ."""
    value = all_own(value)
    data = array_of(value)
    for index, count in enumerate(counts):
        if index not in {grid.index for grid in value.fronts}:
            data = jnp.repeat(jnp.expand_dims(data, index), count, index)
    return data


def _check(images: Any, window: Sequence[int], axes: Sequence[int]) -> None:
    shape = getattr(images, "shape", None)
    if shape is None or len(shape) <= max(axes):
        raise ValueError(
            f"slide expected images with the axes {axes} as the last positional "
            f"argument, got {shape if shape is not None else type(images).__name__}"
        )
    for axis, size in zip(axes, window):
        if shape[axis] < size:
            raise ValueError(
                f"slide expected images of at least {tuple(window)} along the axes "
                f"{tuple(axes)}, got {tuple(shape)}. Pad them, or take a smaller window"
            )


def _sizes(name: str, value: int | Sequence[int], rank: int = 1) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"{name}: expected positive ints, got {value!r}")
    if name == "stride" and len(sizes) != rank:
        raise ValueError(f"stride: expected one int or {rank}, got {value!r}")
    return sizes


def _axes(axes: int | Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    found = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if len(found) != len(window) or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(
            f"axes: expected {len(window)} axes counted from 0, got {axes!r}"
        )
    return found


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
