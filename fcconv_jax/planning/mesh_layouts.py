"""Chooses, for inputs that lie over a mesh, conv forms that add no collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..geometry.meshes import over_mesh, parts
from ..plan import LayerPlan, Layout, Plan
from ..plan.rules import Rule, first_match

GROUPED = (
    "a grouped layer over a mesh: XLA partitions grouped convolutions wrongly (plain "
    "jax.lax.conv_general_dilated gives other numbers there than on one device)"
)


def for_mesh(
    plan: Plan, arrays: PyTree, activations: PyTree, rules: Sequence[Rule]
) -> Plan:
    """The plan with the layouts that suit the shardings of what it was made from.

    With leading axes sharded beyond the first, folding them into the batch would make
    XLA gather the activation, so they are kept; a window over a sharded kernel would
    make it gather the kernel's gradient, so it runs flat. On one device the plan stays
    as it is. Rules that name a layout win.
    """
    meshed = any(map(over_mesh, jax.tree.leaves(arrays)))
    if not meshed:
        return plan
    keep = any(map(_leading, jax.tree.leaves(activations)))
    layers, left = [], list(plan.left)
    for path, layer in plan.items():
        if layer.to == "dense":
            layers.append((path, layer))
            continue
        if layer.groups > 1:
            left.append((path, GROUPED))
            continue
        rule = first_match(rules, path, layer)
        layout = rule.layout or _layout(layer, keep)
        layers.append((path, dataclasses.replace(layer, layout=layout)))
    return dataclasses.replace(plan, layers=tuple(layers), left=tuple(left))


def _layout(layer: LayerPlan, keep: bool) -> Layout:
    if layer.base == "full_window":
        return "flat"
    return "keep" if keep else layer.layout


def _leading(leaf: Any) -> bool:
    """Whether an input is sharded on an axis between its batch and its features."""
    if not over_mesh(leaf):
        return False
    # Token ids have no axis of features yet.
    end = leaf.ndim - jnp.issubdtype(leaf.dtype, jnp.inexact)
    return any(part is not None for part in parts(leaf.sharding, leaf.ndim)[1:end])
