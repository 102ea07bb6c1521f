"""A linen model on fixed inputs, as functions of its variables alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ...plan import Plan
from ...tracing import arguments
from .layers import module_path


class LinenProgram:
    """Calls a linen model with given variables on inputs that stay."""

    def __init__(self, model: Any, plan: Plan, inputs: Any, kwargs: Mapping[str, Any]):
        self.model, self.plan = model, plan
        self.arrays, self.static = arguments.split((inputs, dict(kwargs)))

    def _apply(self, variables: Any, arrays: Any, **extra: Any) -> Any:
        args, kwargs = self.static.merge(arrays)
        return self.model.apply(variables, *args, **{**kwargs, **extra})

    def run(self, variables: Any) -> dict[str, Any]:
        """Output, updated collections, and the outputs of every planned layer."""
        _, kwargs = self.static.merge(self.arrays)
        mutable = kwargs.get("mutable", False)
        collections = [mutable] if isinstance(mutable, str) else list(mutable or ())
        out, updated = self._apply(
            variables,
            self.arrays,
            mutable=[*collections, "intermediates"],
            capture_intermediates=self._is_planned,
        )
        captured = updated.get("intermediates", {})
        layers = {}
        for path in self.plan:
            node = captured
            for name in path.split("/") if path else ():
                node = node.get(name, {})
            calls = node.get("__call__", ())
            layers[path] = {str(i): y for i, y in enumerate(calls)}
        rest = {name: updated[name] for name in collections if name in updated}
        return {"output": out, "updated": rest, "layers": layers}

    def _is_planned(self, module: nn.Module, method: str) -> bool:
        return method == "__call__" and module_path(module) in self.plan

    def call(self, variables: Any, arrays: Any = None) -> Any:
        """The output alone; ``arrays`` stand in for those of the inputs."""
        return self._apply(variables, self.arrays if arrays is None else arrays)
