"""The first module at which two models part, and mistakes of porting behind it."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..frontends.bound import BoundModel
from ..messages.errors import PlanError
from ..params.leaves import flatten_with_path
from ..plan import LayerPlan
from ..plan.paths import join_path
from ..tracing.jaxprs import AnyJaxpr, Literal, call_body, opened, subjaxprs
from ..tracing.marks import named_outputs
from ..tracing.protocols import Atom
from .agreement import agree
from .reference import Reference

Output = tuple[str, int]  # path of a module, and which of its outputs


def parting(
    want: Mapping[str, Any],
    got: Mapping[str, Any],
    reference: Reference,
    ported: bool = False,
) -> str | None:
    """Return the first module whose output differs, in the order they return in.

    Modules of one path are compared. Where the two models have no path in common, as
    after a port, outputs are matched by their values.

    Args:
      want: by path, the outputs of the first model's modules, one for each call.
      got: those of the second.
      reference: the two models in float64.
      ported: whether the models are of two libraries, which may spell paths and lay
        out images differently.
    """
    common = [path for path in want if path in got and path]
    if not ported:
        for path in common:
            if len(want[path]) != len(got[path]):
                counts = f"{len(want[path])} and {len(got[path])}"
                return f"{path!r}: called {counts} times"
            if not all(map(_same, want[path], got[path])):
                return repr(path)
    upstream = _upstream(reference.traces[0].jaxpr)
    mine = {
        (path, number): want[path][number]
        for path, number in upstream
        if path and number < len(want.get(path, ()))
    }
    namesakes = {_spelled(path): path for path in got}

    def beside(path: str, number: int) -> list[str]:
        """Return the second model's modules with this output; its namesake alone."""
        same = namesakes.get(_spelled(path))
        among = dict(got) if same is None else {same: got[same]}
        # Called as often: the calls correspond one by one.
        if same is not None and len(got[same]) == len(want[path]):
            among = {same: [got[same][number]]}
        y = want[path][number]
        return [p for p, zs in among.items() if any(_same(y, z, ported) for z in zs)]

    matched = {each: found for each in mine if (found := beside(*each))}
    agreed: set[Output] = set()

    def agree_with(outputs: Iterable[Output]) -> list[Output]:
        """Add outputs that agree, and all they are made from, however it is split."""
        for each in outputs:
            agreed.update({each} | (upstream[each] if _varies(mine[each]) else set()))
        return [each for each in mine if each not in agreed]

    left = agree_with(matched)
    # A module of one model may be an operation in the other.
    alone = [each for each in left if _spelled(each[0]) not in namesakes]
    parts = [part for each in alone for split in _splits(mine[each]) for part in split]
    seen = reference.values(1, {part.size for part in parts}) if parts else ()
    blamed = agree_with(each for each in alone if _computed(mine[each], seen))
    # Entries in another order, such as of classes.
    blamed = blamed or [each for each in [*mine][-1:] if each in alone]
    before = list(itertools.takewhile(lambda each: each not in blamed, mine))
    behind = f", behind {before[-1][0]!r}" if before else ""
    if not blamed:
        return f"the end of the first{behind}" if behind else None
    path, size = blamed[0][0], np.size(mine[blamed[0]])
    others = [namesakes[key] for key in [_spelled(path)] if key in namesakes]
    if not others:
        known = [
            [*got].index(other) for each in before for other in matched.get(each, ())
        ]
        seen = reference.values(0, {size})
        others = [
            other
            for other in [*got][max(known, default=-1) + 1 :]
            if any(z.size == size and not _computed(z, seen) for z in got[other])
        ]
    second = f" ({others[0] or '(root)'!r} of the second)" if others else ""
    pairs = [(each[0], matched[each]) for each in before if each in matched]
    crossed = _crossed(pairs, [*got])
    return f"{path!r} of the first{second}{behind}{crossed}"


def _spelled(path: str) -> str:
    """Return a path as both libraries spell it: ``blocks.0`` and ``blocks_0``."""
    return re.sub(r"[./]|_(?=\d+(?:[./]|$))", "/", path)


