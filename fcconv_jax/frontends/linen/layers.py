"""Flax linen's linear layers: which calls are theirs, and how their axes lie."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype

from ...planning.layer_axes import DenseAxes

Array = jax.Array
KINDS: dict[str, type[nn.Module]] = {
    "Dense": nn.Dense,
    "DenseGeneral": nn.DenseGeneral,
    "Conv": nn.Conv,
}


def layer_kind(context: nn.module.InterceptorContext) -> str | None:
    """The kind of linear layer whose own ``__call__`` is being intercepted, if any.

    Comparing the method, not the class, sees through subclasses that call ``super``
    and through the classes that lifted transforms such as ``nn.remat`` make.
    """
    if context.method_name != "__call__":
        return None
    method = context.orig_method
    function = method.func if isinstance(method, functools.partial) else method
    for kind, cls in KINDS.items():
        # nn.compact wraps the method; what an interceptor gets is the inner one.
        own = getattr(cls.__call__, "__wrapped__", cls.__call__)
        if function is own and isinstance(context.module, cls):
            return kind
    return None


def module_path(module: nn.Module) -> str:
    """Return the path of the module's parameters: ``"encoder/layer_0/Dense_0"``."""
    return "/".join(module.path)


def is_lifted(module: nn.Module) -> bool:
    """Return whether the module runs below a lifted transform, which may add axes."""
    return module.scope is not None and bool(module.scope.root.debug_path)


def below_map_variables(module: nn.Module) -> bool:
    """Whether ``nn.map_variables`` stands between the module and its parameters."""
    path = () if module.scope is None else module.scope.debug_path
    return any("map_variables(" in part for part in path)


def in_a_branch(module: nn.Module) -> bool:
    """Return whether the module runs in one branch of ``nn.cond`` or ``nn.switch``."""
    path = () if module.scope is None else module.scope.debug_path
    return any(part.startswith(("cond(", "switch(")) for part in path)


def obstacle(module: Any) -> str | None:
    """Why a Dense, DenseGeneral or Conv computes something else than it says, if so."""
    name = type(module).__name__
    if below_map_variables(module):
        return "runs under nn.map_variables, which may change its kernel on the way"
    if type(module).param is not nn.Module.param:
        return (
            f"{name} overrides param(): its kernel is changed on the way to the layer"
        )
    for field in (
        "dot_general",
        "dot_general_cls",
        "conv_general_dilated",
        "conv_general_dilated_cls",
    ):
        if getattr(module, field, None) is not None:
            return f"{name} computes its matmul with a custom {field}"
    if module.promote_dtype is not promote_dtype:
        return f"{name} has a custom promote_dtype, which may read the shapes"
    if getattr(module, "mask", None) is not None:
        return f"{name} has a mask on its kernel"
    return None


class OwnCalls:
    """Tells a model's own calls from those of modules that it merely applies.

    ``other.apply({"params": ...}, x)`` inside a model runs on parameters of its own
    making, under paths that may collide with the model's.
    """

    def __init__(self):
        self._root: Any = None
        self._foreign = False

    @contextlib.contextmanager
    def enter(self, module: nn.Module) -> Iterator[bool]:
        """Run a call; return whether the module's parameters are the model's own."""
        scope = module.scope
        if scope is None:  # a method of an unbound module, which has no parameters
            yield False
            return
        before = self._foreign
        outermost = self._root is None
        if outermost:
            self._root = scope.root
        # The roots that lifted transforms make tell so by their path.
        if scope.root is not self._root and not is_lifted(module):
            self._foreign = True
        try:
            yield not self._foreign
        finally:
            self._foreign = before
            if outermost:  # its scopes hold tracers
                self._root = None


def dense_axes(module: Any, ndim: int) -> DenseAxes:
    """How a bound ``nn.Dense`` or ``nn.DenseGeneral`` reads an input of that rank."""
    # Flax sorts the axes: (3, 2) means (2, 3).
    axis = _as_tuple(getattr(module, "axis", -1))
    contracted = tuple(sorted(a % ndim for a in axis))
    batch = _as_tuple(getattr(module, "batch_dims", ()))
    batch = tuple(sorted(b % ndim for b in batch))
    lead = tuple(a for a in range(ndim) if a not in (*batch, *contracted))
    return DenseAxes(batch, lead, contracted, _as_tuple(module.features))


def kernel_split(module: Any) -> tuple[int, int]:
    """How many kernel axes are the activation's batch, and how many are features."""
    if not isinstance(module, nn.DenseGeneral):
        return 0, 1
    return len(_as_tuple(module.batch_dims)), len(_as_tuple(module.features))


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
