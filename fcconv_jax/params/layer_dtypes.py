"""The dtype of each layer of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from ..plan import Plan
from ..plan.paths import join_path
from .leaves import leaf_path


def layer_dtypes(params: Any, plan: Plan) -> dict[str, Any]:
    """Return the dtype of each layer of a plan: that of its kernel.

    Args:
      params: params or variables, arrays or abstract ones.
      plan: of the model.

    Example:
      >>> import flax.linen as nn
      >>> from fcconv_jax import make_plan
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
      >>> layer_dtypes(params, make_plan(model, x))
      {'': dtype('float32')}
    """
    is_variables = isinstance(params, Mapping) and "params" in params
    tree = meta.unbox(params["params"] if is_variables else params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    dtypes = {leaf_path(path): jnp.result_type(leaf) for path, leaf in leaves}
    found = {}
    for path, layer in plan.items():
        # A tied kernel is stored under another path, in the dtype of its model.
        leaf = join_path(path, layer.leaves[0][0])
        found[path] = dtypes.get(leaf, next(iter(dtypes.values())))
    return found
