"""Runs an optimizer in both forms, to check that its updates agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer
from jaxtyping import PyTree

from ..backends.default_settings import default_settings
from ..versions import enable_x64
from .leaves import flatten_with_path

if TYPE_CHECKING:
    import optax

# In float64 an update that takes entries one by one is bit-identical, and one
# that takes norms of leaves changes by 1e-16 or so. What looks at a shape changes by a
# part of the update that no one would call rounding.
_THRESHOLD = 1e-9
# Where an optimizer insists on the dtypes that it was given.
_NARROW_THRESHOLD = 3e-4
_LIMIT = 2**30  # bytes of random numbers in the place of an abstract state

# What update functions take beside the gradient; those that fit the signature are
# found by trying, because optax.chain hides the signatures of its parts.
_EXTRAS = (("value", "grad"), ("value",), ("grad",), ())

Convert = Callable[[Any], Any]


class ProbeError(Exception):
    """The optimizer's update raised."""


def different_update(
    tx: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    move_state: Convert,
    move_params: Convert,
    kwargs: Mapping[str, Any],
) -> str:
    """What differs between the updates of both forms, in words; empty if nothing does.

    Args:
      tx: the optimizer.
      opt_state: its state for the original params, arrays or abstract.
      params: the original params, likewise.
      move_state: converts such a state.
      move_params: converts such params, and gradients.
      kwargs: what else the update is called with; a tree like the params is converted.

    Raises:
      ProbeError: the update raised.
    """
    opt_state, params = meta.unbox((opt_state, params))
    leaves = jax.tree.leaves((opt_state, params))
    known = all(map(_is_here, leaves))
    size = sum(8 * int(np.prod(np.shape(x))) for x in jax.tree.leaves(params))
    if not known and 6 * size > _LIMIT:
        return ""
    with jax.ensure_compile_time_eval(), default_settings():
        random = _random_like(params, 0)
        if not known:
            opt_state, params = tx.init(random), random
        else:
            opt_state, params = jax.tree.map(_host, (opt_state, params))
        # Lookahead's params are a pair, of which one gets the gradients.
        trained = getattr(params, "fast", params)
        # Two: the state that the first update leaves decides the second.
        gradients = [_random_like(trained, seed) for seed in (1, 2)]
        trees = opt_state, params, gradients, dict(kwargs)
        moves = move_state, move_params
        try:
            with enable_x64(True):
                return _compare(tx, jax.tree.map(_widen, trees), moves, _THRESHOLD)
        except Exception:
            # A branch or a scan of the optimizer's own that is typed by its state.
            pass
        try:
            return _compare(tx, trees, moves, _NARROW_THRESHOLD)
        except Exception as error:
            raise ProbeError(f"{type(error).__name__}: {error}") from error


def updated_shapes(
    tx: optax.GradientTransformation, params: PyTree, kwargs: Mapping[str, Any]
) -> PyTree:
    """Return the shapes of a state after an update; None if no update can be traced."""
    import optax

    update = optax.with_extra_args_support(tx).update
    for extras in _EXTRAS:

        def updated(params: PyTree, extras: Sequence[str] = extras) -> PyTree:
            extra = _extra(extras, params, kwargs)
            return update(params, tx.init(params), params, **extra)[1]

        with contextlib.suppress(Exception):  # another keyword, or a fault of its own
            return jax.eval_shape(updated, params)
    return None


def _compare(
    tx: optax.GradientTransformation,
    trees: PyTree,
    moves: tuple[Convert, Convert],
    threshold: float,
) -> str:
    error = None
    for extras in _EXTRAS:
        try:
            return _compare_with(extras, tx, trees, moves, threshold)
        except TypeError as found:  # a keyword too many, or another fault
            error = found
    assert error is not None
    raise error


def _compare_with(
    extras: Sequence[str],
    tx: optax.GradientTransformation,
    trees: PyTree,
    moves: tuple[Convert, Convert],
    threshold: float,
) -> str:
    import optax

    (state, params, gradients, kwargs), (move_state, move_params) = trees, moves
    update = optax.with_extra_args_support(tx).update
    other, there = move_state(state), move_params(params)
    like_params = jax.tree.structure(params)
    kwargs_there = {
        name: move_params(value) if jax.tree.structure(value) == like_params else value
        for name, value in kwargs.items()
    }
    for given in gradients:
        moved = move_params(given)
        extra = _extra(extras, given, kwargs)
        updates, state = update(given, state, params, **extra)
        extra = _extra(extras, moved, kwargs_there)
        found, other = update(moved, other, there, **extra)
        wrong = _first_difference(move_params(updates), found, threshold)
        if wrong:
            return f"its next update of {wrong}"
    wrong = _first_difference(move_state(state), other, threshold)
    return f"its state after two updates, {wrong}" if wrong else ""


def _extra(
    names: Sequence[str], gradients: PyTree, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of an update: those named, and the caller's."""
    known = {"value": jnp.ones(()), "grad": gradients}
    return {name: known[name] for name in names} | dict(kwargs)


def _first_difference(want: Any, got: Any, threshold: float) -> str:
    for (path, a), (_, b) in zip(flatten_with_path(want)[0], flatten_with_path(got)[0]):
        if not hasattr(a, "dtype") or jnp.issubdtype(a.dtype, jax.dtypes.extended):
            continue
        x, y = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
        scale = abs(x).max(initial=0.0)
        off = abs(x - y).max(initial=0.0)
        if not off <= threshold * scale and not (np.isnan(x) == np.isnan(y)).all():
            return f"{path!r} has NaN in one form alone"
        if off > threshold * scale:
            percent = 100 * off / scale if scale else 100.0
            return f"{path!r} differs by {percent:.3g} % of its largest value"
    return ""


def _is_here(leaf: Any) -> bool:
    """Return whether this process has all values of a leaf."""
    abstract = isinstance(leaf, jax.ShapeDtypeStruct | Tracer)
    return not abstract and getattr(leaf, "is_fully_addressable", True)


def _host(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
        return leaf
    return jnp.asarray(np.asarray(leaf)) if hasattr(leaf, "dtype") else leaf


def _widen(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return leaf
    return jnp.asarray(np.asarray(leaf).astype(np.float64))


def _random_like(tree: PyTree, seed: int) -> Any:
    """Return numbers of order one in the shapes and dtypes of a tree."""
    rng = np.random.default_rng(seed)

    def fill(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.zeros(np.shape(leaf), dtype)
        return jnp.asarray(rng.standard_normal(np.shape(leaf)), dtype)

    return jax.tree.map(fill, tree)
