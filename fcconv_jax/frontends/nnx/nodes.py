"""Modules, iterators and functions among what a traced method takes and returns."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from ...messages.errors import PlanError
from ...tracing import arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """All that an iterator gives, which a trace cannot leave half done."""

    each: list[Any]


class FunctionReturnedError(Exception):
    """A traced method returns a function, which would hold traced arrays.

    Args:
      later: whether the function reads parameters when it is called.
    """

    def __init__(self, later: bool):
        super().__init__(later)
        self.later = later


class _Node:
    """Stands for a module or a Variable among the arguments of a method."""

    def __repr__(self) -> str:
        return "<nnx object>"


_NODE = _Node()


def is_node(value: object) -> bool:
    """Whether a value is a module, another object of NNX, or a Variable."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def without_nodes(tree: PyTree) -> tuple[list[Any], Any]:
    """The modules and Variables in a PyTree, and the PyTree without them."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_node)
    nodes = [leaf for leaf in leaves if is_node(leaf)]
    rest = [_NODE if is_node(leaf) else leaf for leaf in leaves]
    return nodes, jax.tree.unflatten(treedef, rest)


def with_nodes(tree: PyTree, nodes: Sequence[Any]) -> PyTree:
    """The PyTree with the nodes that :func:`without_nodes` took out."""
    rest = iter(nodes)
    return jax.tree.map(lambda leaf: next(rest) if leaf is _NODE else leaf, tree)


def check_returned(method: str, out: PyTree, traced: bool) -> None:
    """Refuses functions among what a method returns.

    Raises:
      FunctionReturnedError: in a trace, whose arrays they would hold.
      PlanError: they read parameters when they are called, and hold other arrays.
    """
    found = [
        leaf
        for leaf in jax.tree.leaves(out, is_leaf=is_node)
        if not is_node(leaf) and callable(leaf) and not isinstance(leaf, type)
    ]
    held = [each for function in found for each in _captured(function)]
    if not found:
        return
    if all(map(arguments.is_array, held)):
        if traced:
            raise FunctionReturnedError(later=False)
        return
    if not traced or found != [out] or any(map(arguments.is_array, held)):
        raise refused(method)
    raise FunctionReturnedError(later=True)


def refused(method: str) -> PlanError:
    """The error of a method that returns what no conversion can follow."""
    return PlanError(
        f"{method} returns functions that hold both "
        "arrays and modules, whose parameters have another form when they are "
        "called. Return arrays, read the parameters before (w = self.w[...]), or "
        "leave this module's parameters out with a rule."
    )


def _captured(function: Any) -> Iterator[Any]:
    """Yield what a function closes over: nodes, arrays, callables of unknown kinds."""
    if inspect.isfunction(function):
        cells = inspect.getclosurevars(function).nonlocals
        held: Any = (list(cells.values()), function.__defaults__)
    elif isinstance(function, functools.partial):
        held = (function.func, function.args, function.keywords)
    elif hasattr(function, "__wrapped__"):  # a jitted one
        held = function.__wrapped__
    elif inspect.ismethod(function):
        held = (function.__func__, function.__self__)
    else:
        held = ()
        yield function
    for leaf in jax.tree.leaves(held, is_leaf=is_node):
        if callable(leaf) and not is_node(leaf) and not isinstance(leaf, type):
            yield from _captured(leaf)
        elif is_node(leaf) or arguments.is_array(leaf):
            yield leaf
