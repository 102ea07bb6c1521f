"""Plans an NNX model: traces a clone whose linear layers note each of their calls."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from ...params.variables import is_variable
from ...plan import Form, Plan
from ...plan.rules import Rule, match_rules
from ...planning.decide import Call, kernel_sizes, plan_layers
from ...planning.own_parameters import OwnParameters
from ...planning.plan_matmuls import matmul_sizes
from ...planning.trace import Traced, trace
from ...tracing import arguments
from ...tracing.marks import mark, marked
from ...tracing.parameter_reads import find_uses, mark_parameter
from ..linen.layers import conv_geometry
from . import layers as nnx_layers
from .parameters import Parameters, leave_tied, stored_paths

_RECORDER = "_fcconv_jax_recorder"


@dataclasses.dataclass(eq=False)
class _Recorder:
    """Notes the calls of a trace.

    It hangs on the stand-ins as a static attribute and is equal only to itself, which
    keeps this trace out of every jit cache that another one reads.
    """

    calls: dict[str, list[Call]] = dataclasses.field(default_factory=dict)
    paths: list[str] = dataclasses.field(default_factory=list)

    def call(self, layer: Any, kind: str, path: str, x: Any, out_sharding: Any) -> Any:
        """Calls a layer as it is, on marked input and parameters."""
        number = len(self.paths)
        self.paths.append(path)
        shadow = types.SimpleNamespace(**vars(layer))
        shadow.kernel = mark_parameter(layer.kernel.get_value(), number, "kernel")
        bias = nnx_layers.bias_of(layer)
        shadow.bias = None if bias is None else mark_parameter(bias, number, "bias")
        shape = tuple(x.shape)
        dense = kind != "Conv"
        self.calls.setdefault(path, []).append(
            Call(
                kind=kind,
                number=number,
                shape=shape,
                kernel=tuple(shadow.kernel.shape),
                bias=None if bias is None else tuple(bias.shape),
                axes=nnx_layers.dense_axes(layer, len(shape)) if dense else None,
                geometry=None if dense else conv_geometry(layer, shape),
                obstacle=nnx_layers.obstacle(layer),
            )
        )
        method: Any = nnx_layers.KINDS[kind].__call__
        return method(shadow, mark(x, number), out_sharding=out_sharding)


def _recorded_call(self: Any, inputs: Any, out_sharding: Any = None) -> Any:
    """What a stand-in does when it is called."""
    recorder, kind, path = getattr(self, _RECORDER)
    return recorder.call(self, kind, path, inputs, out_sharding)


# Subclasses with one base each: Python lets an object of the base become one.
class _Linear(nnx.Linear):
    __call__ = _recorded_call


class _LinearGeneral(nnx.LinearGeneral):
    __call__ = _recorded_call


class _Conv(nnx.Conv):
    __call__ = _recorded_call


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
    recorder = _Recorder()
    twin = _abstract(model)
    kinds = {}
    for path, module in nnx_layers.modules(twin):
        kind = nnx_layers.layer_kind(module)
        if kind is not None and nnx_layers.obstacle(module) is None:
            object.__setattr__(module, "__class__", _STAND_INS[kind])
            setattr(module, _RECORDER, (recorder, kind, path))
        if kind is not None:
            kinds[path] = kind
    graphdef, state = nnx.split(twin, graph=True)
    stored = stored_paths(state)
    leaves, fixed = arguments.split(state)
    arrays, static = arguments.split((tuple(inputs), dict(kwargs)))

    def run(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
        args, options = static.merge(arrays)
        called = nnx.merge(graphdef, fixed.merge(leaves))
        out = _bound(called, method)(*args, **options)
        return arguments.split(out)[0]

    jaxpr = jax.make_jaxpr(run)(leaves, arrays)
    source = ("Conv",) if to == "dense" else ("Linear", "LinearGeneral")
    layers = {p: c for p, c in recorder.calls.items() if c[0].kind in source}
    names = [number for number, path in enumerate(stored) if path is not None]
    parameters = Parameters(stored, find_uses(jaxpr, names), recorder.paths, layers)
    blocked = parameters.blocked()
    modules = dict(nnx_layers.modules(model))
    variables = nnx_layers.variables(model)
    left = {
        path: _why_not_called(modules[path])
        for path, kind in kinds.items()
        if kind in source and path not in layers
    }
    left |= blocked | _subclasses(modules, source)
    owners = _owners(modules, variables, left)
    described, tables = _described(
        modules, variables, parameters.read_otherwise(blocked), left, owners
    )
    known = [path for path in stored if path not in described]
    own = OwnParameters.find(
        described,
        known,
        to,
        [functools.partial(_trace, model, described, inputs, method, kwargs)],
    )
    sizes = {**kernel_sizes(layers), **matmul_sizes(own.layers)}
    chosen = dict(match_rules(rules, sizes))
    for path in own.layers:  # a rule may name the layer, too
        found = [chosen.get(p) for p in (path, *owners.get(path, ()))]
        chosen[path] = min(filter(None, found), key=rules.index, default=None)
    free = {path: calls for path, calls in layers.items() if path not in blocked}
    planned, reasons = plan_layers(
        marked(jaxpr), free, to, chosen, parameters.stack_axes
    )
    leave_tied(planned, reasons, parameters)
    planned = {p: parameters.with_ties(p, layer) for p, layer in planned.items()}
    matmuls, more = own.plan(to, chosen)
    for leaf, (path, *tied) in owners.items():
        # What is said of a layer's kernel is said of the layer.
        if leaf in matmuls:
            left = {p: why for p, why in left.items() if p not in (path, *tied)}
        elif leaf in more:
            left[path] = more.pop(leaf)
    layer_plans = {**planned, **matmuls}
    left = {**reasons, **left, **more, **tables}
    return Plan(to, tuple(layer_plans.items()), tuple(left.items()))


def _trace(
    model: nnx.Module,
    wanted: Container[str],
    inputs: Sequence[Any],
    method: Any,
    kwargs: Mapping[str, Any],
) -> Traced:
    """The trace of an NNX model as a function of its parameters."""
    graphdef, params, rest = nnx.split(
        _abstract(model),
        nnx.Any(nnx.Param, lambda path, _: nnx_layers.path_text(path) in wanted),
        ...,
        graph=True,
    )
    for variable in jax.tree.leaves((params, rest), is_leaf=is_variable):
        if is_variable(variable) and (variable.ref or variable.hijax):
            raise TypeError("it holds mutable references, whose shape is fixed")

    def run(params: Any, rest: Any, args: Any, kwargs: Any) -> list[Any]:
        called = nnx.merge(graphdef, params, rest, copy=True)
        out = _bound(called, method)(*args, **kwargs)
        return arguments.split(out)[0]

    return trace(run, (params, rest, tuple(inputs), dict(kwargs)), {})


def _abstract(model: nnx.Module) -> nnx.Module:
    """A clone whose Variables hold shapes: it must not keep parameters alive."""
    graphdef, state = nnx.split(model, graph=True)
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_variable)
    arrays, fixed = arguments.split([leaf for leaf in leaves if is_variable(leaf)])
    shapes = iter(fixed.merge(jax.eval_shape(lambda arrays: arrays, arrays)))
    # A bare array stays: NNX would take a shape in its place for a static value.
    leaves = [next(shapes) if is_variable(leaf) else leaf for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves), copy=True)


def _bound(model: Any, method: Any) -> Any:
    """The method to call: the model's own ``__call__``, one by name, or a function."""
    if method is None:
        return model
    if isinstance(method, str):
        return getattr(model, method)
    return lambda *args, **kwargs: method(model, *args, **kwargs)


