"""What the commands do: plan a model or a checkpoint, verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .inputs import ArgumentError, load_model, parse_input, parse_kwargs, random_inputs
from .options import To
from .output import print_plan, start_jax

if TYPE_CHECKING:
    import jax

    from ..backends.name import Backend
    from ..checkpoints import ContentReport
    from ..plan import Plan
    from ..verification.report import VerifyReport


@dataclasses.dataclass(frozen=True)
class Wishes:
    """The options of a command about the plan, where it makes one."""

    to: To | None = None
    rules: Sequence[str] | None = None
    backend: str | None = None

    @property
    def any(self) -> bool:
        """Whether any was given."""
        return bool(self.to or self.rules or self.backend)


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """A model and how it is called.

    Args:
      model: a linen or NNX Module, or a function of params and inputs.
      params: of a function.
      specs: shape and dtype of its inputs.
      options: its keyword arguments, ``method`` among them where it is not the usual.
    """

    model: Any
    params: Any
    specs: tuple[jax.ShapeDtypeStruct, ...]
    options: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        name: str,
        inputs: Sequence[str] | None,
        kwargs: Sequence[str] | None,
        method: str | None,
    ) -> ModelCall:
        """Reads MODULE:NAME and the options of a command line."""
        start_jax()
        specs = tuple(parse_input(text) for text in inputs or ())
        options = parse_kwargs(kwargs or ())
        if method is not None:
            options["method"] = method
        loaded = load_model(name)
        return cls(loaded.model, loaded.params, specs, options)

    def plan(self, wishes: Wishes) -> Plan:
        """Plans it by tracing."""
        from ..errors import PlanError
        from ..frontends.make_plan import make_plan

        first = () if self.params is None else (self.params,)
        try:
            return make_plan(
                self.model,
                *first,
                *self.specs,
                to=(wishes.to or To.CONV).value,
                rules=wishes.rules or (),
                backend=wishes.backend,
                **self.options,
            )
        except PlanError:
            raise
        except Exception as error:
            if not self.specs:
                raise ArgumentError(
                    f"{error}. Pass what it is called on: --input 1,8,8,3"
                ) from error
            shapes = " ".join(f"{x.dtype}{list(x.shape)}" for x in self.specs)
            error.add_note(f"It was called on {shapes}.")
            raise


def plan_checkpoint(src: Path, wishes: Wishes, step: str | None = None) -> Plan:
    """Plans from the shapes in a checkpoint, without the model's code; shows it."""
    from ..checkpoints import inspect_checkpoint
    from ..planning.from_shapes import plan_from_params
    from .variables import split_key

    info = inspect_checkpoint(src, step)
    if info.plan is not None:
        return info.plan  # convert_checkpoint says that it is converted already
    shapes = {leaf.path: leaf.shape for leaf in info.leaves}
    if info.format == "safetensors":
        shapes = {"/".join(split_key(key, shapes)): shapes[key] for key in shapes}
    to = (wishes.to or To.CONV).value
    made = plan_from_params(shapes, wishes.rules or (), to, wishes.backend)
    if made:
        print_plan(made, err=True)
    return made


def parse_backends(names: Sequence[str] | None) -> list[Backend] | None:
    """The values of ``--backend``."""
    from ..backends.name import Backend
    from ..errors import BackendError

    try:
        return [Backend.parse(name) for name in names] if names else None
    except BackendError as error:
        raise ArgumentError(f"--backend: {error}") from None


def verify_model(
    call: ModelCall, made: Plan, seed: int, options: Mapping[str, Any]
) -> VerifyReport:
    """The report on a model with random parameters and inputs.

    Where nothing is executed, shapes will do in their place.
    """
    from ..backends.resolution import resolve
    from .variables import abstract_variables, random_variables

    backends = options["backends"]
    if backends and all(resolve(backend).how != "executed" for backend in backends):
        variables = abstract_variables(call)
        return _verify(call, made, variables, None, call.specs, options)
    arrays = random_inputs(call.specs, seed)
    variables = random_variables(call, arrays, seed)
    return _verify(call, made, variables, None, arrays, options)


def verify_checkpoint(
    call: ModelCall,
    checkpoint: Path,
    wishes: Wishes,
    seed: int,
    options: Mapping[str, Any],
    step: str | None = None,
) -> VerifyReport:
    """The report on a model with the parameters of a checkpoint in either form."""
    from ..checkpoints import read_checkpoint
    from ..params.trees import convert_params, restore_params
    from .variables import abstract_variables, find_variables

    saved = read_checkpoint(checkpoint, step)
    arrays = random_inputs(call.specs, seed)
    wanted = abstract_variables(call)
    if saved.plan is None:
        made = call.plan(wishes)
        variables = find_variables(saved, wanted, str(checkpoint))
        return _verify(call, made, variables, None, arrays, options)
    if wishes.any:
        raise ArgumentError(
            f"--to, --rule and --for do not go with {checkpoint}: it is converted, "
            "and holds the plan that decided"
        )
    for form in dict.fromkeys(layer.to for layer in saved.plan.values()):
        _tell_differences(saved.plan, call.plan(Wishes(To(form))), checkpoint)
    wanted = convert_params(wanted, saved.plan)
    converted = find_variables(saved, wanted, str(checkpoint))
    variables = restore_params(converted, saved.plan)
    return _verify(call, saved.plan, variables, converted, arrays, options)


def compare_checkpoints(
    src: Path, dst: Path, step: str | None, prefixes: Sequence[str] | None
) -> ContentReport:
    """The report on two checkpoints, by what they hold."""
    from ..checkpoints import verify_checkpoint

    return verify_checkpoint(src, dst, step=step, prefix=prefixes or ())


def _verify(
    call: ModelCall,
    made: Plan,
    variables: Any,
    converted: Any,
    arrays: Sequence[Any],
    options: Mapping[str, Any],
) -> VerifyReport:
    from ..verification.verify import verify
    from .variables import as_params

    require_layers(made)
    return verify(
        call.model,
        as_params(call.model, variables),
        *arrays,
        plan=made,
        converted_params=as_params(call.model, converted),
        **options,
        **call.options,
    )


def _tell_differences(stored: Plan, traced: Plan, checkpoint: Path) -> None:
    """Says where a stored plan, say one from rules, is not what the code tells."""
    for path in stored.keys() & traced.keys():
        then, now = stored[path], traced[path]
        if (then.window, then.order) != (now.window, now.order):
            typer.echo(
                f"note: {checkpoint} has {path!r} in the window {then.window} "
                f"{then.order}, the model's code tells {now.window} {now.order}: a "
                "model written by hand must flatten as the checkpoint says",
                err=True,
            )


def require_layers(made: Plan) -> None:
    """A conversion that would change nothing is no success."""
    from ..errors import PlanError

    if not made:
        why = "; ".join(f"{path}: {reason}" for path, reason in made.skipped.items())
        raise PlanError(f"no layer converts to {made.to}: {why or 'none is linear'}")


def read_plan(file: Path) -> Plan:
    """Reads a plan from a file."""
    from ..errors import PlanError
    from ..plan import Plan

    try:
        return Plan.from_json(file.read_bytes())
    except OSError as error:
        raise ArgumentError(f"{file}: {error.strerror}") from None
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None
