"""Plans an NNX model: traces a clone whose linear layers note each of their calls."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from .. import arguments, nnx_layers
from ..functions.products import Product, rewrite
from ..functions.trace import trace
from ..linen_layers import conv_geometry
from ..plan import Form, LayerPlan, Plan
from ..rules import Rule, match_rules
from ..variables import is_variable
from .function import as_call, on_leaf
from .inputs import mark, marked
from .layers import Call, LeftError, kernel_sizes, plan_layers
from .uses import Uses, find_uses, mark_parameter

_RECORDER = "_fcconv_jax_recorder"


@dataclasses.dataclass(eq=False)
class _Recorder:
    """Notes the calls of a trace.

    It hangs on the stand-ins as a static attribute and is equal only to itself, which
    keeps this trace out of every jit cache that another one reads.
    """

    calls: dict[str, list[Call]] = dataclasses.field(default_factory=dict)
    paths: list[str] = dataclasses.field(default_factory=list)
    products: dict[str, list[Product]] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

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

    def einsum(self, layer: Any, path: str, x: Any, equation: str | None) -> Any:
        """Calls an ``nnx.Einsum``, whose product a trace of its own shows."""
        number = len(self.paths)
        self.paths.append(f"{path}/kernel".lstrip("/"))
        kernel = mark_parameter(layer.kernel.get_value(), number, "")
        function = nnx_layers.einsum_function(layer)
        traced = trace(function, (kernel, x, equation), {})
        products = [p for _, p in traced.program.walk() if isinstance(p, Product)]
        if traced.program.uses or len(products) != 1:
            self.left[path] = "its einsum is no product of the input with its kernel"
            return function(kernel, x, equation)
        self.products.setdefault(self.paths[-1], []).append(products[0])
        self.calls.setdefault(self.paths[-1], []).append(as_call(products[0], number))

        def replace(product: Product, operands: Sequence[Any]) -> Any:
            inputs = list(operands)
            inputs[1 - product.side] = mark(operands[1 - product.side], number)
            return product.eqn.primitive.bind(*inputs, **product.eqn.params)

        def wanted(product: Product) -> bool:
            return product.obstacle is None

        return rewrite(traced.program, traced.operands, wanted, replace)[0]


def _recorded_call(self: Any, inputs: Any, out_sharding: Any = None) -> Any:
    """What a stand-in does when it is called."""
    recorder, kind, path = getattr(self, _RECORDER)
    return recorder.call(self, kind, path, inputs, out_sharding)


def _recorded_einsum(
    self: Any, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None
) -> Any:
    """What a stand-in for an ``nnx.Einsum`` does when it is called."""
    recorder, _, path = getattr(self, _RECORDER)
    if out_sharding is None:
        return recorder.einsum(self, path, inputs, einsum_str)
    recorder.left[path] = "its product is given an out_sharding"
    return nnx.Einsum.__call__(self, inputs, einsum_str, out_sharding)


# Subclasses with one base each: Python lets an object of the base become one.
class _Linear(nnx.Linear):
    __call__ = _recorded_call


class _LinearGeneral(nnx.LinearGeneral):
    __call__ = _recorded_call


class _Conv(nnx.Conv):
    __call__ = _recorded_call


class _Einsum(nnx.Einsum):
    __call__ = _recorded_einsum


_STAND_INS = {
    "Linear": _Linear,
    "LinearGeneral": _LinearGeneral,
    "Conv": _Conv,
    "Einsum": _Einsum,
}


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
    stored = _stored(state)
    leaves, fixed = arguments.split(state)
    arrays, static = arguments.split((tuple(inputs), dict(kwargs)))

    def run(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
        args, options = static.merge(arrays)
        called = nnx.merge(graphdef, fixed.merge(leaves))
        out = _bound(called, method)(*args, **options)
        return [leaf for leaf in jax.tree.leaves(out) if arguments.is_array(leaf)]

    jaxpr = jax.make_jaxpr(run)(leaves, arrays)
    dense = ("Linear", "LinearGeneral", "Einsum", "dot_general")
    source = ("Conv",) if to == "dense" else dense
    layers = {p: c for p, c in recorder.calls.items() if c[0].kind in source}
    names = [number for number, path in enumerate(stored) if path is not None]
    parameters = _Parameters(stored, find_uses(jaxpr, names), recorder.paths, layers)
    chosen = match_rules(rules, kernel_sizes(layers))
    planned, left = plan_layers(
        marked(jaxpr), layers, to, chosen, parameters.stack_axes
    )
    for path in planned.keys() & recorder.products.keys():
        try:
            planned[path] = on_leaf(planned[path], recorder.products[path])
        except LeftError as reason:
            del planned[path]
            left[path] = str(reason)
    _leave_tied(planned, left, parameters)
    planned = {p: parameters.with_ties(p, layer) for p, layer in planned.items()}
    for path, kind in kinds.items():
        key = f"{path}/kernel".lstrip("/") if kind == "Einsum" else path
        if kind in source and key not in layers:
            left[path] = recorder.left.get(path) or _why_not_called(model, path)
    left.update(_others(model, state, kinds))
    return Plan(to, tuple(planned.items()), tuple(left.items()))


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


def _stored(state: Any) -> list[str | None]:
    """The path of each array in the state, in order; None for what is no Variable's."""
    found: list[str | None] = []
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)
    for path, leaf in leaves:
        arrays = [a for a in jax.tree.leaves(leaf) if arguments.is_array(a)]
        text = nnx_layers.path_text(tuple(_key(key) for key in path))
        single = is_variable(leaf) and len(arrays) == 1
        found += [text if single else None] * len(arrays)
    return found


