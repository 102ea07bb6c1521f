"""Equinox models, as they are: a Module is called on one example.

Batches go through ``eqx.filter_vmap(model)``, which is a Module, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .held import BoundHeld


@dataclasses.dataclass(frozen=True, eq=False)
class BoundEquinox(BoundHeld):
    """An ``equinox.Module``; params are a Module with the same arrays."""

    library = "equinox"
    first_spatial_axis = 2  # behind the batch and the channels

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """Modules, wrappers such as ``eqx.filter_vmap(model)`` among them."""
        return (eqx.Module,)

    @classmethod
    def split(cls, model: object) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Floats are params, other arrays state, the rest stays in the function."""
        arrays, static = eqx.partition(model, eqx.is_array)
        params, state = eqx.partition(arrays, eqx.is_inexact_array)
        call = functools.partial(_call, static)  # pickles, as a closure doesn't
        call.__name__ = type(model).__name__  # pyright: ignore[reportAttributeAccessIssue]
        return call, {"params": params, "state": state}

    @classmethod
    def split_params(cls, model: object, params: PyTree) -> dict[str, Any]:
        """Return the floats of another Module, such as one that was trained."""
        del model
        return {"params": eqx.filter(params, eqx.is_inexact_array)}

    @classmethod
    def levels(cls, path: str) -> tuple[str, ...]:
        """Leave out the field in which ``eqx.filter_vmap(model)`` keeps the model."""
        return super().levels(path.removeprefix("_fun/"))


def _call(
    static: PyTree, params: PyTree, state: PyTree, *args: PyTree, **kwargs: PyTree
) -> Any:
    return eqx.combine(params, state, static)(*args, **kwargs)


FRONTEND = BoundEquinox
