"""Steps shared by commands: bind and plan a model, plan a checkpoint, read a plan."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import ArgumentError, load_model, parse_input, parse_kwargs, random_inputs
from .output import print_plan, start_jax
from .records import CallOptions, PlanOptions

if TYPE_CHECKING:
    from ..backends.name import Backend
    from ..frontends.bound import BoundModel
    from ..plan import Plan


def read_model(name: str, call: CallOptions) -> BoundModel:
    """Bind the model MODULE:NAME to the abstract inputs of a command line."""
    start_jax()
    from ..frontends.bind import bind

    specs = tuple(parse_input(text) for text in call.inputs or ())
    options = parse_kwargs(call.kwargs or ())
    if call.method is not None:
        options["method"] = call.method
    loaded = load_model(name)
    bound = bind(loaded.model, loaded.params, *specs, **options)
    accepted, takes_any = bound.accepts()
    for option in options:
        if option not in accepted and not takes_any:
            known = ", ".join(sorted(accepted))
            raise ArgumentError(
                f"--kwarg: expected a keyword argument of {name}, got {option!r}. Pass "
                f"one of {known}."
            )
    return bound


def require_inputs(bound: BoundModel) -> BoundModel:
    """Refuse a call without inputs where a file is made for them."""
    if not bound.args:
        raise ArgumentError(
            "Expected the shapes of the model's inputs, got none. Pass --input, such "
            "as --input 1,8,8,3."
        )
    return bound


def plan_model(bound: BoundModel, plan_options: PlanOptions) -> Plan:
    """Plan a model by tracing it."""
    if plan_options.backend not in (None, "any"):
        parse_backends([plan_options.backend], "--for")
    with naming_inputs(bound):
        return bound.plan(
            plan_options.form, plan_options.rules or (), plan_options.backend
        )


@contextlib.contextmanager
def naming_inputs(bound: BoundModel) -> Iterator[None]:
    """Say in an error of a model's call which inputs it got, or that it lacks them."""
    from ..messages.errors import PlanError

    try:
        yield
    except Exception as error:
        # A model that gets no inputs may fail with any error of its own code.
        cause = error.__cause__ if isinstance(error, PlanError) else error
        if not bound.args and cause is not None:
            raise ArgumentError(
                f"{cause}. Pass the shapes of the model's inputs: --input 1,8,8,3."
            ) from error
        if isinstance(error, PlanError):
            raise
        shapes = " ".join(f"{x.dtype}{list(x.shape)}" for x in bound.args)
        error.add_note(f"It was called on {shapes}.")
        raise


def with_random_inputs(bound: BoundModel, seed: int) -> BoundModel:
    """Return the call on random arrays of the shapes that it is bound to."""
    return dataclasses.replace(bound, args=tuple(random_inputs(bound.args, seed)))


def plan_checkpoint(
    src: Path, plan_options: PlanOptions, step: str | None = None
) -> Plan:
    """Plan from the shapes in a checkpoint, without the model's code; print it."""
    from ..checkpoints import inspect_checkpoint
    from ..checkpoints.formats import FORMATS
    from ..planning.from_shapes import plan_from_params
    from .variables import split_key

    info = inspect_checkpoint(src, step)
    if info.plan is not None:
        return info.plan  # convert_checkpoint says that it is converted already
    shapes = {leaf.path: leaf.shape for leaf in info.leaves}
    if FORMATS[info.format].flat and any(key.endswith("kernel") for key in shapes):
        # Flax's levels; PyTorch's names stay whole.
        shapes = {"/".join(split_key(key, shapes)): shapes[key] for key in shapes}
    made = plan_from_params(
        shapes, plan_options.rules or (), plan_options.form, plan_options.backend
    )
    if made:
        print_plan(made, err=True)
    return made


def parse_backends(
    names: Sequence[str] | None, option: str = "--backend"
) -> list[Backend] | None:
    """Return the backends that an option names; None if it wasn't passed."""
    from ..backends.name import Backend
    from ..messages.errors import BackendError

    try:
        return [Backend.parse(name) for name in names] if names else None
    except BackendError as error:
        raise ArgumentError(f"{option}: {error}") from None


def require_layers(made: Plan) -> None:
    """Raise if a conversion would change nothing."""
    from ..messages.errors import PlanError

    if not made:
        why = "; ".join(f"{path}: {reason}" for path, reason in made.skipped.items())
        raise PlanError(
            f"Expected a layer that converts to {made.to}, got none: "
            f"{why or 'the model has no linear layer'}. Pass --rule for a layer that "
            "converts, or the checkpoint as it is."
        )


def read_plan(file: Path) -> Plan:
    """Read a plan from a file."""
    from ..messages.errors import PlanError
    from ..plan import Plan

    try:
        return Plan.from_json(file.read_bytes())
    except OSError as error:
        raise ArgumentError(
            f"{file}: can't be read ({error.strerror}). Pass a file that fcconv plan "
            "--out wrote."
        ) from None
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None
