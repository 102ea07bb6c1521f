"""Trained JAX/Flax models from Dense to Conv and back: same code, same numbers."""

from .geometry import ConvGeometry as ConvGeometry
from .geometry import Equivalence as Equivalence
from .geometry import classify as classify
from .geometry import explain as explain
from .kernels import Rearrangement as Rearrangement
from .models import convert_model as convert_model
from .params import convert_opt_state as convert_opt_state
from .params import convert_params as convert_params
from .params import restore_params as restore_params
from .plan import LayerPlan as LayerPlan
from .plan import Plan as Plan
from .plan import PlanError as PlanError
from .plan import Rule as Rule
from .planning import make_plan as make_plan
