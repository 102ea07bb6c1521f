"""Differences between versions of JAX and Flax, back to Colab's 0.7.2 and 0.11.2.

Each entry starts with the version whose lower bound lets it be deleted, and with what
then stands in its place. ``backends/worker.py``, which imports JAX alone, has one more.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.experimental
import jax.numpy as jnp
import numpy as np

# jax 0.10.1: jax.errors.InconclusiveDimensionOperation.
InconclusiveDimensionOperation: Any = vars(jax.errors).get(
    "InconclusiveDimensionOperation",
    vars(jax.core).get("InconclusiveDimensionOperation"),
)

# jax 0.10.0: jax.extend.core.get_opaque_trace_state.
try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:
    get_opaque_trace_state: Any = functools.partial(
        vars(jax.core)["get_opaque_trace_state"], convention="nnx"
    )

# jax 0.8.0: jax.enable_x64.
enable_x64: Any = vars(jax).get("enable_x64", vars(jax.experimental).get("enable_x64"))

# jax 0.8.0: True. Earlier, XLA reuses a donated array only for one of its shape.
DONATES_RESHAPED = jax.__version_info__ >= (0, 8)

# flax 0.12.4: "out_sharding", the only key of an nnx.Variable's metadata for it.
SHARDING_KEYS = ("out_sharding", "sharding_names")


def check_bits(dtype: np.dtype) -> None:
    """Jax 0.8.0: delete. Earlier, XLA's CPU programs write past packed entries."""
    packed = dtype.name.lstrip("u").startswith(("int2", "int4", "float4"))
    if jax.__version_info__ < (0, 8) and packed:
        raise ValueError(
            f"Expected a dtype that jaxlib {jax.__version__} can rearrange, got "
            f"{dtype.name}. Pass a NumPy array, or upgrade to jaxlib 0.8.0."
        )


def convolved(x: Any, kernel: Any, wide: Any) -> tuple[Any, Any]:
    """Jax 0.9.2: ``(x, kernel)``. Earlier, wider results have no gradient."""
    floats = wide is not None and jnp.issubdtype(x.dtype, jnp.floating)
    if jax.__version_info__ >= (0, 9, 2) or not floats:
        return x, kernel
    if jnp.finfo(wide).bits <= jnp.finfo(x.dtype).bits:
        return x, kernel
    return x.astype(wide), kernel.astype(wide)


@functools.cache
def graph_mode() -> Mapping[str, Any]:
    """Flax 0.12.5: ``graph=True``, under which ``nnx.split`` keeps sharing."""
    from flax import nnx

    known = "graph" in inspect.signature(nnx.split).parameters
    return {"graph": True} if known else {}


def iter_graph(node: Any) -> Iterator[tuple[Any, Any]]:
    """Flax 0.12.5: ``nnx.iter_graph(node, graph=True)``; earlier, tied ones repeat."""
    from flax import nnx

    seen: set[int] = set()
    for path, each in nnx.iter_graph(node, **graph_mode()):
        if not isinstance(each, nnx.Variable) or id(each) not in seen:
            seen.add(id(each))
            yield path, each


def holds_reference(variable: Any) -> bool:
    """Flax 0.12.3: ``variable.ref or variable.hijax``."""
    if hasattr(type(variable), "has_ref"):
        return variable.has_ref
    return bool(variable.ref or variable.hijax)


def value_of(variable: Any) -> Any:
    """Flax 0.12.1: ``variable.get_value()``."""
    new = hasattr(type(variable), "get_value")
    return variable.get_value() if new else variable.value


def raw_value(variable: Any) -> Any:
    """Flax 0.12.1: ``variable.get_raw_value()``."""
    new = hasattr(type(variable), "get_raw_value")
    return variable.get_raw_value() if new else variable.raw_value


def set_raw_value(variable: Any, value: Any) -> None:
    """Flax 0.12.1: ``variable.set_raw_value(value)``."""
    if hasattr(type(variable), "set_raw_value"):
        variable.set_raw_value(value)
    else:
        variable.raw_value = value


def set_metadata(variable: Any, updates: Mapping[str, Any]) -> None:
    """Flax 0.12.0: ``variable.set_metadata(**updates)``."""
    if hasattr(type(variable), "set_metadata"):
        variable.set_metadata(**updates)
    else:
        variable.get_metadata().update(updates)


def changes_when_read(variable: Any) -> bool:
    """Flax 0.12.1: whether a subclass overrides ``get_value``; earlier, ``value``."""
    from flax import nnx

    name = "get_value" if hasattr(nnx.Variable, "get_value") else "value"
    return getattr(type(variable), name) is not getattr(nnx.Variable, name)


@functools.cache
def containers() -> tuple[type, ...]:
    """Flax 0.12.0: ``(nnx.List, nnx.Dict)``."""
    from flax import nnx

    return tuple(vars(nnx)[name] for name in ("List", "Dict") if hasattr(nnx, name))


@functools.cache
def linear_settings() -> tuple[str, ...]:
    """Flax 0.12.0: ``("preferred_element_type",)`` of ``nnx.Linear`` and the like."""
    from flax import nnx

    known = inspect.signature(nnx.Linear.__init__).parameters
    return tuple(name for name in ("preferred_element_type",) if name in known)


def as_kernel(value: Any) -> Any:
    """Flax 0.12.1: the value itself, which layers then read as ``self.kernel[...]``."""
    from flax import nnx

    new = hasattr(nnx.Variable, "get_value")
    return value if new else types.SimpleNamespace(value=value)


def is_data(nodes: Any, name: str) -> bool:
    """Flax 0.12.0: ``nodes.get(name, False)``, of ``module._pytree__nodes``."""
    return name in nodes if isinstance(nodes, frozenset) else nodes.get(name, False)


def pytree_option(cls: Any) -> Mapping[str, Any]:
    """Flax 0.12.0: ``pytree=cls._pytree__is_pytree``, for a subclass."""
    known = hasattr(cls, "_pytree__is_pytree")
    return {"pytree": cls._pytree__is_pytree} if known else {}
