"""Keras 3 models on the JAX backend, as they are, run for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from jaxtyping import PyTree

from .held import BoundHeld

# Type checkers take "import keras" for this very file where Keras is not installed.
keras: Any = import_module("keras")


@dataclasses.dataclass(frozen=True, eq=False)
class BoundKeras(BoundHeld):
    """A built Keras model; params are a dict by variable path, or ``get_weights()``."""

    library = "keras"

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """Layers, of which models are some."""
        return (keras.Layer,)

    @classmethod
    def split(cls, model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Params by their paths; statistics and seeds are state.

        Raises:
          TypeError: Keras runs on another backend, or the model is not built.
        """
        if keras.backend.backend() != "jax":
            raise TypeError(
                "Expected Keras on the JAX backend, got "
                f"{keras.backend.backend()!r}. Set KERAS_BACKEND=jax in the environment"
                " before keras is imported."
            )
        if not model.built:
            raise TypeError(
                f"Expected a built model, got {model.name!r} without variables. Call "
                "it once on an input, or build(input_shape)."
            )

        def call(params: PyTree, state: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
            if kwargs.pop("training", None):
                raise TypeError("Expected training=False, got True. Drop training=.")
            values = {**params, **state}
            trainable = [values[v.path] for v in model.trainable_variables]
            others = [values[v.path] for v in model.non_trainable_variables]
            out, _ = model.stateless_call(
                trainable, others, *args, training=False, **kwargs
            )
            return out

        call.__name__ = model.name
        params, state = {}, {}
        for variable in model.variables:
            # A frozen kernel is a parameter, too; running statistics have one axis.
            is_param = variable.trainable or len(variable.shape) > 1
            (params if is_param else state)[variable.path] = variable.value
        return call, {"params": params, "state": state}

    @classmethod
    def split_params(cls, model: Any, params: PyTree) -> dict[str, Any]:
        """Return the values of all variables, in place of the model's."""
        _, own = cls.split(model)
        if not isinstance(params, Mapping):
            params = {v.path: x for v, x in zip(model.weights, params, strict=True)}
        missing = [v.path for v in model.weights if v.path not in params]
        if missing:
            raise TypeError(
                f"Expected params by variable path, got none for {missing[0]!r}. Pass "
                "{v.path: v.value for v in model.weights}."
            )
        return {
            name: {path: params.get(path, value) for path, value in tree.items()}
            for name, tree in own.items()
        }


FRONTEND = BoundKeras
