"""Trained JAX/Flax models from Dense to Conv and back: same code, same numbers."""

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
from .plan import Rule as Rule
from .planning import make_plan as make_plan
from .planning.shapes import plan_from_params as plan_from_params
from .unroll import roll_dense as roll_dense
from .unroll import unroll_conv as unroll_conv
from .verification.report import Report as Report
from .verification.verify import assert_equivalent as assert_equivalent
from .verification.verify import certify_layer as certify_layer
from .verification.verify import verify as verify
