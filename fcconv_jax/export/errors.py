"""What an export refuses, and the extras that it needs."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ExportError


class MissingExtraError(ExportError, ImportError):
    """A package of an optional extra is not installed."""


def require(module: str, extra: str, what: str) -> Any:
    """Imports a module of an optional extra.

    Args:
      module: its name.
      extra: the extra of this package that installs it.
      what: what it is for, for the error.

    Raises:
      MissingExtraError: it is not installed; says how to install it.

    Example:
      >>> require("json", "litert", "reading").__name__
      'json'
      >>> require("no_such_module", "litert", "writing LiteRT files")
      Traceback (most recent call last):
        ...
      fcconv_jax.export.errors.MissingExtraError: writing LiteRT files needs ...
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {module!r} ({error}). Install it with: "
            f"pip install 'fcconv-jax[{extra}]'"
        ) from None
