"""Which layers convert and how: an immutable Plan with a JSON form."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..files.strict_json import loads
from ..messages.errors import PlanError
from ..messages.reports import aligned
from .layer import LayerPlan, layer_from_json, other_form
from .tuning import Tuning

# Of a plan as a whole: "mix" where some layers go to conv and some to dense.
Direction = Literal["conv", "dense", "mix"]

# Of a compiler, by name, as XLA takes them.
Options = tuple[tuple[str, str | bool | int | float], ...]

# Of layers in plan.skipped; others there are called, and stay for another reason.
UNCALLED_REASON = "the trace of these inputs does not call it"

FORMAT = "fcconv_jax.plan"
VERSION = 3


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, LayerPlan]):
    """Which layers convert, and how: an immutable Mapping from path to LayerPlan.

    Args:
      to: the form that the layers convert to, ``"conv"`` or ``"dense"``; ``"mix"`` if
        they convert to different forms (see ``LayerPlan.to``).
      layers: pairs of path and :class:`LayerPlan`.
      left: pairs of path and the reason why that layer is skipped.
      options: the compiler options, as pairs of name and value, that were fastest with
        the plan; a converted linen model or function applies them in its own jit.
      tuning: the measurements of :func:`fcconv_jax.tune`; None for other plans.

    Example:
      >>> from fcconv_jax.geometry.kernels import Rearrangement
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
    options: Options = ()
    # Plans that convert alike are equal, and share jit's cache, whatever was measured.
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

    def __reduce__(self) -> tuple[type[Plan], tuple[object, ...]]:
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
                raise PlanError(
                    f"{path!r} is planned in two ways: {mine} and {yours}. Join plans "
                    "that agree."
                )
        if self.layers and other.layers and self.options != other.options:
            raise PlanError(
                f"Expected plans with the same compiler options, got {self.options} "
                f"and {other.options}. Tune the joined plan."
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
          PlanError: the text isn't a plan, is damaged, or has another version.
        """
        if not isinstance(text, str | bytes):
            raise PlanError(
                f"Expected the text of a plan, got {type(text).__name__}. Pass the "
                "result of to_json."
            )
        try:
            content = loads(text)
        except ValueError as error:
            raise PlanError(
                f"Expected the text of a plan, got something else ({error}). Pass the "
                "result of to_json."
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise PlanError(
                f'Expected a plan, with "format": "{FORMAT}", got other JSON. Pass the '
                "result of to_json."
            )
        version = content.get("version")
        if type(version) is not int or version != VERSION:
            newer = type(version) is int and version > VERSION
            raise PlanError(
                f"Expected a plan of version {VERSION}, got version {version!r}. "
                f"{'Upgrade fcconv_jax' if newer else 'Make the plan again'}."
            )
        try:
            to = content["to"]
            layers = tuple(
                (path, layer_from_json(entry))
                for path, entry in content["layers"].items()
            )
            left = tuple((str(p), str(w)) for p, w in content["skipped"].items())
            options = tuple(content["options"].items())
            tuning = content.get("tuning") and Tuning.from_content(content["tuning"])
            json.dumps(dict(options))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(repr(error)) from None
        try:
            found = cls(to, layers, left, options, tuning)
            hash(found)  # fails for options that are lists
        except (PlanError, TypeError) as error:
            raise _damaged(str(error)) from None
        return found

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


def _damaged(why: str) -> PlanError:
    return PlanError(f"damaged plan: {why}. Make the plan again.")


def check_plan(plan: object) -> None:
    """Refuse what isn't a plan, such as its JSON text.

    Raises:
      PlanError: names the type.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"Expected a Plan, got {type(plan).__name__}. Pass the result of make_plan."
        )


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
