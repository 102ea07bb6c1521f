"""What this package reads of a trace, as types.

JAX's own classes keep shapes and dtypes in subclasses of an abstract value that has
neither, so operands stay ``Any`` here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Primitive(Protocol):
    """The operation of an equation, such as ``dot_general``."""

    name: str
    multiple_results: bool
    bind: Callable[..., Any]
    get_bind_params: Callable[..., Any]


class Equation(Protocol):
    """One operation of a trace: ``outvars = primitive.bind(*invars, **params)``."""

    primitive: Primitive
    params: dict[str, Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    source_info: Any
    effects: Any
    replace: Callable[..., Any]


class OpenJaxpr(Protocol):
    """A traced program; its constants are inputs like the others."""

    constvars: Sequence[Any]
    invars: Sequence[Any]
    eqns: Sequence[Equation]
    outvars: Sequence[Any]
