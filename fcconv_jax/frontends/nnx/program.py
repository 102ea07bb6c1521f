"""An NNX model on fixed inputs, as functions of its parameters alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ...tracing import arguments


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
        """The output alone; ``arrays`` stand in for those of the inputs."""
        return self._call(variables, self.arrays if arrays is None else arrays)[0]

    def _call(self, variables: Mapping[str, Any], arrays: Any) -> tuple[Any, Any]:
        args, kwargs = self.static.merge(arrays)
        state = jax.tree.map(lambda leaf: leaf, self.params)
        nnx.replace_by_pure_dict(state, variables["params"])
        model: Any = nnx.merge(self.graphdef, state, self.rest, copy=True)
        out = model(*args, **kwargs)
        return out, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def run(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Output and updated statistics; the layers' own outputs are not captured."""
        out, updated = self._call(variables, self.arrays)
        return {"output": out, "updated": updated, "layers": {}}
