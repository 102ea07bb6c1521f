"""Turns the layers of an NNX model into their other form, on a clone or in place."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.frozen_dict import FrozenDict
from jax import lax

from .. import forms, nnx_layers
from ..kernels import Rearrangement
from ..params import convert_leaf, move_metadata
from ..plan import Form, LayerPlan, Plan, PlanError
from .nnx_einsum import Einsum, turn

Model = TypeVar("Model", bound=nnx.Module)


def convert_nnx(model: Model, plan: Plan, *, inplace: bool = False) -> Model:
    """The model in the plan's form; see :func:`fcconv_jax.convert_model`."""
    model = model if inplace else nnx.clone(model, graph=True)
    modules = dict(nnx_layers.modules(model))
    # An Einsum is planned by the path of its kernel.
    modules |= {
        f"{path}/kernel".lstrip("/"): module
        for path, module in modules.items()
        if isinstance(module, nnx.Einsum)
    }
    # All checks come first: a model that is converted in place is never left half done.
    for path, layer in plan.items():
        if path not in modules:
            close = difflib.get_close_matches(path, modules, n=3, cutoff=0.4)
            raise PlanError(
                f"the model has no module {path!r}, which the plan converts; close to "
                f"it: {close or list(modules)[:5]}. Pass the model that was planned"
            )
        _check(path, modules[path], layer, plan.to)
    moved: set[int] = set()
    for path, layer in plan.items():
        _convert_layer(modules[path], layer, plan.to, moved)
    return model


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a converted layer was: its class and the settings of its constructor.

    ``nodes`` is NNX's note of which attributes are data; with the same one the way
    back gives an equal ``GraphDef``, and so the same jit cache entries.
    """

    cls: type[nnx.Module]
    settings: tuple[tuple[str, Any], ...]
    nodes: Any

    @classmethod
    def of(cls, layer: Any) -> Origin:
        """Reads them off an NNX layer."""
        known = {*inspect.signature(type(layer).__init__).parameters, "kernel_shape"}
        settings = {k: v for k, v in vars(layer).items() if k in known}
        return cls(type(layer), tuple(settings.items()), layer._pytree__nodes)

    def stand_in(self) -> Any:
        """Something with the settings as attributes."""
        return types.SimpleNamespace(**dict(self.settings))


class Conv(nnx.Conv):
    """An ``nnx.Conv`` in the place of a dense layer: takes that layer's inputs."""

    _layer: LayerPlan
    _origin: Origin

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to the dense layer's input.

        Args:
          inputs: as the original layer takes them.
          out_sharding: of the output, as the original layer takes it.
        """
        plan = self._layer
        axes = nnx_layers.dense_axes(self._origin.stand_in(), inputs.ndim)
        batch = tuple(inputs.shape[axis] for axis in axes.batch)
        x = axes.canonical(inputs)
        lead = x.shape[: len(axes.lead)]
        x = forms.conv_input(plan, x)
        if out_sharding is None:
            y = forms.conv_output(plan, super().__call__(x), lead)
            return axes.restore(y, batch)
        if batch:
            raise PlanError(
                "a layer with a batch_axis takes no out_sharding in its conv form: "
                "leave it out with a rule, or constrain the output after the call"
            )
        shape = (*lead, *axes.features)
        positions = forms.output_positions(plan, x.shape[1:-1])
        here = Rearrangement.reshape(
            shape, (x.shape[0], *positions, math.prod(axes.features))
        )
        y = super().__call__(x, out_sharding=convert_leaf(here, out_sharding))
        return jnp.reshape(y, shape, out_sharding=out_sharding)


class Linear(nnx.Linear):
    """An ``nnx.Linear`` in the place of a conv: takes that layer's inputs."""

    _layer: LayerPlan
    _origin: Origin

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to the convolution's input; arguments as there."""
        return super().__call__(
            forms.dense_input(self._layer, inputs), out_sharding=out_sharding
        )


