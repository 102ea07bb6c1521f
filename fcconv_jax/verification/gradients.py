"""Gradients of two programs by the arrays that both of them take."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .agreement import named_leaves
from .reference import TracedProgram


@dataclasses.dataclass(frozen=True, eq=False)
class Gradients:
    """Both programs' gradients, traced.

    Attributes:
      traces: of both programs, each with one array for each name.
      names: of the arrays by which the gradients are taken.
      notes: what has no gradient, and why.
    """

    traces: tuple[TracedProgram, TracedProgram] | None
    names: tuple[str, ...]
    notes: tuple[str, ...]


def trace_gradients(
    calls: Sequence[Callable[..., Any]],
    args: Sequence[tuple[Any, ...]],
    outputs: Sequence[Any],
) -> Gradients:
    """Trace the gradients of a fixed random projection of all float outputs."""
    if not any(jnp.issubdtype(each.dtype, jnp.floating) for each in outputs):
        return Gradients(None, (), ("no gradients: no output is of floats",))
    pairs, names = _shared(*args)
    if not pairs:
        why = "no gradients: the two programs share no array of floats"
        return Gradients(None, (), (why,))
    traces, notes = [], []
    for call, given, which in zip(calls, args, zip(*pairs)):
        try:
            traces.append(TracedProgram.of(_gradient(call, which), *given))
        except Exception as error:  # the user's code, and what JAX cannot differentiate
            order = "first" if call is calls[0] else "second"
            first, *_ = str(error).splitlines() or [""]
            notes.append(
                f"no gradients: the {order} program has none "
                f"({type(error).__name__}: {first})"
            )
    left = _floats(args[0]) - len(names)
    if left and not notes:
        notes.append(f"no gradients for {left} arrays that only one program takes")
    found = None if len(traces) < 2 else (traces[0], traces[1])
    return Gradients(found, tuple(names), tuple(notes))


def random_projection(outputs: PyTree) -> ArrayLike:
    """Return the sum of all float outputs, each entry with a random sign.

    The signs depend on the order and the sizes of the outputs alone.
    """
    floats = [
        leaf
        for leaf in jax.tree.leaves(outputs)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    # Signs: in a plain sum, errors of opposite sign would cancel, and the outputs of a
    # softmax, whose sum is 1, would have no gradient at all.
    rng, signs = np.random.default_rng(0), np.array([-1, 1], np.int8)
    return sum(
        jnp.sum(jnp.real(leaf) * rng.choice(signs, leaf.shape)) for leaf in floats
    )


def _gradient(call: Callable[..., Any], which: Sequence[int]) -> Callable[..., Any]:
    def gradient(*args: PyTree) -> list[Any]:
        leaves, treedef = jax.tree.flatten(args)

        def loss(chosen: Sequence[Any]) -> ArrayLike:
            given = list(leaves)
            for place, leaf in zip(which, chosen):
                given[place] = leaf
            return random_projection(call(*jax.tree.unflatten(treedef, given)))

        return jax.grad(loss)([leaves[place] for place in which])

    return gradient


def _shared(mine: Any, theirs: Any) -> tuple[list[tuple[int, int]], list[str]]:
    """Places of the float arrays that both programs take, and their names."""
    first, second = _named(mine), _named(theirs)
    kinds = [[_kind(leaf) for _, leaf in each] for each in (first, second)]
    if [name for name, _ in first] == [name for name, _ in second] and (
        kinds[0] == kinds[1]
    ):
        pairs = [(n, n) for n, (_, leaf) in enumerate(first) if _is_float(leaf)]
    else:
        # A port, whose params have other names: arrays are known by their bits. Of
        # several alike, such as biases of zeros, none can be told from the other.
        places = [
            {_bits(leaf): n for n, (_, leaf) in enumerate(each) if _is_float(leaf)}
            for each in (first, second)
        ]
        counts = [
            Counter(_bits(leaf) for _, leaf in each if _is_float(leaf))
            for each in (first, second)
        ]
        pairs = [
            (place, places[1][bits])
            for bits, place in places[0].items()
            if counts[0][bits] == counts[1][bits] == 1
        ]
    return pairs, [f"gradient/{first[place][0]}" for place, _ in pairs]


def _named(args: PyTree) -> list[tuple[str, Any]]:
    variables, inputs = args
    return [*named_leaves(variables, ""), *named_leaves(inputs, "input")]


def _floats(args: PyTree) -> int:
    return sum(map(_is_float, jax.tree.leaves(args)))


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(_kind(leaf)[1], jnp.floating)


def _kind(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return np.shape(leaf), getattr(leaf, "dtype", jnp.result_type(leaf))


def _bits(leaf: Any) -> tuple[Any, ...]:
    return (*_kind(leaf), np.asarray(leaf).tobytes())
