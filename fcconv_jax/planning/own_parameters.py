"""Plans the parameters that a linen model's own code multiplies, by its products."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList

from .. import arguments
from ..functions.products import Product
from ..functions.trace import Traced, trace
from ..plan import Form, LayerPlan
from ..rules import Rule
from .function import find_layers, plan_products


@dataclasses.dataclass(frozen=True)
class OwnParameters:
    """Parameters of a model that no layer of Flax reads, and what is done with them.

    Args:
      described: by path, whose each is, as the beginning of a reason.
      traced: the trace of ``apply``, where one was needed and could be made.
      layers: the products in it with a parameter that is no layer's.
      failure: why it could not be made.
    """

    described: Mapping[str, str]
    traced: Traced | None = None
    layers: Mapping[str, Sequence[Product]] = dataclasses.field(default_factory=dict)
    failure: str = ""

    @classmethod
    def find(
        cls,
        described: Mapping[str, str],
        known: Container[str],
        to: Form,
        model: nn.Module,
        variables: Mapping[str, Any],
        inputs: tuple[Sequence[Any], Mapping[str, Any]],
        rngs: Any,
    ) -> OwnParameters:
        """Traces ``apply``, if there is a parameter to look for.

        Args:
          described: the parameters to look for.
          known: parameters of layers, which are decided about as layers.
          to: the form to go to.
          model: the model.
          variables: its variables, abstract, as ``init`` made them.
          inputs: arguments and keyword arguments of the call.
          rngs: as for ``model.apply``.
        """
        if not described:
            return cls({})
        params = variables["params"]
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        # A cache that init has made may expect other inputs than init: try without.
        failure = ""
        for state in (rest, {}) if rest else (rest,):
            try:
                traced = _trace(model, params, state, inputs, rngs)
            except Exception as error:  # whatever the model's code raises
                failure = failure or f"{type(error).__name__}: {error}"
                continue
            return cls(described, traced, find_layers(traced, to, known))
        return cls(described, failure=failure)

    def plan(
        self, to: Form, chosen: Mapping[str, Rule | None]
    ) -> tuple[dict[str, LayerPlan], dict[str, str]]:
        """The plans of the parameters, and the reasons why others are left.

        A parameter that comes near no product, such as an embedding of positions that
        is added, is neither planned nor left.
        """
        if self.traced is None:
            return {}, {
                path: f"{words}; how cannot be seen, as apply on the inputs of init "
                f"raises {self.failure}"
                for path, words in self.described.items()
            }
        planned, reasons = plan_products(self.traced, self.layers, to, chosen)
        left = {
            path: f"{self.described[path]}: {why}" if path in self.described else why
            for path, why in reasons.items()
            if path in self.described or path in self.layers
        }
        return planned, left


def _trace(
    model: nn.Module,
    params: Any,
    state: Mapping[str, Any],
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    rngs: Any,
) -> Traced:
    """The trace of ``apply`` with fixed params; all other collections may change."""
    args, kwargs = inputs
    kwargs = {**kwargs, "mutable": DenyList("params")}

    def run(params: Any, state: Any, rngs: Any, args: Any, kwargs: Any) -> list[Any]:
        out = model.apply({"params": params, **state}, *args, rngs=rngs, **kwargs)
        return [leaf for leaf in jax.tree.leaves(out) if arguments.is_array(leaf)]

    return trace(run, (params, state, rngs, args, kwargs), {})
