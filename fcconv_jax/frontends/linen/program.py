"""A linen model on fixed inputs, as functions of its variables alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...tracing import arguments
from ...tracing.marks import name_input, name_output
from .interception import intercepting
from .layers import dense_axes, layer_kind, module_path


class LinenProgram:
    """Calls a linen model with given variables on inputs that stay."""

    def __init__(self, model: Any, inputs: Any, kwargs: Mapping[str, Any]):
        self.model = model
        self.arrays, self.static = arguments.split((inputs, dict(kwargs)))

    def call(self, variables: Any, arrays: Any = None) -> Any:
        """What the model returns; ``arrays`` stand in for those of the inputs."""
        args, kwargs = self.static.merge(self.arrays if arrays is None else arrays)
        return self.model.apply(variables, *args, **kwargs)

    def named(self, variables: Any, arrays: Any, wanted: Callable[[str], bool]) -> Any:
        """What the model returns, with modules' inputs and outputs named in the trace.

        Args:
          variables: the model's.
          arrays: stand in for those of the inputs.
          wanted: whether the module at a path is to be named.
        """
        namer = _Namer(wanted)
        with intercepting(namer, key=("fcconv_jax.named", id(namer))):
            return self.call(variables, arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class _Namer:
    """An interceptor that changes nothing but the names in the trace."""

    wanted: Callable[[str], bool]

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return next_fun(*args, **kwargs)
        path = module_path(module)
        if not self.wanted(path):
            return next_fun(*args, **kwargs)
        kind = layer_kind(context)
        if kind is not None and (args or "inputs" in kwargs):
            x = args[0] if args else kwargs["inputs"]
            rows = x if kind == "Conv" else dense_axes(module, x.ndim).canonical(x)
            name_input(path, rows)
        return name_output(path, next_fun(*args, **kwargs))
