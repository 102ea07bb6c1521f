"""Plans from names and shapes alone, without the model's code."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta
from jaxtyping import PyTree

from ..geometry.kernels import bias_rearrangement, channel_last, kernel_rearrangement
from ..messages.errors import PlanError
from ..params.leaves import leaf_path
from ..plan import Form, KernelLayout, LayerPlan, Plan, direction
from ..plan.paths import BOXES, join_path
from ..plan.rules import Rule, as_rules, match_rules
from .layouts import lay_out

Shape = tuple[int, ...]

_FIX = (
    "Plan from the model's code (make_plan, or --model), or skip the layer with a rule "
    "{skip!r} before the one that matches it."
)


def plan_from_params(
    params: PyTree,
    rules: Iterable[Rule | str],
    to: Form = "conv",
    backend: str | None = None,
) -> Plan:
    """Plan without the model, from rules and the shapes of the params.

    Names and shapes don't show how a layer is used. So only layers that a rule matches
    are converted, the rule isn't checked against the model, and parameters that may
    belong to something else than a Dense or a Conv are an error. If you have the model,
    use :func:`fcconv_jax.make_plan`, which finds the window and the order in its trace.

    Kernels called ``kernel`` are Flax's. In a tree without them, those called
    ``weight`` are PyTorch's: ``(out, in/groups, *window)`` for a Conv and ``(out, in)``
    for a Linear, flattened as by ``nn.Flatten`` and ``F.unfold`` unless the rule gives
    another order. The converted tree loads into the Module in which the layer is
    replaced by its other form (``load_state_dict(strict=True)``). With groups, the
    weight is ``(groups, out/groups, in)``, for
    ``torch.einsum("...gi,goi->...go", x, weight)``; biases stay ``(out,)``.

    Args:
      params: a tree of params or variables (arrays or abstract), a PyTorch
        ``state_dict``, or a dict from leaf path (``"fc/kernel"``) to array,
        ``jax.ShapeDtypeStruct`` or shape. If it has a level ``params``, only leaves
        below the outermost one are planned.
      rules: :class:`Rule` or text such as ``"head=7x7"`` or
        ``"patch_embed.proj=dense"``; the first match wins. To ``"conv"``, the window is
        that of the new kernel, all ones for a pointwise convolution. To ``"dense"``,
        the rule repeats the kernel's window or is ``dense``; it asserts that strides
        and padding allow a dense form (see :func:`fcconv_jax.classify`). One group is
        assumed unless the rule contains, for example, ``groups4`` (PyTorch only).
      to: the form to convert to, for rules without one.
      backend: as in :func:`fcconv_jax.make_plan`.

    Returns:
      A :class:`Plan`, as from :func:`fcconv_jax.make_plan`. ``plan.skipped`` maps every
      other parameter of two or more axes to the reason.

    Raises:
      PlanError: a rule matches no layer, or lacks a window or the order of a flatten;
        the window or the bias doesn't fit; or the kernel may be something else
        (attention heads, a scanned stack). The message names the leaf.

    Source:
      The cases are those of :func:`fcconv_jax.classify`.

    Example:
      >>> shapes = {"fc/kernel": (12, 5), "fc/bias": (5,)}
      >>> plan = plan_from_params(shapes, ["fc=2x2:HWC"])
      >>> plan["fc"].kernel.target
      (2, 2, 3, 5)
      >>> plan = plan_from_params({"proj.weight": (8, 3, 4, 4)}, ["proj=dense"])
      >>> plan["proj.weight"].kernel.target
      (8, 48)
      >>> plan_from_params({"attend": {"kernel": (8, 2, 4)}}, ["*=1"])
      Traceback (most recent call last):
      ...
      fcconv_jax.messages.errors.PlanError: Expected a kernel of two axes for a ...
    """
    if to not in ("conv", "dense"):
        raise PlanError(
            f"Expected to='conv' or to='dense', got {to!r:.60}. Pass to='conv'."
        )
    rules = as_rules(rules)
    if not rules:
        raise PlanError(
            "Expected rules, because shapes alone don't determine which layers "
            "convert, got none. Pass rules such as 'head=7x7', or plan from the "
            "model's code (make_plan, or --model)."
        )
    shapes = _below_params(dict(_shapes(params)))
    for library in (_FLAX, _TORCH):
        kernels = {
            found[1] or "": name
            for name, shape in shapes.items()
            if (found := library.kernel.fullmatch(name)) and len(shape) > 1
        }
        if kernels:
            break
    else:
        raise PlanError(
            "Expected a leaf called 'kernel' (Flax) or 'weight' (PyTorch) with two "
            f"axes or more, got {list(shapes)[:10]}. Plan from the model's code "
            "(make_plan, or --model)."
        )
    chosen = match_rules(
        rules, {path: math.prod(shapes[name]) for path, name in kernels.items()}
    )
    layers, left = {}, {}
    for path, name in kernels.items():
        rule = chosen[path]
        # As a Module's plan does, a plan of PyTorch's layers names their weights.
        key = path if library is _FLAX else name
        if rule is None:
            left[key] = f"no rule matches it (its kernel is {shapes[name]})"
        elif rule.skip:
            left[key] = f"excluded by rule {str(rule)!r}"
        else:
            layers[key] = _layer(library, path, name, shapes, rule, rule.to or to)
    known = {*kernels.values(), *(_beside(name) for name in kernels.values())}
    for name, shape in shapes.items():
        if len(shape) > 1 and name not in known:
            last, word = re.split("[./]", name)[-1], library.word
            left[name] = f"called {last!r} {shape}, not {word!r}: no rule can match it"
    to_form = direction(layers) if layers else to
    plan = Plan(to_form, tuple(layers.items()), tuple(left.items()))
    return lay_out(plan, rules, backend, stored=library.stored)


@dataclasses.dataclass(frozen=True)
class _Library:
    """How a library calls and stores its kernels."""

    word: str
    kernel: re.Pattern[str]
    stored: KernelLayout

    def canonical(self, shape: Shape) -> tuple[int, ...]:
        """Return the axes of a stored kernel in the order in which Flax has them."""
        first, second, *rest = range(len(shape))
        if self.stored == "HWIO":
            return first, second, *rest
        return *rest, second, first


_FLAX = _Library("kernel", re.compile("(?:(.*)/)?kernel"), "HWIO")
# Equinox's arrays have these names and layouts, too, with other separators.
_TORCH = _Library("weight", re.compile("(?:(.*)[./])?weight"), "OIHW")


def _layer(
    library: _Library,
    path: str,
    name: str,
    shapes: Mapping[str, Shape],
    rule: Rule,
    to: Form,
) -> LayerPlan:
    """Return the plan of one layer that a rule matches."""
    stored, groups = shapes[name], rule.groups or 1
    _refuse_others(path, name, shapes)
    if library is _TORCH:
        _refuse_unclear(name, shapes, rule, to)
    elif groups > 1:
        raise PlanError(
            f"Expected one group for {name!r}, got groups{groups}. Plan grouped layers "
            f"of Flax from the model's code (make_plan, or --model)."
        )
    grouped_dense = to == "conv" and groups > 1
    axes = (0, 2, 1) if grouped_dense else library.canonical(stored)
    kernel = tuple(stored[axis] for axis in axes if axis < len(stored))
    window = rule.window
    if window is None and rule.to == "dense" and len(kernel) > 2:
        window = kernel[:-2]
    if window is None:
        raise PlanError(
            f"rule {rule.pattern!r}: expected a window, which the shape {stored} of "
            f"{name!r} doesn't determine, got none. Write '{rule.pattern}=7x7'."
        )
    if grouped_dense:
        dense = _grouped_dense_shape(name, stored, groups)
    else:
        dense = _dense_shape(name, kernel, stored, window, path, to)
    if to == "dense" and groups > 1:
        dense = (groups, dense[0], dense[1] // groups)
    rest, order = len(window), rule.order
    try:
        last = channel_last(rest)
        order = order or (last if library is _FLAX else "C" + last[:-1])
        forward = kernel_rearrangement(dense, window, order=order, groups=groups)
    except ValueError as error:
        raise PlanError(f"rule {rule.pattern!r}, leaf {name!r}: {error}") from None
    features = dense[-1] * groups
    bias = shapes.get(_beside(name))
    # Equinox's have the window's axes behind.
    ones = (1,) * (len(bias or ()) - 1 if library is _TORCH else 0)
    if bias not in (None, (features, *ones)):
        raise PlanError(
            f"Expected leaf {_beside(name)!r} of shape {(features,)}, as its kernel "
            f"{stored} has it, got {bias}. {_fix(path)}"
        )
    if library is _FLAX and to == "conv" and not rule.order:
        _require_order(rule, name, window, dense[0])
    move = forward if to == "conv" else forward.inverse()
    if library is _TORCH:  # from the kernel as PyTorch stores it
        move = move.inverse().permuted(_inverse(axes)).inverse()
    leaves = [("" if library is _TORCH else "kernel", move)]
    if library is _FLAX and bias is not None:
        leaves.append(("bias", bias_rearrangement(bias)))
    channels = forward.target[-2] * groups
    # The strides of a patch embedding; on one window alone they change nothing.
    patches = library is _TORCH and to == "dense" and math.prod(window) > 1
    whole = "patchify" if patches else "full_window"
    kinds = ("Dense", "Conv") if library is _FLAX else ("Linear", f"Conv{rest}d")
    return LayerPlan(
        base="pointwise" if math.prod(window) == 1 else whole,
        layer=kinds[to == "dense"],
        window=window,
        order=order,
        leaves=tuple(leaves),
        input_shape=(
            (1, math.prod(window) * channels)
            if to == "conv"
            else (1, *window, channels)
        ),
        strides=window if patches else (1,) * rest,
        groups=groups,
        to=to,
    )


def _refuse_others(path: str, name: str, shapes: Mapping[str, Shape]) -> None:
    """Refuse a layer with more than a kernel and a bias."""
    start = name.removesuffix(re.split("[./]", name)[-1])
    others = [
        p.removeprefix(start)
        for p in shapes
        if p.startswith(start) and p not in (name, _beside(name))
    ]
    parent, _, last = path.rpartition("/")
    # nn.WeightNorm stands beside its layer and names its scales after the kernel.
    others += [
        p for p in shapes if p.startswith(parent) and f"/{last}/kernel/" in f"/{p}"
    ]
    if path and others:
        raise PlanError(
            f"Expected a kernel and a bias in layer {path!r}, got {others[:5]}, too: "
            f"it may be adapted (LoRA), normalized or quantized. {_fix(path)}"
        )


def _refuse_unclear(
    name: str, shapes: Mapping[str, Shape], rule: Rule, to: Form
) -> None:
    """Refuse a weight of PyTorch that may be another layer's than the rule states."""
    shape, groups = shapes[name], rule.groups or 1
    out, inner, *window = shape
    bias = shapes.get(_beside(name))
    depthwise = to == "dense" and window and out > inner == 1
    if depthwise and rule.groups is None:
        raise PlanError(
            f"leaf {name!r} of shape {shape} may be a depthwise convolution's, or one "
            f"on images of one channel. Write '{rule.pattern}=dense:groups{out}' "
            f"or '{rule.pattern}=dense:groups1'."
        )
    if to == "dense" and out % groups:
        raise PlanError(
            f"Expected groups that divide the {out} output channels of {name!r}, "
            f"got groups{groups}. Pass the groups of the module."
        )
    if bias is not None and to == "dense" and bias[:1] != (out,):
        raise PlanError(
            f"leaf {_beside(name)!r} has shape {bias}, the weight {shape} beside it "
            f"isn't a convolution's; it may be a transposed one's. {_fix(name)}"
        )
    wide = any(letter in rule.pattern for letter in "*?[")
    if to == "conv" and len(shape) == 2 and bias is None and wide:
        raise PlanError(
            f"leaf {name!r} of shape {shape} has no bias: it may be an Embedding's, "
            f"which has no conv form. Name it in full instead of {rule.pattern!r}, or "
            "skip it with a rule before."
        )


