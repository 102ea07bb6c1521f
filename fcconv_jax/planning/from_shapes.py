"""Plans from names and shapes alone, without the model's code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax.core import meta

from ..geometry.kernels import bias_rearrangement, channel_last, kernel_rearrangement
from ..messages.errors import PlanError
from ..params.leaves import leaf_path
from ..plan import Form, LayerPlan, Plan
from ..plan.rules import Rule, as_rules, match_rules
from .layouts import lay_out

Shape = tuple[int, ...]

_WAY_OUT = (
    "plan from the model's code (make_plan, or --model), or leave the layer out with a "
    "rule {skip!r} before the one that matches it"
)
# What holds the array of a boxed parameter (nn.Partitioned, nnx.Variable).
_BOXES = ("value", "raw_value")


def plan_from_params(
    params: Any,
    rules: Iterable[Rule | str],
    to: Form = "conv",
    backend: str | None = None,
) -> Plan:
    """Plan the layers that rules name, from the shapes of their parameters.

    Nothing but shapes and names is known here, so nothing is guessed: only layers that
    a rule matches convert, the rule's window is taken at its word, and what may be
    something else than a Dense or a Conv is refused. Planning from the model
    (:func:`fcconv_jax.make_plan`) sees the window and the order, and needs no rule.

    Args:
      params: a tree of params or variables (arrays or abstract), or a dict from leaf
        path (``"fc/kernel"``) to array, ``jax.ShapeDtypeStruct`` or shape. Where there
        is a level ``params``, only what is below the outermost one counts.
      rules: :class:`Rule` or text such as ``"head=7x7"``; the first that matches a
        module path counts. To ``"conv"`` the window is that of the new kernel, all
        ones for a pointwise convolution; to ``"dense"`` it must be the one that the
        kernel has, and says that strides and padding are those of a Dense (see
        :func:`fcconv_jax.classify`) and that there is one group.
      to: the form to go to.
      backend: as in :func:`fcconv_jax.make_plan`.

    Returns:
      A :class:`Plan`, as from :func:`fcconv_jax.make_plan`. ``plan.skipped`` has every
      other parameter of two or more axes, with the reason.

    Raises:
      PlanError: a rule matches no layer, has no window, or leaves the order of a
        flatten open; the window or the bias does not fit; or the kernel may be
        something else (attention heads, a scanned stack). The message names the leaf.

    Source:
      The cases are those of :func:`fcconv_jax.classify`.

    Example:
      >>> shapes = {"fc/kernel": (12, 5), "fc/bias": (5,)}
      >>> plan = plan_from_params(shapes, ["fc=2x2:HWC"])
      >>> plan["fc"].kernel.target
      (2, 2, 3, 5)
      >>> plan_from_params({"attend": {"kernel": (8, 2, 4)}}, ["*=1"])
      Traceback (most recent call last):
      ...
      fcconv_jax.messages.errors.PlanError: leaf 'attend/kernel' of shape ...
    """
    if to not in ("conv", "dense"):
        raise PlanError(f"to={to!r}: it is 'conv' or 'dense'")
    rules = as_rules(rules)
    if not rules:
        raise PlanError(
            "no rules: shapes alone don't determine which layers convert; give rules "
            "such as 'head=7x7', or plan from the model's code (make_plan, or --model)"
        )
    shapes = _below_params(dict(_shapes(params)))
    kernels = {
        path.rpartition("/")[0]: shape
        for path, shape in shapes.items()
        if path.rpartition("/")[2] == "kernel" and len(shape) > 1
    }
    if not kernels:
        raise PlanError(
            "no leaf called 'kernel' with two axes or more: only the layers of Flax "
            f"are known by their names; there are: {list(shapes)[:10]}"
        )
    chosen = match_rules(
        rules, {path: math.prod(shape) for path, shape in kernels.items()}
    )
    layers, left = {}, {}
    for path, kernel in kernels.items():
        rule = chosen[path]
        if rule is None:
            left[path] = f"no rule matches it (its kernel is {kernel})"
        elif rule.skip:
            left[path] = f"excluded by rule {str(rule)!r}"
        else:
            layers[path] = _layer(path, shapes, rule, to)
    for name, shape in shapes.items():
        path, _, last = name.rpartition("/")
        if len(shape) > 1 and not (path in kernels and last in ("kernel", "bias")):
            left[name] = f"called {last!r} {shape}, not 'kernel': no rule can match it"
    plan = Plan(to, tuple(layers.items()), tuple(left.items()))
    return lay_out(plan, rules, backend)


def _layer(path: str, shapes: Mapping[str, Shape], rule: Rule, to: Form) -> LayerPlan:
    """Return the plan of one layer that a rule matches."""
    name, kernel = _join(path, "kernel"), shapes[_join(path, "kernel")]
    window = rule.window
    if window is None:
        raise PlanError(
            f"rule {rule.pattern!r} has no window, and the shape {kernel} of {name!r} "
            f"does not tell it; write it as '{rule.pattern}=7x7'"
        )
    start = f"{path}/" if path else ""
    siblings = [p.removeprefix(start) for p in shapes if p.startswith(start)]
    others = [p for p in siblings if p not in ("kernel", "bias")]
    parent, _, last = path.rpartition("/")
    # nn.WeightNorm stands beside its layer and names its scales after the kernel.
    others += [
        p for p in shapes if p.startswith(parent) and f"/{last}/kernel/" in f"/{p}"
    ]
    if path and others:
        raise PlanError(
            f"layer {path!r} has more than a kernel and a bias: {others[:5]}; it may "
            "be adapted (LoRA), normalised or quantised, and its kernel alone is not "
            f"the layer; {_way_out(path)}"
        )
    dense = _dense_shape(name, kernel, window, path, to)
    rest, order = len(window), rule.order
    try:
        order = order or channel_last(rest)
        forward = kernel_rearrangement(dense, window, order=order)
    except ValueError as error:
        raise PlanError(f"rule {rule.pattern!r}, leaf {name!r}: {error}") from None
    moves = [("kernel", forward)]
    bias = shapes.get(_join(path, "bias"))
    if bias is not None:
        if bias != dense[-1:]:
            raise PlanError(
                f"leaf {_join(path, 'bias')!r} has shape {bias}, the kernel {kernel} "
                f"beside it is of a layer with the bias {dense[-1:]}; {_way_out(path)}"
            )
        moves.append(("bias", bias_rearrangement(bias)))
    if to == "conv" and rule.order is None and dense[0] > math.prod(window) > 1:
        said = f"{rule.pattern}={'x'.join(map(str, window))}"
        last = channel_last(rest)
        raise PlanError(
            f"rule {said!r} leaves open in which order {name!r} gets the window and "
            f"its {dense[0] // math.prod(window)} channels; shapes cannot tell. Write "
            f"'{said}:{last}' for channels last, as Flax's images are flattened, or "
            f"'{said}:C{last[:-1]}' for channels first, as those of PyTorch are"
        )
    if to == "dense":
        moves = [(leaf, move.inverse()) for leaf, move in moves]
    channels = forward.target[-2]
    return LayerPlan(
        base="pointwise" if math.prod(window) == 1 else "full_window",
        layer="Dense" if to == "conv" else "Conv",
        window=window,
        order=order,
        leaves=tuple(moves),
        input_shape=(1, dense[0]) if to == "conv" else (1, *window, channels),
        strides=(1,) * rest,
        to=to,
    )


def _dense_shape(name: str, kernel: Shape, window: Shape, path: str, to: Form) -> Shape:
    """Shape ``(in, out)`` of the dense kernel; the error names other readings."""
    if to == "conv":
        if len(kernel) == 2:
            return kernel
        raise PlanError(
            f"leaf {name!r} of shape {kernel} is ambiguous: a Dense has a kernel of "
            f"two axes, this may be {_guesses(len(kernel))}; {_way_out(path)}"
        )
    size = "x".join(map(str, window))
    if len(kernel) != len(window) + 2:
        what = (
            "a Dense already"
            if len(kernel) == 2
            else f"a Conv of another rank, or {_guesses(len(kernel), conv=False)}"
        )
        raise PlanError(
            f"leaf {name!r} of shape {kernel} is ambiguous: the kernel of a Conv with "
            f"the window {size} has {len(window) + 2} axes, this may be {what}; "
            f"{_way_out(path)}"
        )
    if kernel[:-2] != window:
        raise PlanError(
            f"leaf {name!r} of shape {kernel} has the window "
            f"{'x'.join(map(str, kernel[:-2]))}, the rule says {size}; correct the rule"
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


def _way_out(path: str) -> str:
    return _WAY_OUT.format(skip=f"{path or '*'}=skip")


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _shapes(params: Any) -> Iterator[tuple[str, Shape]]:
    """Path and shape of each leaf, without the boxes that some of them sit in."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: _is_shape(x) or isinstance(x, meta.AxisMetadata)
    )
    for path, leaf in leaves:
        leaf = meta.unbox(leaf)
        name, _, last = leaf_path(path).rpartition("/")
        name = name if name and last in _BOXES else _join(name, last)
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
                f"several levels called 'params': {outermost}; pass the one you mean"
            )
        prefix = outermost[0]
        shapes = {
            path.removeprefix(prefix): shape
            for path, shape in shapes.items()
            if path.startswith(prefix)
        }
