"""Errors that come out of a model's own code: where, and what helps."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import flax.errors
import jax

NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def users_line(error: BaseException) -> str | None:
    """Return where an error left the code of neither this package nor an installed one.

    Example:
      >>> users_line(ValueError("raised nowhere")) is None
      True
    """
    here = Path(__file__).parents[1]
    # A virtual environment may also show the packages of another Python.
    installed = {"site-packages", "dist-packages"}
    library = Path(sysconfig.get_path("stdlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if installed & {*file.parts} or {here, library} & {*file.parents}:
            continue
        if file.is_file():
            return f"{file.name}:{frame.lineno}: {frame.line}"
    return None


def known_fix(error: BaseException) -> str | None:
    """Return the fix of an error that a model raises when it is traced, if known."""
    if isinstance(error, NEEDS_A_VALUE):
        return (
            "the model is traced here, and this needs the value of an array. Pass what "
            "decides as a static value (a flag, a number or a string in the call), or "
            "choose with jax.lax.cond or jnp.where"
        )
    if isinstance(error, flax.errors.ModifyScopeVariableError):
        return (
            "the call changes the model's state, as in training. Call it as for "
            "inference (train=False, use_running_average=True), or pass mutable="
        )
    if isinstance(error, flax.errors.ScopeParamShapeError):
        return (
            "the params are another model's, or in the other form. Pass this model's "
            "own; restore_params(params, plan) restores converted ones"
        )
    # JAX's own limit: of any jitted function that is differentiated from outside.
    if isinstance(error, TypeError) and "constant handler for type" in str(error):
        return (
            "the rule of a custom_jvp reads an array from around it, which JAX can't "
            "differentiate through jit, and a converted model is jitted. Pass the "
            "array, such as a layer's params, to the custom_jvp function as an argument"
        )
    return None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Add the model's own line and a fix, if known, to an error.

    Example:
      >>> with explained():
      ...     jax.jit(lambda x: 1 if x > 0 else 0)(1.0)
      Traceback (most recent call last):
        ...
      jax.errors.TracerBoolConversionError: ...
    """
    try:
        yield
    except Exception as error:
        help_ = known_fix(error)
        if help_ is not None and help_ not in "".join(getattr(error, "__notes__", ())):
            line = users_line(error)
            error.add_note(f"{line.rstrip(':')}: {help_}." if line else f"{help_}.")
        raise