def _key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


@dataclasses.dataclass(frozen=True)
class _Parameters:
    """Which stored parameters each layer reads, as the trace says."""

    stored: Sequence[str | None]
    uses: Mapping[int, Uses]
    paths: Sequence[str]
    layers: Mapping[str, Sequence[Call]]

    def of(self, path: str, name: str) -> dict[int, set[tuple[int, ...]]]:
        """Numbers of the leaves that a layer reads, with the axes taken off each."""
        found: dict[int, set[tuple[int, ...]]] = {}
        for leaf, uses in self.uses.items():
            for (number, parameter), removed in uses.layers.items():
                if self.paths[number] == path and parameter == name:
                    found.setdefault(leaf, set()).update(removed)
        return found

    def readers(self, leaf: int) -> list[str]:
        """Paths of the layers that read a leaf."""
        return list(
            dict.fromkeys(self.paths[number] for number, _ in self.uses[leaf].layers)
        )

    def stack_axes(self, path: str, call: Call) -> tuple[int, ...]:
        """Axes of the stored parameters that the layer does not see.

        Raises:
          LeftError: something else than the layer reads them, or changes them before.
        """
        if call.kind == "dot_general":  # planned by the path of the kernel itself
            return (0,) * self._depth(path, "", "kernel")
        depths = {
            name: self._depth(path, name, name)
            for name in ("kernel", "bias")[: 1 + (call.bias is not None)]
        }
        if len(set(depths.values())) > 1:
            raise LeftError("its kernel and its bias are stacked differently")
        return (0,) * depths["kernel"]

    def _depth(self, path: str, parameter: str, name: str) -> int:
        read = self.of(path, parameter)
        calls = {call.number for call in self.layers[path]}
        marked = {
            number
            for leaf in read
            for number, other in self.uses[leaf].layers
            if other == parameter and number in calls
        }
        if len(read) != 1:
            raise LeftError(
                f"its {name} is transformed on the way to the layer, or is another one "
                "in each call"
                if read or not marked
                else f"its {name} comes from several parameters"
            )
        ((leaf, removed),) = read.items()
        if self.uses[leaf].others:
            what = ", ".join(sorted(set(self.uses[leaf].others)))
            raise LeftError(
                f"its {name} {self.stored[leaf]!r} is also read outside of the layer's "
                f"own call (by {what}), where the other shape would not fit"
            )
        if len(removed) > 1:
            raise LeftError(f"its {name} is stacked differently from call to call")
        (axes,) = removed
        if sorted(axes) != list(range(len(axes))):
            raise LeftError(
                f"its {name} is stacked on axis {axes[0]}, which may count from either "
                "end and would move in another shape: stack on axis 0"
            )
        return len(axes)

    def with_ties(self, path: str, layer: LayerPlan) -> LayerPlan:
        """The plan of a layer, naming the parameters stored under other paths."""
        own = {"/".join(part for part in (path, n) if part): n for n, _ in layer.leaves}
        tied = tuple(name for key, name in own.items() if key not in self.stored)
        return dataclasses.replace(layer, tied=tied) if tied else layer


