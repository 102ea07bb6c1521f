"""PyTorch Modules, as they are, run by JAX through torchax.

Inputs and outputs keep PyTorch's layouts (NCHW), params those of its ``state_dict``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax

from ..messages.extras import require
from .held import BoundHeld

# Type checkers take "import torch" for this very file where PyTorch is not installed.
torch: Any = import_module("torch")


@dataclasses.dataclass(frozen=True, eq=False)
class BoundTorch(BoundHeld):
    """A ``torch.nn.Module`` in eval mode; params are a ``state_dict``."""

    library = "torch"
    first_spatial_axis = 2
    kernel_layout = "OIHW"

    def __post_init__(self) -> None:
        """Takes tensors among the inputs as arrays."""
        args, kwargs = _as_arrays((tuple(self.args), dict(self.kwargs)))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """Modules."""
        return (torch.nn.Module,)

    def call_of(self) -> Callable[..., Any]:
        """The Module's ``forward``."""
        return getattr(self.model, "forward", self.model)

    @classmethod
    def split(cls, model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Parameters and buffers by their names in the ``state_dict``.

        Raises:
          TypeError: a submodule is in training mode.
          MissingExtraError: torchax is not installed.
        """
        training = [name for name, each in model.named_modules() if each.training]
        if training:
            raise TypeError(
                f"Expected a Module in eval mode, got a {type(model).__name__} in "
                f"training mode (at {training[0]!r}). Call model.eval()."
            )
        torchax = require("torchax", "torch", "Running a torch.nn.Module")
        # Tied weights stay apart, as they do in a state_dict.
        values, run = torchax.extract_jax(model, dedup_parameters=False)
        learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}

        def call(params: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            return run({**params, **state}, args, kwargs)

        call.__name__ = type(model).__name__
        params = {name: x for name, x in values.items() if name in learned}
        state = {name: x for name, x in values.items() if name not in learned}
        return call, {"params": params, "state": state}

    @classmethod
    def split_params(cls, model: Any, params: Any) -> dict[str, Any]:
        """A ``state_dict``, of tensors or arrays, all of it."""
        _, own = cls.split(model)
        missing = [name for name in model.state_dict() if name not in params]
        if missing:
            raise TypeError(
                f"Expected the whole state_dict, got none for {missing[0]!r}. Pass "
                "model.state_dict()."
            )
        given = _as_arrays(dict(params))
        return {
            key: {name: given.get(name, own) for name, own in tree.items()}
            for key, tree in own.items()
        }


def _as_arrays(tree: Any) -> Any:
    def as_array(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return jax.dlpack.from_dlpack(leaf.detach().cpu().contiguous())

    return jax.tree.map(as_array, tree)


FRONTEND = BoundTorch
