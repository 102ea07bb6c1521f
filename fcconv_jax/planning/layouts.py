"""Chooses how the convolutions of a plan are run: what changes speed, not numbers.

The defaults are measured (``benchmarks/layouts.py``): run times on CPU, cycles that XLA
estimates for each TPU generation, and for CUDA the weights that it would copy at every
call. By default they are those of the current backend, but that kernels are
stored as a plain ``nn.Conv`` loads them: the params are then the same on every machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from ..backends.name import Backend, jax_platform
from ..messages.errors import BackendError, PlanError
from ..plan import KernelLayout, LayerPlan, Layout, Plan
from ..plan.rules import Rule, first_match

# Rows of a tile of TPU memory: an axis of a multiple of them folds without a copy.
_TPU_ROWS = 8


def lay_out(
    plan: Plan,
    rules: Sequence[Rule],
    backend: str | None,
    arrays: PyTree = (),
    stored: KernelLayout = "HWIO",
) -> Plan:
    """Return the plan with the layout of each layer: from its rule, else the backend's.

    Args:
      plan: where each layer has the default layout.
      rules: the user's; the first that matches a path counts.
      backend: such as ``"cpu"``, ``"cuda:h100"`` or ``"tpu:v5e"``; ``"any"`` for the
        layout that runs everywhere; None for the current backend.
      arrays: the arrays that were planned with; they are on the current backend.
      stored: how the model's library stores kernels.

    Raises:
      PlanError: the backend is unknown.
    """
    try:
        if backend is None:
            platform = _at_hand(arrays)
        else:
            platform = None if backend == "any" else Backend.parse(backend).platform
    except BackendError as error:
        raise PlanError(
            f"backend={backend!r}: {error} Pass backend='any' for all backends."
        ) from None
    layers = []
    for path, layer in plan.items():
        if layer.to == "dense":
            # A dense layer has one layout only.
            layers.append((path, _with_layout(layer, layer.layout, stored)))
            continue
        rule = first_match(rules, path, layer)
        layout, kernel_layout = _default(layer, platform)
        if backend is None or stored != "HWIO":
            kernel_layout = "HWIO" if layer.transposed else stored
        layers.append(
            (
                path,
                _with_layout(
                    layer,
                    rule.layout or layout,
                    rule.kernel_layout or kernel_layout,
                ),
            )
        )
    return dataclasses.replace(plan, layers=tuple(layers))


def _at_hand(arrays: PyTree) -> str:
    """Return the platform that the arrays lie on, or else JAX's default one."""
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            return jax_platform(next(iter(leaf.sharding.device_set)))
    return jax_platform(jax.devices()[0])


def _default(layer: LayerPlan, platform: str | None) -> tuple[Layout, KernelLayout]:
    """Return the layout that a backend runs best."""
    window = math.prod(layer.window)
    flat: Layout = "fold" if layer.groups > 1 and window > 1 else "flat"
    if platform == "cpu":
        return flat, "HWIO"
    if platform == "cuda":
        # With HWIO weights cuDNN's convolution copies them at each call (67 MB for a
        # large 1x1).
        return flat, "OHWI"
    if platform == "tpu" and window == 1:
        return ("keep" if _folding_copies(layer) else "fold"), "HWIO"
    return "fold", "HWIO"


def _folding_copies(layer: LayerPlan) -> bool:
    """Return whether a TPU copies a pointwise layer's input to fold its leading axes.

    Tiles of its memory hold 8 rows: an axis that does not fill them is padded, and
    what is padded has to be moved together. Then the dense form makes that copy, and
    the kept form does not. Where nothing is padded, folding is free, and it is the
    kept form that XLA adds a copy to.
    """
    *outer, rows = layer.dense_input_shape()[: -2 if layer.groups > 1 else -1] or (1,)
    return math.prod(outer) > 1 and rows % _TPU_ROWS > 0


def _with_layout(
    layer: LayerPlan, layout: Layout, kernel_layout: KernelLayout
) -> LayerPlan:
    """Return a layer of the default layout, in another."""
    laid = dataclasses.replace(layer, layout=layout, kernel_layout=kernel_layout)
    (name, kernel), *others = layer.leaves
    return dataclasses.replace(laid, leaves=((name, laid.lay_out(kernel)), *others))
