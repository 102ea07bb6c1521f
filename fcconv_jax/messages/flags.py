"""Options that are True or False, checked where they come in."""

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
