"""What this package reads of a trace, as types.

JAX's own classes keep shapes and dtypes in subclasses of an abstract value that has
neither, so operands are an ``Atom`` here, which type checkers don't look into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

# A variable or a literal: it has an ``aval`` with a shape and a dtype; a literal also
# has its ``val``.
Atom: TypeAlias = Any


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
    invars: Sequence[Atom]
    outvars: Sequence[Atom]
    source_info: Any
    effects: Any
    replace: Callable[..., Any]


class OpenJaxpr(Protocol):
    """A traced program; its constants are inputs like the others."""

    constvars: Sequence[Atom]
    invars: Sequence[Atom]
    eqns: Sequence[Equation]
    outvars: Sequence[Atom]
