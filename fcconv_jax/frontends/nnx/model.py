"""Turns the layers of an NNX model into their other form, on a clone or in place."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.core.frozen_dict import FrozenDict
from flax.nnx import reprlib
from jax import lax

from ...messages.errors import PlanError
from ...params.inplace import convert_in_place
from ...params.leaves import convert_leaf, move_metadata
from ...params.move import Move
from ...plan import Form, LayerPlan, Plan
from ...plan import layer_forms as forms
from ...plan.layer_forms import OutSharding
from ...versions import (
    graph_mode,
    is_data,
    linear_settings,
    raw_value,
    set_metadata,
    set_raw_value,
)
from . import layers as nnx_layers
from .matmuls import converted_matmuls, set_classes
from .twins import warn_of_twins

Model = TypeVar("Model", bound=nnx.Module)


def convert_nnx(model: Model, plan: Plan, *, inplace: bool = False) -> Model:
    """The model in the plan's form; see :func:`fcconv_jax.convert_model`."""
    model = model if inplace else nnx.clone(model, **graph_mode())
    modules = dict(nnx_layers.modules(model))
    variables = nnx_layers.variables(model)
    matmuls = converted_matmuls(model)
    # All checks come first: a model that is converted in place is never left half done.
    for path, layer in plan.items():
        known: Mapping[str, Any] = variables if layer.is_matmul else modules
        if path not in known:
            what = "parameter" if layer.is_matmul else "module"
            close = difflib.get_close_matches(path, known, n=3, cutoff=0.4)
            raise PlanError(
                f"Expected a model with the {what} {path!r}, which the plan converts, "
                f"got {close or list(known)[:5]}. Pass the planned model."
            )
        if layer.is_matmul:
            _check_matmul(path, variables[path], layer, matmuls)
        else:
            _check(path, modules[path], layer)
    warn_of_twins(modules, variables, plan)
    moved: set[int] = set()
    new: dict[int, LayerPlan] = {}
    for path, layer in plan.items():
        if not layer.is_matmul:
            _convert_layer(modules[path], layer, moved, inplace)
            continue
        _move(variables[path], Move(layer.kernel, layer.stack_axes), inplace)
        new[id(variables[path])] = layer
    set_classes(model, new.keys() & matmuls.keys(), new)
    return model


@dataclasses.dataclass(frozen=True)
class Origin:
    """Class and constructor settings of a layer before it was converted.

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

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.cls, self.settings, self.nodes))

    def __reduce__(self) -> Any:
        # Not with its hash: that of a string is another one in each process.
        return type(self), (self.cls, self.settings, self.nodes)

    def __hash__(self) -> int:
        # Asked for at every call under nnx.jit.
        return self._hash

    def stand_in(self) -> Any:
        """Something with the settings as attributes."""
        return types.SimpleNamespace(**dict(self.settings))


# nnx.jit flattens and hashes the attributes of every module at every call: what is the
# same for all instances, or in the plan, is none of theirs.


class Conv(nnx.Conv):
    """An ``nnx.Conv`` in the place of a dense layer: takes that layer's inputs."""

    _layer: LayerPlan
    _origin: Origin
    padding = "VALID"
    input_dilation = kernel_dilation = 1
    mask = None
    conv_general_dilated = staticmethod(lax.conv_general_dilated)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self._layer.kernel.target

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Window of the convolution."""
        return self._layer.window

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the convolution."""
        return self._layer.strides

    @property
    def feature_group_count(self) -> int:
        """Groups of the convolution."""
        return self._layer.groups

    def __nnx_repr__(self) -> Generator[Any, Any, None]:
        """The settings of the convolution before the attributes of the instance."""
        shown = super().__nnx_repr__()
        yield next(shown)
        for number, attribute in enumerate(shown):  # none where it is shown already
            if number == 0:
                for name in ("kernel_size", "strides", "feature_group_count"):
                    yield reprlib.Attr(name, getattr(self, name))
            yield attribute

    def __call__(
        self, inputs: jax.Array, out_sharding: OutSharding = None
    ) -> jax.Array:
        """Applies the layer to the dense layer's input."""
        axes = nnx_layers.dense_axes(self._origin.stand_in(), inputs.ndim)
        batch = tuple(inputs.shape[axis] for axis in axes.batch)
        sharding = axes.canonical_sharding(out_sharding, inputs.shape)
        y = _call_other_form(self, "conv", axes.canonical(inputs), sharding)
        return axes.restore(y, batch)


class Linear(nnx.Linear):
    """An ``nnx.Linear`` in the place of a conv: takes that layer's inputs."""

    _layer: LayerPlan
    _origin: Origin
    dot_general = staticmethod(lax.dot_general)

    def __call__(
        self, inputs: jax.Array, out_sharding: OutSharding = None
    ) -> jax.Array:
        """Applies the layer to the convolution's input."""
        return _call_other_form(self, "dense", inputs, out_sharding)


class LinearGeneral(nnx.LinearGeneral):
    """An ``nnx.LinearGeneral`` in the place of a grouped conv: takes its inputs."""

    _layer: LayerPlan
    _origin: Origin
    axis = (-1,)
    dot_general = dot_general_cls = None

    def __call__(
        self, inputs: jax.Array, out_sharding: OutSharding = None
    ) -> jax.Array:
        """Applies the layer to the convolution's input."""
        return _call_other_form(self, "dense", inputs, out_sharding)


