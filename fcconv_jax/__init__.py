"""Trained JAX/Flax models from Dense to Conv and back: same code, same numbers."""

# A name is imported when it is first asked for: what needs none of JAX, such as
# `fcconv --help`, does not wait for it. A test holds the two lists together.

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import convert_checkpoint as convert_checkpoint
    from .checkpoints import restore_checkpoint as restore_checkpoint
    from .equivalence import Equivalence as Equivalence
    from .equivalence import classify as classify
    from .equivalence import explain as explain
    from .geometry import ConvGeometry as ConvGeometry
    from .kernels import Rearrangement as Rearrangement
    from .kernels import conv_kernel_to_dense as conv_kernel_to_dense
    from .kernels import dense_kernel_to_conv as dense_kernel_to_conv
    from .models import convert_model as convert_model
    from .params import convert_opt_state as convert_opt_state
    from .params import convert_params as convert_params
    from .params import restore_params as restore_params
    from .plan import LayerPlan as LayerPlan
    from .plan import Plan as Plan
    from .plan import PlanError as PlanError
    from .planning import make_plan as make_plan
    from .planning.shapes import plan_from_params as plan_from_params
    from .rules import Rule as Rule
    from .unroll import roll_dense as roll_dense
    from .unroll import unroll_conv as unroll_conv
    from .verification.layer_certificates import certify_layer as certify_layer
    from .verification.report import Report as Report
    from .verification.verify import assert_equivalent as assert_equivalent
    from .verification.verify import verify as verify

_HOMES = {
    "ConvGeometry": "geometry",
    "Equivalence": "equivalence",
    "LayerPlan": "plan",
    "Plan": "plan",
    "PlanError": "plan",
    "Rearrangement": "kernels",
    "Report": "verification.report",
    "Rule": "rules",
    "assert_equivalent": "verification.verify",
    "certify_layer": "verification.layer_certificates",
    "classify": "equivalence",
    "conv_kernel_to_dense": "kernels",
    "convert_checkpoint": "checkpoints",
    "convert_model": "models",
    "convert_opt_state": "params",
    "convert_params": "params",
    "dense_kernel_to_conv": "kernels",
    "explain": "equivalence",
    "make_plan": "planning",
    "plan_from_params": "planning.shapes",
    "restore_checkpoint": "checkpoints",
    "restore_params": "params",
    "roll_dense": "unroll",
    "unroll_conv": "unroll",
    "verify": "verification.verify",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
