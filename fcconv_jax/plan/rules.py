"""The user's rules: which layers convert, and how, where the trace is not to decide."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import glob
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from ..geometry.reasons import PHASES
from ..messages.errors import PlanError
from ..messages.flags import check_flags, check_kind
from .layer import Form, KernelLayout, LayerPlan, Layout

_SYNTAX = (
    "PATTERN=skip, =auto, =phases or PATTERN=[FORM][:WINDOW][:ORDER][:LAYOUT]"
    "[:groupsN], such as 'head=7x7', 'head=7x7:CHW', 'patch_embed.proj=dense', "
    "'*=keep' or 'fc*=1x1:OHWI:flat'; PATTERN<SIZE is for kernels of fewer entries, as "
    "in '*<10000=skip'"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule for the layers whose module path matches a pattern.

    Fields that aren't given are read from the trace. So a rule with a pattern only
    keeps the planner's choice, and protects its layers from later rules.

    Args:
      pattern: shell-style pattern for the whole module path (``*`` also crosses
        ``/``): ``"head"``, ``"*/attention/*"``.
      window: kernel size of the conv form.
      order: flatten order such as ``"CHW"``.
      layout: as in :class:`fcconv_jax.plan.layer.LayerPlan`; None for the backend's.
      skip: don't convert the layer.
      kernel_layout: as in :class:`fcconv_jax.plan.layer.LayerPlan`; None for the
        backend's.
      below: match only kernels with fewer entries than this.
      to: the form to convert to; None for that of the whole plan.
      groups: feature groups of the conv form, for :func:`fcconv_jax.plan_from_params`;
        None for one.
      phases: run transposed convolutions that have no dense form as one plain
        convolution for each residue of their strides.

    Example:
      >>> rule = Rule.parse("head/fc6=7x7:CHW:keep")
      >>> rule.pattern, rule.window, rule.order, rule.layout
      ('head/fc6', (7, 7), 'CHW', 'keep')
      >>> Rule.parse("*<10000=skip") == Rule("*", skip=True, below=10000)
      True
    """

    pattern: str
    window: tuple[int, ...] | None = None
    order: str | None = None
    layout: Layout | None = None
    skip: bool = False
    kernel_layout: KernelLayout | None = None
    below: int | None = None
    to: Form | None = None
    groups: int | None = None
    phases: bool = False

    def __post_init__(self) -> None:
        check_flags(skip=self.skip, phases=self.phases)
        wanted = "sizes of a window"
        check_kind("window=", self.window, (tuple, list, type(None)), wanted, "(7, 7)")
        for name, kind in (("layout", Layout), ("kernel_layout", KernelLayout)):
            value, known = getattr(self, name), get_args(kind)
            if value not in (None, *known):
                raise PlanError(
                    f"Expected {name}= one of {', '.join(known)}, got {value!r}. Pass "
                    "one of them, or None."
                )

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read a rule as it is written on the command line.

        Args:
          text: ``PATTERN=skip``; ``PATTERN=auto``, for what the trace says;
            ``PATTERN=phases``; or ``PATTERN=`` and a form, a window, an order, layouts
            and a number of groups, all optional, between colons. ``PATTERN<SIZE`` is
            for kernels of fewer entries.

        Raises:
          PlanError: the text has another form.
        """
        # From the right: a value has no "=", and a path may have one.
        pattern, _, value = text.rpartition("=")
        if limited := re.fullmatch(r"(.+)<(\d+)", pattern):
            pattern = limited[1]
        below = int(limited[2]) if limited else None
        if pattern and value in ("skip", "auto", "phases"):
            skip, phases = value == "skip", value == "phases"
            return cls(pattern, skip=skip, below=below, phases=phases)
        found: dict[str, Any] = {}
        for word in value.split(":"):
            name = _meaning(word)
            if not pattern or name is None or name in found:
                raise PlanError(
                    f"Expected a rule {_SYNTAX}, got {text!r}. Pass one such as "
                    "'head=7x7', or 'head=skip'."
                )
            found[name] = word
            if name == "window":
                found[name] = tuple(map(int, word.split("x")))
            elif name == "groups":
                found[name] = int(word.removeprefix("groups"))
        return cls(pattern, **found, below=below)

    def __str__(self) -> str:
        """Return the pattern and the size, as they are written."""
        return self.pattern if self.below is None else f"{self.pattern}<{self.below}"

    def matches(self, path: str, size: int) -> bool:
        """Return whether the rule matches a layer.

        Args:
          path: the layer's module path.
          size: number of entries of its kernel, without stack axes.
        """
        small = self.below is None or size < self.below
        return small and fnmatch.fnmatchcase(path, self.pattern)


def as_rules(rules: Iterable[Rule | str]) -> tuple[Rule, ...]:
    """Read rules given as :class:`Rule` or as command-line text."""
    # One rule alone: iterating over a text would give its letters.
    if isinstance(rules, Rule | str):
        rules = (rules,)
    if rules is None or isinstance(rules, Mapping):
        raise PlanError(
            f"Expected rules as a list of Rule or text, got a {type(rules).__name__}. "
            "Pass rules=['head=7x7']."
        )
    found = []
    for rule in rules:
        if not isinstance(rule, Rule | str):
            raise PlanError(
                f"Expected rules as Rule or text such as 'head=7x7', got {rule!r:.60}. "
                "Pass rules=['head=7x7']."
            )
        found.append(Rule.parse(rule) if isinstance(rule, str) else rule)
        if found[-1].to not in (None, "conv", "dense"):
            raise PlanError(
                f"rule {found[-1]}: expected to='conv' or to='dense', got "
                f"{found[-1].to!r}. Pass one of them, or leave it out."
            )
    return tuple(found)


def match_rules(
    rules: Sequence[Rule], sizes: Mapping[str, int]
) -> Mapping[str, Rule | None]:
    """Return the first rule that matches each layer.

    Raises:
      PlanError: a rule's pattern matches no path at all; the message lists near misses.
    """
    paths = list(sizes)
    for rule in rules:
        # By the pattern alone: a limit of sizes that fits no layer may be meant.
        if not any(fnmatch.fnmatchcase(path, rule.pattern) for path in paths):
            close = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.3)
            hint = f"close to it: {close}" if close else f"there are: {paths[:10]}"
            hint += ". Pass the path of a layer, or a pattern such as '*'."
            if not paths:
                hint = "none was found for the rule's form. Drop it, or its form."
            raise PlanError(f"rule {rule.pattern!r} matches no linear layer; {hint}")
    return {
        path: next((rule for rule in rules if rule.matches(path, size)), None)
        for path, size in sizes.items()
    }


def first_match(rules: Sequence[Rule], path: str, layer: LayerPlan) -> Rule:
    """Return the first rule that matches a planned layer, or an empty rule.

    A rule for the matmuls of a layer's kernel may name the layer.
    """
    size = math.prod(layer.kernel.source)
    names = {path, module_of(path) if layer.is_matmul else path}
    for rule in rules:
        if any(rule.matches(name, size) for name in names):
            return rule
    return Rule(path)


def module_of(path: str) -> str:
    """Return the path of the module that a kernel of Flax or PyTorch belongs to."""
    return re.sub(r"(/kernel|[./]weight)$", "", path)


def require_traceable(rules: Iterable[Rule], to: Form) -> None:
    """Refuse rules for what a trace decides.

    Raises:
      PlanError: a rule states groups, or another form than the plan's.
    """
    for rule in rules:
        if rule.to not in (None, to):
            raise PlanError(
                f"Expected rules for to={to!r}, got rule {rule.pattern!r} to "
                f"{rule.to!r}. Pass to={rule.to!r} (--to {rule.to})."
            )
        if rule.groups is not None:
            raise PlanError(
                f"Expected a rule without groups, got groups{rule.groups} for "
                f"{rule.pattern!r}. Drop it: the model's trace shows them."
            )


def phases_rules(skipped: Mapping[str, str]) -> list[Rule]:
    """Return a rule for each skipped layer that can still run in phases.

    Example:
      >>> phases_rules({"head": "it is a table"})
      []
    """
    return [
        Rule(glob.escape(path), phases=True)
        for path, reason in skipped.items()
        if PHASES in reason
    ]


def _meaning(word: str) -> str | None:
    """Return the field that a word of a rule sets."""
    if re.fullmatch(r"\d+(x\d+)*", word):
        return "window"
    if word in get_args(Layout):
        return "layout"
    if word in get_args(KernelLayout):
        return "kernel_layout"
    if word in get_args(Form):
        return "to"
    if re.fullmatch(r"groups[1-9]\d*", word):
        return "groups"
    # Last, as layouts of kernels are capital letters, too.
    return "order" if re.fullmatch("[A-Z]+", word) else None
