"""The first module at which two models part, and mistakes of porting behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..frontends.bound import BoundModel
from ..messages.errors import PlanError
from ..params.leaves import flatten_with_path
from ..plan import LayerPlan
from ..plan.paths import join_path
from .agreement import agree


def parting(
    want: Mapping[str, Any], got: Mapping[str, Any], ported: bool = False
) -> str | None:
    """Return the first module whose output differs, in the order they return in.

    Modules of one path are held against each other. Where the two have no path in
    common, as after a port, outputs are matched by their values.

    Args:
      want: by path, the outputs of the first model's modules, one for each call.
      got: those of the second.
      ported: whether the models are of two libraries, whose images may have their
        channels in other places.
    """
    common = [path for path in want if path in got and path]
    for path in common:
        if len(want[path]) != len(got[path]):
            return f"{path!r}: called {len(want[path])} and {len(got[path])} times"
        if not _alike(want[path], got[path], ported):
            return repr(path)
    if (common and not ported) or not (want and got):
        return None
    paths, others = list(want), list(got)
    last, behind = -1, -1
    for number, path in enumerate(paths):
        found = [
            at
            for at, other in enumerate(others)
            if _alike(want[path], got[other], ported)
        ]
        if found:
            last, behind = number, max(behind, *found)
    if last + 1 == len(paths):
        return None
    path = paths[last + 1]
    before = f", behind {paths[last]!r}" if last >= 0 else ""
    beside = [
        other
        for other in others[behind + 1 :]
        if [y.size for y in got[other]] == [y.size for y in want[path]]
    ]
    second = f" ({beside[0] or '(root)'!r} of the second)" if beside else ""
    return f"{path or '(root)'!r} of the first{second}{before}"


def porting_mistakes(first: BoundModel, second: BoundModel) -> list[str]:
    """Name kernels of one model that another has transposed, or in another order.

    PyTorch flattens images as CHW, Flax as HWC: the kernel of a Dense behind a flatten
    that was transposed and copied has its rows in the order of the other library.
    """
    if not all(each.variables.get("params") for each in (first, second)):
        return []  # such as two functions of their inputs alone
    try:
        mine, theirs = ([*_matrices(each)] for each in (first, second))
    except (PlanError, TypeError):  # of a model that can't be planned
        return []
    found = []
    for path, layer, matrix, kernel in mine:
        for other, there, rows, moved in theirs:
            alike = matrix.shape == rows.shape and np.array_equal(matrix, rows)
            if alike and layer.window == there.window and layer.order != there.order:
                if not np.array_equal(kernel, moved):
                    found.append(
                        f"{other!r} has the rows of {path!r}: the rows are ordered "
                        f"{layer.order} there, {there.order} here. Pass "
                        f"restore_params(convert_params(...)), by the plan of each"
                    )
            elif not alike and np.array_equal(matrix, rows.T):
                found.append(
                    f"the kernel of {other!r} is that of {path!r} transposed. Pass its "
                    "transpose"
                )
    return found


def _matrices(
    bound: BoundModel,
) -> Iterator[tuple[str, LayerPlan, np.ndarray, np.ndarray]]:
    """Yield path, plan and kernel, as ``(in, out)`` and as a conv's, of each Dense."""
    leaves = dict(flatten_with_path(bound.variables["params"])[0])
    for path, layer in bound.plan("conv").items():
        leaf = leaves.get(join_path(path, layer.leaves[0][0]))
        if leaf is None or layer.groups > 1 or layer.stack_axes or layer.transposed:
            continue
        array = np.asarray(getattr(leaf, "value", leaf))
        stored = layer.kernel(array)
        kernel = stored.transpose(layer.channels_last(range(stored.ndim)))
        letters = layer.channel_last_order
        order = layer.order if len(layer.order) == len(letters) else letters
        split = kernel.transpose(*(letters.index(a) for a in order), len(letters))
        yield path, layer, split.reshape(-1, kernel.shape[-1]), kernel


def _alike(ys: Sequence[Any], zs: Sequence[Any], ported: bool) -> bool:
    return len(ys) == len(zs) and all(_same(y, z, ported) for y, z in zip(ys, zs))


def _same(y: Any, z: Any, ported: bool) -> bool:
    y, z = np.asarray(y), np.asarray(z)
    if y.size != z.size:
        return False
    ways = [y]
    if ported and y.ndim > 2:
        ways += [np.moveaxis(y, 1, -1), np.moveaxis(y, -1, 1)]
    return any(
        agree("layers", [("", way)], [("", z.reshape(way.shape))])[0].passed
        for way in ways
    )
