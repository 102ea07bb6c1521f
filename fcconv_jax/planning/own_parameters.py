"""Plans the parameters that a model's own code multiplies, by its matmuls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from ..plan import Form, LayerPlan
from ..plan.rules import Rule
from .matmul import Matmul
from .plan_matmuls import find_layers, plan_matmuls
from .trace import Traced


@dataclasses.dataclass(frozen=True)
class OwnParameters:
    """Parameters of a model that no layer of Flax reads, and what is done with them.

    Args:
      described: by path, whose each is, as the beginning of a reason.
      traced: the trace of the model as a function of its params, where one was needed
        and could be made.
      layers: the matmuls in it with a parameter that is no layer's.
      failure: why it could not be made.
    """

    described: Mapping[str, str]
    traced: Traced | None = None
    layers: Mapping[str, Sequence[Matmul]] = dataclasses.field(default_factory=dict)
    failure: str = ""

    @classmethod
    def find(
        cls,
        described: Mapping[str, str],
        known: Container[str],
        to: Form,
        traces: Iterable[Callable[[], Traced]],
    ) -> OwnParameters:
        """Traces the model, if there is a parameter to look for.

        Args:
          described: the parameters to look for.
          known: parameters of layers, which are decided about as layers.
          to: the form to go to.
          traces: make the trace of the model as a function of its params; the first
            that can counts.
        """
        if not described:
            return cls({})
        failure = ""
        for trace in traces:
            try:
                traced = trace()
            except Exception as error:  # whatever the model's code raises
                failure = failure or f"{type(error).__name__}: {error}"
                continue
            return cls(described, traced, find_layers(traced, to, known))
        return cls(described, failure=failure)

    def plan(
        self, to: Form, chosen: Mapping[str, Rule | None]
    ) -> tuple[dict[str, LayerPlan], dict[str, str]]:
        """The plans of the parameters, and the reasons why others are left.

        A parameter that comes near no matmul, such as an embedding of positions that
        is added, is neither planned nor left.
        """
        if self.traced is None:
            return {}, {
                path: f"{words}; how cannot be seen, as the model on these inputs "
                f"raises {self.failure}"
                for path, words in self.described.items()
            }
        planned, reasons = plan_matmuls(self.traced, self.layers, to, chosen)
        left = {
            path: f"{self.described[path]}: {why}" if path in self.described else why
            for path, why in reasons.items()
            if path in self.described or path in self.layers
        }
        return planned, left
