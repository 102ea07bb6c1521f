"""Plans a linen model: its modules name the layers, a trace of ``apply`` decides."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import DenyList
from jaxtyping import PyTree

from ...params.leaves import leaf_path
from ...plan import Form, Plan
from ...plan.paths import join_path
from ...plan.rules import Rule
from ...planning.from_trace import Own, plan_trace
from ...planning.layers import LibraryLayer
from ...planning.trace import TracedModel, trace
from ...tracing import arguments
from .interception import intercepting
from .layers import (
    OwnCalls,
    below_map_variables,
    in_a_branch,
    is_lifted,
    kernel_split,
    layer_kind,
    module_path,
    obstacle,
)


@dataclasses.dataclass
class _Names:
    """Notes the modules that ``init`` calls: where they are, and what they are.

    Args:
      layers: by path, the linear layers; their kernels are those that they see.
      owners: by path, the classes of all modules.
      stack: the modules that are being called.
      own: knows the model's own calls.
    """

    layers: dict[str, LibraryLayer] = dataclasses.field(default_factory=dict)
    owners: dict[str, type] = dataclasses.field(default_factory=dict)
    stack: list[nn.Module] = dataclasses.field(default_factory=list)
    own: OwnCalls = dataclasses.field(default_factory=OwnCalls)

    def __call__(
        self, next_fun: Any, args: PyTree, kwargs: PyTree, context: Any
    ) -> Any:
        module = context.module
        with self.own.enter(module) as own:
            if not own:
                return next_fun(*args, **kwargs)
            path = module_path(module)
            self.owners[path] = type(module)
            kind = layer_kind(context)
            self.stack.append(module)
            try:
                y = next_fun(*args, **kwargs)
                if kind is not None:
                    self._note(kind, path, module)
            finally:
                self.stack.pop()
        # What maps variables may look at their structure, which a box would change;
        # branches must leave the same structure.
        if (
            is_lifted(module)
            and not below_map_variables(module)
            and not in_a_branch(module)
            and module.is_mutable_collection("params")
        ):
            _box_params(module)
        return y

    def _note(self, kind: str, path: str, module: Any) -> None:
        kernel, bias = (
            nn.meta.unbox(module.get_variable("params", name))
            for name in ("kernel", "bias")
        )
        batch, features = kernel_split(module)
        layer = LibraryLayer(
            kind=kind,
            kernel=join_path(path, "kernel"),
            shape=tuple(kernel.shape),
            bias=None if bias is None else tuple(bias.shape),
            batch=batch,
            features=features,
            obstacle=self._obstacle(module),
        )
        # One call with an obstacle is enough to leave the layer as it is.
        if path not in self.layers or layer.obstacle:
            self.layers[path] = layer

    def _obstacle(self, module: nn.Module) -> str | None:
        for outer in self.stack[:-1]:
            if isinstance(outer, nn.WeightNorm | nn.SpectralNorm):
                return (
                    f"inside {type(outer).__name__}, which normalises the kernel in "
                    "its stored shape"
                )
        return obstacle(module)


def _box_params(module: nn.Module) -> None:
    """Boxes a module's own parameters, so that Flax reports the axes it adds."""
    for name, value in module.variables.get("params", {}).items():
        if not isinstance(value, Mapping | _StackAxes):
            module.put_variable("params", name, _StackAxes(value))


