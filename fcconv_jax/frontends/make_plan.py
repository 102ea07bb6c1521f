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
    """Finds the linear layers of a model and how each moves to the other form.

    The model is traced on abstract inputs: no array is made, nothing is computed.
    The window of a Dense behind a flatten, and the order of that flatten, are read
    off the trace. Parameters that no layer of Flax reads are planned by their matmuls
    and named by their own path, as those of a function are.

    Args:
      model: a ``flax.linen`` or ``flax.nnx`` Module; it is left as it is. Or any
        function ``f(params, *inputs)``, whose layers are its matmuls with a parameter.
      *inputs: what the model is called with: arrays or ``jax.ShapeDtypeStruct``. For a
        function the params, in a PyTree of any kind, come first. Where they are sharded
        over a mesh, layouts are chosen that add no collectives.
      to: ``"conv"`` converts Dense and DenseGeneral layers (in NNX, Linear and
        LinearGeneral), ``"dense"`` Conv layers.
      rules: :class:`Rule` or text such as ``"head=7x7"``; the first that matches a
        module path (for a matmul, a parameter's path) overrides what the trace says.
      rngs: as for ``model.init``; a fixed key by default. NNX models hold
        their own; one that takes ``rngs=`` in its call gets these.
      method: as for ``model.init``; for NNX, a method's name or a function of the
        model. Plans of several methods join with ``|``.
      backend: where the conv form will run: ``"cpu"``, ``"cuda:h100"``, ``"tpu:v5e"``.
        Each layer gets the layout that was quickest there for inputs of these shapes;
        a kernel may be stored as OHWI then, which a plain ``nn.Conv`` does not load.
        None takes the available backend (where the params or inputs lie, else JAX's
        default) and stores kernels as a plain ``nn.Conv`` loads them, so that params
        convert alike on every machine. ``"any"`` runs the same convolutions everywhere.
      **kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
      A :class:`Plan`; ``plan.skipped`` has the reason for each layer that is not
      converted.

    Raises:
      PlanError: a rule matches no layer, or asks for what cannot be.
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
