"""Plans an NNX model: a clone's layers name what they read, its trace decides."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from ...params.variables import is_variable
from ...plan import UNCALLED_REASON, Form, LayerPlan, Plan
from ...plan.layer_forms import OutSharding
from ...plan.paths import join_path
from ...plan.rules import Rule
from ...planning.from_trace import Own, plan_trace
from ...planning.layers import LibraryLayer
from ...planning.trace import TracedModel, trace
from ...tracing import arguments
from ...tracing.marks import name_parameter
from ...versions import as_kernel, graph_mode, holds_reference, raw_value, value_of
from . import layers as nnx_layers
from .readers import Readers

_CALLED, _PATH = "_fcconv_jax_called", "_fcconv_jax_path"
_REFS = (
    "it can't be traced, because the model on these inputs raises TypeError: it holds "
    "mutable references, whose shape is fixed"
)


@dataclasses.dataclass(eq=False)
class _Called:
    """The paths of the layers that a trace calls.

    It hangs on the stand-ins as a static attribute and is equal only to itself, which
    keeps this trace out of every jit cache that another one reads.
    """

    paths: set[str] = dataclasses.field(default_factory=set)


def _named_call(self: Any, inputs: PyTree, out_sharding: OutSharding = None) -> Any:
    """Calls a layer as it is, on parameters that have a name in the trace."""
    path = getattr(self, _PATH)
    getattr(self, _CALLED).paths.add(path)
    shadow = types.SimpleNamespace(**vars(self))
    shadow.kernel = as_kernel(name_parameter(path, value_of(self.kernel)))
    bias = nnx_layers.bias_of(self)
    shadow.bias = None if bias is None else as_kernel(name_parameter(path, bias))
    method: Any = type(self).__mro__[1].__call__
    options = {} if out_sharding is None else {"out_sharding": out_sharding}
    return method(shadow, inputs, **options)


# Subclasses with one base each: Python lets an object of the base become one.
class _Linear(nnx.Linear):
    __call__ = _named_call


class _LinearGeneral(nnx.LinearGeneral):
    __call__ = _named_call


class _Conv(nnx.Conv):
    __call__ = _named_call


_STAND_INS = {"Linear": _Linear, "LinearGeneral": _LinearGeneral, "Conv": _Conv}


def plan_nnx(
    model: nnx.Module,
    inputs: Sequence[Any],
    to: Form,
    rules: Sequence[Rule],
    method: Any,
    kwargs: Mapping[str, Any],
) -> Plan:
    """The plan of an NNX model; see :func:`fcconv_jax.make_plan`."""
    modules = dict(nnx_layers.modules(model))
    variables = nnx_layers.variables(model)
    kinds = ("Conv",) if to == "dense" else ("Linear", "LinearGeneral")
    layers = _layers(modules, variables)
    called, traced = _trace(model, layers, inputs, method, kwargs)
    layers = {path: each for path, each in layers.items() if path in called}
    left = _left(modules, kinds, called)
    readers = Readers.of(traced, layers, variables, to)
    left |= readers.blocked()
    free = {path: each for path, each in layers.items() if path not in left}
    own = _own(modules, variables, traced, free, left)
    planned, reasons = plan_trace(traced, to, rules, free, own)
    if _holds_references(model):
        for path in [path for path, layer in planned.items() if layer.is_matmul]:
            del planned[path]
            reasons[next(iter(own[path].layers), path)] = f"{own[path].words}; {_REFS}"
    readers.leave_tied(planned, reasons)
    for path in planned.keys() & free.keys():
        planned[path] = _with_ties(path, planned[path], variables)
    # Those that their kernels' matmuls may stand for have their reasons from there.
    instead = {path for each in own.values() for path in each.layers}
    reasons |= {path: why for path, why in left.items() if path not in instead}
    return Plan(to, tuple(planned.items()), tuple(reasons.items()))


def _layers(
    modules: Mapping[str, Any], variables: Mapping[str, nnx.Variable]
) -> dict[str, LibraryLayer]:
    """NNX's own linear layers that are nothing more than that, in either form."""
    paths = {id(variable): path for path, variable in variables.items()}
    layers = {}
    for path, module in modules.items():
        kind = nnx_layers.layer_kind(module)
        if kind is None or nnx_layers.obstacle(module) is not None:
            continue
        shape = tuple(module.kernel.shape)
        batch, features, ndim = nnx_layers.kernel_split(module)
        depth = len(shape) - ndim
        layers[path] = LibraryLayer(
            kind=kind,
            kernel=paths[id(module.kernel)],
            shape=shape,
            bias=None if module.bias is None else tuple(module.bias.shape)[depth:],
            bias_path=paths.get(id(module.bias), ""),
            batch=batch,
            features=features,
            stack=(0,) * depth,
        )
    return layers


