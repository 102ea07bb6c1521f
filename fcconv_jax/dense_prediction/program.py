"""A traced function of a crop, run on all crops of images."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ..backends.options import has_pools
from ..messages.errors import PlanError
from ..tracing.cost import flops, largest
from ..tracing.jaxprs import AnyJaxpr, Literal, call_body, jaxpr_as_fun, opened
from ..tracing.primitives import ENTRYWISE, MATMULS, MOVES, ROUNDING, SAME
from . import costs
from .interpreter import Interpreter
from .maps import crops
from .report import SlideReport
from .values import CropArray, Grid, Part, all_own, array_of

# Positions that a search for the default stride looks at, along each axis.
_LOOKED_AT = 65
# A step that the strides of networks divide.
_DIVISIBLE = 2**8 * 3**2 * 5 * 7


@dataclasses.dataclass(frozen=True, eq=False)
class AllCrops:
    """A traced function of a crop, on the crops of images."""

    jaxpr: AnyJaxpr
    out: PyTree
    leaves: Sequence[Any]
    images: Any
    window: tuple[int, ...]
    stride: tuple[int, ...]
    axes: tuple[int, ...]
    padded_outside: bool

    def run(self) -> PyTree:
        """Return the outputs, with the batch first and then the positions."""
        operands = (*jax.tree.leaves(self.leaves), self.images)
        if self.report.shares:
            outs = jaxpr_as_fun(self._shared[0])(*operands)
        else:
            outs = self._outputs(True, *operands)
        _ = self.outputs  # refuses outputs without a batch, which have no axis to move
        fronts = [jnp.moveaxis(out, len(self.axes), 0) for out in outs]
        return jax.tree.unflatten(jax.tree.structure(self.out), fronts)

    @property
    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the outputs for one crop, with the batch first.

        Raises:
          ValueError: one of them has another axis first.
        """
        shapes = jax.tree.leaves(self.out)
        for shape in shapes:
            if not shape.shape or shape.shape[0] != self.images.shape[0]:
                raise ValueError(
                    f"Expected outputs with the batch of {self.images.shape[0]} first, "
                    f"got one of shape {shape.shape} from crops. Return one row for "
                    "each crop."
                )
        return shapes

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
        pixels = math.prod(self.images.shape) / math.prod(
            self.images.shape[axis] / size for axis, size in zip(self.axes, self.window)
        )
        batch = costs.crop_batch(self.jaxpr, count, pixels)
        gain = batch / max(costs.work(jaxpr), 1.0)
        return SlideReport(
            window=self.window,
            stride=self.stride,
            positions=positions,
            crop_flops=one,
            flops=whole,
            crop_bytes=largest(self.jaxpr) * count,
            bytes=largest(jaxpr),
            left=tuple(left.items()),
            shares=self.padded_outside or gain >= costs.WORTH_WHOLE,
            gain=gain,
            copied=int(costs.copied(jaxpr)),
            exact=not self.padded_outside,
        )

    @property
    def needs_guard(self) -> bool:
        """Whether XLA may compute a pool wrongly: see :data:`faults.POOL`.

        A batch of crops needs it for the function's own pools, too: with more than a
        few images, YNNPACK's pools return finite results where a pixel is NaN.
        """
        return has_pools(self.jaxpr)

    @property
    def image_flops(self) -> float | None:
        """FLOPs with zeros around the image alone; None where the step forbids it."""
        try:
            around = dataclasses.replace(self, padded_outside=True)
            image_stride(self.jaxpr, self.leaves, self._crop, self.axes, self.stride)
            return around.report.flops
        except PlanError:
            return None

    @property
    def _crop(self) -> jax.ShapeDtypeStruct:
        shape = list(self.images.shape)
        for axis, size in zip(self.axes, self.window):
            shape[axis] = size
        sharding = crop_sharding(self.images, self.axes)
        dtype = self.images.dtype
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    @functools.cached_property
    def _shared(self) -> tuple[Any, Counter[str]]:
        """Trace of the shared program, and the reasons why sharing stopped."""
        left: Counter[str] = Counter()
        run = functools.partial(self._outputs, False, left=left)
        operands = (*jax.tree.leaves(self.leaves), self.images)
        return jax.make_jaxpr(run)(*operands), left

    def _outputs(
        self, own: bool, *operands: PyTree, left: Counter[str] | None = None
    ) -> list[Any]:
        mesh = _explicit_mesh(self.jaxpr)
        counts = [
            (self.images.shape[axis] - size) // step + 1
            for axis, size, step in zip(self.axes, self.window, self.stride)
        ]

        def run(*operands: PyTree) -> list[Any]:
            *leaves, images = operands
            how = images, self.window, self.stride, self.axes
            value = (
                _in_a_row(*how, _is_fused(self.jaxpr))
                if own
                else image_value(*how, self.padded_outside)
            )
            interpreter = Interpreter(
                Counter() if left is None else left, placed=mesh is None
            )
            outs = interpreter.run(self.jaxpr, [*leaves, value])
            return [_on_all(out, counts) for out in outs]

        shardings = [
            _with_free_axes(var.aval.sharding, len(counts))
            for var in opened(self.jaxpr)[0].outvars
        ]
        return _automatic(run, mesh, shardings)(*operands)


