"""A model of any kind on fixed inputs, as functions of its variables."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..backends.compilation import Program
from ..matmuls.trace import is_function
from ..params.trees import leaf_path
from ..params.variables import is_nnx_module
from ..plan import Plan
from .function.program import FunctionProgram, function_variables
from .linen.program import LinenProgram


@dataclasses.dataclass(frozen=True)
class BothForms:
    """A model and its converted form, on the same inputs."""

    plan: Plan
    original: Any
    changed: Any
    variables: Mapping[str, Any]
    other: Mapping[str, Any]

    def by_form(self) -> dict[str, Program]:
        """What is compiled, under 'dense' and 'conv'."""
        forms = ("dense", "conv") if self.plan.to == "conv" else ("conv", "dense")
        original = compilable(self.original, self.variables)
        changed = compilable(self.changed, self.other)
        return dict(zip(forms, (original, changed)))

    def on(self, device: Any) -> BothForms:
        """The same with all arrays on one device."""
        moved = [copy.copy(program) for program in (self.original, self.changed)]
        for program in moved:
            program.arrays = jax.device_put(program.arrays, device)
        trees = jax.device_put((self.variables, self.other), device)
        return BothForms(self.plan, *moved, *trees)


def program_of(model: Any, plan: Plan, inputs: Any, kwargs: Mapping[str, Any]) -> Any:
    """A model of any kind on fixed inputs.

    Args:
      model: a linen or NNX Module, a converted one, or a function.
      plan: names the layers whose outputs are wanted.
      inputs: what it is called with.
      kwargs: its keyword arguments.

    Returns:
      What has ``.call(variables)`` and ``.run(variables)``, see
      :class:`.linen_program.LinenProgram`.
    """
    if is_nnx_module(model):
        from .nnx.program import NnxProgram

        return NnxProgram(model, inputs, kwargs)
    if is_function(model):
        return FunctionProgram(model, inputs, kwargs)
    return LinenProgram(model, plan, inputs, kwargs)


def variables_of(model: Any, params: Any) -> Mapping[str, Any]:
    """The params or variables of a model, as variables with ``params`` in them."""
    if is_nnx_module(model):
        from .nnx.program import nnx_variables

        return nnx_variables(model, params)
    if is_function(model):
        return function_variables(params)
    is_variables = isinstance(params, Mapping) and "params" in params
    return params if is_variables else {"params": params}


def layer_dtypes(params: Any, plan: Plan) -> dict[str, Any]:
    """The dtype of each layer of a plan: that of its kernel.

    Args:
      params: params or variables, arrays or abstract ones.
      plan: of the model.

    Example:
      >>> from fcconv_jax import make_plan
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
      >>> layer_dtypes(params, make_plan(model, x))
      {'': dtype('float32')}
    """
    is_variables = isinstance(params, Mapping) and "params" in params
    tree = nn.meta.unbox(params["params"] if is_variables else params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    dtypes = {leaf_path(path): jnp.result_type(leaf) for path, leaf in leaves}
    found = {}
    for path, layer in plan.items():
        # A tied kernel is stored under another path, in the dtype of its model.
        leaf = "/".join(part for part in (path, layer.leaves[0][0]) if part)
        found[path] = dtypes.get(leaf, next(iter(dtypes.values())))
    return found


def compilable(program: Any, variables: Any) -> Program:
    """A model's call as it is compiled: with its inputs as arguments, not constants."""
    return Program(program.call, (variables, program.arrays))
