"""One rule for each primitive: its result for all crops, with what they share.

A rule gets an equation and its operands as :class:`CropArray`; it returns the outputs,
or raises :class:`NotSharedError`: then each crop gets an array of its own, and the
equation runs on them as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tracing.jaxprs import bind
from ..tracing.primitives import ELEMENTWISE, ROUNDING, SAME
from ..tracing.protocols import Equation
from . import movement, products, reductions, windows
from .alignment import aligned, combined
from .values import CropArray, SlideRule


def _same(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    # A placement speaks of the axes of one crop's array; the shared array has others.
    return list(values)


def _elementwise(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    together, parts, ranks = aligned(values)
    outs = combined(lambda *arrays: bind(eqn, list(arrays)), together)
    return [CropArray(out, together[0].fronts, parts, ranks) for out in outs]


RULES: Mapping[str, SlideRule] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(ELEMENTWISE | ROUNDING, _elementwise),
    **movement.RULES,
    **products.RULES,
    **reductions.RULES,
    **windows.RULES,
}
