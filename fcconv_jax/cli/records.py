"""Options that several commands share, as records that a command takes whole."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from .options import (
    AllSteps,
    BackendFor,
    CheckpointStep,
    DryRun,
    FollowLinks,
    Inputs,
    Kwargs,
    Method,
    NoCheck,
    Overwrite,
    Prefixes,
    Rules,
    To,
    ToForm,
)

if TYPE_CHECKING:
    from ..plan import Form


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """Params, inputs and keyword arguments of a model's call."""

    inputs: Inputs = None
    kwargs: Kwargs = None
    method: Method = None


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What decides a plan, where a command makes one."""

    to: ToForm = None
    rules: Rules = None
    backend: BackendFor = None

    @property
    def form(self) -> Form:
        """``--to``, or else the form that all rules agree on; ``"conv"`` by default."""
        from ..plan.rules import as_rules

        forms = {rule.to for rule in as_rules(self.rules or ()) if not rule.skip}
        if self.to is None and forms == {"dense"}:
            return "dense"
        return "dense" if self.to == To.DENSE else "conv"


@dataclasses.dataclass(frozen=True)
class TransferOptions:
    """How one checkpoint is written from another."""

    overwrite: Overwrite = False
    step: CheckpointStep = None
    all_steps: AllSteps = False
    prefixes: Prefixes = None
    no_check: NoCheck = False
    dry_run: DryRun = False
    follow_links: FollowLinks = False

    def arguments(self) -> Mapping[str, Any]:
        """Return them as the keyword arguments of ``convert_checkpoint``."""
        found = dict(vars(self))
        found["prefix"] = found.pop("prefixes") or ()
        found["check"] = not found.pop("no_check")
        return found


def given(options: Any) -> bool:
    """Return whether any option of a record was given.

    Example:
      >>> given(CallOptions()), given(CallOptions(method="encode"))
      (False, True)
    """
    return any(vars(options).values())


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let Typer see each field of a command's records as an option of its own.

    Typer reads a command's signature, and has no notion of groups of options.

    Example:
      >>> def show(file: str, call: CallOptions): print(file, call.method)
      >>> spread(show)(file="net.py", inputs=None, kwargs=None, method="encode")
      net.py encode
    """
    hints = get_type_hints(command, include_extras=True)
    records: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            records[name] = hints[name]
            parameters += _options(hints[name])
        else:
            parameters.append(
                parameter.replace(
                    annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY
                )
            )

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, record in records.items():
            fields = [field.name for field in dataclasses.fields(record)]
            values[name] = record(**{field: values.pop(field) for field in fields})
        command(**values)

    # Without them Typer reads the command's own, to which `wraps` refers.
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    vars(call)["__signature__"] = inspect.Signature(parameters)
    return call


def _options(record: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(record)
    ]
