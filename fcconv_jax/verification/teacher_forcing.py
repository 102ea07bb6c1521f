"""Layers in both forms on the inputs that the model really gives them.

Where a whole program has no float64 reading, each converted layer is compared on its
own: the original runs as it is and provides each layer's input (teacher forcing),
so that no error is carried from one layer to the next. The two results may differ by
what one matmul rounds, ``|x| @ |w|`` times the length of its sums and the unit
roundoff (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.5), which
does not grow with the depth of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..params.leaves import flatten_with_path
from ..plan import LayerPlan, Plan
from ..plan.layer_forms import canonical_layer, pair_of_forms
from ..plan.paths import join_path
from ..tracing.marks import named_inputs, named_outputs
from .arithmetic import Arithmetic, measure_precision
from .reading import Reading
from .reference import TracedProgram


@dataclasses.dataclass(frozen=True)
class ForcedLayer:
    """One layer in both forms, on each input that it had.

    Attributes:
      path: the layer's.
      calls: how many inputs it had.
      difference: the largest difference between its forms.
      allowed: what one matmul may round there.
      reason: what differs, where it does not pass.
    """

    path: str
    calls: int
    difference: float
    allowed: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether every difference is within what one matmul rounds."""
        return not self.reason


def compare_layers(
    trace: TracedProgram, variables: Mapping[str, Any], plan: Plan
) -> tuple[dict[str, ForcedLayer], list[str]]:
    """Compare the layers of a plan on the inputs that the original gives them.

    Returns:
      By path what was found, and the paths whose inputs the trace does not tell.
    """
    _, named = Reading(trace.jaxpr, wide=False)(trace.operands)
    inputs, outputs = named_inputs(named), named_outputs(named)
    params = dict(flatten_with_path(variables["params"])[0])
    found, unknown = {}, []
    for path, layer in plan.items():
        # Of a stack or a tied kernel, the params hold no array of this layer alone.
        if path not in inputs or layer.stack_axes or layer.tied:
            unknown.append(path)
            continue
        arrays = [params.get(join_path(path, name)) for name, _ in layer.leaves]
        if arrays[0] is None:
            unknown.append(path)
            continue
        # The layer promotes its operands to the dtype that comes out.
        dtype = outputs[path][0].dtype
        arrays = [jnp.asarray(getattr(a, "value", a)).astype(dtype) for a in arrays]
        found[path] = _compare(path, layer, inputs[path], arrays)
    return found, unknown


def _compare(
    path: str, layer: LayerPlan, inputs: PyTree, arrays: PyTree
) -> ForcedLayer:
    canonical = canonical_layer(layer) if layer.is_matmul else layer
    source, target = map(jax.jit, pair_of_forms(canonical, layer.to))
    kernel, bias = arrays[0], arrays[1] if len(arrays) > 1 else None
    moved = [move(array) for (_, move), array in zip(layer.leaves, arrays)]
    dtype = kernel.dtype
    worst, bound, reason = 0.0, 0.0, ""
    terms = kernel.size // layer.canonical_target[-1]
    arithmetic = measure_precision(dtype, form="dot").worse(
        measure_precision(dtype, form="conv")
    )
    for number, x in enumerate(inputs):
        x = jnp.asarray(x).astype(dtype)
        want = np.asarray(source(x, kernel, bias)).astype(np.float64)
        got = np.asarray(target(x, *moved, *[None][: bias is None]))
        sizes = source(abs(x), abs(kernel), None if bias is None else abs(bias))
        allowed = _rounding(arithmetic, terms) * np.asarray(sizes).astype(np.float64)
        off = abs(want - got.astype(np.float64))
        worst = max(worst, float(off.max(initial=0.0)))
        bound = max(bound, float(allowed.max(initial=0.0)))
        # Not `off > allowed`, which is false of NaN.
        wrong = np.argwhere(~(off <= allowed))
        if len(wrong) and not reason:
            at = tuple(int(i) for i in wrong[0])
            reason = (
                f"expected {want[at]!r} at {at} of its output in call {number}, got "
                f"{got[at].item()!r}: more than one matmul rounds ({allowed[at]:.1e})"
            )
    return ForcedLayer(path, len(inputs), worst, bound, reason)


def _rounding(arithmetic: Arithmetic, terms: int) -> float:
    """By how much two results of one matmul may differ, as a part of ``|x| @ |w|``."""
    each = (
        2 * arithmetic.input_roundoff
        + (terms + 2) * arithmetic.accumulate_roundoff
        + 2 * arithmetic.output_roundoff
    )
    # Both results may be off by as much, in opposite directions.
    return 2 * each
