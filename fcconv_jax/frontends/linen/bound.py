"""A linen Module bound to its variables and inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from ...messages.user_code import explained
from ...plan import Form, Plan
from ...plan.rules import Rule
from ...tracing.marks import name_input, name_output
from ..bound import BoundModel, OnCrops
from .interception import intercepting
from .layers import dense_axes, layer_kind, module_path
from .model import ConvertedLinen
from .plan import plan_linen

# Keyword arguments of a Module's apply that its init does not take.
_APPLY_ONLY = ("mutable", "capture_intermediates")


@dataclasses.dataclass(frozen=True, eq=False)
class BoundLinen(BoundModel):
    """A ``flax.linen`` Module, or one that :func:`convert_model` returned."""

    library = "linen"
    params_of = "its variables"
    more_options = ("rngs", "method", *_APPLY_ONLY)
    stores_collections = True

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """Modules, and what :func:`convert_model` makes of them."""
        return nn.Module, ConvertedLinen

    @classmethod
    def owns(cls, model: object) -> bool:
        """Also refuses objects around a Module, such as those of transformers."""
        if super().owns(model):
            return True
        if isinstance(getattr(model, "module", None), nn.Module):
            raise TypeError(
                f"Expected a model, got a {type(model).__name__}, which holds a "
                "flax.linen Module and its params. Pass model.module with the inputs "
                "of its own __call__, or a function such as lambda params, ids: "
                "model(ids, params=params) with model.params."
            )
        return False

    @classmethod
    def called(cls, model: Any, args: Sequence[Any], kwargs: PyTree) -> BoundModel:
        """The variables come first, as ``apply`` takes them."""
        if not args:
            raise TypeError(
                "Expected the variables of a linen Module and its inputs, got no "
                "arguments. Pass the arguments of its apply."
            )
        if not isinstance(args[0], Mapping):
            raise TypeError(
                "Expected the variables of a linen Module first, got "
                f"{type(args[0]).__name__}. Pass the arguments of its apply: "
                "[variables, x]."
            )
        return cls(model, args[0], tuple(args[1:]), kwargs)

    @classmethod
    def on_crops(cls, model: Any) -> OnCrops:
        """``apply``; its variables are the caller's."""

        def apply(*args: PyTree, **kwargs: PyTree) -> PyTree:
            if len(args) < 2:
                name = type(model).__name__
                raise TypeError(
                    f"Expected the variables of {name} and the images, got one "
                    "argument. Pass the variables first: grid(variables, images)."
                )
            return model.apply(*args, **kwargs)

        return OnCrops(apply)

    @classmethod
    def convert_model(cls, model: Any, plan: Plan) -> ConvertedLinen:
        """The Module in the plan's form."""
        return ConvertedLinen(model, plan)

    def call_of(self) -> Callable[..., Any]:
        """The Module's ``__call__``."""
        return getattr(self.model, "model", self.model).__call__

    def _variables(self) -> Mapping[str, Any]:
        if self.params is None:
            return self.shapes
        is_variables = isinstance(self.params, Mapping) and "params" in self.params
        return self.params if is_variables else {"params": self.params}

    @functools.cached_property
    def shapes(self) -> Mapping[str, Any]:
        """As ``init`` makes them; nothing is computed."""
        options = self._init_options()
        rngs = options.pop("rngs", None)
        rngs = jax.random.key(0) if rngs is None else rngs
        init = functools.partial(self.model.init, **options)
        shapes = nn.meta.unbox(jax.eval_shape(init, rngs, *self.args))
        return shapes if "params" in shapes else {"params": {}, **shapes}

    def drawn(self, seed: int) -> BoundModel:
        """The same call with variables from ``init``."""
        options = self._init_options()
        rngs = options.pop("rngs", None)
        rngs = jax.random.key(seed) if rngs is None else rngs
        variables = self.model.init(rngs, *self.args, **options)
        # A model without parameters has no such collection.
        return self.with_variables({"params": {}, **variables})

    def _init_options(self) -> dict[str, Any]:
        """What ``init`` takes of the keyword arguments of ``apply``."""
        options = {k: v for k, v in self.kwargs.items() if k not in _APPLY_ONLY}
        rngs = options.get("rngs")
        # `apply` draws no params, so its streams need not have theirs.
        if isinstance(rngs, Mapping) and "params" not in rngs:
            options["rngs"] = {"params": next(iter(rngs.values())), **rngs}
        return options

    def _plan(self, to: Form, rules: Sequence[Rule]) -> Plan:
        if isinstance(self.model, ConvertedLinen):
            raise TypeError(
                "Expected a Module that isn't converted yet, got a converted "
                f"{type(self.model.model).__name__}. Pass its .model; plan.inverse() "
                "converts back."
            )
        options = self._init_options()
        rngs, method = options.pop("rngs", None), options.pop("method", None)
        return plan_linen(self.model, self.args, to, rules, rngs, method, options)

    def _call(self, variables: PyTree, args: PyTree, kwargs: PyTree) -> Any:
        with explained():
            return self.model.apply(variables, *args, **kwargs)

    def named(
        self, variables: PyTree, arrays: PyTree, wanted: Callable[[str], bool]
    ) -> PyTree:
        """Also names the inputs of linear layers."""
        namer = _Namer(wanted)
        with intercepting(namer, key=("fcconv_jax.named", id(namer))):
            return self.call(variables, arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class _Namer:
    """An interceptor that changes nothing but the names in the trace."""

    wanted: Callable[[str], bool]

    def __call__(
        self, next_fun: Any, args: PyTree, kwargs: PyTree, context: Any
    ) -> Any:
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


FRONTEND = BoundLinen