def _grouped_dense_shape(name: str, stored: Shape, groups: int) -> Shape:
    """Shape ``(groups, in, out)`` of a grouped Linear's weight."""
    if len(stored) != 3 or stored[0] != groups:
        raise PlanError(
            f"Expected the weight {name!r} as ({groups}, out/{groups}, in), got shape "
            f"{stored}. Pass the groups of the layer."
        )
    return groups, stored[2], stored[1]


def _require_order(rule: Rule, name: str, window: Shape, features: int) -> None:
    """Refuse a rule that leaves open how Flax's layer gets the window."""
    if features > math.prod(window) > 1:
        said = f"{rule.pattern}={'x'.join(map(str, window))}"
        last = channel_last(len(window))
        raise PlanError(
            f"Expected a rule with the order in which {name!r} gets the window and its "
            f"{features // math.prod(window)} channels, got {said!r}. Write "
            f"'{said}:{last}' for channels last, as in Flax, or '{said}:C{last[:-1]}' "
            "for channels first, as in PyTorch."
        )


def _beside(name: str) -> str:
    """Return the name of the bias beside a kernel."""
    return re.sub(r"[^./]+$", "bias", name)


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def _dense_shape(
    name: str, kernel: Shape, stored: Shape, window: Shape, path: str, to: Form
) -> Shape:
    """Shape ``(in, out)`` of the dense kernel; the error names other readings."""
    if to == "conv":
        if len(kernel) == 2:
            return kernel
        raise PlanError(
            f"Expected a kernel of two axes for a Dense, got leaf {name!r} of shape "
            f"{stored}, which may be {_guesses(len(kernel))}. {_fix(path)}"
        )
    size = "x".join(map(str, window))
    if len(kernel) != len(window) + 2:
        what = (
            "a Dense already"
            if len(kernel) == 2
            else f"a Conv of another rank, or {_guesses(len(kernel), conv=False)}"
        )
        raise PlanError(
            f"Expected a kernel of {len(window) + 2} axes for a Conv with the window "
            f"{size}, got leaf {name!r} of shape {stored}, which may be {what}. "
            f"{_fix(path)}"
        )
    if kernel[:-2] != window:
        raise PlanError(
            f"Expected the window {'x'.join(map(str, kernel[:-2]))} of leaf {name!r} "
            f"of shape {stored}, got {size} in the rule. Correct the rule."
        )
    return (math.prod(kernel[:-1]), kernel[-1])


