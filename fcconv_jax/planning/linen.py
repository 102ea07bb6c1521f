"""Plans a linen model: traces it once, and reads off what each linear layer does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import struct

from .. import arguments
from ..context import intercepting
from ..geometry import classify
from ..kernels import Rearrangement, kernel_rearrangement
from ..linen_layers import (
    DenseAxes,
    OwnCalls,
    below_map_variables,
    conv_geometry,
    is_lifted,
    layer_kind,
    module_path,
    obstacle,
)
from ..plan import Form, LayerPlan, Plan, PlanError, Rule, is_order, match_rules
from .flatten import Features, Flatten, find_flattens, mark


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a linear layer, as the trace saw it."""

    kind: str
    number: int
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: tuple[int, ...] | None
    axes: DenseAxes | None
    geometry: Mapping[str, Any] | None
    obstacle: str | None


@dataclasses.dataclass
class _Recorder:
    """Watches a trace: which layers are called, on what, and where they live."""

    calls: dict[str, list[_Call]] = dataclasses.field(default_factory=dict)
    owners: dict[str, str] = dataclasses.field(default_factory=dict)
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
        # What maps variables may look at their structure, which a box would change.
        if (
            is_lifted(module)
            and not below_map_variables(module)
            and module.is_mutable_collection("params")
        ):
            _box_params(module)
        return y

    def _call(
        self, kind: str, number: int, shape: tuple[int, ...], module: Any
    ) -> _Call:
        kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
        bias = nn.meta.unbox(module.get_variable("params", "bias"))
        dense = kind != "Conv"
        return _Call(
            kind=kind,
            number=number,
            shape=shape,
            kernel=tuple(kernel.shape),
            bias=None if bias is None else tuple(bias.shape),
            axes=DenseAxes.of(module, len(shape)) if dense else None,
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
    arrays, static = arguments.split((tuple(inputs), dict(kwargs)))
    rngs = jax.random.key(0) if rngs is None else rngs

    def run(arrays: Sequence[Any]) -> Any:
        args, options = static.merge(arrays)
        out, variables = model.init_with_output(rngs, *args, method=method, **options)
        return [leaf for leaf in jax.tree.leaves(out) if arguments.is_array(leaf)], (
            variables
        )

    # An object of its own as the key: no other trace may see the marks.
    with intercepting(recorder, key=recorder_key(recorder)):
        jaxpr, (_, variables) = jax.make_jaxpr(run, return_shape=True)(arrays)
    params = _stored(variables.get("params", {}))
    own = {
        path: calls
        for path, calls in recorder.calls.items()
        if f"{path}/kernel".lstrip("/") in params
    }
    source_kinds = ("Conv",) if to == "dense" else ("Dense", "DenseGeneral")
    layers = {p: c for p, c in own.items() if c[0].kind in source_kinds}
    flattens = _flattens(jaxpr, layers) if to == "conv" else {}
    chosen = match_rules(rules, layers)
    planned: dict[str, LayerPlan] = {}
    left: dict[str, str] = {}
    for path, calls in layers.items():
        rule = chosen[path]
        try:
            stack_axes = _stack_axes(path, calls[0], params)
            if to == "conv":
                plan = _plan_dense(path, calls, flattens, stack_axes, rule)
            else:
                plan = _plan_conv(path, calls, stack_axes, rule)
            planned[path] = plan
        except _LeftError as reason:
            left[path] = str(reason)
    left.update(_other_kernels(params, own, recorder.owners))
    return Plan(to, tuple(planned.items()), tuple(left.items()))


def recorder_key(recorder: _Recorder) -> Any:
    """A jit cache key that no other trace shares."""
    return ("fcconv_jax planning", id(recorder), object())


class _LeftError(Exception):
    """A layer is left alone; the message is the reason that ``plan.skipped`` gives."""


def _stored(params: Any) -> dict[str, Any]:
    """The stored parameters by path, still in their boxes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def _flattens(jaxpr: Any, layers: Mapping[str, Sequence[_Call]]) -> Any:
    features = {}
    for calls in layers.values():
        for call in calls:
            rank = len(call.shape)
            assert call.axes is not None
            from_end = tuple(axis - rank for axis in call.axes.contracted)
            features[call.number] = Features(rank, from_end, len(call.axes.lead))
    return find_flattens(jaxpr, features)


def _stack_axes(path: str, call: _Call, params: Mapping[str, Any]) -> tuple[int, ...]:
    """Axes that lifted transforms added to the stored kernel, as Flax counted them."""
    box = params[f"{path}/kernel".lstrip("/")]
    shape = list(nn.meta.unbox(box).shape)
    axes = box.axes if isinstance(box, _StackAxes) else ()
    for axis in reversed(axes):
        del shape[axis]
    if tuple(shape) != call.kernel:
        raise _LeftError(
            f"its kernel is stored as {tuple(shape)} and used as {call.kernel}: it is "
            "transformed on the way to the layer"
        )
    return axes


def _plan_dense(
    path: str,
    calls: Sequence[_Call],
    flattens: Mapping[int, Sequence[Flatten]],
    stack_axes: tuple[int, ...],
    rule: Rule | None,
) -> LayerPlan:
    """Plans a Dense or DenseGeneral that goes to conv."""
    call = calls[0]
    axes = call.axes
    assert axes is not None
    _check_calls(calls, rule)
    groups = math.prod(call.kernel[: len(axes.batch)])
    fan_in = math.prod(call.shape[a] for a in axes.contracted)
    flatten = _choose_flatten(path, calls, flattens, rule, fan_in)
    _check_order(rule, len(flatten.window))
    canonical = (fan_in, math.prod(axes.features))
    if groups > 1:
        canonical = (groups, *canonical)
    kernel = dataclasses.replace(
        kernel_rearrangement(
            canonical, flatten.window, order=flatten.order, groups=groups
        ),
        source=call.kernel,
    )
    leaves = [("kernel", kernel)]
    if call.bias is not None:
        flat = (math.prod(call.bias),)
        leaves.append(("bias", Rearrangement.reshape(call.bias, flat)))
    return LayerPlan(
        base="pointwise" if math.prod(flatten.window) == 1 else "full_window",
        layer=call.kind,
        window=flatten.window,
        order=flatten.order,
        leaves=tuple(leaves),
        input_shape=call.shape,
        strides=(1,) * len(flatten.window),
        groups=groups,
        stack_axes=stack_axes,
        layout=(rule.layout if rule else None) or "fold",
    )


def _check_calls(calls: Sequence[_Call], rule: Rule | None) -> None:
    """Leaves a layer alone that a rule excludes or that is not what it seems."""
    if rule is not None and rule.skip:
        raise _LeftError(f"excluded by rule {rule.pattern!r}")
    for call in calls:
        if call.obstacle is not None:
            raise _LeftError(call.obstacle)
        if call.kernel != calls[0].kernel or call.kind != calls[0].kind:
            raise _LeftError(
                f"called with kernels of several shapes, {calls[0].kernel} and "
                f"{call.kernel}: it runs under an apply of its own"
            )


def _check_order(rule: Rule | None, rank: int) -> None:
    """Refuses an order that does not name each axis of the window once."""
    letters = "DHW"[3 - rank :] + "C"
    if rule is not None and rule.order and not is_order(rule.order, rank):
        raise PlanError(
            f"rule {rule.pattern!r}: the order {rule.order!r} must hold each of "
            f"{', '.join(letters)} once, slowest axis first, such as {letters!r}"
        )


def _choose_flatten(
    path: str,
    calls: Sequence[_Call],
    flattens: Mapping[int, Sequence[Flatten]],
    rule: Rule | None,
    fan_in: int,
) -> Flatten:
    """The window and order of a dense layer: from its rule, else from the trace."""
    found = list(dict.fromkeys(f for c in calls for f in flattens.get(c.number, ())))
    split = [f for f in found if math.prod(f.window) > 1]
    if rule is not None and rule.window is not None:
        window = rule.window
        if len(window) > 3 or fan_in % math.prod(window):
            raise PlanError(
                f"rule {rule.pattern!r}: a window of {'x'.join(map(str, window))} does "
                f"not divide the {fan_in} input features of {path!r}"
            )
        same = [f.order for f in split if f.window == window]
        default = same[0] if len(same) == 1 else "DHW"[3 - len(window) :] + "C"
        return Flatten(window, rule.order or default)
    if len(split) > 1:
        answers = ", ".join(f"{f.window} in order {f.order}" for f in split)
        raise _LeftError(
            f"its input is flattened in several ways ({answers}): choose one with a "
            f"rule such as '{path}={'x'.join(map(str, split[0].window))}'"
        )
    if split:
        order = split[0].order if rule is None else rule.order or split[0].order
        return Flatten(split[0].window, order)
    rank = max((len(f.window) for f in found), default=1)
    return Flatten((1,) * rank, "DHW"[3 - rank :] + "C")


def _plan_conv(
    path: str, calls: Sequence[_Call], stack_axes: tuple[int, ...], rule: Rule | None
) -> LayerPlan:
    """Plans a Conv that goes to dense."""
    call = calls[0]
    _check_calls(calls, rule)
    for each in calls:
        geometry = dict(each.geometry or {})
        equivalence = classify(**geometry)
        if not equivalence.same_parameters:
            raise _LeftError(f"{equivalence.reason} {equivalence.fix}".strip())
    equivalences = {classify(**dict(c.geometry or {})).base for c in calls}
    if len(equivalences) > 1:
        raise _LeftError(f"called in several cases: {', '.join(sorted(equivalences))}")
    geometry = classify(**dict(call.geometry or {}))
    window, groups = geometry.geometry.kernel_size, geometry.geometry.groups
    if rule is not None and rule.window not in (None, window):
        raise PlanError(
            f"rule {rule.pattern!r} says {rule.window}, the kernel of {path!r} is "
            f"{window}"
        )
    _check_order(rule, len(window))
    order = (rule.order if rule else None) or "DHW"[3 - len(window) :] + "C"
    fan_in = math.prod(call.kernel[:-1])
    canonical = (fan_in, call.kernel[-1] // groups)
    if groups > 1:
        canonical = (groups, *canonical)
    forward = kernel_rearrangement(canonical, window, order=order, groups=groups)
    leaves = [("kernel", forward.inverse())]
    if call.bias is not None:
        shape = canonical[2:] if groups == 1 else (groups, canonical[-1])
        shape = call.bias if groups == 1 else shape
        leaves.append(("bias", Rearrangement.reshape(call.bias, shape)))
    return LayerPlan(
        base=geometry.base,
        layer="Conv",
        window=window,
        order=order,
        leaves=tuple(leaves),
        input_shape=call.shape,
        strides=geometry.geometry.strides,
        groups=groups,
        stack_axes=stack_axes,
    )


def _other_kernels(
    params: Mapping[str, Any],
    own: Mapping[str, Sequence[_Call]],
    owners: Mapping[str, str],
) -> dict[str, str]:
    """Parameters of two or more axes that belong to no layer that converts."""
    left = {}
    for leaf_path, box in params.items():
        path, _, name = leaf_path.rpartition("/")
        shape = tuple(nn.meta.unbox(box).shape)
        stacked = len(box.axes) if isinstance(box, _StackAxes) else 0
        if path in own or len(shape) - stacked < 2:
            continue
        owner = owners.get(path, "the model")
        if owner == "Embed":
            left[leaf_path] = (
                f"the table of an Embed, {shape}: looked up by index; a head tied to "
                "it (attend) multiplies by the same array"
            )
        else:
            left[leaf_path] = (
                f"{owner} uses its own parameter {name!r} {shape}: no Dense, "
                "DenseGeneral or Conv layer reads it"
            )
    return left
