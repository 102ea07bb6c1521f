"""Rules of what is computed along whole axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tracing.primitives import POSITIONS, REDUCTIONS, SCANS
from ..tracing.protocols import Equation
from .values import (
    CropArray,
    NotSharedError,
    Part,
    SlideRule,
    merged,
    own_arrays,
    stored,
)


def _reduction(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    (value,) = values
    axes = sorted(eqn.params["axes"])
    p = {k: v for k, v in eqn.params.items() if k != "axes"}
    bounds = np.cumsum((0, *value.ranks)).tolist()
    indices = [i for dim in axes for i in range(bounds[dim], bounds[dim + 1])]
    for index in indices:
        value = stored(value, index)
    # A shared axis at a time, so that the next is read for fewer entries.
    for index in indices:
        part = value.parts[index]
        if part.grid is not None:
            value = own_arrays(value, part.grid)
            axis = value.axis(index)
            data = eqn.primitive.bind(value.data, axes=(axis,), **p)
            parts = list(value.parts)
            parts[index] = Part(1, uniform=True)
            value = value.replace(data=data, parts=tuple(parts))
    left = tuple(
        value.axis(index) for index in indices if not value.parts[index].uniform
    )
    data = eqn.primitive.bind(value.data, axes=left, **p) if left else value.data
    groups = [g for dim, g in enumerate(value.groups) if dim not in axes]
    return [value.with_groups(groups, data)]


def _scan(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    axis = eqn.params["axis"]
    value = _whole(values[0], axis)
    at = value.axis(sum(value.ranks[:axis]))
    params = eqn.params | {"axis": at}
    return [value.replace(data=eqn.primitive.bind(value.data, **params))]


def _position(eqn: Equation, values: Sequence[CropArray]) -> list[CropArray]:
    (axis,) = eqn.params["axes"]
    value = _whole(values[0], axis)
    at = value.axis(sum(value.ranks[:axis]))
    groups = value.groups
    del groups[axis]
    data = eqn.primitive.bind(value.data, **eqn.params | {"axes": (at,)})
    return [value.with_groups(groups, data)]


def _whole(value: CropArray, dim: int) -> CropArray:
    """Return the value with an axis that is one part, the same for all crops."""
    if any(part.map is not None for part in value.groups[dim]):
        raise NotSharedError("along an axis of the image")
    return merged(value, dim)


RULES: dict[str, SlideRule] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(SCANS, _scan),
    **dict.fromkeys(POSITIONS, _position),
}
