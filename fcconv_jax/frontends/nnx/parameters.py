"""Which stored parameters of an NNX model each of its layers reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax

from ...params.variables import is_variable
from ...plan import LayerPlan
from ...planning.decide import Call, LeftError
from ...tracing import arguments
from ...tracing.parameter_reads import Uses
from . import layers as nnx_layers


def stored_paths(state: Any) -> list[str | None]:
    """The path of each array in the state, in order; None for what is no Variable's."""
    found: list[str | None] = []
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)
    for path, leaf in leaves:
        arrays = [a for a in jax.tree.leaves(leaf) if arguments.is_array(a)]
        text = nnx_layers.path_text(tuple(_key(key) for key in path))
        single = is_variable(leaf) and len(arrays) == 1
        found += [text if single else None] * len(arrays)
    return found


def _key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Which stored parameters each layer reads, as the trace says."""

    stored: Sequence[str | None]
    uses: Mapping[int, Uses]
    paths: Sequence[str]
    layers: Mapping[str, Sequence[Call]]

    def of(self, path: str, name: str) -> dict[int, set[tuple[int, ...]]]:
        """Numbers of the leaves that a layer reads, with the axes taken off each."""
        found: dict[int, set[tuple[int, ...]]] = {}
        for leaf, uses in self.uses.items():
            for (number, parameter), removed in uses.layers.items():
                if self.paths[number] == path and parameter == name:
                    found.setdefault(leaf, set()).update(removed)
        return found

    def readers(self, leaf: int) -> list[str]:
        """Paths of the layers that read a leaf."""
        return list(
            dict.fromkeys(self.paths[number] for number, _ in self.uses[leaf].layers)
        )

    def stack_axes(self, path: str, call: Call) -> tuple[int, ...]:
        """Axes of the stored parameters that the layer does not see.

        Raises:
          LeftError: something else than the layer reads them, or changes them before.
        """
        depths = {
            name: self._depth(path, name)
            for name in ("kernel", "bias")[: 1 + (call.bias is not None)]
        }
        if len(set(depths.values())) > 1:
            raise LeftError("its kernel and its bias are stacked differently")
        return (0,) * depths["kernel"]

    def _depth(self, path: str, name: str) -> int:
        read = self.of(path, name)
        calls = {call.number for call in self.layers[path]}
        marked = {
            number
            for leaf in read
            for number, other in self.uses[leaf].layers
            if other == name and number in calls
        }
        if len(read) != 1:
            raise LeftError(
                f"its {name} is transformed on the way to the layer, or is another one "
                "in each call"
                if read or not marked
                else f"its {name} comes from several parameters"
            )
        ((leaf, removed),) = read.items()
        if self.uses[leaf].others:
            what = ", ".join(sorted(set(self.uses[leaf].others)))
            raise LeftError(
                f"its {name} {self.stored[leaf]!r} is also read outside of the layer's "
                f"own call (by {what}), where the other shape would not fit"
            )
        if len(removed) > 1:
            raise LeftError(f"its {name} is stacked differently from call to call")
        (axes,) = removed
        if sorted(axes) != list(range(len(axes))):
            raise LeftError(
                f"its {name} is stacked on axis {axes[0]}, which may count from either "
                "end and would move in another shape: stack on axis 0"
            )
        return len(axes)

    def blocked(self) -> dict[str, str]:
        """The layers that cannot convert as layers, each with the reason.

        They are no layers to those that share a parameter with them either.
        """
        found: dict[str, str] = {}
        for path, calls in self.layers.items():
            try:
                self.stack_axes(path, calls[0])
            except LeftError as reason:
                found[path] = str(reason)
        groups = [self.readers(leaf) for leaf in self.uses]
        changed = True
        while changed:
            changed = False
            for readers in groups:
                reason = next((found[path] for path in readers if path in found), None)
                others = [p for p in readers if p in self.layers and p not in found]
                if reason is not None and others:
                    found.update(dict.fromkeys(others, reason))
                    changed = True
        return found

    def read_otherwise(self, blocked: Container[str]) -> dict[str, set[str]]:
        """The parameters that no layer reads which converts as a layer.

        Args:
          blocked: from :meth:`blocked`.

        Returns:
          By path, the primitives that read each.
        """
        return {
            path: set(uses.others)
            for leaf, uses in self.uses.items()
            if (path := self.stored[leaf]) is not None
            and (uses.others or uses.layers)
            and all(reader in blocked for reader in self.readers(leaf))
        }

    def with_ties(self, path: str, layer: LayerPlan) -> LayerPlan:
        """The plan of a layer, naming the parameters stored under other paths."""
        own = {"/".join(part for part in (path, n) if part): n for n, _ in layer.leaves}
        tied = tuple(name for key, name in own.items() if key not in self.stored)
        return dataclasses.replace(layer, tied=tied) if tied else layer


def leave_tied(
    planned: dict[str, LayerPlan], left: dict[str, str], parameters: Parameters
) -> None:
    """Leaves layers alone whose parameters another layer needs as they are."""
    shared = [leaf for leaf in parameters.uses if len(parameters.readers(leaf)) > 1]
    changed = True
    while changed:
        changed = False
        for leaf in shared:
            readers = parameters.readers(leaf)
            moves = {
                (move, planned[path].stack_axes)
                for path in readers
                if path in planned
                for name, move in planned[path].leaves
                if leaf in parameters.of(path, name)
            }
            if len(moves) <= 1 and all(path in planned for path in readers):
                continue
            for path in [path for path in readers if path in planned]:
                others = ", ".join(repr(p) for p in readers if p != path)
                del planned[path]
                left[path] = (
                    f"its parameter {parameters.stored[leaf]!r} is tied to that of "
                    f"{others}, which does not convert in the same way"
                )
                changed = True
