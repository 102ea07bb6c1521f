"""Array maps: a dense kernel to a conv kernel and back, never changing an entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Shaped

from ..messages.flags import check_flags
from ..versions import check_bits
from .meshes import reshape
from .windows import per_dimension, single

# The kind that goes in comes out: NumPy arrays go through NumPy, others through JAX.
Array = TypeVar("Array", np.ndarray, jax.Array)


def dense_kernel_to_conv(
    kernel: Shaped[Array, "*groups features out"],
    kernel_size: int | Sequence[int],
    *,
    order: str | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> Shaped[Array, "*window in out"]:
    """Rearrange a dense kernel into that of the equivalent convolution.

    Args:
      kernel: ``(F, O)``, with ``F`` the flattened window times channels; for
        ``groups > 1``, ``(G, F, O/G)`` with the flattened window times ``C/G``.
      kernel_size: the window ``(*k)``; ``(1, 1)`` for a pointwise convolution.
      order: axes in the order in which they were flattened into ``F``, slowest
        first: ``"HWC"`` (the default, channel last), ``"CHW"``, ``"WHC"``; letters
        as :func:`window_letters` gives them, and ``C``.
      groups: ``feature_group_count`` of the convolution.
      transposed: convert to a transposed convolution whose strides are its kernel size:
        ``kernel`` is then ``(C, F)``, with ``F`` the flattened window times the ``O``
        output channels (``(G, C/G, F)`` with the window times ``O/G``). The window is
        reversed, as ``flax.linen.ConvTranspose`` stores it by default.

    Returns:
      The conv kernel ``(*k, C/G, O)``; output channel ``o`` belongs to group
      ``o // (O/G)``. A NumPy array returns a NumPy array, if possible as a view.

    Raises:
      ValueError: the shape does not fit the window, the order or the groups.

    Source:
      Raschka, *Machine Learning Q and AI* (2024), ch. 12;
      Long et al. (2015) converted the head of VGG this way.

    Example:
      >>> dense_kernel_to_conv(np.zeros((12, 5)), (2, 2), order="CHW").shape
      (2, 2, 3, 5)
      >>> dense_kernel_to_conv(np.zeros((3, 20)), (2, 2), transposed=True).shape
      (2, 2, 3, 5)
    """
    rearrange = kernel_rearrangement(
        np.shape(kernel), kernel_size, order=order, groups=groups, transposed=transposed
    )
    return rearrange(kernel)


def conv_kernel_to_dense(
    kernel: Shaped[Array, "*window in out"],
    *,
    order: str | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> Shaped[Array, "*groups features out"]:
    """Rearrange a conv kernel into that of the equivalent dense layer.

    Args:
      kernel: ``(*k, C/G, O)``.
      order: as in :func:`dense_kernel_to_conv`, whose inverse this is.
      groups: ``feature_group_count`` of the convolution.
      transposed: whether the convolution is transposed, as there.

    Returns:
      The dense kernel ``(F, O)``, or ``(G, F, O/G)`` for ``groups > 1``; for a
      transposed convolution ``(C, F)`` or ``(G, C/G, F)``.

    Raises:
      ValueError: the shape does not fit the order or the groups.

    Source:
      Raschka, *Machine Learning Q and AI* (2024), ch. 12.

    Example:
      >>> conv_kernel_to_dense(np.zeros((2, 2, 3, 4)), groups=2).shape
      (2, 12, 2)
    """
    window, channels, features = conv_kernel_axes(np.shape(kernel), groups)
    rows, out, taps = channels // groups, features // groups, math.prod(window)
    dense = (rows, taps * out) if transposed else (taps * rows, out)
    if groups > 1:
        dense = (groups, *dense)
    rearrange = kernel_rearrangement(
        dense, window, order=order, groups=groups, transposed=transposed
    )
    return rearrange.inverse()(kernel)


def conv_kernel_axes(
    shape: tuple[int, ...], groups: int
) -> tuple[tuple[int, ...], int, int]:
    """Window, input channels of all groups, and output channels of a conv kernel.

    Raises:
      ValueError: the shape isn't that of a conv kernel, or the groups do not fit.

    Example:
      >>> conv_kernel_axes((2, 2, 3, 4), groups=2)
      ((2, 2), 6, 4)
    """
    if len(shape) < 3:
        raise ValueError(
            f"kernel: expected a conv kernel (*window, in, out), got shape {shape}. "
            "Pass a kernel with one axis or more for the window."
        )
    *window, inside, features = shape
    if groups < 1 or features % groups:
        raise ValueError(
            f"groups: expected a divisor of the {features} output channels, got "
            f"{groups}. Pass the convolution's feature_group_count."
        )
    return tuple(window), inside * groups, features


def kernel_rearrangement(
    dense_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    order: str | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> Rearrangement:
    """Return the rearrangement from a dense kernel to a conv kernel.

    Args:
      dense_shape: ``(F, O)``, or ``(G, F, O/G)`` for ``groups > 1``; for a transposed
        convolution ``(C, F)`` or ``(G, C/G, F)``.
      kernel_size: of the convolution; an int is one dimension.
      order: axes in the order in which they were flattened into ``F``, slowest first;
        channel last by default.
      groups: ``feature_group_count`` of the convolution.
      transposed: as in :func:`dense_kernel_to_conv`.

    Raises:
      ValueError: the shape does not fit the window, the order or the groups.

    Example:
      >>> kernel_rearrangement((12, 5), (2, 2)).target
      (2, 2, 3, 5)
    """
    check_flags(transposed=transposed)
    dense_shape = tuple(dense_shape)
    window = per_dimension("kernel_size", kernel_size, None)
    groups = single("groups", groups)
    inner = ("C", "F") if transposed else ("F", "O")
    lead = ()
    if groups > 1:
        inner = (f"C/{groups}", "F") if transposed else ("F", f"O/{groups}")
        lead = (groups,)
    if len(dense_shape) != 2 + len(lead) or dense_shape[:-2] != lead:
        named = ", ".join(map(str, (*lead, *inner)))
        raise ValueError(
            f"kernel: expected a dense kernel of shape ({named}) for groups={groups}, "
            f"got {dense_shape}. Reshape it, or pass other groups="
        )
    flat, kept = dense_shape[-2:][::-1] if transposed else dense_shape[-2:]
    taps = math.prod(window)
    if flat % taps:
        what = "columns" if transposed else "rows"
        raise ValueError(
            f"kernel: expected a multiple of the {taps} taps of kernel_size {window}, "
            f"got {flat} {what} in the dense kernel {dense_shape}. Check kernel_size."
        )
    # Axes of the flatten: the window's are 0, 1, ..., the channels' is the last.
    axes = _flatten_order(order, len(window))
    sizes = (*window, flat // taps)
    flattened = tuple(sizes[a] for a in axes)
    # Of the split array: groups, then the flattened axes and the other channels.
    start = len(lead) + transposed
    split = (*lead, kept, *flattened) if transposed else (*lead, *flattened, kept)
    at = [start + axes.index(a) for a in range(len(sizes))]
    other = len(lead) if transposed else len(split) - 1
    channels, features = (other, at[-1]) if transposed else (at[-1], other)
    perm = (*at[:-1], channels, *range(len(lead)), features)
    target = (*window, split[channels], groups * split[features])
    # Flax's ConvTranspose stores the window reversed unless transpose_kernel is set.
    flip = tuple(sorted(at[:-1])) if transposed else ()
    return Rearrangement(dense_shape, split, perm, target, flip)


def bias_rearrangement(dense_shape: Sequence[int]) -> Rearrangement:
    """Return the reshape of a dense bias ``(O,)`` or ``(G, O/G)`` to ``(O,)``.

    Example:
      >>> bias_rearrangement((2, 3)).target
      (6,)
    """
    return Rearrangement.reshape(dense_shape, (math.prod(dense_shape),))


def window_letters(rank: int) -> str:
    """Return the letters of a window's dimensions: ``W``, ``HW`` or ``DHW``.

    Raises:
      ValueError: the rank has no letters; leave out the order there.

    Example:
      >>> window_letters(2)
      'HW'
    """
    if not 1 <= rank <= 3:
        raise ValueError(
            f"order: expected 1 to 3 dimensions, which have letters, got {rank}. Pass "
            "order=None."
        )
    return "DHW"[3 - rank :]


def channel_last(rank: int) -> str:
    """Return the flatten order of a channel-last window: ``WC``, ``HWC`` or ``DHWC``.

    Raises:
      ValueError: as :func:`window_letters`.

    Example:
      >>> channel_last(2)
      'HWC'
    """
    return window_letters(rank) + "C"


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A bijection between the entries of two shapes: reshape, transpose, reshape.

    Args:
      source: shape of the array that goes in.
      split: shape the source is reshaped to; ``prod(split) == prod(source)``.
      perm: permutation of the axes of ``split``.
      target: shape of the array that comes out.
      flip: axes of ``split`` that are reversed, in ascending order.

    Raises:
      ValueError: the sizes differ, ``perm`` is not a permutation, or ``flip`` does not
        name axes once each.

    Example:
      >>> chw = Rearrangement((12, 5), (3, 2, 2, 5), (1, 2, 0, 3), (2, 2, 3, 5))
      >>> chw(np.arange(60).reshape(12, 5)).shape
      (2, 2, 3, 5)
      >>> chw.inverse()(chw(np.arange(60).reshape(12, 5)))[0]
      array([0, 1, 2, 3, 4])
    """

    source: tuple[int, ...]
    split: tuple[int, ...]
    perm: tuple[int, ...]
    target: tuple[int, ...]
    flip: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = {math.prod(s) for s in (self.source, self.split, self.target)}
        axes = range(len(self.split))
        if (
            len(sizes) != 1
            or sorted(self.perm) != list(axes)
            or [axis for axis in axes if axis in self.flip] != list(self.flip)
        ):
            raise ValueError(
                f"not a rearrangement: {self.source} -> {self.split} reversed along "
                f"{self.flip}, transposed by {self.perm} -> {self.target}"
            )

    @classmethod
    def reshape(cls, source: Sequence[int], target: Sequence[int]) -> Rearrangement:
        """Return the pure reshape from ``source`` to ``target``."""
        source, target = tuple(source), tuple(target)
        return cls(source, source, tuple(range(len(source))), target)

    @property
    def is_reshape(self) -> bool:
        """Whether the entries keep their row-major order (no transpose is needed)."""
        # Axes of size 1 may stand anywhere: moving them moves no entry.
        moved = [p for p in self.perm if self.split[p] != 1]
        return moved == sorted(moved) and not any(p in self.flip for p in moved)

    def normal(self) -> Rearrangement:
        """Return the same map in its one shortest spelling, by which maps compare.

        Example:
          >>> Rearrangement((6, 1, 4), (6, 1, 4), (0, 1, 2), (24,)).normal().split
          (24,)
        """
        kept = [axis for axis, size in enumerate(self.split) if size != 1]
        order = [kept.index(axis) for axis in self.perm if self.split[axis] != 1]
        runs: list[list[int]] = []
        # Neighbours that are both reversed are one axis that is reversed.
        turned = [axis in self.flip for axis in kept]
        for number in order:
            before = runs[-1][-1] if runs else None
            if before == number - 1 and turned[number - 1] == turned[number]:
                runs[-1].append(number)
            else:
                runs.append([number])
        stored = sorted(runs)
        return Rearrangement(
            self.source,
            tuple(math.prod(self.split[kept[n]] for n in run) for run in stored),
            tuple(stored.index(run) for run in runs),
            self.target,
            tuple(i for i, run in enumerate(stored) if turned[run[0]]),
        )

    def inverse(self) -> Rearrangement:
        """Return the rearrangement that takes ``target`` back to ``source``."""
        order = sorted(range(len(self.perm)), key=self.perm.__getitem__)
        return Rearrangement(
            self.target,
            tuple(self.split[p] for p in self.perm),
            tuple(order),
            self.source,
            tuple(sorted(order[axis] for axis in self.flip)),
        )

    def stacked(self, lead: Sequence[int]) -> Rearrangement:
        """Return the same of each entry of a stack, whose axes ``lead`` come first.

        Example:
          >>> Rearrangement.reshape((6,), (2, 3)).stacked((4,)).target
          (4, 2, 3)
        """
        lead, n = tuple(lead), len(lead)
        return Rearrangement(
            (*lead, *self.source),
            (*lead, *self.split),
            (*range(n), *(n + p for p in self.perm)),
            (*lead, *self.target),
            tuple(n + axis for axis in self.flip),
        )

    def permuted(self, axes: Sequence[int]) -> Rearrangement:
        """Return this rearrangement with the axes of its target in another order.

        Raises:
          ValueError: a target axis cuts through a transposed one.

        Example:
          >>> kernel_rearrangement((12, 5), (2, 2)).permuted((3, 2, 0, 1)).target
          (5, 3, 2, 2)
        """
        target = tuple(self.target[axis] for axis in axes)
        # Without entries every map is right, and axes can't be matched by size.
        if not math.prod(self.target):
            return Rearrangement.reshape(self.source, target)
        pieces: dict[int, list[int]] = {axis: [] for axis in self.perm}
        groups: list[list[tuple[int, int]]] = []
        left, waiting = 1, iter(self.perm)
        axis = -1
        for size in self.target:
            groups.append([])
            while size > 1:
                while left == 1:
                    axis = next(waiting)
                    left = self.split[axis]
                # Both axes are cut at each boundary that either has; a boundary inside
                # of both can't be reached by moving whole axes.
                step = math.gcd(size, left)
                if step not in (size, left):
                    raise ValueError(f"{self}: axis {size} is a part of {left}")
                groups[-1].append((axis, len(pieces[axis])))
                pieces[axis].append(step)
                size, left = size // step, left // step
        named = [(axis, i) for axis in sorted(pieces) for i in range(len(pieces[axis]))]
        return Rearrangement(
            self.source,
            tuple(pieces[axis][i] for axis, i in named),
            tuple(named.index(piece) for at in axes for piece in groups[at]),
            target,
            tuple(n for n, (axis, _) in enumerate(named) if axis in self.flip),
        )

    def __call__(self, array: Array) -> Array:
        """Rearrange ``array`` of shape ``source`` into shape ``target``.

        NumPy arrays stay NumPy (views where the order is kept); everything else
        goes through ``jax.numpy``, so tracers work. Where the order is kept, a
        concrete ``jax.Array`` on one CPU device shares its memory with the result.

        Raises:
          ValueError: the array's shape is not ``source``, or JAX cannot move its
            dtype.
        """
        if not hasattr(array, "shape"):
            raise ValueError(
                f"Expected an array, got {type(array).__name__}. Pass jnp.asarray(...)."
            )
        if tuple(array.shape) != self.source:
            raise ValueError(
                f"Expected shape {self.source}, got {tuple(array.shape)}. Pass the "
                "array that the rearrangement is for."
            )
        if self.source == self.target and self.is_reshape:
            return array
        if self.is_reshape:
            return _reshape(array, self.target)
        xp = np if isinstance(array, np.ndarray) else jnp
        if xp is jnp:
            check_bits(array.dtype)
        split = _reshape(array, self.split)
        if self.flip:
            split = xp.flip(split, self.flip)
        return _reshape(xp.transpose(split, self.perm), self.target)


