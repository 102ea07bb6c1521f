"""Plans a linen model: traces it once, and reads off what each linear layer does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import DenyList

from ...plan import Form, Plan
from ...plan.rules import Rule, match_rules
from ...planning.decide import Call, LeftError, kernel_sizes, plan_layers
from ...planning.own_parameters import OwnParameters
from ...planning.plan_matmuls import matmul_sizes
from ...planning.trace import Traced, trace
from ...tracing import arguments
from ...tracing.marks import mark, marked
from .interception import intercepting
from .layers import (
    OwnCalls,
    below_map_variables,
    conv_geometry,
    dense_axes,
    in_a_branch,
    is_lifted,
    layer_kind,
    module_path,
    obstacle,
)


@dataclasses.dataclass
class _Recorder:
    """Watches a trace: which layers are called, on what, and where they live."""

    calls: dict[str, list[Call]] = dataclasses.field(default_factory=dict)
    owners: dict[str, str] = dataclasses.field(default_factory=dict)
    tables: set[str] = dataclasses.field(default_factory=set)
    stack: list[nn.Module] = dataclasses.field(default_factory=list)
    own: OwnCalls = dataclasses.field(default_factory=OwnCalls)
    count: int = 0

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        with self.own.enter(module) as own:
            if not own:
                return next_fun(*args, **kwargs)
            path = module_path(module)
            self.owners[path] = type(module).__name__
            if isinstance(module, nn.Embed) and context.method_name == "__call__":
                self.tables.add(f"{path}/embedding".lstrip("/"))
            kind = layer_kind(context)
            self.stack.append(module)
            try:
                if kind is None:
                    y = next_fun(*args, **kwargs)
                else:
                    x = args[0] if args else kwargs["inputs"]
                    number, self.count = self.count, self.count + 1
                    y = next_fun(mark(x, number))
                    self.calls.setdefault(path, []).append(
                        self._call(kind, number, tuple(x.shape), module)
                    )
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

    def _call(
        self, kind: str, number: int, shape: tuple[int, ...], module: Any
    ) -> Call:
        kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
        bias = nn.meta.unbox(module.get_variable("params", "bias"))
        dense = kind != "Conv"
        return Call(
            kind=kind,
            number=number,
            shape=shape,
            kernel=tuple(kernel.shape),
            bias=None if bias is None else tuple(bias.shape),
            axes=dense_axes(module, len(shape)) if dense else None,
            geometry=None if dense else conv_geometry(module, shape),
            obstacle=self._obstacle(module),
        )

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
    rngs: Any,
    method: Any,
    kwargs: Mapping[str, Any],
) -> Plan:
    """The plan of a linen model; see :func:`fcconv_jax.make_plan`."""
    recorder = _Recorder()
    if rngs is None:
        rngs = jax.eval_shape(jax.random.key, 0)  # any key: nothing is computed
    arrays, static = arguments.split((rngs, tuple(inputs), dict(kwargs)))

    def run(arrays: Sequence[Any]) -> Any:
        rngs, args, options = static.merge(arrays)
        out, variables = model.init_with_output(rngs, *args, method=method, **options)
        return arguments.split(out)[0], variables

    # An object of its own as the key: no other trace may see the marks.
    with intercepting(recorder, key=recorder_key(recorder)):
        jaxpr, (_, variables) = jax.make_jaxpr(run, return_shape=True)(arrays)
    params = _stored(variables.get("params", {}))
    calls = {
        path: calls
        for path, calls in recorder.calls.items()
        if f"{path}/kernel".lstrip("/") in params
    }
    source_kinds = ("Conv",) if to == "dense" else ("Dense", "DenseGeneral")
    layers = {p: c for p, c in calls.items() if c[0].kind in source_kinds}
    known = {f"{path}/{n}".lstrip("/") for path in calls for n in ("kernel", "bias")}
    own = OwnParameters.find(
        _described(params, known | recorder.tables, recorder.owners),
        known,
        to,
        _traces(model, variables, (inputs, {**kwargs, "method": method}), rngs),
    )
    chosen = match_rules(rules, {**kernel_sizes(layers), **matmul_sizes(own.layers)})
    planned, left = plan_layers(
        marked(jaxpr),
        layers,
        to,
        chosen,
        lambda path, call: _stack_axes(path, call, params),
    )
    more, reasons = own.plan(to, chosen)
    tables = {
        path: f"the table of an Embed, {_shape(params[path])}: looked up by index; a "
        "head tied to it (attend) multiplies by the same array"
        for path in sorted(recorder.tables & params.keys())
    }
    layer_plans = {**planned, **more}
    left = {**left, **reasons, **tables}
    return Plan(to, tuple(layer_plans.items()), tuple(left.items()))


def _traces(
    model: nn.Module,
    variables: Any,
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    rngs: Any,
) -> list[Any]:
    """What traces ``apply`` on the variables that ``init`` made."""
    variables = _without_stack_axes(variables)
    params = variables.get("params", {})
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    # A cache that init has made may expect other inputs than init: try without.
    return [
        functools.partial(_trace, model, params, state, inputs, rngs)
        for state in ((rest, {}) if rest else (rest,))
    ]


def _trace(
    model: nn.Module,
    params: Any,
    state: Mapping[str, Any],
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    rngs: Any,
) -> Traced:
    """The trace of ``apply`` with fixed params; all other collections may change."""
    args, kwargs = inputs
    kwargs = {**kwargs, "mutable": DenyList("params")}

    def run(params: Any, state: Any, rngs: Any, args: Any, kwargs: Any) -> list[Any]:
        out = model.apply({"params": params, **state}, *args, rngs=rngs, **kwargs)
        return arguments.split(out)[0]

    return trace(run, (params, state, rngs, args, kwargs), {})


def recorder_key(recorder: _Recorder) -> Any:
    """A jit cache key that no other trace shares."""
    return ("fcconv_jax planning", id(recorder), object())


def _stored(params: Any) -> dict[str, Any]:
    """The stored parameters by path, still in their boxes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def _stack_axes(path: str, call: Call, params: Mapping[str, Any]) -> tuple[int, ...]:
    """Axes that lifted transforms added to the stored kernel, as Flax counted them."""
    box = params[f"{path}/kernel".lstrip("/")]
    shape = list(nn.meta.unbox(box).shape)
    axes = box.axes if isinstance(box, _StackAxes) else ()
    for axis in reversed(axes):
        del shape[axis]
    if tuple(shape) != call.kernel:
        raise LeftError(
            f"its kernel is stored as {tuple(shape)} and used as {call.kernel}: it is "
            "transformed on the way to the layer"
        )
    return axes


def _without_stack_axes(variables: Any) -> Any:
    """The variables as the model made them."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, _StackAxes) else leaf,
        variables,
        is_leaf=lambda node: isinstance(node, _StackAxes),
    )


def _described(
    params: Mapping[str, Any], known: Container[str], owners: Mapping[str, str]
) -> dict[str, str]:
    """Whose parameters those of two or more axes are that no layer of Flax reads."""
    described = {}
    for leaf, box in params.items():
        path, _, name = leaf.rpartition("/")
        shape = _shape(box)
        stacked = len(box.axes) if isinstance(box, _StackAxes) else 0
        if leaf not in known and len(shape) - stacked >= 2:
            owner = owners.get(path, "the model")
            described[leaf] = f"{owner} uses its own parameter {name!r} {shape}"
    return described


def _shape(box: Any) -> tuple[int, ...]:
    return tuple(nn.meta.unbox(box).shape)
