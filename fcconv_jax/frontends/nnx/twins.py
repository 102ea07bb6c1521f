"""Warns of modules like a converted one that the planned call doesn't use.

A target network, say. A soft update would put one form's kernel into the other's layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ...params.matching import planned_moves
from ...params.move import Parts
from ...plan import UNCALLED_REASON, Plan
from . import layers as nnx_layers


def warn_of_twins(
    modules: Mapping[str, Any], variables: Mapping[str, Any], plan: Plan
) -> None:
    """Warn of modules of a converted one's class and shapes that stay in their form."""
    twins = _twins(modules, variables, plan)
    if not twins:
        return
    pairs = [f"{twin!r} (like {original!r})" for twin, original in twins.items()]
    joined = [f"plan.moved({each!r}, {twin!r})" for twin, each in twins.items()]
    warnings.warn(
        "The planned call doesn't use these modules, which have the class and shapes "
        f"of converted ones and stay in their form: {', '.join(pairs)}. To convert "
        f"them, too, pass {' | '.join(['plan', *joined])}, or join the plan of the "
        "method that uses them: make_plan(model, x) | make_plan(model, x, method=...).",
        stacklevel=5,  # the caller of the public convert_model
    )


def _twins(
    modules: Mapping[str, Any], variables: Mapping[str, Any], plan: Plan
) -> dict[str, str]:
    """Return the outermost twins, and for each the converted module that it is like."""
    planned = [*planned_moves(plan)]
    # Layers that the call uses are in the plan, or skipped for another reason.
    used = [tuple(p.split("/")) for p, why in plan.left if why != UNCALLED_REASON]
    used += planned
    inside: dict[Parts, dict[Parts, tuple[int, ...]]] = {}
    for path, variable in variables.items():
        parts = tuple(path.split("/"))
        for level in range(1, len(parts)):
            if "/".join(parts[:level]) in modules:
                inside.setdefault(parts[:level], {})[parts[level:]] = variable.shape
    groups = sorted(inside, key=len)
    originals = [g for g in groups if any(_below(path, g) for path in planned)]
    twins: dict[Parts, Parts] = {}
    unused: list[Parts] = []
    for group in groups:
        if any(_below(path, group) or _below(group, path) for path in (*used, *twins)):
            continue
        unused.append(group)
        kind = type(modules["/".join(group)])
        # Layers of equal sizes are common; inside another unused module, they say
        # nothing. A whole network there is a copy, as in a class that averages it.
        if kind in nnx_layers.KINDS_BY_CLASS and any(
            _below(group, outer) for outer in unused[:-1]
        ):
            continue
        for original in originals:
            same_class = type(modules["/".join(original)]) is kind
            if same_class and inside[original] == inside[group]:
                twins[group] = original
                break
    return {"/".join(twin): "/".join(each) for twin, each in twins.items()}


def _below(path: Parts, group: Parts) -> bool:
    return path[: len(group)] == group
