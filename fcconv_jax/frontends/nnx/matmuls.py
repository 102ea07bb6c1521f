"""Runs the methods of NNX modules with some of their matmuls in the other form.

A module that multiplies parameters in its own code, and every module above it, becomes
a subclass of its class. Its methods go their own way, on a copy of the module of the
original classes that lives in a trace, and the trace is rewritten matmul by matmul.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from ...messages.errors import PlanError
from ...params.leaves import convert_leaf, move_metadata
from ...params.move import inner_shape
from ...params.moves import map_leaves
from ...plan import LayerPlan, Plan, direction
from ...tracing import arguments
from ...versions import (
    containers,
    graph_mode,
    iter_graph,
    pytree_option,
    raw_value,
    set_metadata,
    set_raw_value,
)
from ..function.model import run_rewritten
from . import layers as nnx_layers
from .nodes import (
    FunctionReturnedError,
    Steps,
    check_returned,
    refused,
    with_nodes,
    without_nodes,
)

_PLAN, _ORIGINAL = "_fcconv_jax_plan", "_fcconv_jax_original"
_TAG = "fcconv_jax"


def converted_matmuls(model: nnx.Module) -> dict[int, LayerPlan]:
    """The plan that each parameter went through, by the identity of its Variable."""
    found: dict[int, LayerPlan] = {}
    for _, module in nnx_layers.modules(model):
        found |= _matmuls_of(module)
    return found


def set_classes(
    model: nnx.Module,
    gone: Container[int],
    new: Mapping[int, LayerPlan],
) -> None:
    """Makes each module of a model the class that its matmuls ask for.

    Args:
      model: its planned parameters are converted.
      gone: parameters that went back, by the identity of the Variable.
      new: parameters that have been converted, as :func:`converted_matmuls` has them.
    """
    for _, module in nnx_layers.modules(model):
        if not isinstance(module, containers()):
            matmuls = {**_matmuls_of(module), **new}
            _set_matmuls(module, {k: p for k, p in matmuls.items() if k not in gone})


def _matmuls_of(module: Any) -> dict[int, LayerPlan]:
    """:func:`converted_matmuls` of a module's own class."""
    plan = vars(type(module)).get(_PLAN)
    if plan is None:
        return {}
    own = nnx_layers.variables(module)
    return {id(own[path]): layer for path, layer in plan.items()}


def _set_matmuls(module: Any, matmuls: Mapping[int, LayerPlan]) -> None:
    """Gives a module the class that runs those matmuls that are below it."""
    own = {
        path: matmuls[id(variable)]
        for path, variable in nnx_layers.variables(module).items()
        if id(variable) in matmuls
    }
    cls = vars(type(module)).get(_ORIGINAL, type(module))
    if own:
        cls = _rewritten_class(cls, Plan(direction(own), tuple(own.items())))
    if cls is not type(module):
        _set_class(module, cls)


def _rewritten_class(cls: type[nnx.Module], plan: Plan) -> type[nnx.Module]:
    """The subclass whose methods are rewritten; one for each class and plan.

    So modules that are alike have equal ``GraphDef``s, and share entries of jit caches.
    """
    for known in cls.__subclasses__():
        if vars(known).get(_PLAN) == plan:
            return known
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        _PLAN: plan,
        _ORIGINAL: cls,
    }
    methods = {
        name: _rewritten_method(name, value) for name, value in _methods(cls).items()
    }
    make: Any = type(cls)
    return make(cls.__name__, (cls,), {**names, **methods}, **pytree_option(cls))


# Special methods that make, show, compare or store an object: none computes with it.
_NO_CALLS = frozenset(
    """
    __class_getitem__ __copy__ __deepcopy__ __del__ __delattr__ __dir__ __eq__
    __format__ __getattr__ __getattribute__ __getnewargs__ __getnewargs_ex__
    __getstate__ __hash__ __init__ __init_subclass__ __ne__ __new__ __post_init__
    __reduce__ __reduce_ex__ __repr__ __set_name__ __setattr__ __setstate__ __sizeof__
    __str__ __subclasshook__
    """.split()
)


def _methods(cls: type) -> dict[str, Any]:
    """Return a class's members beyond ``nnx.Module``'s that may compute, by name.

    Methods, special ones such as ``__getitem__``, and properties.
    """
    known = set(dir(nnx.Module)) - {"__call__"}
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base in nnx.Module.__mro__:
            continue
        for name, value in vars(base).items():
            special = name.startswith("__") and name.endswith("__")
            private = name.startswith("_") and not special
            if private or name in known or name in _NO_CALLS or name in found:
                continue
            method = callable(value) and hasattr(value, "__get__")
            if isinstance(value, property) or (
                method and not isinstance(value, staticmethod | type)
            ):
                found[name] = value
    return found


