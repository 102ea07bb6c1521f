"""How one layer converts: an immutable LayerPlan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

from ..files.strict_json import whole_numbers
from ..geometry.convolution import Case
from ..geometry.kernels import Rearrangement, channel_last
from ..messages.errors import PlanError

T = TypeVar("T")
Form = Literal["conv", "dense"]
Layout = Literal["fold", "keep", "flat"]
KernelLayout = Literal["HWIO", "OHWI", "OIHW"]


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How the parameters and the call of one layer convert to the other form.

    Args:
      base: the case in which the two forms are equal (see :func:`fcconv_jax.classify`);
        with several groups, that of each group.
      layer: class of the original layer, such as ``"Dense"``.
      window: kernel size of the conv form.
      order: the axes of the window and the channels in the order in which the dense
        form flattens them, slowest first: ``"HWC"``, ``"CHW"``, ``"WC"``. For a
        transposed convolution, this is the order in the dense form's output.
      leaves: for each parameter, its name under the module path and how its entries
        are rearranged; the name is ``""`` if the plan's key is the leaf's own path.
      input_shape: shape of the layer's input when the plan was made; an example if
        sizes were symbolic.
      strides: strides of the conv form; for a transposed one, outputs per input.
      groups: feature groups of the conv form.
      stack_axes: axes that ``nn.scan`` and ``nn.vmap`` add to the stored parameters,
        innermost first, as Flax numbers them.
      layout: how the conv form runs. ``"fold"`` folds leading axes into the batch,
        ``"keep"`` keeps those of a pointwise layer as spatial axes, and ``"flat"`` runs
        a 1-D convolution 1x1 with window and channels in one axis.
      tied: names of the leaves that a tree holds only once, under another layer's
        path.
      kernel_layout: how the converted kernel is stored: ``"HWIO"`` as in Flax (WIO in
        1-D, DHWIO in 3-D; dense ``(in, out)``), ``"OHWI"`` (conv only), or ``"OIHW"``
        as in PyTorch (dense ``(out, in)``).
      to: the form that the layer converts to.

    Raises:
      PlanError: the fields do not describe one layer.

    Example:
      >>> kernel = Rearrangement.reshape((8, 3), (2, 2, 2, 3))
      >>> layer = LayerPlan("full_window", "Dense", (2, 2), "HWC",
      ...                   (("kernel", kernel),), (1, 8), (1, 1))
      >>> layer.case, layer.kernel.target, layer.inverse().kernel.target
      ('full_window', (2, 2, 2, 3), (8, 3))
    """

    base: Case
    layer: str
    window: tuple[int, ...]
    order: str
    leaves: tuple[tuple[str, Rearrangement], ...]
    input_shape: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int = 1
    stack_axes: tuple[int, ...] = ()
    layout: Layout = "fold"
    tied: tuple[str, ...] = ()
    kernel_layout: KernelLayout = "HWIO"
    to: Form = "conv"

    def __post_init__(self):
        sizes = (*self.window, *self.strides, self.groups)
        rank = len(self.window)
        problem = None
        if self.base not in get_args(Case) or self.base == "grouped":
            problem = f"base {self.base!r}"
        elif self.layout not in get_args(Layout):
            problem = f"layout {self.layout!r}"
        elif self.kernel_layout not in get_args(KernelLayout):
            problem = f"kernel_layout {self.kernel_layout!r}"
        elif self.layout == "flat" and self.groups > 1 and math.prod(self.window) > 1:
            problem = "layout 'flat' for a window of several groups"
        elif self.transposed and self.layout != "fold":
            problem = f"{self.base} with layout {self.layout!r}"
        elif self.base == "unpatchify" and self.strides != self.window:
            problem = f"unpatchify of {self.window} with strides {self.strides}"
        elif self.to not in get_args(Form):
            problem = f"to {self.to!r}"
        elif any(type(n) is not int or n < 1 for n in sizes):
            problem = (
                f"window {self.window}, strides {self.strides}, {self.groups} groups"
            )
        elif not _can_stack(self.stack_axes, self.leaves):
            problem = f"stack_axes {self.stack_axes}"
        elif not 1 <= rank <= 3 or len(self.strides) != rank:
            problem = f"window {self.window} with strides {self.strides}"
        elif not isinstance(self.order, str) or not (
            # A window of ones is flattened alike in every order.
            math.prod(self.window) == 1 or is_order(self.order, rank)
        ):
            problem = f"order {self.order!r} for a window of {rank} axes"
        elif not self.leaves:
            problem = "no leaves"
        elif not isinstance(self.layer, str) or not all(
            isinstance(name, str) for name in self.tied
        ):
            problem = f"layer {self.layer!r}, tied {self.tied!r}"
        if problem:
            raise PlanError(f"not a layer's plan: {problem}")

    @property
    def case(self) -> Case:
        """Why the two forms are equal: ``"grouped"``, or the base case."""
        return "grouped" if self.groups > 1 else self.base

    @property
    def transposed(self) -> bool:
        """Whether the conv form is a transposed convolution."""
        return self.base in ("unpatchify", "phases")

    @property
    def kernel(self) -> Rearrangement:
        """How the kernel's entries move."""
        return self.leaves[0][1]

    @property
    def bias(self) -> Rearrangement | None:
        """How the bias's entries move; None for a layer without bias."""
        return self.leaves[1][1] if len(self.leaves) > 1 else None

    @property
    def is_matmul(self) -> bool:
        """Whether it is one parameter's matmuls in a traced program.

        Else it is a layer of Flax, which is swapped as a whole.
        """
        return not self.leaves[0][0]

    def lay_out(self, move: Rearrangement) -> Rearrangement:
        """Return a rearrangement to the converted kernel in the stored order.

        Args:
          move: to ``(*window, in, out)``, or to ``([groups,] in, out)``.
        """
        if self.base == "phases":  # which leave the kernel as it is
            return move
        *lead, inner, out = range(len(move.target))
        if self.kernel_layout == "OIHW":
            axes = (out, inner, *lead) if self.to == "conv" else (*lead, out, inner)
            return move.permuted(axes)
        if self.kernel_layout == "OHWI" and self.to == "conv":
            return move.permuted((out, *lead, inner))
        return move

    def channels_last(self, stored: Sequence[T]) -> tuple[T, ...]:
        """Return a stored conv kernel's shape as ``(*window, in, out)``.

        Or whatever else there is for each axis.
        """
        if self.kernel_layout == "OHWI":
            return (*stored[1:], stored[0])
        if self.kernel_layout == "OIHW":
            return (*stored[2:], stored[1], stored[0])
        return tuple(stored)

    @property
    def channel_last_order(self) -> str:
        """Order of a flatten of the window with channels last, such as ``"HWC"``."""
        return channel_last(len(self.window))

    @property
    def canonical_target(self) -> tuple[int, ...]:
        """Shape of the converted kernel, ``(*window, in, out)`` or a dense one's."""
        target = self.kernel.target
        if self.to == "conv":
            return self.channels_last(target)
        if self.kernel_layout == "OIHW":
            return (*target[:-2], target[-1], target[-2])
        return target

    def dense_input_shape(self) -> tuple[int, ...]:
        """Shape of the dense form's input ``(*lead, [groups,] in)``, of a plan to conv.

        As the layer had it when the plan was made, with all its features in one axis.
        Phases read the convolution's own input.
        """
        if self.base == "phases":
            return self.input_shape
        *window, channels, _ = self.canonical_target
        features = channels if self.transposed else math.prod(window) * channels
        total = features * self.groups
        lead = self.input_shape
        while lead and math.prod(self.input_shape[len(lead) :]) < total:
            lead = lead[:-1]
        if math.prod(self.input_shape[len(lead) :]) != total:
            # Features that do not come last: only their number counts for the matmul.
            lead = (math.prod(self.input_shape) // total,)
        groups = (self.groups,) if self.groups > 1 else ()
        return (*lead, *groups, features)

    def inverse(self) -> LayerPlan:
        """Return the same layer, going the other way."""
        leaves = tuple((name, leaf.inverse()) for name, leaf in self.leaves)
        return dataclasses.replace(self, leaves=leaves, to=other_form(self.to))


def other_form(form: Form) -> Form:
    """Return the form that a layer has where it does not have this one.

    Example:
      >>> other_form("conv")
      'dense'
    """
    return "dense" if form == "conv" else "conv"


def layer_from_json(entry: dict[str, Any]) -> LayerPlan:
    """Rebuild a layer plan.

    Raises:
      KeyError: a field is missing.
      TypeError: there is one that is unknown.
      ValueError: a value is not of its kind.
    """
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()
    }
    values["leaves"] = tuple(
        (name, Rearrangement(**{k: whole_numbers(v) for k, v in leaf.items()}))
        for name, leaf in entry["leaves"].items()
    )
    whole_numbers(values["input_shape"])
    return LayerPlan(**values)


def _can_stack(
    axes: Sequence[int], leaves: Sequence[tuple[str, Rearrangement]]
) -> bool:
    """Return whether axes can be put, one after the other, among those of each leaf."""
    ranks = [len(shape) for _, leaf in leaves for shape in (leaf.source, leaf.target)]
    return all(
        type(axis) is int and -rank - n - 1 <= axis <= rank + n
        for n, axis in enumerate(axes)
        for rank in ranks
    )


def is_order(order: str, rank: int) -> bool:
    """Return whether an order names each axis of a window of this rank, and C, once.

    Example:
      >>> is_order("CHW", 2), is_order("HW", 2)
      (True, False)
    """
    return sorted(order) == sorted("DHW"[3 - rank :] + "C")
