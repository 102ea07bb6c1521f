"""Flax NNX's linear layers: which modules they are, and how their axes lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from ...planning.layer_axes import DenseAxes
from ...versions import changes_when_read, holds_reference, iter_graph, value_of

KINDS: dict[str, type[nnx.Module]] = {
    "Linear": nnx.Linear,
    "LinearGeneral": nnx.LinearGeneral,
    "Conv": nnx.Conv,
}
KINDS_BY_CLASS = {cls: kind for kind, cls in KINDS.items()}


def layer_kind(module: Any) -> str | None:
    """Return the class of linear layer that a module is, subclasses excluded."""
    return KINDS_BY_CLASS.get(type(module))


def path_text(path: tuple[Any, ...]) -> str:
    """Return a path in the graph as text: ``"blocks/0/fc1"``."""
    return "/".join(map(str, path))


def modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield every module below and including the model, once, with its first path."""
    for path, node in iter_graph(model):
        if isinstance(node, nnx.Module):
            yield path_text(path), node


def variables(model: object) -> dict[str, nnx.Variable]:
    """Return every Variable of a model once, by its first path, as its state has it."""
    return {
        path_text(path): node
        for path, node in iter_graph(model)
        if isinstance(node, nnx.Variable)
    }


def is_converted(module: object) -> bool:
    """Whether a module is a layer that has been swapped for one of the other form."""
    return hasattr(module, "_origin")


def dense_axes(layer: Any, ndim: int) -> DenseAxes:
    """How an ``nnx.Linear`` or ``nnx.LinearGeneral`` reads an input of ``ndim`` axes.

    Example:
      >>> layer = nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=nnx.Rngs(0))
      >>> dense_axes(layer, 4).contracted
      (2, 3)
    """
    axis = getattr(layer, "axis", (-1,))
    batch = getattr(layer, "batch_axis", {})
    features = layer.out_features
    contracted = tuple(sorted(a % ndim for a in axis))
    batched = tuple(sorted(b % ndim for b in batch))
    lead = tuple(a for a in range(ndim) if a not in (*batched, *contracted))
    features = (features,) if isinstance(features, int) else tuple(features)
    return DenseAxes(batched, lead, contracted, features)


def kernel_split(layer: Any) -> tuple[int, int, int]:
    """Return how the axes of a layer's kernel divide.

    Returns:
      How many the activation's batch has, too, how many are features, and how many
      there are in all.
    """
    if isinstance(layer, nnx.Conv):
        return 0, 1, len(layer.kernel_size) + 2
    if isinstance(layer, nnx.LinearGeneral):
        batch, features = len(layer.batch_axis), len(layer.out_features)
        return batch, features, batch + len(layer.axis) + features
    return 0, 1, 2


def obstacle(layer: Any) -> str | None:
    """Return why a layer computes something else than it says, if so."""
    name = type(layer).__name__
    for field, default in (
        ("dot_general", lax.dot_general),
        ("dot_general_cls", None),
        ("conv_general_dilated", lax.conv_general_dilated),
    ):
        if getattr(layer, field, None) not in (None, default):
            return f"{name} computes its matmul with a custom {field}"
    if layer.promote_dtype is not promote_dtype:
        return f"{name} has a custom promote_dtype, which may read the shapes"
    if getattr(layer, "mask", None) is not None:
        return f"{name} has a mask on its kernel"
    padding = getattr(layer, "padding", "VALID")
    if padding in ("CAUSAL", "CIRCULAR", "REFLECT") and max(layer.kernel_size) > 1:
        return f"{name} pads its input by {padding} before its convolution"
    for variable in (layer.kernel, layer.bias):
        if variable is None:
            continue
        if not isinstance(variable, nnx.Variable):
            return f"{name} holds its parameters as bare arrays, not as nnx.Param"
        if holds_reference(variable):
            return "its parameters are mutable references, whose shape is fixed"
        hooks = variable.get_metadata()
        if (
            changes_when_read(variable)
            or hooks.get("on_get_value")
            or hooks.get("on_set_value")
        ):
            return f"its {type(variable).__name__} changes its value when it is read"
    return None


def bias_of(layer: Any) -> Any:
    """Return the bias's value, or None."""
    return None if layer.bias is None else value_of(layer.bias)
