"""What programs that nothing ran can still show: that the planned matmuls moved."""

from __future__ import annotations

from ..plan import Plan, in_words
from .report import VerifyReport


def structure_failures(report: VerifyReport, plan: Plan) -> list[str]:
    """Name each backend whose two programs do not differ as the plan says.

    Counts operations in the StableHLO of both programs, before a compiler merges or
    rewrites any: for every layer of the plan, the converted program must ask for at
    least one operation fewer of the kind that the layer had (a matmul, where
    the plan goes to conv) and one more of the kind that it has now. Of a plan that goes
    both ways only the sum shows. This says nothing of the numbers: those need a run.

    Returns:
      One sentence for each backend where the counts are others.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> plan, params = fc.make_plan(model, x), model.init(jax.random.key(0), x)
      >>> report = fc.verify(model, params, x, plan=plan, backends=["rocm"])
      >>> structure_failures(report, plan)
      []
    """
    found = []
    for backend in report.backends:
        if backend.original is None or backend.converted is None:
            continue
        old, new = backend.original.stablehlo, backend.converted.stablehlo
        more = new.convolutions - old.convolutions, old.dots - new.dots
        to_conv = sum(layer.to == "conv" for layer in plan.values())
        to_dense = len(plan) - to_conv
        # In a plan both ways, what goes one way may hide what goes the other.
        if -to_dense <= min(more) and max(more) <= to_conv and to_conv and to_dense:
            continue
        if not to_dense and min(more) >= to_conv:
            continue
        if not to_conv and max(more) <= -to_dense:
            continue
        layers = ", ".join(repr(path or "(root)") for path in plan)
        found.append(
            f"{backend.backend}: planned to {in_words(plan.to)}: {layers}, yet the "
            f"original program has {old.dots} dots and {old.convolutions} "
            f"convolutions, and the converted one {new.dots} dots and "
            f"{new.convolutions} convolutions. A planned layer did not change form, "
            "or this call does not run it: plan with the arguments of this call"
        )
    return found