def _call_other_form(
    layer: Any, to: Form, x: jax.Array, out_sharding: OutSharding
) -> Any:
    """Runs a converted layer, with the settings that it has as an NNX layer."""
    kernel, bias = layer.kernel[...], nnx_layers.bias_of(layer)
    x, kernel, bias = layer.promote_dtype((x, kernel, bias), dtype=layer.dtype)
    names = ("precision", *linear_settings())
    settings = {name: getattr(layer, name) for name in names}
    _, converted = forms.pair_of_forms(layer._layer, to, **settings)
    return converted(x, kernel, bias, out_sharding)


_SWAPPED = (Conv, Linear, LinearGeneral)


def _check(path: str, module: Any, layer: LayerPlan) -> None:
    """Refuses a module that the plan of a layer is not for.

    Raises:
      PlanError: names the module, what was found, and a fix.
    """
    if isinstance(module, _SWAPPED):
        if module._layer != layer.inverse():
            raise PlanError(
                f"{path!r} is already converted by another plan. Convert it back with "
                "that plan's inverse() first."
            )
    else:
        kind = nnx_layers.layer_kind(module)
        if kind is None or (kind == "Conv") != (layer.to == "dense"):
            raise PlanError(
                f"Expected a {layer.layer} at {path!r}, which the plan converts to "
                f"{layer.to}, got a {type(module).__name__}. Pass the planned model."
            )
        canonical = 2 + (layer.groups > 1)
        if layer.to == "dense" and len(layer.kernel.target) != canonical:
            raise PlanError(
                f"Expected a converted layer at {path!r}, which the plan converts back "
                f"to a {layer.layer} with a kernel of shape {layer.kernel.target}, got "
                "a plain nnx.Conv. Plan this model with to='dense'."
            )
        if (reason := nnx_layers.obstacle(module)) is not None:
            raise PlanError(f"{path!r}: {reason}")
    for name, move in layer.leaves:
        variable = getattr(module, name)
        if variable is None:
            raise PlanError(
                f"Expected {path!r} to have a {name}, which the plan converts, got "
                "none. Pass the planned model."
            )
        _check_move(f"the {name} of {path!r}", variable, Move(move, layer.stack_axes))


def _check_matmul(
    path: str,
    variable: Any,
    layer: LayerPlan,
    matmuls: Mapping[int, LayerPlan],
) -> None:
    """Refuses a parameter that the plan of its matmuls is not for.

    Raises:
      PlanError: names the parameter, what was found, and a fix.
    """
    before = matmuls.get(id(variable))
    if before is not None and before.kernel != layer.inverse().kernel:
        raise PlanError(
            f"{path!r} is already converted by another plan. Convert it back with that "
            "plan's inverse() first."
        )
    forms = sorted({each.to for each in matmuls.values()} - {layer.to})
    if before is None and forms:
        raise PlanError(
            f"The plan converts {path!r} to {layer.to}, but other parameters of the "
            f"model are already converted to {forms[0]}. Convert them back with that "
            "plan's inverse() first."
        )
    _check_move(repr(path), variable, Move(layer.kernel, layer.stack_axes))


def _check_move(what: str, variable: Any, move: Move) -> None:
    """Refuse a parameter whose shape or names do not move as planned."""
    if not move.fits(tuple(variable.shape)):
        raise PlanError(
            f"Expected {what} of shape {move.rearrange.source}, as planned, got "
            f"{tuple(variable.shape)}. Pass the planned model."
        )
    try:
        move_metadata(move.rearrange, variable, move.stack_axes)
    except ValueError as error:
        raise PlanError(f"{what}: {error}") from None


def _convert_layer(
    module: Any, layer: LayerPlan, moved: set[int], inplace: bool
) -> None:
    """Turns one module into the layer of the other form, itself and its Variables."""
    for name, move in layer.leaves:
        variable = getattr(module, name)
        if id(variable) not in moved:  # a tied one
            moved.add(id(variable))
            _move(variable, Move(move, layer.stack_axes), inplace)
    if isinstance(module, _SWAPPED):
        origin = module._origin
        _become(module, origin.cls, dict(origin.settings))
        added = [k for k in vars(module) if not k.startswith("_pytree__")]
        if all(name in origin.nodes for name in added):
            vars(module)["_pytree__nodes"] = origin.nodes
        return
    origin = Origin.of(module)
    cls, settings = _settings(origin.stand_in(), layer)
    _become(module, cls, settings)
    module._layer, module._origin = layer, origin


def _move(variable: Any, move: Move, inplace: bool) -> None:
    """Move the entries of one parameter, and its metadata."""
    if updates := move_metadata(move.rearrange, variable, move.stack_axes):
        set_metadata(variable, updates)
    if inplace:
        convert_in_place(variable, move.rearrange, move.stack_axes)
        return
    value = convert_leaf(move.rearrange, raw_value(variable), move.stack_axes)
    set_raw_value(variable, value)


def _settings(old: Any, layer: LayerPlan) -> tuple[type[nnx.Module], dict[str, Any]]:
    """Class and attributes of the layer in its new form."""
    shape = layer.kernel.target
    *_, inner, features = layer.channels_last(shape)
    same = ("use_bias", "dtype", "param_dtype", "precision", "promote_dtype")
    same += linear_settings()
    settings = {name: getattr(old, name) for name in same}
    if layer.to == "conv":
        return Conv, settings | {
            "in_features": inner * layer.groups,
            "out_features": features,
        }
    if layer.groups == 1:
        return Linear, settings | {"in_features": shape[0], "out_features": shape[1]}
    return LinearGeneral, settings | {
        "in_features": (shape[1],),
        "out_features": (shape[2],),
        "batch_axis": FrozenDict({0: layer.groups}),
    }


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
        data = name in kept and is_data(nodes, name)
        setattr(module, name, nnx.data(value) if data else value)
