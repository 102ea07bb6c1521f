"""Traces a model once on abstract inputs and decides what converts: ``make_plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import PyTree

from ..plan import Form, Plan
from ..plan.rules import Rule
from .bind import bind_planned
from .options import check_options


def make_plan(
    model: object,
    *inputs: PyTree,
    to: Form = "conv",
    rules: Iterable[Rule | str] = (),
    rngs: PyTree = None,
    method: str | Callable[..., PyTree] | None = None,
    backend: str | None = None,
    **kwargs: PyTree,
) -> Plan:
    """Plan how the linear layers of a model convert to the other form.

    The model is traced on abstract inputs: no computation runs and no array is
    allocated. For a Dense behind a flatten, the trace shows the window and the order of
    the flatten. Parameters that aren't read by a Flax layer, such as those of a
    function, are planned by their matmuls and named by their own path.

    Args:
      model: a ``flax.linen`` or ``flax.nnx`` Module, which isn't modified, or any
        function ``f(params, *inputs)``, whose layers are its matmuls with a parameter.
      *inputs: the model's inputs: arrays or ``jax.ShapeDtypeStruct``. For a function,
        the params, in any PyTree, come first. If they are sharded over a mesh, the
        chosen layouts add no collectives.
      to: ``"conv"`` converts Dense and DenseGeneral layers (in NNX, Linear and
        LinearGeneral), ``"dense"`` Conv layers.
      rules: :class:`Rule` or text such as ``"head=7x7"``; the first that matches a
        module path (for a matmul, a parameter's path) overrides the planner's choice.
      rngs: as for ``model.init``; a fixed key by default. NNX models hold their own;
        if one takes ``rngs=`` in its call, it gets these.
      method: as for ``model.init``; for NNX, a method's name or a function of the
        model. Join the plans of several methods with ``|``.
      backend: the backend that will run the conv form: ``"cpu"``, ``"cuda:h100"``,
        ``"tpu:v5e"``. Each layer gets the layout that is fastest there for inputs of
        these shapes. Kernels may then be stored as OHWI, which a plain ``nn.Conv``
        can't load. None uses the current backend (that of the params or inputs, or else
        JAX's default), and stores kernels as a plain ``nn.Conv`` does, so that
        converted params are the same on every machine. ``"any"`` uses the same layouts
        everywhere.
      **kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
      A :class:`Plan`; ``plan.skipped`` maps each layer that isn't converted to the
      reason.

    Raises:
      PlanError: a rule matches no layer, or requests an impossible conversion.
      TypeError: the model is of another kind.

    Source:
      ``jax.make_jaxpr`` gives the trace, :func:`fcconv_jax.classify` the cases.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = nn.relu(nn.Conv(8, (3, 3))(x))
      ...         x = x.reshape(x.shape[0], -1)
      ...         return nn.Dense(10, name="head")(x)
      >>> print(make_plan(Net(), jnp.zeros((1, 6, 5, 3))))
      1 layer to conv
      path  layer  case         kernel                        order
      head  Dense  full_window  (240, 10) -> (6, 5, 8, 10)    HWC
    """
    given = {"rngs": rngs, "method": method}
    options = {name: value for name, value in given.items() if value is not None}
    bound = bind_planned(model, inputs, {**kwargs, **options})
    check_options(make_plan, bound)
    return bound.plan(to, rules, backend)
