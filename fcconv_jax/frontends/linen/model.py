"""Runs a linen model in its other form: layers are swapped while it is traced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax

from ... import layer_forms as forms
from ...geometry.classify import classify
from ...kernels import Rearrangement
from ...params.leaves import convert_leaf, flatten_with_path
from ...params.moves import check_converted
from ...params.trees import convert_params
from ...plan import Form, LayerPlan, Plan, PlanError
from ...tracing import arguments
from ..function.model import run_rewritten
from .interception import intercepting
from .layers import (
    OwnCalls,
    conv_geometry,
    dense_axes,
    flat_init,
    layer_kind,
    module_path,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertedLinen:
    """A linen model in its other form, called as the model is called.

    Parameter names, RNG streams, mutable collections and keyword arguments are the
    model's own; only the shapes of the planned parameters differ. ``apply`` is
    jitted, one trace per shape: arrays are traced, everything else in the arguments
    (flags, numbers, functions) is static. ``init`` runs as Flax runs it, op by op,
    which keeps the bits of the initializers.

    Where the plan takes products of the model's own code as well, each trace goes
    that code's own way, with layers swapped, and is rewritten product by product.

    Args:
      model: the model that was planned.
      plan: from :func:`fcconv_jax.make_plan`.
    """

    model: nn.Module
    plan: Plan

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initialises variables: the model's own, converted, to the bit."""
        return self.init_with_output(rngs, *args, **kwargs)[1]

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initialises variables and returns them behind the output."""
        with self._swapping(initialising=True):
            out, variables = self.model.init_with_output(rngs, *args, **kwargs)
        return out, self._with_products(variables)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the model; ``variables`` hold its params in the plan's form.

        Raises:
          PlanError: planned params are still in the form that the plan comes from.
        """
        arrays, static = arguments.split_hashable(
            (args, kwargs), f"{type(self.model).__name__}.apply"
        )
        return self._jitted(static, variables, arrays)

    def lazy_init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initialises variables from shapes, as ``model.lazy_init`` does."""
        with self._swapping(initialising=True):
            variables = self.model.lazy_init(rngs, *args, **kwargs)
        return self._with_products(variables)

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a bound module would run outside of the conversion."""
        raise TypeError(
            "a converted model cannot be bound; call apply(variables, ..., method=f) "
            "with a function of the module"
        )

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """A summary table, as ``nn.tabulate`` makes it, with the converted layers."""
        return nn.tabulate(self, rngs)(*args, **kwargs)  # pyright: ignore

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)

    @functools.cached_property
    def _jitted(self) -> Any:
        def apply(static: arguments.Static, variables: Any, arrays: Any) -> Any:
            args, kwargs = static.merge(arrays)
            leaves, _ = flatten_with_path(variables.get("params", {}))
            shapes = {path: nn.meta.unbox(leaf).shape for path, leaf in leaves}
            check_converted(shapes, self.plan)
            with self._swapping():
                if self.plan.products:
                    return self._rewritten(variables, args, kwargs)
                return self.model.apply(variables, *args, **kwargs)

        return jax.jit(apply, static_argnums=0)

    def _rewritten(self, variables: Any, args: Any, kwargs: Any) -> Any:
        """Calls the model with its layers swapped, and its products replaced."""

        def run(params: Any, state: Any, args: Any, kwargs: Any) -> Any:
            return self.model.apply({**state, "params": params}, *args, **kwargs)

        products = self.plan.products
        state = {name: tree for name, tree in variables.items() if name != "params"}
        inputs = (variables["params"], state, args, kwargs)
        out = run_rewritten(run, products, inputs, {})
        if kwargs.get("mutable", False) is False:
            return out
        y, updated = out
        return y, self._with_products(updated)

    def _with_products(self, variables: Any) -> Any:
        """Variables that come out of the model, with the products' params converted."""
        products = self.plan.products
        return (
            convert_params(variables, products)
            if "params" in variables and products
            else variables
        )

    def _swapping(self, initialising: bool = False) -> AbstractContextManager[None]:
        key = ("fcconv_jax", self.plan, initialising)
        return intercepting(_Swap(self.plan, initialising), key=key)