def _why_not_called(layer: nnx.Module) -> str:
    """Why a linear layer was not seen in the trace."""
    return nnx_layers.obstacle(layer) or "the trace of these inputs does not call it"


def _subclasses(
    modules: Mapping[str, nnx.Module], kinds: Sequence[str]
) -> dict[str, str]:
    """Layers of classes that stand on one of NNX's linear layers, or are converted."""
    left = {}
    for path, module in modules.items():
        base = next((k for k in kinds if isinstance(module, nnx_layers.KINDS[k])), None)
        if base is None or type(module) is nnx_layers.KINDS[base]:
            continue
        if nnx_layers.is_converted(module):
            left[path] = (
                "it is converted already: the inverse() of the plan that did it goes "
                "back"
            )
        else:
            left[path] = (
                f"{type(module).__name__} is a class of its own on top of nnx.{base}, "
                "which may change the kernel or add to the matmul"
            )
    return left


def _owners(
    modules: Mapping[str, Any],
    variables: Mapping[str, nnx.Variable],
    left: Container[str],
) -> dict[str, list[str]]:
    """By the path of its kernel, the layers that do not convert as layers."""
    paths = {id(v): path for path, v in variables.items()}
    owners: dict[str, list[str]] = {}
    for path, module in modules.items():
        if path in left and not nnx_layers.is_converted(module):
            kernel: Any = module.kernel
            if id(kernel) in paths:
                owners.setdefault(paths[id(kernel)], []).append(path)
    return owners


def _described(
    modules: Mapping[str, nnx.Module],
    variables: Mapping[str, nnx.Variable],
    read: Mapping[str, set[str]],
    left: Mapping[str, str],
    owners: Mapping[str, Sequence[str]],
) -> tuple[dict[str, str], dict[str, str]]:
    """The parameters to look for in a trace: whose they are.

    Args:
      modules: those of the model, by path.
      variables: likewise.
      read: parameters that no layer reads which converts as a layer, with the
        primitives that do.
      left: reasons of the layers that do not.
      owners: from :func:`_owners`.

    Returns:
      By the path of the parameter, the beginning of a reason; and the reasons of the
      tables that are looked up by index.
    """
    described, tables = {}, {}
    for path, variable in variables.items():
        owner, _, name = path.rpartition("/")
        while owner and owner not in modules:  # a list or a dict in between
            owner, _, part = owner.rpartition("/")
            name = f"{part}/{name}"
        module = modules[owner]
        shape = tuple(getattr(variable.get_raw_value(), "shape", ()))
        if path not in read or len(shape) < 2 or nnx_layers.is_converted(module):
            continue
        if path in owners:
            described[path] = left[owners[path][0]]
        elif not isinstance(variable, nnx.Param):
            continue
        elif isinstance(module, nnx.Embed) and "gather" in read[path]:
            tables[path] = (
                f"the table of an Embed, {shape}: looked up by index; a head tied to "
                "it (attend) multiplies by the same array"
            )
        else:
            described[path] = (
                f"{type(module).__name__} uses its own parameter {name!r} {shape}"
            )
    return described, tables
