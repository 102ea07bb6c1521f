"""How a matmul in a trace is a layer: its axes, its kernel, and its other form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax import lax

from ..geometry.kernels import Rearrangement, channel_last, kernel_rearrangement
from ..geometry.meshes import permuted, reshape
from ..plan import Form, LayerPlan
from ..plan.layer_forms import FormFn, pair_of_forms
from ..plan.phases import check_no_mesh, in_phases
from .factors import rearrangement, regroup, reversed_axis, stacked_axes
from .layer_axes import DenseAxes
from .matmul import Matmul

Array = jax.Array
T = TypeVar("T")


def form_of(matmul: Matmul) -> Form:
    """Return the form that a matmul is in.

    Returns:
      ``"dense"`` for a ``dot_general``, ``"conv"`` for a convolution.
    """
    return "dense" if matmul.eqn.primitive.name == "dot_general" else "conv"


def input_shape(matmul: Matmul) -> tuple[int, ...]:
    """Return the shape of the activation; of a convolution's with the channels last."""
    shape = matmul.eqn.invars[1 - matmul.side].aval.shape
    if form_of(matmul) == "conv":
        return tuple(shape[axis] for axis in _channel_last(_specs(matmul)[0]))
    return tuple(shape)


def kernel_shape(matmul: Matmul) -> tuple[int, ...]:
    """Return the shape of the kernel as the layer's form has it.

    Returns:
      ``(*batch, in, out)`` of a dense layer, ``(*window, in/groups, out)`` of a conv.
    """
    shape = matmul.eqn.invars[matmul.side].aval.shape
    if form_of(matmul) == "conv":
        return tuple(shape[axis] for axis in kernel_axes_of_conv(matmul))
    batch, contracted, features = (
        [shape[axis] for axis in axes] for axes in kernel_axes_of_dot(matmul)
    )
    return (*batch, math.prod(contracted), math.prod(features))


def groups_of(matmul: Matmul) -> int:
    """Return how many matmuls stand side by side in one."""
    if form_of(matmul) == "conv":
        return matmul.eqn.params["feature_group_count"]
    _, batch = matmul.eqn.params["dimension_numbers"]
    shape = matmul.eqn.invars[matmul.side].aval.shape
    return math.prod(shape[axis] for axis in batch[matmul.side])


def dense_axes(matmul: Matmul) -> DenseAxes:
    """Return how a ``dot_general`` reads its activation."""
    other = 1 - matmul.side
    contract, batch = matmul.eqn.params["dimension_numbers"]
    x, kernel = (matmul.eqn.invars[i].aval for i in (other, matmul.side))
    taken = (*batch[other], *contract[other])
    return DenseAxes(
        batch=tuple(batch[other]),
        lead=tuple(axis for axis in range(len(x.shape)) if axis not in taken),
        contracted=tuple(sorted(contract[other])),
        features=tuple(kernel.shape[axis] for axis in kernel_axes_of_dot(matmul)[2]),
    )


def conv_arguments(matmul: Matmul) -> Mapping[str, Any]:
    """Return the arguments of :func:`fcconv_jax.classify` for a convolution."""
    p = matmul.eqn.params
    return {
        "input_shape": input_shape(matmul)[1:-1],
        "kernel_size": kernel_shape(matmul)[:-2],
        "strides": p["window_strides"],
        "padding": p["padding"],
        "input_dilation": p["lhs_dilation"],
        "kernel_dilation": p["rhs_dilation"],
        "groups": p["feature_group_count"],
    }


def channels_first(matmul: Matmul) -> bool:
    """Return whether a convolution reads images with their channels first."""
    images, _, _ = _specs(matmul)
    return images[1] < min(images[2:], default=0)


def stack_axes(matmul: Matmul) -> tuple[int, ...] | None:
    """Return the axes of the parameter along which the matmul sees one step at a time.

    Returns:
      None where that is a part of an axis, so that it has no number.
    """
    axes = stacked_axes(matmul.weight.shape, matmul.weight.stack)
    return None if axes is None else tuple(axes)