def crop_sharding(images: Any, axes: Sequence[int]) -> NamedSharding | None:
    """Return a crop's placement on an Explicit mesh: whole along the sliding axes."""
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


def _explicit_mesh(jaxpr: AnyJaxpr) -> Any:
    """Return the mesh whose axes a trace has in its types; None if it has none."""
    body, _ = opened(jaxpr)
    known = (getattr(var.aval, "sharding", None) for var in body.invars)
    return next((each.mesh for each in known if each and _is_explicit(each)), None)


def _with_free_axes(sharding: Any, count: int) -> NamedSharding:
    spec = PartitionSpec(*(None,) * count, *sharding.spec)
    return NamedSharding(sharding.mesh, spec)


def _automatic(run: Callable[..., Any], mesh: Any, out: PyTree) -> Callable[..., Any]:
    """Let the compiler place what is inside a function on an Explicit mesh.

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
) -> CropArray:
    """Return images as a value that their crops share."""
    parts = [Part(size) for size in images.shape]
    for index, (axis, size, step) in enumerate(zip(axes, window, stride)):
        map_ = crops(images.shape[axis], size, step)
        parts[axis] = Part(size, map_, Grid(index, padded_outside))
    return CropArray(images, (), tuple(parts), (1,) * len(parts))


def own_stride(
    jaxpr: AnyJaxpr, leaves: PyTree, crop: jax.ShapeDtypeStruct, axes: Sequence[int]
) -> tuple[int, ...]:
    """Return the network's total stride, or the crop's size where that is less."""
    try:
        total = image_stride(jaxpr, leaves, crop, axes, None)
    except PlanError:  # it can't be padded around the image, so it can't be told so
        found = _last_maps(jaxpr, leaves, crop, axes, _LOOKED_AT, 1, False)
        total = tuple(
            0 if map_ is None else _first_shared(map_, crop.shape[axis])
            for axis, map_ in zip(axes, found)
        )
    return tuple(
        min(step or crop.shape[axis], crop.shape[axis])
        for axis, step in zip(axes, total)
    )


def image_stride(
    jaxpr: AnyJaxpr,
    leaves: PyTree,
    crop: jax.ShapeDtypeStruct,
    axes: Sequence[int],
    stride: Sequence[int] | None,
) -> tuple[int, ...]:
    """Return the step between crops of a network that is padded around the image.

    Args:
      jaxpr: the function's trace.
      leaves: what it takes in front of crops.
      crop: a batch of them.
      axes: those that slide.
      stride: the step that is wanted; None for the network's total stride.

    Raises:
      PlanError: it isn't a multiple of the network's total stride.
    """
    found = _last_maps(jaxpr, leaves, crop, axes, 2, _DIVISIBLE, True)
    total = tuple(
        # Padding that the function writes out has one place for all crops.
        1
        if map_ is None
        else max(_DIVISIBLE // max(int(np.diff(map_, axis=0).max()), 1), 1)
        for map_ in found
    )
    if stride is None:
        return total
    if any(step % least for step, least in zip(stride, total)):
        raise PlanError(
            f"padding='image': expected a stride that is a multiple of the network's "
            f"total stride {total}, got {tuple(stride)}. Pass stride={total}."
        )
    return tuple(stride)


def _last_maps(
    jaxpr: AnyJaxpr,
    leaves: PyTree,
    crop: jax.ShapeDtypeStruct,
    axes: Sequence[int],
    positions: int,
    step: int,
    padded_outside: bool,
) -> list[Any]:
    """Return the map that a function makes last along each axis of an image."""
    shape = list(crop.shape)
    for axis in axes:
        shape[axis] += (positions - 1) * step
    window = [crop.shape[axis] for axis in axes]
    found: dict[Grid, Any] = {}
    mesh = _explicit_mesh(jaxpr)

    def look(leaves: PyTree, images: Any) -> tuple[()]:
        steps = (step,) * len(axes)
        value = image_value(images, window, steps, axes, padded_outside)
        interpreter = Interpreter(Counter(), placed=mesh is None)
        interpreter.run(jaxpr, [*jax.tree.leaves(leaves), value])
        found.update(interpreter.maps)
        return ()

    images = jax.ShapeDtypeStruct(tuple(shape), crop.dtype, sharding=crop.sharding)
    jax.eval_shape(_automatic(look, mesh, ()), leaves, images)
    return [found.get(Grid(index, padded_outside)) for index in range(len(axes))]


def reaches_matmul_as_integer(jaxpr: AnyJaxpr) -> bool:
    """Return whether a trace multiplies the integers of its last input by weights.

    Not if it scales them first, or reads a table at them. An answer for a warning: a
    model may be trained so.
    """
    body, _ = opened(jaxpr)
    image = body.invars[-1]
    if not jnp.issubdtype(image.aval.dtype, jnp.integer):
        return False
    same = {image}
    for eqn in body.eqns:
        name = eqn.primitive.name
        if not any(v in same for v in eqn.invars if not isinstance(v, Literal)):
            continue
        if name in MATMULS:
            return True
        if name in SAME | ROUNDING | MOVES:
            same |= set(eqn.outvars)
    return False


def _first_shared(map_: Any, otherwise: int) -> int:
    for step in range(1, len(map_)):
        if np.intersect1d(map_[0], map_[step]).size:
            return step
    return otherwise


def _is_fused(jaxpr: AnyJaxpr) -> bool:
    """Return whether XLA fuses the crops of a trace with the one operation on them."""
    body, _ = opened(jaxpr)
    var = body.invars[-1]
    while True:
        users = [eqn for eqn in body.eqns if any(v is var for v in eqn.invars)]
        if len(users) != 1:
            return False
        (eqn,) = users
        if (inner := call_body(eqn)) is not None:
            body, _ = opened(inner)
            var = body.invars[next(i for i, v in enumerate(eqn.invars) if v is var)]
        elif eqn.primitive.name in ENTRYWISE:
            (var,) = eqn.outvars
        else:
            return True


def _in_a_row(
    images: Any,
    window: Sequence[int],
    stride: Sequence[int],
    axes: Sequence[int],
    fused: bool,
) -> CropArray:
    """Return the crops of images along one axis, as a user's batch has them.

    An axis of crops beside the batch would cost XLA's CPU backend 1.1x the time for
    matmuls, because they have more axes than a user's. A gather of rows and one of
    columns take up to three times as long as one of windows.
    """
    sizes, counts = list(images.shape), []
    for axis, size, step in zip(axes, window, stride):
        counts.append((images.shape[axis] - size) // step + 1)
        sizes[axis] = size
    # Computed, because the places of many crops would be a large constant.
    starts = jnp.stack(
        [
            step * jax.lax.broadcasted_iota(np.int32, counts, index)
            for index, step in enumerate(stride)
        ],
        -1,
    )
    gather = functools.partial(
        jax.lax.gather,
        images,
        dimension_numbers=jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(counts), len(counts) + len(sizes))),
            collapsed_slice_dims=(),
            start_index_map=tuple(axes),
        ),
        slice_sizes=sizes,
        mode="promise_in_bounds",
    )
    split = next((axis for axis, count in enumerate(counts) if count > 1), None)
    if split is None or not fused or jax.default_backend() != "cpu":
        data = gather(starts)
    else:
        # XLA's CPU backend fuses a gather with what flattens its result, and takes up
        # to 5 times as long, unless a concatenation lies between them.
        pieces = jnp.split(starts, [1], split)
        data = jnp.concatenate([gather(piece) for piece in pieces], split)
    count, (batch, *rest) = math.prod(counts), sizes
    parts = tuple(map(Part, sizes))
    ranks = (1,) * len(parts)
    if not batch:
        return CropArray(data.reshape(count, *sizes), (Grid(0),), parts, ranks)
    # Crops are parts of the batch, so that operations run as on a user's.
    own = np.arange(count * batch).reshape(count, batch)
    parts = (Part(batch, own, Grid(0)), *parts[1:])
    return CropArray(data.reshape(count * batch, *rest), (), parts, ranks)


def _on_all(value: CropArray, counts: Sequence[int]) -> Any:
    """Return the arrays of all crops, also where they do not differ."""
    value = all_own(value)
    data = array_of(value)
    if len(value.fronts) == 1 and data.shape[0] == math.prod(counts):
        return data.reshape(*counts, *data.shape[1:])  # in a row
    for index, count in enumerate(counts):
        if index not in {grid.index for grid in value.fronts}:
            data = jnp.repeat(jnp.expand_dims(data, index), count, index)
    return data
