"""What converts and how: immutable Plan, LayerPlan and Rule with a JSON form."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..files.strict_json import loads, whole_numbers
from ..geometry.convolution import Case
from ..geometry.kernels import Rearrangement
from ..messages.errors import PlanError
from ..messages.reports import aligned
from .tuning import Tuning

Form = Literal["conv", "dense"]
# Of a plan as a whole: "mix" where some layers go to conv and some to dense.
Direction = Literal["conv", "dense", "mix"]
Layout = Literal["fold", "keep", "flat"]
KernelLayout = Literal["HWIO", "OHWI", "OIHW"]

# Of layers in plan.skipped; others there are called, and stay for another reason.
UNCALLED_REASON = "the trace of these inputs does not call it"

FORMAT = "fcconv_jax.plan"
VERSION = 3


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one layer's parameters and call move from one form to the other.

    Args:
      base: why the two forms are equal (see :func:`fcconv_jax.classify`), of each
        group where there are several.
      layer: class of the layer as it was found, such as ``"Dense"``.
      window: kernel size of the conv form.
      order: the axes of the window and the channels in the order in which the dense
        form flattens them, slowest first: ``"HWC"``, ``"CHW"``, ``"WC"``. A transposed
        convolution's dense form has them so in its output.
      leaves: for each parameter its name under the module path and how its entries
        move; the name is ``""`` where the plan's key is the leaf's own path.
      input_shape: shape of the layer's input when the plan was made; an example of
        it where sizes were symbolic.
      strides: strides of the conv form; of a transposed one outputs per input.
      groups: feature groups of the conv form.
      stack_axes: axes that ``nn.scan`` and ``nn.vmap`` add to the stored parameters,
        innermost first, as Flax numbers them.
      layout: how the conv form is run: ``"fold"`` the leading axes into the batch,
        ``"keep"`` those of a pointwise layer as spatial axes, or run it ``"flat"``, as
        a 1-D convolution 1x1 over the window and channels in one axis.
      tied: names of the leaves that a tree holds only once, under another layer's
        path.
      kernel_layout: how the converted kernel is stored: ``"HWIO"``, as Flax has it
        (for one dimension WIO, for three DHWIO; a dense one ``(in, out)``); a conv one
        as ``"OHWI"``; or ``"OIHW"``, as PyTorch has it (a dense one ``(out, in)``).
      to: the form that the layer goes to.

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

    def channels_last(self, stored: Sequence[Any]) -> tuple[Any, ...]:
        """Return a stored conv kernel's shape as ``(*window, in, out)``.

        Or whatever else there is for each axis.
        """
        if self.kernel_layout == "OHWI":
            return (*stored[1:], stored[0])
        if self.kernel_layout == "OIHW":
            return (*stored[2:], stored[1], stored[0])
        return tuple(stored)

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


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, LayerPlan]):
    """Which layers convert, and how: an immutable Mapping from path to LayerPlan.

    Args:
      to: the form that the plan goes to, ``"conv"`` or ``"dense"``; ``"mix"`` if its
        layers go to different ones, as each says itself.
      layers: pairs of path and :class:`LayerPlan`.
      left: pairs of path and the reason why that layer is skipped.
      options: compiler options, pairs of name and value, with which the plan was found
        to be best; the jit of a converted linen model or function sets them.
      tuning: what :func:`fcconv_jax.tune` measured; None for other plans.

    Example:
      >>> kernel = Rearrangement.reshape((8, 3), (2, 2, 2, 3))
      >>> fc = LayerPlan("full_window", "Dense", (2, 2), "HWC", (("kernel", kernel),),
      ...                (1, 8), (1, 1))
      >>> plan = Plan("conv", (("fc", fc),))
      >>> plan["fc"].kernel.target
      (2, 2, 2, 3)
      >>> Plan.from_json(plan.to_json()) == plan
      True
      >>> print(plan)
      1 layer to conv
      path  layer  case         kernel                    order
      fc    Dense  full_window  (8, 3) -> (2, 2, 2, 3)    HWC
    """

    to: Direction
    layers: tuple[tuple[str, LayerPlan], ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    tuning: Tuning | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if self.to not in get_args(Direction):
            raise PlanError(f"not a plan: it goes to {self.to!r}")
        for path, layer in self.layers:
            if self.to not in (layer.to, "mix"):
                raise PlanError(f"a plan to {self.to}, with {path!r} to {layer.to}")

    @functools.cached_property
    def _by_path(self) -> dict[str, LayerPlan]:
        return dict(self.layers)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.to, self.layers, self.left, self.options))

    def __reduce__(self) -> Any:
        # Not with its hash: that of a string is another one in each process.
        return type(self), tuple(
            getattr(self, f.name) for f in dataclasses.fields(self)
        )

    def __hash__(self) -> int:
        # A plan is part of the cache key of every jit below a converted model.
        return self._hash

    def __getitem__(self, path: str) -> LayerPlan:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def skipped(self) -> Mapping[str, str]:
        """Map the path of each linear layer that isn't converted to the reason."""
        return MappingProxyType(dict(self.left))

    @functools.cached_property
    def matmuls(self) -> Plan:
        """The part of the plan that is taken in the traced program, by parameter."""
        layers = tuple((p, layer) for p, layer in self.layers if layer.is_matmul)
        return Plan(self.to, layers)

    def inverse(self) -> Plan:
        """Return the reverse plan: ``plan.inverse().inverse() == plan``."""
        return self._inverse

    @functools.cached_property
    def _inverse(self) -> Plan:
        # Every trace of a converted function moves its params back.
        return Plan(
            self.to if self.to == "mix" else other_form(self.to),
            tuple((path, layer.inverse()) for path, layer in self.layers),
            self.left,
        )

    def __or__(self, other: Mapping[str, LayerPlan]) -> Plan:
        """Join two plans of one model, such as those of two of its methods.

        Raises:
          PlanError: the plans plan one layer differently, or are tuned with other
            compiler options.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        for path in self.keys() & other.keys():
            mine, yours = self[path], other[path]
            if dataclasses.replace(mine, input_shape=yours.input_shape) != yours:
                raise PlanError(f"{path!r} is planned in two ways: {mine} and {yours}")
        if self.layers and other.layers and self.options != other.options:
            raise PlanError(
                f"plans with other compiler options: {self.options}, {other.options}"
            )
        layers = {**self._by_path, **other._by_path, **self._by_path}
        left = {**dict(self.left), **dict(other.left), **dict(self.left)}
        return Plan(
            self.to if self.to == other.to else "mix",
            tuple(layers.items()),
            tuple((path, why) for path, why in left.items() if path not in layers),
            self.options or other.options,
        )

    def moved(self, module: str, to: str) -> Plan:
        """Return the plan of one module's layers for its copy under another path.

        For copies that the planned call doesn't use, such as a target network:
        ``plan | plan.moved("online", "target")`` converts both.

        Args:
          module: path of a module with layers that the plan converts.
          to: path of the copy, a module of the same class and shapes.

        Raises:
          PlanError: the plan converts no layer of the module.
        """
        layers = tuple(
            (to + path.removeprefix(module), layer)
            for path, layer in self.layers
            if path == module or path.startswith(f"{module}/")
        )
        if not layers:
            raise PlanError(
                "Expected a module with layers that the plan converts, got "
                f"{module!r}. Pass a path above one of {list(self)[:5]}."
            )
        return Plan(self.to, layers, options=self.options)

    def to_json(self) -> str:
        """Return the plan as JSON text, with a format name and a version number."""
        layers = {}
        for path, layer in self.layers:
            entry = {
                field.name: getattr(layer, field.name)
                for field in dataclasses.fields(layer)
            }
            entry["leaves"] = {
                name: dataclasses.asdict(leaf) for name, leaf in layer.leaves
            }
            layers[path] = entry
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "to": self.to,
            "layers": layers,
            "skipped": dict(self.left),
            "options": dict(self.options),
        }
        if self.tuning is not None:
            content["tuning"] = self.tuning.content()
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
          PlanError: the text isn't a plan, is damaged, or is of a newer version.
        """
        try:
            content = loads(text)
        except ValueError as error:
            raise PlanError(f"not a plan: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise PlanError(f'not a plan: no \'"format": "{FORMAT}"\' in it')
        version = content.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise PlanError(
                f"the plan has version {version}, this fcconv_jax reads up to "
                f"{VERSION}: upgrade fcconv_jax"
            )
        try:
            to = content["to"]
            layers = tuple(
                # Layers of version 1 do not say themselves where they go.
                (path, _layer_from_json({"to": to, **entry}))
                for path, entry in content["layers"].items()
            )
            left = tuple((str(p), str(w)) for p, w in content["skipped"].items())
            options = tuple(content.get("options", {}).items())
            tuning = content.get("tuning") and Tuning.from_content(content["tuning"])
            json.dumps(dict(options))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"damaged plan: {error!r}") from None
        try:
            return cls(to, layers, left, options, tuning)
        except PlanError as error:
            raise PlanError(f"damaged plan: {error}") from None

    def table(self) -> list[tuple[str, ...]]:
        """Return the layers as rows of text, below a row of headings."""
        rows = [("path", "layer", "case", "kernel", "order", "to", "front end")]
        for path, layer in self.layers:
            kernel = f"{layer.kernel.source} -> {layer.kernel.target}"
            if layer.stack_axes:
                kernel += f" stacked on {', '.join(map(str, layer.stack_axes))}"
            # Flat or folded, it is one convolution to whoever reads the table.
            if layer.layout == "keep" or layer.kernel_layout != "HWIO":
                kernel += f" {layer.kernel_layout} {layer.layout}"
            taken = "matmul" if layer.is_matmul else "layer"
            rows.append(
                (
                    *(path or "(root)", layer.layer, layer.case),
                    *(kernel, layer.order, layer.to, taken),
                )
            )
        if self.to != "mix":
            rows = [(*row[:5], *row[6:]) for row in rows]
        if not self.matmuls:  # layers only, as their classes say
            return [row[:-1] for row in rows]
        return rows

    def __str__(self) -> str:
        lines = [f"{len(self)} layer{'s' * (len(self) != 1)} to {in_words(self.to)}"]
        if self.tuning is not None:
            lines.append(f"tuned: {self.tuning.headline()}")
        lines += [f"compiled with {name}={value!r}" for name, value in self.options]
        if self.layers:
            rows = [list(row) for row in self.table()]
            for row in rows:
                row[3] += "  "
            lines += aligned(rows)
        if self.left:
            lines.append(f"{len(self.left)} skipped")
            width = max(len(path or "(root)") for path, _ in self.left)
            lines += [
                f"{(path or '(root)').ljust(width)}  {why}" for path, why in self.left
            ]
        return "\n".join(lines)


def direction(layers: Mapping[str, LayerPlan]) -> Direction:
    """Return where a plan of these layers goes; of none, to conv.

    Example:
      >>> direction({})
      'conv'
    """
    forms: list[Direction] = [layer.to for layer in layers.values()]
    return "mix" if len(set(forms)) > 1 else (forms or ["conv"])[0]


def in_words(to: Direction) -> str:
    """Return where a plan goes, as a sentence has it.

    Example:
      >>> in_words("mix")
      'conv and dense'
    """
    return "conv and dense" if to == "mix" else to


def other_form(form: Form) -> Form:
    """Return the form that a layer has where it does not have this one.

    Example:
      >>> other_form("conv")
      'dense'
    """
    return "dense" if form == "conv" else "conv"


def _layer_from_json(entry: dict[str, Any]) -> LayerPlan:
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
