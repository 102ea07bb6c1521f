"""Gradients and one optimizer step of a model in both forms, to be compared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..frontends.programs import BothForms
from ..params.opt_state import convert_opt_state
from ..params.trees import restore_params
from .pair import Pair


def pair_of_steps(pair: BothForms, tx: Any, notes: list[str]) -> Pair | None:
    """Gradients, and the parameters after one optimizer step.

    Args:
      pair: the two programs.
      tx: the ``optax`` optimizer; SGD with momentum if None.
      notes: takes what is to be told; that there are no gradients, say.
    """
    import optax

    plan, variables, other = pair.plan, pair.variables, pair.other
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(variables["params"])]
    if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        notes.append("no gradients: some params are not floats")
        return None
    tx = optax.sgd(1e-2, momentum=0.9) if tx is None else tx
    state = jax.jit(tx.init)(variables["params"])
    other_state = convert_opt_state(state, plan, tx=tx, params=variables["params"])

    def step(program: Any, variables: Any, state: Any) -> dict[str, Any]:
        grads = gradient(program, variables)
        updates, _ = tx.update(grads, state, variables["params"])
        return {
            "gradient": grads,
            "params": optax.apply_updates(variables["params"], updates),
        }

    def restored(variables: Any) -> Any:
        after = step(pair.changed, variables, other_state)
        return {name: restore_params(tree, plan) for name, tree in after.items()}

    return Pair(
        lambda v: step(pair.original, v, state), restored, variables, other, notes
    )


def gradient(program: Any, variables: Any) -> Any:
    """Gradient of a fixed random projection of the float outputs."""

    def loss(params: Any) -> Any:
        out = program.call({**variables, "params": params})
        floats = [
            leaf
            for leaf in jax.tree.leaves(out)
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        ]
        rng, signs = np.random.default_rng(0), np.array([-1, 1], np.int8)
        return sum(
            jnp.sum(jnp.real(leaf) * rng.choice(signs, leaf.shape)) for leaf in floats
        )

    return jax.grad(loss)(variables["params"])
