"""Trained JAX/Flax models from Dense to Conv and back: same code, same numbers."""

# A name is imported when it is first asked for: what needs none of JAX, such as
# `fcconv --help`, does not wait for it. A test holds the two lists together.

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import convert_checkpoint as convert_checkpoint
    from .checkpoints import restore_checkpoint as restore_checkpoint
    from .frontends.convert_model import convert_model as convert_model
    from .frontends.make_plan import make_plan as make_plan
    from .geometry.classify import Equivalence as Equivalence
    from .geometry.classify import classify as classify
    from .geometry.classify import explain as explain
    from .geometry.convolution import ConvGeometry as ConvGeometry
    from .geometry.unroll import roll_dense as roll_dense
    from .geometry.unroll import unroll_conv as unroll_conv
    from .kernels import Rearrangement as Rearrangement
    from .kernels import conv_kernel_to_dense as conv_kernel_to_dense
    from .kernels import dense_kernel_to_conv as dense_kernel_to_conv
    from .params.trees import convert_opt_state as convert_opt_state
    from .params.trees import convert_params as convert_params
    from .params.trees import restore_params as restore_params
    from .plan import LayerPlan as LayerPlan
    from .plan import Plan as Plan
    from .plan import PlanError as PlanError
    from .planning.from_shapes import plan_from_params as plan_from_params
    from .rules import Rule as Rule
    from .verification.layer_certificates import certify_layer as certify_layer
    from .verification.report import Report as Report
    from .verification.verify import assert_equivalent as assert_equivalent
    from .verification.verify import verify as verify

_HOMES = {
    "ConvGeometry": "geometry.convolution",
    "Equivalence": "geometry.classify",
    "LayerPlan": "plan",
    "Plan": "plan",
    "PlanError": "plan",
    "Rearrangement": "kernels",
    "Report": "verification.report",
    "Rule": "rules",
    "assert_equivalent": "verification.verify",
    "certify_layer": "verification.layer_certificates",
    "classify": "geometry.classify",
    "conv_kernel_to_dense": "kernels",
    "convert_checkpoint": "checkpoints",
    "convert_model": "frontends.convert_model",
    "convert_opt_state": "params.trees",
    "convert_params": "params.trees",
    "dense_kernel_to_conv": "kernels",
    "explain": "geometry.classify",
    "make_plan": "frontends.make_plan",
    "plan_from_params": "planning.from_shapes",
    "restore_checkpoint": "checkpoints",
    "restore_params": "params.trees",
    "roll_dense": "geometry.unroll",
    "unroll_conv": "geometry.unroll",
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
