"""The first module at which two models part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .agreement import agree


def parting(want: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    """Return the first module whose output differs, in the order they return in.

    Modules of one path are held against each other. Where the two have no path in
    common, as after a port, outputs are matched by their values.
    """
    common = [path for path in want if path in got and path]
    for path in common:
        if len(want[path]) != len(got[path]):
            return f"{path!r}: called {len(want[path])} and {len(got[path])} times"
        if not all(map(_same, want[path], got[path])):
            return repr(path)
    if common or not (want and got):
        return None
    values = [y for ys in got.values() for y in ys]
    matched = [all(_any_same(y, values) for y in ys) for ys in want.values()]
    paths = list(want)
    last = max((n for n, same in enumerate(matched) if same), default=-1)
    if last + 1 == len(paths):
        return None
    before = f", behind {paths[last]!r}" if last >= 0 else ""
    return f"{paths[last + 1] or '(root)'!r} of the first{before}"


def _any_same(y: Any, values: Sequence[Any]) -> bool:
    return any(np.size(y) == np.size(z) and _same(y, z) for z in values)


def _same(y: Any, z: Any) -> bool:
    y, z = np.asarray(y), np.asarray(z)
    if y.size != z.size:
        return False
    return agree("layers", [("", y)], [("", z.reshape(y.shape))])[0].passed