def _rewritten_method(name: str, original: Any) -> Any:
    """A method or a property that goes through :func:`_call_method`."""
    if isinstance(original, property):
        read = property(lambda self: _call_method(self, name, ()))
        return property(read.fget, original.fset, original.fdel, original.__doc__)

    def method(self: Any, *args: PyTree, **kwargs: PyTree) -> Any:
        return _call_method(self, name, ((args, kwargs),))

    return functools.wraps(original)(method)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles a module of a class that is made at run time: by its original class."""
    cls = vars(type(self))
    _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
    return (_unpickled, (cls[_ORIGINAL], cls[_PLAN]), *state)


def _unpickled(cls: type[nnx.Module], plan: Plan) -> Any:
    rewritten = _rewritten_class(cls, plan)
    return rewritten.__new__(rewritten)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Outputs of a trace other than arrays, as a PyTree without leaves."""

    value: Any


jax.tree_util.register_static(_Static)


def _call_method(
    module: Any, name: str, calls: tuple[Any, ...], traced: bool = True
) -> Any:
    """Calls a method of a module, and updates what the method changes.

    Args:
      module: of a rewritten class.
      name: of the method or property.
      calls: positional and keyword arguments: of the method, and of what it returns.
      traced: whether it is rewritten; else it runs as it is, on parameters in the form
        that it was written for.
    """
    nodes, rest = without_nodes(calls)
    arrays, static = arguments.split(rest)
    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as split:
            graphdef, state = split.split((module, *nodes))
        call = _Call(name, vars(type(module))[_PLAN], graphdef, static, traced)
        run = _jitted if traced and _is_hashable(call) else _Call.run
        try:
            ended = run(call, state, arrays)
        except FunctionReturnedError as returned:
            if not returned.later:
                return _call_method(module, name, calls, traced=False)
            return lambda *args, **kwargs: _call_method(
                module, name, (*calls, (args, kwargs))
            )
        found: tuple[Any, ...] = ()
        if ended.structure is not None:
            with nnx.merge_context(_TAG, inner=False) as merge:
                merged: Any = merge.merge(*ended.structure)
            found = merged[1 + len(nodes) :]
    if ended.changed:
        variables = nnx_layers.variables((module, *nodes))
        for path, value in ended.changed.items():
            set_raw_value(variables[path], value)
    out = with_nodes(ended.static.value.merge(ended.arrays), found)
    # A generator ends in the trace that it runs in, so its steps were collected there.
    return iter(out.each) if isinstance(out, Steps) else out


