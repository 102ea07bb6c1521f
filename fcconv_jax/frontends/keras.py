"""Keras 3 models on the JAX backend, as they are, run for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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

        params, state = {}, {}
        for variable in model.variables:
            # A frozen kernel is a parameter, too; running statistics have one axis.
            is_param = variable.trainable or len(variable.shape) > 1
            (params if is_param else state)[variable.path] = variable.value
        return _Call(model), {"params": params, "state": state}

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


class _Call:
    """A model as a function of its params; pickles, as a closure doesn't.

    Args:
      model: built.
      paths: those of its variables in the params; their own by default.
    """

    def __init__(self, model: Any, paths: Sequence[str] | None = None):
        self.model, self.__name__ = model, model.name
        own = [variable.path for variable in model.variables]
        # Variables of a copy have other paths, in the same order.
        self.paths = dict(zip(own, paths or own, strict=True))

    def __reduce__(self) -> Any:
        return type(self), (self.model, tuple(self.paths.values()))

    def __call__(
        self, params: PyTree, state: PyTree, *args: PyTree, **kwargs: PyTree
    ) -> Any:
        if kwargs.pop("training", None):
            raise TypeError("Expected training=False, got True. Drop training=.")
        values = {**params, **state}
        trainable, others = (
            [values[self.paths[v.path]] for v in variables]
            for variables in (
                self.model.trainable_variables,
                self.model.non_trainable_variables,
            )
        )
        out, _ = self.model.stateless_call(
            trainable, others, *args, training=False, **kwargs
        )
        return out


FRONTEND = BoundKeras
