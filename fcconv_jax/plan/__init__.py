"""What converts and how: immutable plans, their rules, and what tuning recorded."""

from .plan import UNCALLED_REASON as UNCALLED_REASON
from .plan import Case as Case
from .plan import Direction as Direction
from .plan import Form as Form
from .plan import KernelLayout as KernelLayout
from .plan import LayerPlan as LayerPlan
from .plan import Layout as Layout
from .plan import Plan as Plan
from .plan import direction as direction
from .plan import in_words as in_words
from .plan import is_order as is_order
from .plan import other_form as other_form
