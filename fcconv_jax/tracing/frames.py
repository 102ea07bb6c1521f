"""Jaxprs in the context of the equations that call them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from .jaxprs import AnyJaxpr, opened
from .protocols import Atom, Equation, OpenJaxpr


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A jaxpr in the context of the equation that calls it.

    One jaxpr may be called from several places (``nn.relu`` is traced once), so
    frames, not jaxprs, tell places apart.
    """

    jaxpr: OpenJaxpr
    parent: Frame | None = None
    call: Equation | None = None
    inner: dict[tuple[int, int], Frame] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def producers(self) -> Mapping[Atom, tuple[Equation, int]]:
        """What makes each variable: the equation and the number of its output."""
        return {
            var: (eqn, index)
            for eqn in self.jaxpr.eqns
            for index, var in enumerate(eqn.outvars)
        }

    @classmethod
    def of(cls, jaxpr: AnyJaxpr) -> Frame:
        """Return the frame of a whole trace, as ``jax.make_jaxpr`` returns it."""
        return cls(opened(jaxpr)[0])

    def enter(self, eqn: Equation, body: AnyJaxpr) -> Frame:
        """Return the frame of a jaxpr that an equation of this frame runs."""
        # By identity: both live as long as this frame's jaxpr, which holds them, so no
        # id is used again.
        key = (id(eqn), id(body))
        if key not in self.inner:
            self.inner[key] = Frame(opened(body)[0], self, eqn)
        return self.inner[key]
