"""Checks what ``export`` is asked for before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from numpy.typing import ArrayLike

from ..frontends.bound import BoundModel
from ..messages.errors import ExportError
from ..messages.flags import check_kind
from ..plan import Plan, check_plan
from .chips import Chip, chip_of
from .forms import FORMS
from .putting import check_free
from .runtimes import Runtime, runtime_of, runtimes


def check_arguments(
    path: object,
    runtime: str | None,
    form: str,
    chip: str | None,
    plan: Plan | None,
    weights: str | None,
    calibrate: Sequence[Any] | None,
    labels: ArrayLike | None,
    unroll: int,
    kwargs: Mapping[str, Any],
    **open_sizes: bool,
) -> tuple[Runtime, Chip | None]:
    """Return the runtime and the chip of an export, whose arguments these are.

    Raises:
      ExportError: an argument is none that it takes, or two don't go together.
    """
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise ExportError(
            f"Expected path= as the path of a file, got {path!r}. Pass "
            "path='model.tflite'."
        )
    target = runtime_of(Path(path), runtime)
    check_free(Path(path))
    check_kind("unroll=", unroll, int, "a number of steps, 0 or more", "8")
    if unroll < 0:
        raise ExportError(
            f"Expected unroll= as a number of steps, 0 or more, got {unroll}. Pass 8."
        )
    if plan is not None:
        check_plan(plan)
    # It would be handed to the model as an argument of its call.
    if "int8" in kwargs:
        raise ExportError(
            "Expected calibrate= for an int8 file, got int8=. Pass arrays of examples, "
            "one for each input: calibrate=[images]."
        )
    if form not in FORMS:
        raise ExportError(
            f"Expected to= one of {', '.join(FORMS)}, the form of the layers, got "
            f"{form!r}. Pass one of them; the suffix of path=, or runtime=, selects "
            "the runtime."
        )
    made_for = None if chip is None else chip_of(chip)
    if form == "mix" and made_for is None and plan is None:
        raise ExportError(
            "Expected a chip for to='mix', got none. Pass chip='ethos-u55', or your "
            "own plan=."
        )
    if calibrate is not None and not isinstance(calibrate, list | tuple):
        raise ExportError(
            f"Expected calibrate= as a list of arrays, one for each input, got "
            f"{type(calibrate).__name__}. Pass calibrate=[images]."
        )
    if calibrate is not None and target.quantize is None:
        known = " or ".join(r.suffix for r in runtimes().values() if r.quantize)
        raise ExportError(
            f"Expected a {known} path for an int8 file, got {path}. Drop "
            "calibrate= for a file in float32."
        )
    if labels is not None and calibrate is None:
        raise ExportError(
            "Expected calibrate=, the labeled examples, with labels=, got none. Pass "
            "calibrate=[images], labels=labels."
        )
    for flag, wanted in open_sizes.items():
        if wanted and (flag not in target.open_sizes or calibrate is not None):
            known = ", ".join(
                r.suffix for r in runtimes().values() if flag in r.open_sizes
            )
            raise ExportError(
                f"Expected a file in float32 for {flag}=True, one of {known}, got "
                f"{path}{'' if calibrate is None else ' in int8'}. Drop {flag}=True."
            )
    if weights is not None and (weights not in target.weights or calibrate is not None):
        known = " or ".join(f"weights={name!r}" for name in sorted(target.weights))
        halved = " or ".join(
            r.suffix for r in runtimes().values() if "float16" in r.weights
        )
        raise ExportError(
            f"Expected {known or 'no weights='} for {target.title}, without calibrate=,"
            f" got weights={weights!r}. Pass a path that ends in {halved} with "
            "weights='float16'."
        )
    return target, made_for


def check_arrays(bound: BoundModel) -> None:
    """Refuse a call without params or inputs, or with abstract ones."""
    if not bound.arrays:
        raise ExportError(
            "Expected params and then inputs after the model, got no input. Call "
            "fc.export(model, params, *inputs, path=...)."
        )
    if bound.params is bound.given is None and hasattr(bound.model, "init"):
        raise ExportError(
            "Expected the params after the model, got None. Pass the variables that "
            "model.init returns, or an empty dict for a model without."
        )
    leaves = jax.tree.leaves((bound.variables, bound.arrays))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise ExportError(
            "Expected arrays as params and inputs, got abstract ones, which have no "
            "values. Pass arrays."
        )
