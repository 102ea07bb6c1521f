"""Decides how one linear layer moves, from the calls that a trace recorded of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..geometry.classify import Equivalence, classify
from ..geometry.kernels import Rearrangement, channel_last, kernel_rearrangement
from ..geometry.windows import is_symbolic
from ..messages.errors import PlanError
from ..plan import Form, LayerPlan, is_order
from ..plan.layer_forms import holds
from ..plan.rules import Rule
from ..versions import InconclusiveDimensionOperation
from .flatten import Flatten, LayerInput, find_flattens
from .layer_axes import DenseAxes

# Stands for a symbolic size in the input_shape of a plan.
_EXAMPLE = 8


class LeftError(Exception):
    """A layer is skipped; the message is the reason in ``plan.skipped``."""


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a linear layer, as the trace shows it.

    Args:
      kind: of the layer; the primitive's name for a matmul of no layer's.
      number: tells calls apart.
      shape: of the input, as the layer sees it.
      kernel: shape of the kernel, likewise.
      bias: shape of the bias, likewise; None without.
      axes: how a dense layer reads the input.
      geometry: of a convolution, as :func:`fcconv_jax.classify` takes it.
      obstacle: why it does not convert, if so.
      mapped: how many axes of the input in the trace the layer does not see.
      channels_first: whether a convolution's images have their channels before their
        spatial axes.
    """

    kind: str
    number: int
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: tuple[int, ...] | None
    axes: DenseAxes | None
    geometry: Mapping[str, Any] | None
    obstacle: str | None
    mapped: int = 0
    channels_first: bool = False


def plan_layers(
    inputs: Iterable[LayerInput],
    layers: Mapping[str, Sequence[LayerCall]],
    to: Form,
    chosen: Mapping[str, Rule | None],
    stack_axes: Callable[[str, LayerCall], tuple[int, ...]],
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """Plan each layer of a trace, or give the reason to skip it.

    Args:
      inputs: where the inputs of the calls are in the trace; read to go to conv.
      layers: by path, the calls of each layer that is in the other form.
      to: the form to go to.
      chosen: the user's rule for each path, if any.
      stack_axes: gives the axes that lifted transforms added to a layer's stored
        parameters, or raises :class:`LeftError`.

    Returns:
      The plans, and the reasons, by path.

    Raises:
      PlanError: a rule asks for what cannot be.
    """
    flattens = find_flattens(inputs) if to == "conv" else {}
    planned: dict[str, LayerPlan] = {}
    left: dict[str, str] = {}
    for path, calls in layers.items():
        try:
            axes = stack_axes(path, calls[0])
            if to == "conv":
                planned[path] = _plan_dense(path, calls, flattens, axes, chosen[path])
            else:
                planned[path] = _plan_conv(path, calls, axes, chosen[path])
        except LeftError as reason:
            left[path] = str(reason)
    return planned, left


def _plan_dense(
    path: str,
    calls: Sequence[LayerCall],
    flattens: Mapping[int, Sequence[Flatten]],
    stack_axes: tuple[int, ...],
    rule: Rule | None,
) -> LayerPlan:
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
        input_shape=_example(call.shape),
        strides=(1,) * len(flatten.window),
        groups=groups,
        stack_axes=stack_axes,
    )


def _plan_conv(
    path: str,
    calls: Sequence[LayerCall],
    stack_axes: tuple[int, ...],
    rule: Rule | None,
) -> LayerPlan:
    call = calls[0]
    _check_calls(calls, rule)
    found = [_classify(each) for each in calls]
    failed = [each for each in found if not each.same_parameters]
    phases = rule is not None and rule.phases
    if failed and phases and all(each.geometry.transposed for each in found):
        return _plan_phases(call, found[0], stack_axes)
    for each in failed:
        raise LeftError(f"{each.reason} {each.fix}".strip())
    cases = sorted({each.base for each in found})
    # Each case has another dense layer, and the kernel is stored for one.
    if len(cases) > 1:
        raise LeftError(f"called in several cases: {', '.join(cases)}")
    window, groups = found[0].geometry.kernel_size, found[0].geometry.groups
    if rule is not None and rule.window not in (None, window):
        raise PlanError(
            f"rule {rule.pattern!r}: expected the window {window} of the kernel of "
            f"{path!r}, got {rule.window}. Correct the rule."
        )
    _check_order(rule, len(window))
    # Patches of such images are flattened in this order by F.unfold and nn.Flatten.
    letters = channel_last(len(window))
    order = "C" + letters[:-1] if call.channels_first else letters
    order = (rule.order if rule else None) or order
    transposed = cases == ["unpatchify"]
    taps, rows, out = math.prod(window), call.kernel[-2], call.kernel[-1] // groups
    # A transposed convolution puts out a window for each input, instead of reading one.
    canonical = (rows, taps * out) if transposed else (taps * rows, out)
    if groups > 1:
        canonical = (groups, *canonical)
    forward = kernel_rearrangement(
        canonical, window, order=order, groups=groups, transposed=transposed
    )
    leaves = [("kernel", forward.inverse())]
    if call.bias is not None:
        shape = call.bias if groups == 1 else (groups, out)
        leaves.append(("bias", Rearrangement.reshape(call.bias, shape)))
    plan = LayerPlan(
        base=found[0].base,
        layer="Conv",
        window=window,
        order=order,
        leaves=tuple(leaves),
        input_shape=_example(call.shape, window),
        strides=window if transposed else found[0].geometry.strides,
        groups=groups,
        stack_axes=stack_axes,
        to="dense",
    )
    if not holds(plan, found[0]):
        raise LeftError(
            f"it reads each input once only due to its padding or dilation: {found[0]}"
        )
    if not all(holds(plan, each) for each in found):
        raise LeftError("called with several strides")
    return plan


