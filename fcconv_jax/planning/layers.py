"""Reads matmuls as calls of a library's layer, whose module only names the kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from ..plan import Form
from .as_layer import (
    conv_arguments,
    dense_axes,
    form_of,
    input_shape,
    kernel_axes_of_conv,
    kernel_axes_of_dot,
)
from .decide import LayerCall
from .factors import Axis, axes_of, joined, size, without
from .layer_axes import DenseAxes
from .matmul import Matmul


@dataclasses.dataclass(frozen=True)
class LibraryLayer:
    """A linear layer of a library, as its module describes it.

    Args:
      kind: the class, as a plan shows it: ``"Dense"``, ``"LinearGeneral"``, ``"Conv"``.
      kernel: path of the kernel among the params.
      shape: of the kernel, as it is stored.
      bias: shape of the bias, as the layer sees it; None without.
      bias_path: path of the bias, where it matters who reads it.
      batch: how many leading axes of the kernel the activation has, too.
      features: how many of its last axes are new in the output.
      stack: axes that transforms add to the stored params; see
        :class:`fcconv_jax.plan.layer.LayerPlan`.
      obstacle: why the layer does not convert, if so.
    """

    kind: str
    kernel: str
    shape: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    bias_path: str = ""
    batch: int = 0
    features: int = 1
    stack: tuple[int, ...] = ()
    obstacle: str | None = None

    @property
    def form(self) -> Form:
        """The form that the layer is in."""
        return "conv" if self.kind == "Conv" else "dense"

    @property
    def leaves(self) -> dict[str, str]:
        """By path, the layer's names of its parameters."""
        return {self.kernel: "kernel"} | (
            {self.bias_path: "bias"} if self.bias_path else {}
        )

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of the kernel, as the layer sees it."""
        return tuple(self.shape[axis] for axis in self.axes()[1])

    def axes(self) -> tuple[list[int], list[int]]:
        """Return the stored kernel's axes: those of the stack, and the layer's own."""
        own = list(range(len(self.shape)))
        # The outermost transform added its axis last.
        return [own.pop(axis) for axis in reversed(self.stack)], own


def layer_call(layer: LibraryLayer, matmul: Matmul, number: int) -> LayerCall | None:
    """Return one matmul, as a call of the layer that its kernel is of.

    A stack under ``vmap`` is one matmul of all its steps; the call is that of one.

    Returns:
      None where the kernel is not read as the layer reads it, such as its transpose in
      a tied head.
    """
    if form_of(matmul) != layer.form or (layer.form == "conv" and matmul.side != 1):
        return None
    weight, shape = matmul.weight, layer.own_shape
    obstacle = matmul.obstacle and f"its kernel is {matmul.obstacle}"
    stack, own = layer.axes()

    def parts(axes: Iterable[int]) -> list[Axis]:
        return [without(weight.axes[axis], weight.shape, stack) for axis in axes]

    entries = axes_of(weight.shape)
    stored = joined(factor for axis in own for factor in entries[axis])
    if layer.form == "conv":
        axes = parts(kernel_axes_of_conv(matmul))
        if tuple(map(size, axes)) != shape or _flat(axes) != stored:
            return None
        groups = _groups(matmul, axes[-1])
        geometry = {**conv_arguments(matmul), "groups": groups}
        x = (*input_shape(matmul)[:-1], groups * shape[-2])
        return LayerCall(
            layer.kind, number, x, shape, layer.bias, None, geometry, obstacle
        )
    batch, contracted, outs = map(parts, kernel_axes_of_dot(matmul))
    mapped = len(batch) - layer.batch  # vmap puts its axes first
    split = len(shape) - layer.features
    if (
        mapped < 0
        or any(batch[:mapped])
        or _flat([*batch, *contracted, *outs]) != stored
        # By products: the matmul may see several of the layer's axes as one.
        or math.prod(map(size, batch)) != math.prod(shape[: layer.batch])
        or math.prod(map(size, outs)) != math.prod(shape[split:])
    ):
        return None
    axes = dense_axes(matmul)
    seen = [a for a in range(len(input_shape(matmul))) if a not in axes.batch[:mapped]]
    return LayerCall(
        kind=layer.kind,
        number=number,
        shape=tuple(input_shape(matmul)[axis] for axis in seen),
        kernel=shape,
        bias=layer.bias,
        axes=DenseAxes(
            batch=tuple(map(seen.index, axes.batch[mapped:])),
            lead=tuple(map(seen.index, axes.lead)),
            contracted=tuple(map(seen.index, axes.contracted)),
            features=shape[split:],
        ),
        geometry=None,
        obstacle=obstacle,
        mapped=mapped,
    )


def _groups(matmul: Matmul, out: Axis) -> int:
    """The feature groups of one step of a convolution, which vmap may have stacked.

    Where vmap maps the input, too, it makes groups of the steps, and the step is the
    slowest part of the output channels.
    """
    groups = matmul.eqn.params["feature_group_count"]
    every = matmul.weight.axes[kernel_axes_of_conv(matmul)[-1]]
    steps = size(every) // size(out)
    slowest = without(every, matmul.weight.shape, ())[:1] != out[:1]
    return groups // steps if slowest and groups % steps == 0 else groups


def _flat(axes: Iterable[Axis]) -> Axis:
    return joined(factor for axis in axes for factor in axis)
