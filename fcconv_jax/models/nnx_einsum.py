"""An ``nnx.Einsum`` in conv form: its equation stays, its product is a convolution."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from .. import nnx_layers
from ..plan import LayerPlan, Plan, PlanError
from .function import run_rewritten


class Einsum(nnx.Einsum):
    """An ``nnx.Einsum`` whose kernel is that of a convolution."""

    _layer: LayerPlan
    _nodes: Any

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer; arguments as those of ``nnx.Einsum``.

        Raises:
          PlanError: ``out_sharding`` is given, which the product in conv form lacks.
        """
        if out_sharding is not None:
            raise PlanError(
                "an Einsum in conv form takes no out_sharding: leave it out with a "
                "rule, or constrain the output after the call"
            )
        # A stack's axes are taken off before a layer of it is called.
        plan = Plan("conv", (("", dataclasses.replace(self._layer, stack_axes=())),))
        inner = (self.kernel.get_value(), inputs, einsum_str)
        return run_rewritten(nnx_layers.einsum_function(self), plan, inner, {})


def turn(module: Any, layer: LayerPlan) -> None:
    """Makes an ``nnx.Einsum`` whose kernel has moved one in conv form, or back."""
    attributes = vars(module)
    if isinstance(module, Einsum):
        nodes = attributes.pop("_nodes")
        del attributes["_layer"]
        object.__setattr__(module, "__class__", nnx.Einsum)
        attributes["_pytree__nodes"] = nodes
        return
    nodes = module._pytree__nodes
    object.__setattr__(module, "__class__", Einsum)
    module._layer, module._nodes = layer, nodes