@dataclasses.dataclass
class _Swap:
    """The interceptor that runs each planned layer in its other form."""

    plan: Plan
    initialising: bool
    own: OwnCalls = dataclasses.field(default_factory=OwnCalls)

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        with self.own.enter(module) as own:
            kind = layer_kind(context)
            if not own or kind is None or (kind == "Conv") != (self.plan.to == "dense"):
                return next_fun(*args, **kwargs)
            layer = self.plan.get(module_path(module))
            if layer is None:
                return next_fun(*args, **kwargs)
            if self.initialising:
                _show_as(module, layer, self.plan.to)
            x = args[0] if args else kwargs["inputs"]
            return _call_layer(module, module, layer, self.plan.to, x)


def _call_layer(owner: Any, module: Any, layer: LayerPlan, to: Form, x: Any) -> Any:
    """Calls a linear layer in its other form.

    Args:
      owner: the bound module whose ``kernel`` and ``bias`` are the parameters.
      module: the Dense, DenseGeneral or Conv with the settings.
      layer: its plan.
      to: the form to run.
      x: the input, as the module takes it.
    """
    kernel_init, bias_init = flat_init(module)
    dtype = module.param_dtype
    kernel = _parameter(owner, "kernel", layer.kernel, kernel_init, dtype)
    bias = layer.bias and _parameter(owner, "bias", layer.bias, bias_init, dtype)
    x, kernel, bias = module.promote_dtype(x, kernel, bias, dtype=module.dtype)
    _, converted = forms.pair_of_forms(layer, to, precision=module.precision)
    if to == "dense":
        _check_size(owner, module, layer, tuple(x.shape))
        return converted(x, kernel, bias)
    axes = dense_axes(module, x.ndim)
    batch = tuple(x.shape[axis] for axis in axes.batch)
    return axes.restore(converted(axes.canonical(x), kernel, bias), batch)


def _check_size(owner: Any, module: Any, layer: LayerPlan, shape: Any) -> None:
    """Refuses an input of a size for which the plan's case does not hold."""
    found = classify(**conv_geometry(module, shape))
    if not forms.holds(layer, found):
        path = module_path(owner) or "(root)"
        raise PlanError(
            f"layer {path!r} was planned as {layer.case} on an input of shape "
            f"{layer.input_shape}; on {shape} it is something else: "
            f"{found.reason} Plan again with that input, or leave the layer out with a "
            "rule"
        )


def _parameter(
    owner: Any, name: str, leaf: Rearrangement, init: Any, dtype: Any
) -> Any:
    """A parameter in the new form: the stored one, else drawn in the old and moved."""
    if owner.has_variable("params", name):
        # Spares the trace of the initializer by which param() checks the shape.
        stored = nn.meta.unbox(owner.get_variable("params", name))
        if tuple(stored.shape) == leaf.target:
            return stored
    return owner.param(
        name, lambda key: convert_leaf(leaf, init(key, leaf.source, dtype))
    )


def _show_as(module: Any, layer: LayerPlan, to: Form) -> None:
    """Lets ``nn.tabulate``, which lists a clone of each called module, list the other.

    Only ``clone()`` without arguments is answered so, and only during init: lifted
    transforms clone with arguments.
    """
    clone = module.clone
    run = functools.partial(_call_layer, module=clone(parent=None), layer=layer, to=to)
    shape = layer.channels_last(layer.kernel.target)
    if to == "conv":
        other = Conv(shape[-1], layer.window, padding="VALID", run=run, parent=None)
    else:
        other = Dense(shape[-1], run=run, parent=None)

    def shown(**updates: Any) -> nn.Module:
        return clone(**updates) if updates else other

    object.__setattr__(module, "clone", shown)


class Conv(nn.Conv):
    """How a layer in conv form shows in ``nn.tabulate``."""

    run: Any = None

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        """Calls the layer that this one stands for."""
        return self.run(self, x=inputs)


class Dense(nn.Dense):
    """How a layer in dense form shows in ``nn.tabulate``."""

    run: Any = None

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        """Calls the layer that this one stands for."""
        return self.run(self, x=inputs)
