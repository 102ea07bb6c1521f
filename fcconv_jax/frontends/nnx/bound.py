"""An NNX model bound to its variables and inputs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from ...messages.errors import PlanError
from ...plan import Form, Plan
from ...plan.rules import Rule
from ...tracing.marks import name_input, name_output
from ...versions import graph_mode
from ..bound import BoundModel, OnCrops
from . import layers as nnx_layers
from .model import convert_nnx
from .plan import bound_method, plan_nnx

_PATH = "_fcconv_jax_path"


@dataclasses.dataclass(frozen=True, eq=False)
class BoundNnx(BoundModel):
    """An ``nnx.Module``: its ``nnx.Param`` in ``params``, the rest in ``state``.

    Params may be passed as an ``nnx.State`` or a pure dict, of all variables that the
    call reads. None takes those of the model.
    """

    library = "nnx"
    mixes_variables = True
    params_of = "nnx.state(model)"
    more_options = ("method",)
    takes_options = False  # Users jit NNX models themselves.

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """Modules, whose classes converting changes to subclasses."""
        return (nnx.Module,)

    @classmethod
    def class_options(cls, model_class: type) -> dict[str, Any]:
        """The ``rngs``, which most classes take."""
        # The class itself shows the signature of its metaclass.
        init: Any = model_class.__init__
        takes = "rngs" in inspect.signature(init).parameters
        return {"rngs": nnx.Rngs(0)} if takes else {}

    @classmethod
    def convert_model(cls, model: Any, plan: Plan) -> Any:
        """A converted clone."""
        return convert_nnx(model, plan)

    @classmethod
    def convert_in_place(cls, model: Any, plan: Plan) -> Any:
        """The model itself, converted."""
        return convert_nnx(model, plan, inplace=True)

    @classmethod
    def on_crops(cls, model: Any) -> OnCrops:
        """Read the variables at each call."""

        def call(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
            return cls(model)._call(variables, args, kwargs)

        call.__name__ = type(model).__name__
        return OnCrops(call, lambda args: (cls(model).variables, *args))

    @property
    def held(self) -> PyTree:
        """All arrays of the model."""
        return nnx.split(self.model, **graph_mode())[1]

    @functools.cached_property
    def _parts(self) -> Any:
        return nnx.split(self.model, nnx.Param, ..., **graph_mode())

    def _variables(self) -> Mapping[str, Any]:
        _, params, rest = self._parts
        if self.params is None:
            return {"params": nnx.to_pure_dict(params), "state": rest}
        given = self.params
        if isinstance(given, Mapping) and isinstance(given.get("state"), nnx.State):
            return given  # Variables of a bound model.
        if isinstance(given, nnx.State):
            given = nnx.to_pure_dict(given)
        values = {nnx_layers.path_text(p): v for p, v in flatten_dict(given).items()}
        missing = []

        def filled(state: nnx.State) -> nnx.State:
            leaves = []
            for path, leaf in nnx.to_flat_state(state):
                text = nnx_layers.path_text(path)
                if text in values:
                    leaf = leaf.replace(values[text])
                else:
                    missing.append(text)
                leaves.append((path, leaf))
            return nnx.from_flat_state(leaves)

        variables = {"params": nnx.to_pure_dict(filled(params)), "state": filled(rest)}
        if missing:
            own = dataclasses.replace(self, params=None)
            paths = own.stored_paths(own.variables)
            lost = [p for p, read in zip(paths, own.reads) if read and p in missing]
            if lost:
                raise PlanError(
                    "Expected params with every variable that the call reads, got none "
                    f"for {', '.join(map(repr, lost))}. Pass the whole nnx.state(model)"
                    ", or None for the model's own."
                )
        return variables

    def _plan(self, to: Form, rules: Sequence[Rule]) -> Plan:
        options = dict(self.kwargs)
        method = options.pop("method", None)
        return plan_nnx(self.model, self.args, to, rules, method, options)

    def _explain_inputs(self, error: Exception) -> None:
        if any(isinstance(arg, nnx.State) for arg in self.args):
            raise PlanError(
                "Expected the inputs of the call, got an nnx.State: the model holds "
                "its variables. Pass make_plan(model, *inputs)."
            ) from error
        super()._explain_inputs(error)

    def _call(self, variables: PyTree, args: PyTree, kwargs: PyTree) -> Any:
        return bound_method(self._merged(variables), kwargs.get("method"))(
            *args, **_without(kwargs)
        )

    def call(self, variables: PyTree, arrays: PyTree = None) -> PyTree:
        """The output, and the batch statistics after the call if there are any."""
        return self._run(variables, arrays, lambda model: None)

    def named(
        self, variables: PyTree, arrays: PyTree, wanted: Callable[[str], bool]
    ) -> PyTree:
        """Also names the inputs of linear layers."""
        return self._run(variables, arrays, lambda model: _name_modules(model, wanted))

    def _run(
        self, variables: PyTree, arrays: PyTree, prepare: Callable[[Any], None]
    ) -> Any:
        args, kwargs = self._arguments(arrays)
        model = self._merged(variables)
        prepare(model)
        out = bound_method(model, kwargs.get("method"))(*args, **_without(kwargs))
        updated = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return (out, updated) if updated else out

    def check_inference(self) -> None:
        """Refuse a call that changes batch statistics."""
        jaxpr, out = jax.make_jaxpr(self.call, return_shape=True)(
            self.shapes, self.arrays
        )
        if not nnx.state(self.model, nnx.BatchStat):
            return
        updated = list(map(nnx_layers.path_text, flatten_dict(out[1])))
        after = jaxpr.jaxpr.outvars[-len(updated) :]
        changed = [p for p, var in zip(updated, after) if var not in jaxpr.jaxpr.invars]
        if changed:
            raise PlanError(
                f"Expected a {type(self.model).__name__} in eval mode, got one whose "
                f"call changes {changed[0]!r}. Call model.eval() first; on the command "
                "line, pass a function that does so and returns the model."
            )

    def _merged(self, variables: PyTree) -> Any:
        graphdef, params, _ = self._parts
        # A copy: replacing by a dict changes the state in place.
        state = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(state, variables["params"])
        return nnx.merge(graphdef, state, variables["state"], copy=True)


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "method"}


def _name_modules(model: nnx.Module, wanted: Callable[[str], bool]) -> None:
    """Makes modules name what goes in and comes out, in a model of one call's own."""
    # All modules are collected first: renamed classes would change the walk.
    for path, module in list(nnx_layers.modules(model)):
        if wanted(path) and callable(module):
            setattr(module, _PATH, path)
            object.__setattr__(module, "__class__", _naming(type(module)))


@functools.cache
def _naming(cls: type) -> type:
    """A subclass whose call names its input and its output."""

    def call(self: Any, *args: PyTree, **kwargs: PyTree) -> PyTree:
        path = getattr(self, _PATH)
        rows = _canonical_input(self, cls, args)
        if rows is not None:
            name_input(path, rows)
        return name_output(path, cls.__call__(self, *args, **kwargs))

    names = {"__call__": call, "__module__": cls.__module__}
    return type(cls)(cls.__name__, (cls,), names)


def _canonical_input(layer: Any, cls: type, args: tuple[Any, ...]) -> Any:
    """The input of a linear layer as both of its forms take it."""
    kind = nnx_layers.KINDS_BY_CLASS.get(cls)
    if kind is None or not args:
        return None
    if kind == "Conv":
        return args[0]
    return nnx_layers.dense_axes(layer, args[0].ndim).canonical(args[0])


FRONTEND = BoundNnx