def leaf_rearrangement(matmul: Matmul, layer: LayerPlan) -> Rearrangement | None:
    """Return how the parameter itself moves into the other form's kernel.

    Returns:
      The rearrangement of the parameter without its stack axes, whatever transposes
      and reshapes lie between it and the matmul; None where none exists.
    """
    weight = matmul.weight
    dropped = stacked_axes(weight.shape, weight.stack)
    if dropped is None:
        return None
    source = [n for i, n in enumerate(weight.shape) if i not in dropped]
    if layer.base == "phases":
        return Rearrangement.reshape(source, source)
    letters, taps, groups = (
        channel_last(len(layer.window)),
        math.prod(layer.window),
        layer.groups,
    )
    order = letters if taps == 1 else layer.order  # flattened alike in every order
    lead = (groups,) if groups > 1 else ()
    *_, rows, features = kernel_shape(matmul)
    if form_of(matmul) == "conv":
        *window, inner, out = (weight.axes[a] for a in kernel_axes_of_conv(matmul))
        outs = regroup(out, (groups, features // groups))
        if outs is None:
            return None
        features //= groups
        if layer.transposed:  # it applies its kernel from the other end
            named = dict(zip(letters, (*map(reversed_axis, window), outs[1])))
            factors = _flat([outs[0], inner, *(named[axis] for axis in order)])
            return rearrangement(source, factors, (*lead, rows, taps * features))
        named = dict(zip(letters, (*window, inner)))
        factors = _flat([outs[0], *(named[axis] for axis in order), outs[1]])
        return rearrangement(source, factors, (*lead, taps * rows, features))
    batch, contracted, outs = (
        _flat(weight.axes[axis] for axis in axes) for axes in kernel_axes_of_dot(matmul)
    )
    flat, flattened = (features, outs) if layer.transposed else (rows, contracted)
    sizes = dict(zip(letters, (*layer.window, flat // taps)))
    split = None
    if flat % taps == 0:
        split = regroup(flattened, [sizes[axis] for axis in order])
    if split is None:
        return None
    named = dict(zip(order, split))
    window = [named[axis] for axis in letters[:-1]]
    if layer.transposed:
        factors = [*_flat(map(reversed_axis, window)), *contracted, *batch, *named["C"]]
        return rearrangement(
            source, factors, (*layer.window, rows, groups * sizes["C"])
        )
    factors = [*_flat(window), *named["C"], *batch, *outs]
    return rearrangement(
        source, factors, (*layer.window, sizes["C"], groups * features)
    )


def run_other_form(matmul: Matmul, layer: LayerPlan, operands: Sequence[Any]) -> Array:
    """Run a matmul in its other form, on the same operands.

    The kernel goes from the operand's shape to the other form's; where the operand is
    a planned parameter on its way back, XLA folds the two.
    """
    p = matmul.eqn.params
    if layer.base == "phases":
        return _conv_in_phases(matmul, *operands)
    other: Form = "conv" if form_of(matmul) == "dense" else "dense"
    layer = _grouped_as(matmul, layer)
    _, converted = pair_of_forms(
        layer,
        other,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    x, kernel = operands[1 - matmul.side], operands[matmul.side]
    run = _dot_as_conv if other == "conv" else _conv_as_dot
    y = run(matmul, layer, converted, x, kernel)
    return lax.convert_element_type(y, matmul.eqn.outvars[0].aval.dtype)


def _grouped_as(matmul: Matmul, layer: LayerPlan) -> LayerPlan:
    """The layer with the groups of a matmul: a stack under vmap is one of many."""
    groups = groups_of(matmul)
    if groups == layer.groups:
        return layer
    layout = "fold" if math.prod(layer.window) > 1 else layer.layout
    return dataclasses.replace(layer, groups=groups, layout=layout)


def _dot_as_conv(
    matmul: Matmul, layer: LayerPlan, conv: FormFn, x: Array, kernel: Array
) -> Array:
    axes = dense_axes(matmul)
    batch = tuple(x.shape[axis] for axis in axes.batch)
    *_, rows, features = kernel_shape(matmul)
    kernel = kernel.transpose(_flat(kernel_axes_of_dot(matmul)))
    move = _canonical_move(layer, rows, features)
    kernel = reshape(kernel, move.source)
    first, lead, outs = len(batch), len(axes.lead), len(axes.features)
    ndim = first + lead + outs
    sharding = matmul.eqn.params["out_sharding"]
    if matmul.side == 0:  # the kernel's axes come first in the result
        sharding = permuted(
            sharding,
            [*range(first), *range(first + outs, ndim), *range(first, first + outs)],
        )
    sharding = axes.canonical_sharding(sharding, x.shape)
    kernel = layer.lay_out(move)(kernel)
    y = axes.restore(conv(axes.canonical(x), kernel, None, sharding), batch)
    if matmul.side == 0:
        y = y.transpose(
            *range(first), *range(first + lead, ndim), *range(first, first + lead)
        )
    return y


def _canonical_move(layer: LayerPlan, rows: int, columns: int) -> Rearrangement:
    """Return the move from the kernel of the dense form to that of the conv form."""
    return kernel_rearrangement(
        (layer.groups, rows, columns)[layer.groups == 1 :],
        layer.window,
        order=layer.order,
        groups=layer.groups,
        transposed=layer.transposed,
    )


def _conv_as_dot(
    matmul: Matmul, layer: LayerPlan, dense: FormFn, x: Array, kernel: Array
) -> Array:
    lhs, _, out = _specs(matmul)
    *window, rows, features = kernel_shape(matmul)
    taps, features = math.prod(window), features // layer.groups
    sizes = (rows, taps * features) if layer.transposed else (taps * rows, features)
    move = _canonical_move(layer, *sizes)
    kernel = move.inverse()(kernel.transpose(kernel_axes_of_conv(matmul)))
    order = _channel_last(out)
    sharding = permuted(matmul.eqn.params["out_sharding"], order)
    y = dense(x.transpose(_channel_last(lhs)), kernel, None, sharding)
    return y.transpose([order.index(axis) for axis in range(y.ndim)])


def _conv_in_phases(matmul: Matmul, x: Array, kernel: Array) -> Array:
    p = matmul.eqn.params
    check_no_mesh(p["out_sharding"], x, kernel)
    lhs, _, out = _specs(matmul)
    y = in_phases(
        x.transpose(_channel_last(lhs)),
        kernel.transpose(kernel_axes_of_conv(matmul)),
        *(p["lhs_dilation"], p["padding"], p["rhs_dilation"]),
        p["feature_group_count"],
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    order = _channel_last(out)
    # Strides of the windows, which phases ignore, leave one position.
    y = y[tuple(slice(matmul.eqn.outvars[0].aval.shape[axis]) for axis in order)]
    y = y.transpose([order.index(axis) for axis in range(y.ndim)])
    return lax.convert_element_type(y, matmul.eqn.outvars[0].aval.dtype)


def kernel_axes_of_dot(
    matmul: Matmul,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of a dot's weight: shared with the activation, summed over, new."""
    contract, batch = matmul.eqn.params["dimension_numbers"]
    # einsum sums in an order of its own; the activation's is that of a flatten.
    order = sorted(range(len(contract[0])), key=contract[1 - matmul.side].__getitem__)
    contracted = tuple(contract[matmul.side][i] for i in order)
    shared = tuple(batch[matmul.side])
    ndim = len(matmul.eqn.invars[matmul.side].aval.shape)
    features = [a for a in range(ndim) if a not in (*contracted, *shared)]
    return shared, contracted, tuple(features)


def _specs(matmul: Matmul) -> Any:
    return matmul.eqn.params["dimension_numbers"]


def _channel_last(spec: Sequence[int]) -> list[int]:
    """The axes ``(N, *spatial, C)`` of an array that a convolution reads or makes."""
    return [spec[0], *spec[2:], spec[1]]


def kernel_axes_of_conv(matmul: Matmul) -> list[int]:
    """Return the axes ``(*window, in, out)`` of a convolution's kernel."""
    _, spec, _ = _specs(matmul)
    return [*spec[2:], spec[1], spec[0]]


def _flat(axes: Iterable[Iterable[T]]) -> list[T]:
    return [part for axis in axes for part in axis]
