"""Arguments of a wrong type, refused where they come in."""

from __future__ import annotations

import numpy as np


def check_flags(**flags: object) -> None:
    """Refuse options that are neither True nor False.

    The string ``"no"`` counts as true in Python, and would mean its opposite.

    Raises:
      TypeError: names the first that is something else.

    Example:
      >>> check_flags(strict=True, overwrite="no")
      Traceback (most recent call last):
        ...
      TypeError: Expected overwrite= as True or False, got 'no'. Pass overwrite=False.
    """
    for name, value in flags.items():
        if isinstance(value, bool | np.bool_):
            continue
        meant = str(value).strip().lower() in ("yes", "true", "on", "1")
        raise TypeError(
            f"Expected {name}= as True or False, got {value!r}. Pass {name}={meant}."
        )


def check_kind(
    name: str,
    value: object,
    kinds: type | tuple[type, ...],
    wanted: str,
    example: str,
) -> None:
    """Refuse an argument of another type, such as True for a number.

    Args:
      name: of the argument.
      value: what it is.
      kinds: of which it may be.
      wanted: those in words.
      example: what to pass.

    Raises:
      TypeError: it is of another type.

    Example:
      >>> check_kind("timeout=", "60", (int, float), "a number of seconds", "60")
      Traceback (most recent call last):
        ...
      TypeError: Expected timeout= as a number of seconds, got '60'. Pass 60.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        shown = repr(value)
        shown = shown if len(shown) < 60 else type(value).__name__
        raise TypeError(f"Expected {name} as {wanted}, got {shown}. Pass {example}.")


def check_seconds(name: str, value: object) -> None:
    """Refuse what isn't a positive number of seconds.

    Raises:
      TypeError: it is of another type.
      ValueError: it is 0, negative or NaN.

    Example:
      >>> check_seconds("timeout=", -1)
      Traceback (most recent call last):
        ...
      ValueError: Expected timeout= as a positive number of seconds, got -1. Pass 60.
    """
    wanted = "a positive number of seconds"
    check_kind(name, value, (int, float), wanted, "60")
    if not value > 0:  # pyright: ignore[reportOperatorIssue]: NaN, too
        raise ValueError(f"Expected {name} as {wanted}, got {value}. Pass 60.")
