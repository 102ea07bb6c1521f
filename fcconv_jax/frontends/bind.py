"""Binds a model to its call, by the front end of its library."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from jaxtyping import PyTree

from ..params.tensors import is_tensor
from ..tracing.arguments import is_array
from .bound import BoundModel, OnCrops
from .function.bound import BoundFunction
from .held import BoundHeld, ConvertedModel

# The package that defines a library's models, and the module here that binds them. A
# model cannot exist before its package is imported, so nothing is imported for it.
_FRONTENDS = {
    "flax.nnx": "nnx.bound",
    "flax.linen": "linen.bound",
    "equinox": "equinox",
    "haiku": "haiku",
    "keras": "keras",
    "torch": "torch",
}


def bind(
    model: object, params: PyTree = None, *inputs: PyTree, **kwargs: PyTree
) -> BoundModel:
    """Binds a model to its params, inputs and keyword arguments.

    Args:
      model: a model of a known library, converted or not, a function
        ``f(params, *inputs)``, or a bound model, which is returned as it is.
      params: params or variables; None for those that the model holds. Models of
        Equinox, Keras and PyTorch hold them: an array here is the first input.
      *inputs: what the model is called with.
      **kwargs: keyword arguments of the call.

    Raises:
      TypeError: it is not a model; the message has the fix.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> bound = bind(model, model.init(jax.random.key(0), x), x)
      >>> bound.library, len(bound.plan()), bound.call(bound.variables).shape
      ('linen', 1, (2, 3))
    """
    if isinstance(model, BoundModel):
        return _alone(model, (*inputs, *kwargs), params)
    frontend = frontend_of(model)
    if issubclass(frontend, BoundHeld) and (is_array(params) or is_tensor(params)):
        # Such a model holds its params, and an array is none: it is the first input.
        params, inputs = None, (params, *inputs)
    if frontend is not BoundFunction and is_array(params):
        raise TypeError(
            f"Expected params as a tree of arrays, got {params.dtype} of shape "
            f"{params.shape}. Pass the params before the inputs: (model, params, x)."
        )
    if frontend is not BoundFunction and hasattr(params, "apply_fn"):
        raise TypeError(
            f"Expected params as a tree of arrays, got a {type(params).__name__}. Pass "
            "state.params, or all variables: {'params': state.params, ...}."
        )
    return frontend(model, params, inputs, kwargs)


def bind_planned(
    model: object, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> BoundModel:
    """Binds a model with the arguments that ``make_plan`` takes."""
    if isinstance(model, BoundModel):
        return _alone(model, (*args, *kwargs))
    return frontend_of(model).planned(model, args, kwargs)


def bind_called(
    model: object, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> BoundModel:
    """Binds a model with all that a call of it takes, params included."""
    if isinstance(model, BoundModel):
        return _alone(model, (*args, *kwargs))
    return frontend_of(model).called(model, args, kwargs)


def bind_crops(model: object) -> OnCrops:
    """The model as a function of crops, which a later call passes."""
    if isinstance(model, BoundModel):
        return model.bound_on_crops()
    return frontend_of(model).on_crops(model)


def _alone(bound: Any, more: Sequence[Any], params: PyTree = None) -> BoundModel:
    if more or params is not None:
        raise TypeError(
            f"Expected a bound model alone, got {len(more) + 1} more arguments. Pass "
            "its params, inputs and keyword arguments when you bind it."
        )
    return bound


def frontend_of(model: object) -> type[BoundModel]:
    """The front end of a model's library.

    Raises:
      TypeError: it is not a model; the message has the fix.

    Example:
      >>> import flax.linen as nn
      >>> frontend_of(nn.Dense(3)).library, frontend_of(lambda p, x: x @ p).library
      ('linen', 'function')
      >>> frontend_of("bert")
      Traceback (most recent call last):
        ...
      TypeError: Expected a model of a known library or a function of params and ...
    """
    if isinstance(model, ConvertedModel):
        return model.frontend
    # Functions last: models are callable, too.
    for frontend in _imported():
        if frontend.owns(model):
            return frontend
    if isinstance(model, type):
        raise TypeError(
            f"Expected a model, got the class {model.__name__}. Pass an instance: "
            f"{model.__name__}(...)."
        )
    if not callable(model):
        raise TypeError(
            "Expected a model of a known library or a function of params and inputs, "
            f"got {type(model).__name__}. Pass a flax.linen or flax.nnx Module, or a "
            "function."
        )
    return BoundFunction


def frontend_of_instance(value: object) -> type[BoundModel] | None:
    """The front end of a library's model; None for another value, and for functions."""
    return next((x for x in _imported() if isinstance(value, x.classes())), None)


def is_model(value: object) -> bool:
    """Whether a value is a model of a library: functions are none."""
    return frontend_of_instance(value) is not None


def frontend_of_class(value: object) -> type[BoundModel] | None:
    """The front end of the models that a class makes; None for another value."""
    if isinstance(value, type):
        for frontend in _imported():
            if issubclass(value, frontend.classes()):
                return frontend
    return None


def _imported() -> Iterator[type[BoundModel]]:
    """The front ends of libraries that somebody imported."""
    for package, module in _FRONTENDS.items():
        if package in sys.modules:
            yield import_module(f".{module}", __package__).FRONTEND
