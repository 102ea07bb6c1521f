"""Which framework a model is of, and the room that knows about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol

import flax.linen as nn

from ..params.variables import is_nnx_class, is_nnx_module
from ..plan import Form, Plan
from ..plan.rules import Rule
from .linen.model import ConvertedLinen

Kind = Literal["linen", "nnx", "function"]


class ModelProgram(Protocol):
    """A model on inputs that stay, called with variables; ``arrays`` are its inputs."""

    arrays: Any

    def call(self, variables: Any, arrays: Any = None) -> Any:
        """What the model returns; ``arrays`` stand in for those of the inputs."""
        ...

    def named(self, variables: Any, arrays: Any, wanted: Callable[[str], bool]) -> Any:
        """The same, with the outputs of wanted modules named in the trace."""
        ...


class Frontend(Protocol):
    """What each framework's room offers in its ``frontend`` module."""

    def make_plan(
        self,
        model: Any,
        inputs: Sequence[Any],
        to: Form,
        rules: Sequence[Rule],
        rngs: Any,
        method: Any,
        kwargs: Mapping[str, Any],
    ) -> Plan:
        """The plan of a model, in the layout that every backend runs."""
        ...

    def convert_model(self, model: Any, plan: Plan, inplace: bool) -> Any:
        """The model in the plan's form."""
        ...

    def model_program(
        self, model: Any, inputs: Any, kwargs: Mapping[str, Any]
    ) -> ModelProgram:
        """A model, original or converted, on inputs that stay."""
        ...

    def variables(self, model: Any, params: Any) -> Mapping[str, Any]:
        """The params or variables of a model, as variables with ``params`` in them."""
        ...

    def planning_call(
        self, params: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """What ``make_plan`` takes, from how the model is called with params."""
        ...

    def activations(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Those of a call's inputs that are no params."""
        ...

    def state(self, model: Any) -> Any:
        """The arrays that a model holds itself."""
        ...


def kind_of(model: Any, caller: str) -> Kind:
    """The framework of a model, which may be a converted one.

    Args:
      model: a linen or NNX Module, or a function of params and inputs.
      caller: who asks, for the error.

    Raises:
      TypeError: it is no model; names the way out.

    Example:
      >>> kind_of(nn.Dense(3), "plan"), kind_of(lambda params, x: x @ params, "plan")
      ('linen', 'function')
      >>> kind_of("bert", "make_plan")
      Traceback (most recent call last):
        ...
      TypeError: make_plan takes a flax.linen or flax.nnx Module or a function of ...
    """
    if is_nnx_module(model):
        return "nnx"
    if isinstance(model, nn.Module | ConvertedLinen):
        return "linen"
    if callable(model) and not isinstance(model, type) and not _holds_linen(model):
        return "function"
    name = type(model).__name__
    is_class = isinstance(model, type)
    if is_class and (issubclass(model, nn.Module) or is_nnx_class(model)):
        raise TypeError(
            f"{caller} expected a Module, got the class {model.__name__}. Pass an "
            f"instance: {model.__name__}(...)"
        )
    if _holds_linen(model):
        raise TypeError(
            f"{name} is no flax.linen Module, it holds one and its params: hand over "
            "model.module with the inputs of its own __call__, or a function such as "
            "lambda params, ids: model(ids, params=params) with model.params"
        )
    raise TypeError(
        f"{caller} takes a flax.linen or flax.nnx Module or a function of params and "
        f"inputs, got {name}"
    )


def frontend_of(model: Any, caller: str) -> Frontend:
    """The room of a model's framework; nnx is imported only where it is needed."""
    module: Any = import_module(f"..{kind_of(model, caller)}.frontend", __name__)
    return module


def _holds_linen(model: Any) -> bool:
    """Whether it is an object around a linen Module, as those of transformers are."""
    return isinstance(getattr(model, "module", None), nn.Module)