def _crossed(matched: Sequence[tuple[str, list[str]]], others: Sequence[str]) -> str:
    """Name two modules whose outputs agree crosswise, as swapped weights make them."""
    for (one, a), (two, b) in itertools.pairwise(matched):
        if len(a) == len(b) == 1 and others.index(a[0]) > others.index(b[0]):
            return f"; {one!r} returns what {a[0]!r} does, and {two!r} what {b[0]!r}"
    return ""


def _upstream(trace: AnyJaxpr) -> dict[Output, set[Output]]:
    """Return, for each output that a trace names, in order, those it is made from.

    An output in a loop depends on all that the loop reads.
    """
    found: dict[Output, set[Output]] = {}
    calls: collections.Counter[str] = collections.Counter()

    def read(jaxpr: AnyJaxpr, given: Sequence[set[Output]], named: bool) -> list[Any]:
        body, _ = opened(jaxpr)
        known = dict(zip(body.invars, given))

        def of(atom: Atom) -> set[Output]:
            return set() if isinstance(atom, Literal) else known.get(atom, set())

        for eqn in body.eqns:
            ins = [of(atom) for atom in eqn.invars]
            every = set[Output]().union(*ins)
            outs = [every] * len(eqn.outvars)
            if eqn.primitive.name == "name" and named:
                for path in named_outputs({eqn.params["name"]: None}):
                    output = path, calls[path]
                    calls[path] += 1
                    found[output] = every
                    outs = [every | {output}]
            elif (inner := call_body(eqn)) is not None:
                outs = read(inner, ins, named)
            else:
                for _, each in subjaxprs(eqn):
                    # Loops other than scans, and branches, come out without names.
                    into = [every] * len(opened(each)[0].invars)
                    inside = read(each, into, named and eqn.primitive.name == "scan")
                    outs = [out.union(*inside) for out in outs]
            known.update(zip(eqn.outvars, outs))
        return [of(atom) for atom in body.outvars]

    body, _ = opened(trace)
    read(trace, [set[Output]()] * len(body.invars), True)
    return found


def _varies(y: Any) -> bool:
    """Return whether an output is evidence: no index, and not one value throughout."""
    y = np.asarray(y)
    return bool(
        np.issubdtype(y.dtype, np.inexact) and y.size and (y != y.flat[0]).any()
    )


def _splits(y: Any) -> list[list[np.ndarray]]:
    """Return an output whole, in halves and in thirds, as of a fused ``qkv``."""
    y = np.asarray(y)
    counts = [n for n in (1, 2, 3) if y.ndim and y.shape[-1] % n == 0]
    return [np.split(y, n, axis=-1) for n in counts]


def _computed(y: Any, seen: Sequence[np.ndarray]) -> bool:
    """Return whether an output, or each of its parts, is among values in any layout."""

    def sorted_(z: np.ndarray) -> list[tuple[str, np.ndarray]]:
        return [("", np.sort(z, axis=None))]

    def found(part: np.ndarray) -> bool:
        alike = (z for z in seen if z.size == part.size and z.dtype == part.dtype)
        return any(agree("layers", sorted_(part), sorted_(z))[0].passed for z in alike)

    return any(all(map(found, parts)) for parts in _splits(y))


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
        # Their kernels are not one matrix of rows and columns.
        if leaf is None or layer.groups > 1 or layer.stack_axes or layer.transposed:
            continue
        array = np.asarray(getattr(leaf, "value", leaf))
        stored = layer.kernel(array)
        kernel = stored.transpose(layer.channels_last(range(stored.ndim)))
        letters = layer.channel_last_order
        order = layer.order if len(layer.order) == len(letters) else letters
        split = kernel.transpose(*(letters.index(a) for a in order), len(letters))
        yield path, layer, split.reshape(-1, kernel.shape[-1]), kernel


def _same(y: Any, z: Any, ported: bool = False) -> bool:
    y, z = np.asarray(y), np.asarray(z)
    if y.size != z.size:
        # One of the layers that a scan stacks.
        stacked = ported and z.ndim > 1 and z.size == len(z) * y.size
        return stacked and any(_same(y, row, True) for row in z)
    ways = [y]
    if ported and y.ndim > 2:
        # PyTorch has the channels behind the batch, Flax at the end.
        ways += [np.moveaxis(y, 1, -1), np.moveaxis(y, -1, 1)]
    return any(
        agree("layers", [("", way)], [("", z.reshape(way.shape))])[0].passed
        for way in ways
    )