def _plan_phases(
    call: LayerCall, found: Equivalence, stack_axes: tuple[int, ...]
) -> LayerPlan:
    """Plan a transposed convolution that runs in phases, with the same kernel."""
    window = found.geometry.kernel_size
    return LayerPlan(
        base="phases",
        layer="conv_transpose",
        window=window,
        order=channel_last(len(window)),
        leaves=(("kernel", Rearrangement.reshape(call.kernel, call.kernel)),),
        input_shape=_example(call.shape, window),
        strides=found.geometry.input_dilation,
        groups=found.geometry.groups,
        stack_axes=stack_axes,
        to="dense",
    )


def _classify(call: LayerCall) -> Equivalence:
    """Return the equivalence of one call.

    Raises:
      LeftError: it depends on the value of a symbolic size.
    """
    geometry = dict(call.geometry or {})
    try:
        return classify(**geometry)
    except InconclusiveDimensionOperation:
        raise LeftError(
            "whether it has a dense form isn't known for the symbolic sizes of its "
            f"input, {geometry['input_shape']}: plan with fixed sizes"
        ) from None


def _example(shape: tuple[int, ...], window: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return a shape with 8 (or room for 8 windows) for each symbolic size."""
    per_axis = (1,) * (len(shape) - len(window) - 1) + (*window, 1)
    return tuple(
        _EXAMPLE * step if is_symbolic(size) else size
        for size, step in zip(shape, per_axis)
    )


def _check_calls(calls: Sequence[LayerCall], rule: Rule | None) -> None:
    """Skip a layer that a rule excludes or that computes something else."""
    if rule is not None and rule.skip:
        raise LeftError(f"excluded by rule {str(rule)!r}")
    for call in calls:
        if call.obstacle is not None:
            raise LeftError(call.obstacle)


def _check_order(rule: Rule | None, rank: int) -> None:
    """Refuse an order that does not name each axis of the window once."""
    letters = channel_last(rank)
    if rule is not None and rule.order and not is_order(rule.order, rank):
        raise PlanError(
            f"rule {rule.pattern!r}: expected an order with each of "
            f"{', '.join(letters)} once, slowest axis first, such as {letters!r}, got "
            f"{rule.order!r}. Correct the rule."
        )


def _choose_flatten(
    path: str,
    calls: Sequence[LayerCall],
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
                f"rule {rule.pattern!r}: expected a window that divides the {fan_in} "
                f"input features of {path!r}, got {'x'.join(map(str, window))}. "
                "Correct the rule."
            )
        same = [f.order for f in split if f.window == window]
        # The trace's own order for this window; Flax's flatten is channel-last.
        default = same[0] if len(same) == 1 else channel_last(len(window))
        return Flatten(window, rule.order or default)
    if len(split) > 1:
        answers = ", ".join(f"{f.window} in order {f.order}" for f in split)
        raise LeftError(
            f"its input is flattened in several ways ({answers}): choose one with a "
            f"rule such as '{path}={'x'.join(map(str, split[0].window))}'"
        )
    if split:
        order = split[0].order if rule is None else rule.order or split[0].order
        return Flatten(split[0].window, order)
    # Never split: any order is the same, only the number of spatial axes counts.
    rank = max((len(f.window) for f in found), default=1)
    return Flatten((1,) * rank, channel_last(rank))