def _guesses(rank: int, conv: bool = True) -> str:
    """Return what a kernel of so many axes may be, other than the rule's."""
    found = ["attention heads or another DenseGeneral", "a scanned or vmapped stack"]
    if rank == 3:
        found.append("a grouped Dense")
    if conv:
        found.append(f"a Conv{rank - 2}D, which is in conv form already")
    return ", ".join(found[:-1]) + " or " + found[-1]


def _fix(path: str) -> str:
    return _FIX.format(skip=f"{path or '*'}=skip")


def _shapes(params: PyTree) -> Iterator[tuple[str, Shape]]:
    """Path and shape of each leaf, without the boxes that some of them sit in."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: _is_shape(x) or isinstance(x, meta.AxisMetadata)
    )
    for path, leaf in leaves:
        leaf = meta.unbox(leaf)
        name, _, last = leaf_path(path).rpartition("/")
        name = name if name and last in BOXES else join_path(name, last)
        yield name, leaf if _is_shape(leaf) else tuple(getattr(leaf, "shape", ()))


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def _below_params(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the tree below the outermost level ``params``, with paths from there.

    Optimizer states and running averages repeat the parameters' names further down.
    """
    shapes = dict(shapes)
    while True:
        prefixes = {
            path[: at + len("params/")]
            for path in shapes
            if (at := f"/{path}".find("/params/")) >= 0
        }
        if not prefixes:
            return shapes
        depth = min(prefix.count("/") for prefix in prefixes)
        outermost = sorted(p for p in prefixes if p.count("/") == depth)
        if len(outermost) > 1:
            raise PlanError(
                f"Expected one level called 'params', got {outermost}. Pass one of "
                "them."
            )
        prefix = outermost[0]
        shapes = {
            path.removeprefix(prefix): shape
            for path, shape in shapes.items()
            if path.startswith(prefix)
        }