def _flatten_order(order: str | None, rank: int) -> tuple[int, ...]:
    """Axes of (*window, channels) in the order in which the flatten took them."""
    if order is None:
        return tuple(range(rank + 1))
    letters = channel_last(rank)
    if sorted(order) != sorted(letters):
        raise ValueError(
            f"order: expected each of {', '.join(letters)} once, slowest axis first, "
            f"got {order!r}. Pass {letters!r} or {'C' + letters[:-1]!r}."
        )
    return tuple(letters.index(letter) for letter in order)


def _reshape(array: Any, shape: tuple[int, ...]) -> Any:
    """``array.reshape(shape)``, without a copy where none is needed."""
    alias = _reshaped_without_copy(array, shape)
    return reshape(array, shape) if alias is None else alias


def _reshaped_without_copy(array: Any, shape: tuple[int, ...]) -> Any:
    """Reshape a ``jax.Array`` on one CPU without a copy; ``None`` for others.

    ``array.reshape`` compiles a program per shape and copies. Neither is needed on
    the host: NumPy sees the buffer, and ``jax.device_put`` may alias it. The runtime
    knows that the buffer is shared, so deleting or donating either array leaves the
    other whole. Whatever would make the result differ from ``array.reshape`` in more
    than its memory is left to that.
    """
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return None
    sharding = array.sharding
    if not isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return None
    (device,) = sharding.device_set
    aval = jax.typeof(array)
    if (
        device.platform != "cpu"
        or jnp.issubdtype(array.dtype, jax.dtypes.extended)
        or aval.weak_type
        or array.size == 0
    ):
        return None
    # An uncommitted array may follow others to another device; it has to stay so.
    where = sharding if array.committed else None
    try:
        alias = jax.device_put(np.asarray(array).reshape(shape), where, may_alias=True)
    except jax.errors.JaxRuntimeError:
        # A transfer guard may forbid even this placement, which moves nothing.
        return None
    same = (
        not isinstance(alias, Tracer)
        and alias.dtype == array.dtype
        and alias.sharding == sharding
        and alias.committed == array.committed
    )
    return alias if same else None
