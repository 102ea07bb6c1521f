"""What converts and how: immutable plans, their rules, and what tuning recorded."""

from .layer import Case as Case
from .layer import Form as Form
from .layer import KernelLayout as KernelLayout
from .layer import LayerPlan as LayerPlan
from .layer import Layout as Layout
from .layer import is_order as is_order
from .layer import other_form as other_form
from .plan import UNCALLED_REASON as UNCALLED_REASON
from .plan import Direction as Direction
from .plan import Options as Options
from .plan import Plan as Plan
from .plan import check_plan as check_plan
from .plan import direction as direction
from .plan import in_words as in_words