class _StackAxes(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A box around a parameter that Flax tells about every axis it adds."""

    value: Any
    axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def replace_boxed(self, val: Any) -> Any:
        return self.replace(value=nn.meta.replace_boxed(self.value, val))

    def unbox(self) -> Any:
        return nn.meta.unbox(self.value)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        inner = nn.meta.add_axis(self.value, index, dict(params))
        return self.replace(value=inner, axes=(*self.axes, index))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        inner = nn.meta.remove_axis(self.value, index, dict(params))
        return self.replace(value=inner, axes=self.axes[:-1])


def plan_linen(
    model: nn.Module,
    inputs: Sequence[Any],
    to: Form,
    rules: Sequence[Rule],
    rngs: PyTree,
    method: Any,
    kwargs: Mapping[str, Any],
) -> Plan:
    """Return the plan of a linen model; see :func:`fcconv_jax.make_plan`."""
    if rngs is None:
        rngs = jax.eval_shape(jax.random.key, 0)  # any key: nothing is computed
    names, variables = _init(model, inputs, rngs, method, kwargs)
    params = _stored(variables.get("params", {}))
    layers = {
        path: _as_stored(layer, params[layer.kernel])
        for path, layer in names.layers.items()
        if layer.kernel in params
    }
    own = _own(params, layers, names.owners)
    if not layers and not own:
        return Plan(to)
    variables = _without_stack_axes(variables)
    try:
        traced = _trace(model, variables, (inputs, {**kwargs, "method": method}), rngs)
    except Exception as error:  # whatever the model's code raises
        failure = f"{type(error).__name__}: {error}"
        left = {path: each.words for path, each in own.items() if each.words}
        left |= {
            path: f"it is a {layer.kind}"
            for path, layer in layers.items()
            if layer.form != to
        }
        left = {
            path: f"{words}; it can't be traced, because the model on these inputs "
            f"raises {failure}"
            for path, words in left.items()
        }
        return Plan(to, (), tuple(left.items()))
    planned, left = plan_trace(traced, to, rules, layers, own)
    return Plan(to, tuple(planned.items()), tuple(left.items()))


def _init(
    model: nn.Module,
    inputs: Sequence[Any],
    rngs: PyTree,
    method: Any,
    kwargs: Mapping[str, Any],
) -> tuple[_Names, Any]:
    """Return the model's modules, and the shapes of its variables in boxes."""
    names = _Names()
    arrays, static = arguments.split((rngs, tuple(inputs), dict(kwargs)))

    def run(arrays: Sequence[Any]) -> PyTree:
        rngs, args, options = static.merge(arrays)
        return model.init(rngs, *args, method=method, **options)

    # An object of its own as the key: no other trace may see the boxes.
    with intercepting(names, key=("fcconv_jax planning", id(names), object())):
        return names, jax.eval_shape(run, arrays)


def _trace(
    model: nn.Module,
    variables: Mapping[str, Any],
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    rngs: PyTree,
) -> TracedModel:
    """The trace of ``apply`` with fixed params; all other collections may change.

    Raises:
      Exception: whatever the model's code raises.
    """
    args, kwargs = inputs
    # A call may change any other collection, as a BatchNorm in training does; fixed
    # ones would raise.
    kwargs = {**kwargs, "mutable": DenyList("params")}
    params = variables.get("params", {})
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def run(
        params: PyTree, state: PyTree, rngs: PyTree, args: PyTree, kwargs: PyTree
    ) -> list[Any]:
        out = model.apply({"params": params, **state}, *args, rngs=rngs, **kwargs)
        return arguments.split(out)[0]

    try:
        return trace(run, (params, rest, rngs, args, kwargs), {})
    except Exception:
        if not rest:
            raise
        # A cache that init has made may expect other inputs than init: try without.
        with contextlib.suppress(Exception):
            return trace(run, (params, {}, rngs, args, kwargs), {})
        raise


def _stored(params: PyTree) -> dict[str, Any]:
    """Return the stored parameters by path, still in their boxes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
    return {leaf_path(path): leaf for path, leaf in leaves}


def _as_stored(layer: LibraryLayer, box: Any) -> LibraryLayer:
    """A layer with its kernel as it is stored, and the axes that Flax counted there."""
    axes = box.axes if isinstance(box, _StackAxes) else ()
    stored = dataclasses.replace(layer, shape=_shape(box), stack=axes)
    if stored.obstacle is None and stored.own_shape != layer.shape:
        reason = (
            f"its kernel is stored as {stored.own_shape} and used as {layer.shape}: it "
            "is transformed on the way to the layer"
        )
        return dataclasses.replace(stored, obstacle=reason)
    return stored


def _own(
    params: Mapping[str, Any],
    layers: Mapping[str, LibraryLayer],
    owners: Mapping[str, type],
) -> dict[str, Own]:
    """Return the parameters of two or more axes that no layer of Flax reads."""
    known = {join_path(path, n) for path in layers for n in ("kernel", "bias")}
    own = {}
    for leaf, box in params.items():
        path, _, name = leaf.rpartition("/")
        stacked = len(box.axes) if isinstance(box, _StackAxes) else 0
        # Vectors, such as a norm's scale, are in no matmul.
        if leaf not in known and len(_shape(box)) - stacked >= 2:
            owner = owners.get(path)
            words = "the model" if owner is None else owner.__name__
            words = f"{words} uses its own parameter {name!r} {_shape(box)}"
            embed = owner is not None and issubclass(owner, nn.Embed)
            own[leaf] = Own(words, embed)
    return own


def _without_stack_axes(variables: PyTree) -> Any:
    """Return the variables as the model made them."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, _StackAxes) else leaf,
        variables,
        is_leaf=lambda node: isinstance(node, _StackAxes),
    )


def _shape(box: Any) -> tuple[int, ...]:
    return tuple(nn.meta.unbox(box).shape)