def _trace(
    model: nnx.Module,
    layers: Mapping[str, LibraryLayer],
    inputs: Sequence[Any],
    method: Any,
    kwargs: Mapping[str, Any],
) -> tuple[set[str], TracedModel]:
    """The layers that a call of the model calls, and its trace as a function of params.

    Params are the ``nnx.Param``s and what layers have as kernel or bias.
    """
    twin, called = _abstract(model), _Called()
    held = set()
    for path, module in nnx_layers.modules(twin):
        if path in layers:
            each: Any = module
            held |= {id(each.kernel), id(each.bias)}
            object.__setattr__(module, "__class__", _STAND_INS[layers[path].kind])
            setattr(module, _CALLED, called)
            setattr(module, _PATH, path)
    params = {
        path
        for path, variable in nnx_layers.variables(twin).items()
        if isinstance(variable, nnx.Param) or id(variable) in held
        if arguments.is_array(raw_value(variable))
    }
    graphdef, state, rest = nnx.split(
        twin, lambda path, _: nnx_layers.path_text(path) in params, ..., **graph_mode()
    )

    def run(params: PyTree, rest: Any, args: PyTree, kwargs: PyTree) -> list[Any]:
        called = nnx.merge(graphdef, params, rest, copy=True)
        out = bound_method(called, method)(*args, **kwargs)
        return arguments.split(out)[0]

    traced = trace(run, (state, rest, tuple(inputs), dict(kwargs)), {})
    return called.paths, traced


def _abstract(model: nnx.Module) -> nnx.Module:
    """A clone whose Variables hold shapes: it must not keep parameters alive."""
    graphdef, state = nnx.split(model, **graph_mode())
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_variable)
    arrays, fixed = arguments.split([leaf for leaf in leaves if is_variable(leaf)])
    shapes = iter(fixed.merge(jax.eval_shape(lambda arrays: arrays, arrays)))
    # A bare array stays: NNX would take a shape in its place for a static value.
    leaves = [next(shapes) if is_variable(leaf) else leaf for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves), copy=True)


def bound_method(model: Any, method: Any) -> Callable[..., Any]:
    """Return what to call: ``__call__``, a method by name, or a function of the model.

    Example:
      >>> bound_method("text", "upper")(), bound_method("text", len)()
      ('TEXT', 4)
    """
    if isinstance(method, str):
        return getattr(model, method)
    return model if method is None else functools.partial(method, model)


def _holds_references(model: nnx.Module) -> bool:
    variables = nnx_layers.variables(model).values()
    return any(holds_reference(variable) for variable in variables)


def _left(
    modules: Mapping[str, nnx.Module], kinds: Sequence[str], called: set[str]
) -> dict[str, str]:
    """The linear layers that cannot be taken as layers, with the reason."""
    left = {}
    for path, module in modules.items():
        base = next((k for k in kinds if isinstance(module, nnx_layers.KINDS[k])), None)
        if base is None:
            continue
        if nnx_layers.is_converted(module):
            left[path] = (
                "it is converted already; the inverse() of its plan converts it back"
            )
        elif type(module) is not nnx_layers.KINDS[base]:
            left[path] = (
                f"{type(module).__name__} is a subclass of nnx.{base}, which may "
                "change the kernel or add to the matmul"
            )
        elif (obstacle := nnx_layers.obstacle(module)) is not None:
            left[path] = obstacle
        elif path not in called:
            left[path] = UNCALLED_REASON
    return left


def _own(
    modules: Mapping[str, Any],
    variables: Mapping[str, nnx.Variable],
    traced: TracedModel,
    free: Mapping[str, LibraryLayer],
    left: Mapping[str, str],
) -> dict[str, Own]:
    """The parameters that no layer reads which converts as a layer."""
    owners: dict[int, dict[str, str]] = {}
    for path, why in left.items():
        if not nnx_layers.is_converted(modules[path]):
            owners.setdefault(id(modules[path].kernel), {})[path] = why
    known = {layer.kernel for layer in free.values()}
    own = {}
    for path, variable in variables.items():
        owner, _, name = path.rpartition("/")
        while owner and owner not in modules:  # a list or a dict in between
            owner, _, part = owner.rpartition("/")
            name = f"{part}/{name}"
        shape = traced.shapes.get(path, ())
        module = modules[owner]
        if path in known or len(shape) < 2 or nnx_layers.is_converted(module):
            continue
        declined = owners.get(id(variable), {})
        words = f"{type(module).__name__} uses its own parameter {name!r} {shape}"
        words = next(iter(declined.values()), words)
        embed = isinstance(module, nnx.Embed) and not declined
        own[path] = Own(words, embed, declined)
    return own


def _with_ties(
    path: str, layer: LayerPlan, variables: Mapping[str, object]
) -> LayerPlan:
    """The plan of a layer, naming the parameters stored under other paths."""
    own = {join_path(path, n): n for n, _ in layer.leaves}
    tied = tuple(name for key, name in own.items() if key not in variables)
    return dataclasses.replace(layer, tied=tied) if tied else layer
