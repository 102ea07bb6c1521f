"""Names of modules in a trace: their inputs and outputs, and what layers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

_INPUT = "fcconv_jax.input:"
_OUTPUT = "fcconv_jax.output:"
_LAYER = "fcconv_jax.layer:"


def name_parameter(path: str, array: Any) -> PyTree:
    """Name a parameter in the trace as read by the own call of the layer at a path.

    Other readers get it without the name, and layers that share it under their own.
    """
    return checkpoint_name(array, f"{_LAYER}{path}")


def layer_of(name: str) -> str | None:
    """Return the path of the layer that gave a name, or None for another name."""
    return name.removeprefix(_LAYER) if name.startswith(_LAYER) else None


def name_input(path: str, x: Any) -> None:
    """Name a layer's input in the trace; the name is found where the trace is run."""
    _name(f"{_INPUT}{path}", x)


def name_output(path: str, out: PyTree) -> PyTree:
    """Return the output of a module, each of its arrays under the module's name."""
    return jax.tree.map(lambda leaf: _name(f"{_OUTPUT}{path}", leaf), out)


def _name(name: str, x: Any) -> Any:
    return checkpoint_name(x, name) if isinstance(x, jax.Array) else x


def named_inputs(named: Mapping[str, Any]) -> dict[str, Any]:
    """By path, what :func:`name_input` named, of all names in a trace."""
    return _with_prefix(named, _INPUT)


def named_outputs(named: Mapping[str, Any]) -> dict[str, Any]:
    """By path, what :func:`name_output` named, of all names in a trace."""
    return _with_prefix(named, _OUTPUT)


def _with_prefix(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in named.items()
        if name.startswith(prefix)
    }