class LinearGeneral(nnx.LinearGeneral):
    """An ``nnx.LinearGeneral`` in the place of a grouped conv: takes its inputs."""

    _layer: LayerPlan
    _origin: Origin

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to the convolution's input.

        Raises:
          PlanError: ``out_sharding`` is given, which does not fit grouped products.
        """
        if out_sharding is not None:
            raise PlanError(
                "a grouped convolution takes no out_sharding in its dense form: leave "
                "it out with a rule, or constrain the output after the call"
            )
        x = jnp.moveaxis(forms.dense_input(self._layer, inputs), -2, 0)
        y = jnp.moveaxis(super().__call__(x), 0, -2)
        return forms.dense_output(self._layer, y)


_SWAPPED = (Conv, Linear, LinearGeneral)
_CONVERTED = (*_SWAPPED, Einsum)


def _check(path: str, module: Any, layer: LayerPlan, to: Form) -> None:
    """Refuses a module that the plan of a layer is not for.

    Raises:
      PlanError: names the module, what was found, and the way out.
    """
    if isinstance(module, _CONVERTED):
        if module._layer != layer.inverse():
            raise PlanError(
                f"{path!r} is converted already, by another plan; go back with that "
                "plan's inverse() first"
            )
    else:
        kind = nnx_layers.layer_kind(module)
        if kind is None or (kind == "Conv") != (to == "dense"):
            raise PlanError(
                f"{path!r} is a {type(module).__name__}, and the plan takes a "
                f"{layer.layer} to {to}: pass the model that was planned"
            )
        if (kind == "Einsum") != layer.is_product:
            raise PlanError(
                f"{path!r} is a {type(module).__name__}, and the plan takes a "
                f"{layer.layer}: pass the model that was planned"
            )
        canonical = 2 + (layer.groups > 1)
        if to == "dense" and len(layer.kernel.target) != canonical:
            raise PlanError(
                f"{path!r} is a plain nnx.Conv, and the plan goes back to a "
                f"{layer.layer} with a kernel of shape {layer.kernel.target}: plan the "
                "way to dense from this model"
            )
        if (reason := nnx_layers.obstacle(module)) is not None:
            raise PlanError(f"{path!r}: {reason}")
    for name, move in layer.leaves:
        name = name or "kernel"
        variable = getattr(module, name)
        if variable is None:
            raise PlanError(f"{path!r} has no {name}, which the plan converts")
        shape = list(variable.shape)
        for axis in reversed(layer.stack_axes):
            del shape[axis]
        if tuple(shape) != move.source:
            raise PlanError(
                f"the {name} of {path!r} has shape {tuple(variable.shape)}, the plan "
                f"is for {move.source}: pass the model that was planned"
            )
        try:
            move_metadata(move, variable, layer.stack_axes)
        except ValueError as error:
            raise PlanError(f"the {name} of {path!r}: {error}") from None


def _convert_layer(module: Any, layer: LayerPlan, to: Form, moved: set[int]) -> None:
    """Turns one module into the layer of the other form, itself and its Variables."""
    for name, move in layer.leaves:
        variable = getattr(module, name or "kernel")
        if id(variable) in moved:  # a tied one
            continue
        moved.add(id(variable))
        if updates := move_metadata(move, variable, layer.stack_axes):
            variable.set_metadata(**updates)
        value = convert_leaf(move, variable.get_raw_value(), layer.stack_axes)
        variable.set_raw_value(value)
    if layer.is_product:
        turn(module, layer)
        return
    if isinstance(module, _SWAPPED):
        origin = module._origin
        _become(module, origin.cls, dict(origin.settings))
        added = [k for k in vars(module) if not k.startswith("_pytree__")]
        if all(name in origin.nodes for name in added):
            vars(module)["_pytree__nodes"] = origin.nodes
        return
    origin = Origin.of(module)
    cls, settings = _settings(origin.stand_in(), layer, to)
    _become(module, cls, settings)
    module._layer, module._origin = layer, origin


def _settings(
    old: Any, layer: LayerPlan, to: Form
) -> tuple[type[nnx.Module], dict[str, Any]]:
    """Class and attributes of the layer in its new form."""
    shape = layer.kernel.target
    *_, inner, features = layer.channels_last(shape)
    same = ("use_bias", "dtype", "param_dtype", "precision", "promote_dtype")
    settings = {name: getattr(old, name) for name in same}
    settings["preferred_element_type"] = old.preferred_element_type
    if to == "conv":
        settings |= {
            "kernel_shape": shape,
            "in_features": inner * layer.groups,
            "out_features": features,
            "kernel_size": layer.window,
            "strides": layer.strides,
            "padding": "VALID",
            "input_dilation": 1,
            "kernel_dilation": 1,
            "feature_group_count": layer.groups,
            "mask": None,
            "conv_general_dilated": _convolution(layer),
        }
        return Conv, settings
    if layer.groups == 1:
        settings |= {"in_features": shape[0], "out_features": shape[1]}
        return Linear, settings | {"dot_general": lax.dot_general}
    settings |= {
        "in_features": (shape[1],),
        "out_features": (shape[2],),
        "axis": (-1,),
        "batch_axis": FrozenDict({0: layer.groups}),
        "dot_general": None,
        "dot_general_cls": None,
    }
    return LinearGeneral, settings


def _convolution(layer: LayerPlan) -> Any:
    """What ``nnx.Conv`` calls to convolve: its default, where the layout is."""
    usual = layer.layout != "flat" and layer.kernel_layout == "HWIO"
    return lax.conv_general_dilated if usual else _LaidOut(layer)


@dataclasses.dataclass(frozen=True)
class _LaidOut:
    """A convolution in a layout of its own, called as ``lax.conv_general_dilated``."""

    layer: LayerPlan

    def __call__(
        self, x: Any, kernel: Any, *_: Any, out_sharding: Any = None, **settings: Any
    ) -> Any:
        same = ("precision", "preferred_element_type")
        wanted = {k: v for k, v in settings.items() if k in same}
        if out_sharding is not None:
            if self.layer.layout == "flat":
                ones = (1,) * len(self.layer.window)
                features = self.layer.channels_last(kernel.shape)[-1]
                shape = (x.shape[0], *ones, features)
                flat = Rearrangement.reshape(shape, (x.shape[0], 1, features))
                out_sharding = convert_leaf(flat, out_sharding)
            wanted["out_sharding"] = out_sharding
        return forms.convolve(self.layer, x, kernel, **wanted)


def _become(module: Any, cls: type[nnx.Module], settings: dict[str, Any]) -> None:
    """Makes a module another class, with other settings and the same other attributes.

    The object stays the same one, so whoever shares it sees the change.
    """
    old = vars(module).copy()
    nodes = module._pytree__nodes
    dropped: Sequence[str] = ("_layer", "_origin")
    if isinstance(module, _SWAPPED):
        known: Any = inspect.signature(type(module).__mro__[1].__init__).parameters
    else:
        known = inspect.signature(type(module).__init__).parameters
    kept = {
        name: value
        for name, value in old.items()
        if name not in (*dropped, *known, "kernel_shape")
        and not name.startswith("_pytree__")
    }
    vars(module).clear()
    vars(module)["_pytree__state"] = old["_pytree__state"]
    object.__setattr__(module, "__class__", cls)
    for name, value in (settings | kept).items():
        data = name in kept and nodes.get(name, False)
        setattr(module, name, nnx.data(value) if data else value)