def _leave_tied(
    planned: dict[str, LayerPlan], left: dict[str, str], parameters: _Parameters
) -> None:
    """Leaves layers alone whose parameters another layer needs as they are."""
    shared = [leaf for leaf in parameters.uses if len(parameters.readers(leaf)) > 1]
    changed = True
    while changed:
        changed = False
        for leaf in shared:
            readers = parameters.readers(leaf)
            moves = {
                (move, planned[path].stack_axes)
                for path in readers
                if path in planned
                for name, move in planned[path].leaves
                if leaf in parameters.of(path, name)
            }
            if len(moves) <= 1 and all(path in planned for path in readers):
                continue
            for path in [path for path in readers if path in planned]:
                others = ", ".join(repr(p) for p in readers if p != path)
                del planned[path]
                left[path] = (
                    f"its parameter {parameters.stored[leaf]!r} is tied to that of "
                    f"{others}, which does not convert in the same way"
                )
                changed = True


def _why_not_called(model: nnx.Module, path: str) -> str:
    """Why a linear layer was not seen in the trace."""
    layer = dict(nnx_layers.modules(model))[path]
    return nnx_layers.obstacle(layer) or "the trace of these inputs does not call it"


def _others(model: nnx.Module, state: Any, kinds: Mapping[str, str]) -> dict[str, str]:
    """Layers of other classes, and parameters of two or more axes that stand alone."""
    left, covered = {}, set(kinds)
    classes = {}
    for path, module in nnx_layers.modules(model):
        name = type(module).__name__
        classes[path] = name
        base = next(
            (k for k, cls in nnx_layers.KINDS.items() if isinstance(module, cls)), None
        )
        if base is None or path in kinds:
            continue
        covered.add(path)
        left[path] = (
            f"{name} is a class of its own on top of nnx.{base}, which may change the "
            "kernel or add to the product"
        )
        if isinstance(module, nnx.LoRALinear):
            left[path] += (
                "; nnx.LoRA(..., base_module=linear) keeps the adapter beside a "
                "plain nnx.Linear, which converts"
            )
    for path, variable in nnx.to_flat_state(state):
        owner = nnx_layers.path_text(path[:-1])
        inside = owner in covered or any(c and owner.startswith(f"{c}/") for c in left)
        if not isinstance(variable, nnx.Param) or inside:
            continue
        shape = getattr(variable.get_value(), "shape", ())
        if len(shape) < 2:
            continue
        name = classes.get(owner, "the model")
        left[nnx_layers.path_text(path)] = _why_alone(name, str(path[-1]), tuple(shape))
    return left


def _why_alone(owner: str, name: str, shape: tuple[int, ...]) -> str:
    if owner == "Embed":
        return (
            f"the table of an Embed, {shape}: looked up by index; a head tied to it "
            "(attend) multiplies by the same array"
        )
    if owner == "ToNNX":
        return (
            f"{shape}, of a linen module inside ToNNX: plan and convert the linen "
            "module before wrapping it"
        )
    return (
        f"{owner} uses its own parameter {name!r} {shape}: no Linear, LinearGeneral, "
        "Einsum or Conv layer reads it; plan the model as a function of its state, "
        "lambda state, x: nnx.merge(graphdef, state)(x), with nnx.split(model)"
    )