def _is_hashable(call: _Call) -> bool:
    """Whether a call can be a key of jit; an attribute or an argument may not be."""
    try:
        hash(call)
    except TypeError:
        return False
    return True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Ended:
    """Result of a rewritten call.

    Args:
      arrays: of what the method returns.
      static: the rest of it.
      changed: new values of Variables, by path.
      structure: where more than that has changed, or a module is returned: all objects
        of the call, those that it returns at the end, as ``split`` gives them.
    """

    arrays: list[Any]
    static: _Static
    changed: dict[str, Any]
    structure: tuple[Any, Any] | None


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a method: all that is static about it.

    Args:
      name: of the method.
      plan: of the module's matmuls.
      graphdef: of the module, and of modules and Variables among the arguments.
      static: the arguments without their arrays.
      traced: whether it is traced and rewritten.
    """

    name: str
    plan: Plan
    graphdef: Any
    static: arguments.Static
    traced: bool = True

    def run(self, state: PyTree, arrays: Sequence[Any]) -> _Ended:
        """Runs it, rewritten."""
        stored = {
            nnx_layers.path_text(path[1:]): raw_value(variable)
            for path, variable in nnx.to_flat_state(state)
            if path[0] == 0 and isinstance(variable, nnx.Variable)
        }
        params = {path: stored[path] for path in self.plan}
        layers = tuple(
            (path, _as_present(path, layer, params[path]))
            for path, layer in self.plan.items()
        )
        plan = Plan(self.plan.to, layers)
        follow = functools.partial(self._follow, plan)
        if not self.traced:
            return follow(map_leaves(params, plan.inverse()), state, list(arrays))
        return run_rewritten(follow, plan, (params, state, list(arrays)), {})

    def _follow(
        self, plan: Plan, params: PyTree, state: PyTree, arrays: PyTree
    ) -> _Ended:
        """The original method, on parameters as it knows them.

        Args:
          plan: of its matmuls.
          params: their parameters in the form that the plan comes from.
          state: of all objects of the call, in the plan's form.
          arrays: among the arguments.
        """
        with nnx.merge_context(_TAG, inner=True) as merge:
            module, *nodes = merge.merge(self.graphdef, state)
        before = _objects((module, *nodes))
        rewritten = [
            (path, each, type(each))
            for path, each in before.items()
            if isinstance(each, nnx.Module) and _PLAN in vars(type(each))
        ]
        here = {f"0/{path}": id(before[f"0/{path}"]) for path in plan}
        for path, each, cls in rewritten:
            if all(f"{path}/{below}" in here for below in vars(cls)[_PLAN]):
                _set_class(each, vars(cls)[_ORIGINAL])
                continue
            # A part that was converted separately before stays converted.
            rest = _matmuls_of(each).items()
            rest = {key: p for key, p in rest if key not in here.values()}
            _set_matmuls(each, rest)
        there = {}
        for path, layer in plan.inverse().items():
            there[path] = raw_value(before[f"0/{path}"])
            _set(before[f"0/{path}"], params[path], layer)
        values = _values(before)
        out = getattr(module, self.name)
        for args, kwargs in with_nodes(self.static.merge(arrays), nodes):
            out = out(*args, **kwargs)
        if isinstance(out, Iterator):
            out = Steps(list(out))
        method = f"{type(module).__name__}.{self.name}"
        check_returned(method, out, self.traced)
        after = _objects((module, *nodes))
        same = before.keys() == after.keys() and all(
            before[path] is after[path] for path in before
        )
        changed = {
            path: jax.tree.unflatten(*reversed(value))
            for path, value in _values(after).items()
            if not _is_same(value, values.get(path))
        }
        for path, layer in plan.items():
            key = f"0/{path}"
            if key in changed:
                there[path] = changed[key] = convert_leaf(
                    layer.kernel, changed[key], layer.stack_axes
                )
            if key in after and self.traced:
                _set(after[key], there[path], layer)
        returned, rest = without_nodes(out)
        outs, static = arguments.split(rest)
        if not self.traced:
            if returned or not same:
                raise refused(method)
            return _Ended(outs, _Static(static), changed, None)
        for _, each, cls in rewritten:
            _set_class(each, cls)
        same = same and nnx.graphdef((module, *nodes), **graph_mode()) == self.graphdef
        structure = None
        if returned or not same:
            with nnx.split_context(_TAG) as split:
                structure = split.split((module, *nodes, *returned))
                changed = {}
        return _Ended(outs, _Static(static), changed, structure)


_jitted = jax.jit(_Call.run, static_argnums=0)


def _as_present(path: str, layer: LayerPlan, value: Any) -> LayerPlan:
    """The plan of a matmul with the stack axes that the parameter still has.

    Raises:
      PlanError: the parameter has another shape than the plan gave it.
    """
    target = layer.kernel.target
    axes = layer.stack_axes[: max(len(value.shape) - len(target), 0)]
    if inner_shape(value.shape, axes, target) != target:
        raise PlanError(
            f"Expected {path!r} of shape {target}, as converted, got "
            f"{tuple(value.shape)}. Update the model with the converted params."
        )
    return dataclasses.replace(layer, stack_axes=axes)


def _set(variable: nnx.Variable, value: Any, layer: LayerPlan) -> None:
    """Puts a value that has moved into a Variable, and moves its metadata."""
    if updates := move_metadata(layer.kernel, variable, layer.stack_axes):
        set_metadata(variable, updates)
    set_raw_value(variable, value)


def _set_class(module: Any, cls: type[nnx.Module]) -> None:
    object.__setattr__(module, "__class__", cls)


def _objects(nodes: Any) -> dict[str, Any]:
    """All objects of a graph, by their first path."""
    return {
        nnx_layers.path_text(path): node for path, node in iter_graph(nodes) if path
    }


def _values(objects: Mapping[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """The values of the Variables, flat: one may be changed in place."""
    return {
        path: jax.tree.flatten(raw_value(node))
        for path, node in objects.items()
        if isinstance(node, nnx.Variable)
    }


def _is_same(after: Any, before: Any) -> bool:
    if before is None or after[1] != before[1]:
        return False
    # In a trace values aren't known: what was written is another object.
    return all(a is b for a, b in zip(after[0], before[0], strict=True))
