"""An NNX model on fixed inputs, as functions of its parameters alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from ...tracing import arguments
from ...tracing.marks import name_input, name_output
from . import layers as nnx_layers

_PATH = "_fcconv_jax_path"


def nnx_variables(model: nnx.Module, params: Any) -> dict[str, Any]:
    """The parameters as a pure dict, in the ``params`` of a variables dict.

    Args:
      model: gives them where ``params`` is None.
      params: an ``nnx.State`` (of which the ``nnx.Param`` count), or a pure dict.
    """
    state = nnx.state(model, nnx.Param) if params is None else params
    if isinstance(state, nnx.State):
        state = nnx.to_pure_dict(nnx.filter_state(state, nnx.Param))
    return {"params": state}


class NnxProgram:
    """Calls an NNX model with given parameters; all other state is the model's own."""

    def __init__(self, model: nnx.Module, inputs: Any, kwargs: Mapping[str, Any]):
        self.graphdef, self.params, self.rest = nnx.split(
            model, nnx.Param, ..., graph=True
        )
        self.arrays, self.static = arguments.split((inputs, dict(kwargs)))

    def call(self, variables: Mapping[str, Any], arrays: Any = None) -> Any:
        """What the model returns, and its batch statistics if it has any.

        Args:
          variables: the model's.
          arrays: stand in for those of the inputs.
        """
        return self._call(variables, arrays, lambda model: None)

    def named(
        self, variables: Mapping[str, Any], arrays: Any, wanted: Callable[[str], bool]
    ) -> Any:
        """The same, with modules' inputs and outputs named in the trace.

        Args:
          variables: the model's.
          arrays: stand in for those of the inputs.
          wanted: whether the module at a path is to be named.
        """
        return self._call(variables, arrays, lambda model: _name_modules(model, wanted))

    def _call(self, variables: Any, arrays: Any, prepare: Callable[[Any], None]) -> Any:
        args, kwargs = self.static.merge(self.arrays if arrays is None else arrays)
        state = jax.tree.map(lambda leaf: leaf, self.params)
        nnx.replace_by_pure_dict(state, variables["params"])
        model: Any = nnx.merge(self.graphdef, state, self.rest, copy=True)
        prepare(model)
        out = model(*args, **kwargs)
        updated = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return (out, updated) if updated else out


def _name_modules(model: nnx.Module, wanted: Callable[[str], bool]) -> None:
    """Makes modules name what goes in and comes out, in a model of one call's own."""
    # All modules are collected first: renamed classes would change the walk.
    for path, module in list(nnx_layers.modules(model)):
        if wanted(path) and callable(module):
            setattr(module, _PATH, path)
            object.__setattr__(module, "__class__", _naming(type(module)))


@functools.cache
def _naming(cls: type) -> type:
    """A subclass whose call names its input and its output."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = getattr(self, _PATH)
        rows = _canonical_input(self, cls, args)
        if rows is not None:
            name_input(path, rows)
        return name_output(path, cls.__call__(self, *args, **kwargs))

    names = {"__call__": call, "__module__": cls.__module__}
    return type(cls)(cls.__name__, (cls,), names)


def _canonical_input(layer: Any, cls: type, args: tuple[Any, ...]) -> Any:
    """The input of a linear layer as both of its forms take it."""
    kind = nnx_layers.KINDS_BY_CLASS.get(cls)
    if kind is None or not args:
        return None
    if kind == "Conv":
        return args[0]
    return nnx_layers.dense_axes(layer, args[0].ndim).canonical(args[0])
