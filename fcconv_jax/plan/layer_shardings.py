"""Shardings of layers in the conv form, on a mesh with explicit axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ..geometry.meshes import parts, typed_sharding
from ..messages.errors import PlanError
from .layer import LayerPlan

Array = jax.Array


def gathered(
    layer: LayerPlan, kernel: Array, x: Array, y: NamedSharding | None, ndim: int
) -> Array:
    """Gather a kernel along mesh axes that shard neither input nor output.

    A dot leaves that to XLA, which gathers a fully sharded kernel once. For a
    convolution and its gradient it would do so twice.

    Args:
      layer: the layer's plan.
      kernel: the conv kernel, as the plan stores it.
      x: the dense form's input, features last.
      y: the sharding of the dense form's output, features last.
      ndim: how many axes that has.
    """
    mine, theirs = typed_sharding(kernel), typed_sharding(x)
    if mine is None or theirs is None or y is None:
        return kernel
    summed, made = (_names(parts(s, n)[-1]) for s, n in ((theirs, x.ndim), (y, ndim)))
    kept = [
        part if set(wanted).issuperset(_names(part)) else None
        for part, wanted in zip(
            parts(mine, kernel.ndim),
            [made, *[summed] * (kernel.ndim - 1)]
            if layer.kernel_layout != "HWIO"
            else [*[summed] * (kernel.ndim - 1), made],
        )
    ]
    if kept == parts(mine, kernel.ndim):
        return kernel
    return jax.sharding.reshard(kernel, NamedSharding(mine.mesh, PartitionSpec(*kept)))


def _names(part: Any) -> tuple[Any, ...]:
    """Return the mesh axes that one axis is sharded over."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


def dense_sharding(
    layer: LayerPlan, dense: Callable[..., Array], x: Array, kernel: Array
) -> NamedSharding | None:
    """Return the sharding that JAX infers for the dense form's output, from the types.

    A convolution whose channels are sharded has none until it is told. Where the
    dense form would be refused, so is this.

    Args:
      layer: the layer's plan.
      dense: its dense form, of input, kernel and bias.
      x: the input.
      kernel: the conv kernel, as the plan stores it.
    """
    found = [typed_sharding(operand) for operand in (x, kernel)]
    known = [s for s in found if s is not None and any(s.spec)]
    if not known or found[1] is None:
        return None
    *inner, out = layer.channels_last(parts(found[1], kernel.ndim))
    summed = [name for part in inner for name in _names(part)]
    features = layer.channels_last(kernel.shape)[-1]
    shape = (kernel.size // features, features)
    spec = PartitionSpec(tuple(summed) or None, out)
    if layer.groups > 1:
        raise PlanError(
            f"a grouped layer on {jax.typeof(x)} with a kernel {jax.typeof(kernel)}: "
            "XLA partitions grouped convolutions wrongly. Skip the layer with a rule."
        )
    matrix = jax.ShapeDtypeStruct(
        shape, kernel.dtype, sharding=NamedSharding(known[0].mesh, spec)
    )
    return jax.eval_shape(dense, x, matrix, None).sharding
