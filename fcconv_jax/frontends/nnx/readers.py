"""Who reads the parameters of NNX's layers: a layer that is swapped must be alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flax import nnx

from ...plan import Form, LayerPlan
from ...planning.as_layer import stack_axes
from ...planning.decide import LeftError
from ...planning.layers import LibraryLayer, layer_call
from ...planning.matmul import Matmul
from ...planning.trace import TracedModel


@dataclasses.dataclass(frozen=True)
class Readers:
    """What reads the kernels and biases of layers, as a trace shows it.

    Args:
      layers: by path, those of the form that is planned.
      matmuls: of the trace, by the path of the parameter.
      reads: of each parameter, other than by a matmul: the primitive, and whether its
        layer does it.
      ndims: number of axes of each parameter.
    """

    layers: Mapping[str, LibraryLayer]
    matmuls: Mapping[str, Sequence[Matmul]]
    reads: Mapping[str, Sequence[tuple[str, bool]]]
    ndims: Mapping[str, int]

    @classmethod
    def of(
        cls,
        traced: TracedModel,
        layers: Mapping[str, LibraryLayer],
        variables: Mapping[str, nnx.Variable],
        to: Form,
    ) -> Readers:
        """Collect the reads from a trace in which layers name theirs."""
        matmuls = traced.matmuls()
        reads: dict[str, list[tuple[str, bool]]] = {}
        for path, each in matmuls.items():
            reads[path] = [
                (m.eqn.primitive.name, m.weight.reader is not None) for m in each
            ]
        for use in traced.analysis.uses:
            reads.setdefault(use.path, []).append((use.how, use.named))
        return cls(
            {path: layer for path, layer in layers.items() if layer.form != to},
            matmuls,
            reads,
            {path: len(shape) for path, shape in traced.shapes.items()},
        )

    def blocked(self) -> dict[str, str]:
        """Return the layers that cannot convert as layers, each with the reason.

        Layers that share a parameter with one of them cannot either.
        """
        found: dict[str, str] = {}
        for path, layer in self.layers.items():
            try:
                self._check(layer)
            except LeftError as reason:
                found[path] = str(reason)
        waiting = list(found)
        for path in waiting:
            for other, layer in self.layers.items():
                shared = self.layers[path].leaves.keys() & layer.leaves.keys()
                if shared and other not in found:
                    found[other] = found[path]
                    waiting.append(other)
        return found

    def _check(self, layer: LibraryLayer) -> None:
        """Refuse a layer whose parameters are not its own alone.

        Raises:
          LeftError: something else reads them, or changes them before.
        """
        for leaf, name in layer.leaves.items():
            reads = self.reads.get(leaf, ())
            others = sorted({how for how, named in reads if not named})
            if not any(named for _, named in reads):
                raise LeftError(
                    f"its {name} is transformed on the way to the layer, or differs "
                    "between calls"
                )
            if others:
                raise LeftError(
                    f"its {name} {leaf!r} is also read outside of the layer's own call "
                    f"(by {', '.join(others)}), where the other shape would not fit"
                )
        for matmul in self.matmuls.get(layer.kernel, ()):
            if layer_call(layer, matmul, 0) is None and not matmul.backward:
                raise LeftError(_why_unlike(layer, matmul))
        bias = layer.bias_path
        if bias and self.ndims[bias] - len(layer.bias or ()) != len(layer.stack):
            raise LeftError("its kernel and its bias are stacked differently")

    def leave_tied(self, planned: dict[str, LayerPlan], left: dict[str, str]) -> None:
        """Skip layers whose parameters another layer needs in their form."""
        tied: dict[str, dict[str, str]] = {}
        for path, layer in self.layers.items():
            for leaf, name in layer.leaves.items():
                tied.setdefault(leaf, {})[path] = name
        waiting = [leaf for leaf, paths in tied.items() if len(paths) > 1]
        while waiting:
            leaf = waiting.pop()
            here = {path for path in tied[leaf] if path in planned}
            moves = {
                (dict(planned[path].leaves)[tied[leaf][path]], planned[path].stack_axes)
                for path in here
            }
            if len(moves) <= 1 and len(here) in (0, len(tied[leaf])):
                continue
            for path in here:
                others = ", ".join(repr(p) for p in tied[leaf] if p != path)
                del planned[path]
                left[path] = (
                    f"its parameter {leaf!r} is tied to that of {others}, which does "
                    "not convert in the same way"
                )
                # Its other parameters may be tied to layers that can't convert without
                # it.
                waiting += self.layers[path].leaves


def _why_unlike(layer: LibraryLayer, matmul: Matmul) -> str:
    """Return why a matmul of a layer does not read the kernel as it is stored."""
    for axis in range(1, len(layer.shape)):
        # Only to give the reason: would it be the layer's matmul, stacked on another
        # axis?
        other = dataclasses.replace(layer, stack=(axis,))
        if len(layer.stack) == 1 and layer_call(other, matmul, 0) is not None:
            return (
                f"its kernel is stacked on axis {axis}, which may count from either "
                "end and would move in another shape: stack on axis 0"
            )
    if layer.stack and stack_axes(matmul) is None:
        return "its kernel is stacked differently in each call"
    return "its kernel is transformed on the way to the layer"
