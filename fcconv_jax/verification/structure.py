"""What programs that nothing ran can still show: that the planned matmuls moved."""

from __future__ import annotations

from ..plan import Plan
from .report import Report


def structure_failures(report: Report, plan: Plan) -> list[str]:
    """Names each backend whose two programs do not differ as the plan says.

    Counts operations in the StableHLO of both programs, before a compiler merges or
    rewrites any: for every layer of the plan, the converted program must ask for at
    least one operation fewer of the kind that the layer had (a matmul, where
    the plan goes to conv) and one more of the kind that it has now. This says nothing
    of the numbers: those need a run.

    Args:
      report: from :func:`fcconv_jax.verify`.
      plan: what was verified.

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
        if backend.dense is None or backend.conv is None:
            continue
        dense, conv = backend.dense.stablehlo, backend.conv.stablehlo
        fewer = dense.dots - conv.dots
        more = conv.convolutions - dense.convolutions
        if min(fewer, more) >= len(plan):
            continue
        layers = ", ".join(repr(path or "(root)") for path in plan)
        found.append(
            f"{backend.backend}: planned to {plan.to}: {layers}, yet the "
            f"dense program has {dense.dots} dots and {dense.convolutions} "
            f"convolutions, and the conv program {conv.dots} dots and "
            f"{conv.convolutions} convolutions. A planned layer did not change form, "
            "or this call does not run it: plan with the arguments of this call"
        )
    return found
