"""A jitted call in which arrays are traced and everything else is static."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from ..backends.options import correct_options
from ..messages.user_code import explained
from ..tracing import arguments
from ..tracing.arguments import native
from ..versions import get_opaque_trace_state


class Jitted:
    """Jits a function so that it is called as the function is.

    Arrays are traced; flags, numbers and functions stay static, wherever they are in
    the arguments, so that the function can branch on them. ``lower``, ``trace`` and
    ``eval_shape`` are those of ``jax.jit``, and ``jax.export.export`` takes it.

    A call costs what one of ``jax.jit`` does: what is static is decided once for each
    combination of argument types, and not at all while every call has only arrays.
    Only where static values lie inside of PyTrees is every call taken apart.

    Args:
      function: what is traced.
      name: of the function, for errors and for the trace.
      context: what else a trace depends on; most often empty.
      options: compiler options, where it is called on arrays; within another
        transformation the outermost jit decides.

    Example:
      >>> scaled = Jitted(lambda x, by: x * by if by > 1 else x, "scaled")
      >>> x = jax.numpy.ones(2)
      >>> scaled(x, 3), scaled.eval_shape(x, by=1)
      (Array([3., 3.], dtype=float32), ShapeDtypeStruct(shape=(2,), dtype=float32))
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        context: Collection[Hashable] = (),
        options: Callable[[], Mapping[str, Any]] = dict,
    ):
        self.__wrapped__ = function
        self.__name__ = name
        self._context = context
        self._options = options
        self._by_types: dict[Hashable, Any] = {}
        self._by_static: dict[Hashable, Any] = {}
        # The jit of calls on arrays only, before any other call.
        self._of_arrays: Any = None
        self._only_arrays = True

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Call the function, compiled on the first call with new shapes."""
        args = tuple(map(native, args))
        kwargs = {name: native(value) for name, value in kwargs.items()}
        if self._of_arrays is not None and not self._context:
            try:
                return self._of_arrays(*args, **kwargs)
            # jit raises TypeError for leaves other than arrays. An error of the
            # function itself comes again below, with its note.
            except (_StaticError, TypeError):
                self._of_arrays, self._only_arrays = None, False
        return self._on("__call__", args, kwargs)

    def lower(self, *args: PyTree, **kwargs: PyTree) -> jax.stages.Lowered:
        """Lower the function for these arguments, which may be abstract."""
        return self._on("lower", args, kwargs)

    def trace(self, *args: PyTree, **kwargs: PyTree) -> jax.stages.Traced:
        """Trace the function on these arguments, which may be abstract."""
        return self._on("trace", args, kwargs)

    def eval_shape(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Return the shapes and dtypes that a call returns; computes nothing."""
        return self._on("eval_shape", args, kwargs)

    def _on(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        types = (
            tuple(self._context),
            *map(type, args),
            *kwargs,
            *map(type, kwargs.values()),
        )
        jitted = self._by_types.get(types) or self._jit(types, args, kwargs)
        try:
            return getattr(jitted, method)(*args, **kwargs)
        except (_StaticError, TypeError) as error:
            with explained():
                jitted = self._apart(types, args, kwargs, error)
        with explained():
            return getattr(jitted, method)(*args, **kwargs)

    def _jit(
        self, types: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the jit for calls with arguments of these types."""
        numbers = [i for i, value in enumerate(args) if _is_static(value)]
        names = [name for name, value in kwargs.items() if _is_static(value)]
        # 1, 1.0 and True are equal, but trace differently.
        static = (
            *((i, type(args[i])) for i in numbers),
            *((name, type(kwargs[name])) for name in names),
        )
        others = [value for value in (*args, *kwargs.values()) if not _is_static(value)]
        if not _all_arrays(others) or not _hashable(args, kwargs):
            return self._by_types.setdefault(types, self._split())

        def traced(*args: PyTree, **kwargs: PyTree) -> Any:
            # A number or a flag would be traced, as an array is.
            if any(_may_be_static(leaf) for leaf in jax.tree.leaves((args, kwargs))):
                raise _StaticError
            with explained():
                return self.__wrapped__(*args, **kwargs)

        traced.__name__ = self.__name__
        key = (tuple(self._context), static)
        if key not in self._by_static:
            self._by_static[key] = _with_options(
                functools.partial(
                    jax.jit, traced, static_argnums=numbers, static_argnames=names
                ),
                self._options(),
            )
        self._only_arrays &= not static
        if self._only_arrays and not self._context:
            self._of_arrays = self._by_static[key]
        return self._by_types.setdefault(types, self._by_static[key])

    def _apart(
        self,
        types: Hashable,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        error: Exception,
    ) -> Any:
        """The jit for calls whose static values have to be taken out of PyTrees."""
        others = [value for value in (*args, *kwargs.values()) if not _is_static(value)]
        # With arrays alone there was nothing to refuse: the function's own error.
        if isinstance(error, TypeError) and _all_arrays(others):
            raise error
        self._of_arrays, self._only_arrays = None, False
        self._by_types[types] = self._split()
        return self._by_types[types]

    def _split(self) -> _Split:
        key = (tuple(self._context), _Split)
        if key not in self._by_static:
            self._by_static[key] = _Split(
                self.__wrapped__, self.__name__, self._options()
            )
        return self._by_static[key]


def _with_options(make: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Return a jit that has options where it is the outermost."""
    options = correct_options(jax.default_backend()) | dict(options)
    if not options:
        return make()
    return _Outermost(make(), make(compiler_options=options))


@functools.cache
def _no_trace() -> Any:
    """Return the state of JAX where nothing is being traced."""
    # What this thread traces is unknown to a new one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(get_opaque_trace_state).result()


class _Outermost:
    """Two jits of one function: JAX takes options for the outermost only."""

    def __init__(self, plain: Any, tuned: Any):
        self._plain = plain
        self._tuned = tuned

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        # Constants, too, are part of the trace of an outer jit, scan or grad.
        outermost = get_opaque_trace_state() == _no_trace()
        return (self._tuned if outermost else self._plain)(*args, **kwargs)

    def lower(self, *args: PyTree, **kwargs: PyTree) -> Any:
        return self._tuned.lower(*args, **kwargs)

    def trace(self, *args: PyTree, **kwargs: PyTree) -> Any:
        return self._plain.trace(*args, **kwargs)

    def eval_shape(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self._plain.eval_shape(*args, **kwargs)


class _Split:
    """Jits a function of any PyTrees: their arrays are traced, the rest is static."""

    def __init__(
        self, function: Callable[..., Any], name: str, options: Mapping[str, Any]
    ):
        def traced(static: arguments.Static, arrays: PyTree) -> Any:
            args, kwargs = static.merge(arrays)
            with explained():
                return function(*args, **kwargs)

        traced.__name__ = self._name = name
        make = functools.partial(jax.jit, traced, static_argnums=0)
        self._jitted = _with_options(make, options)

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        return self._jitted(*self._taken_apart(args, kwargs))

    def lower(self, *args: PyTree, **kwargs: PyTree) -> Any:
        return self._jitted.lower(*self._taken_apart(args, kwargs))

    def trace(self, *args: PyTree, **kwargs: PyTree) -> Any:
        return self._jitted.trace(*self._taken_apart(args, kwargs))

    def eval_shape(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self._jitted.eval_shape(*self._taken_apart(args, kwargs))

    def _taken_apart(
        self, args: PyTree, kwargs: PyTree
    ) -> tuple[arguments.Static, Any]:
        arrays, static = arguments.split_hashable((args, kwargs), self._name)
        return static, arrays


class _StaticError(Exception):
    """Some leaf may be a Python number or flag, which a model may branch on."""


def _is_static(value: Any) -> bool:
    return jax.tree_util.all_leaves([value]) and not arguments.is_array(value)


def _all_arrays(trees: PyTree) -> bool:
    return all(map(arguments.is_array, jax.tree.leaves(trees)))


def _hashable(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        for value in (*args, *kwargs.values()):
            if _is_static(value):
                hash(value)
    except TypeError:
        return False
    return True


def _may_be_static(leaf: Any) -> bool:
    """Whether a traced leaf may have been a Python number, or ``True`` or ``False``."""
    if not isinstance(leaf, Tracer):
        return False
    # jit makes numbers weakly typed and flags scalars of bool. Arrays that look so
    # go the longer way, too, which traces them all the same.
    return getattr(leaf.aval, "weak_type", False) or (
        leaf.dtype == bool and not leaf.shape
    )
