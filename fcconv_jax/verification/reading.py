"""Reads a traced program in float64: the same equations, every float widened.

A program in float32 or bfloat16 rounds after each equation, and two forms of one
function round differently. Read in float64 (complex128) they differ by so little that a
real difference stands out: the reference that both forms are held against. Casts
between floats are left out, what is computed from integers (random bits, masks,
indices) stays as it is.

Convolutions run as sums of matmuls, see :mod:`.float64_convolution`. What the
program names (by ``jax.ad_checkpoint.checkpoint_name``) comes out as well, from inside
calls and scans too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..tracing.jaxprs import (
    Literal,
    bind,
    bodies,
    opened,
    rerun,
    scan_parts,
    subjaxprs,
)
from ..tracing.primitives import PLACES, SAME
from .compiling import BackgroundProgram
from .float64_convolution import convolve

# What may happen to the bits of a float that come back as a float: JAX's derivative of
# erf cuts a number in two so.
_MASKS = frozenset(
    """
    add and not or shift_left shift_right_arithmetic shift_right_logical sub xor
    """.split()
)
# Their own code, which combines two numbers, is made anew in float64.
_SCATTERS = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter-max": jax.lax.scatter_max,
    "scatter-min": jax.lax.scatter_min,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter-sub": jax.lax.scatter_sub,
    "scatter_add": jax.lax.scatter_add,
    "scatter_max": jax.lax.scatter_max,
    "scatter_min": jax.lax.scatter_min,
    "scatter_mul": jax.lax.scatter_mul,
    "scatter_sub": jax.lax.scatter_sub,
}

Named = dict[str, list[Any]]


def widened(dtype: Any) -> Any:
    """The dtype in which a dtype is read: float64, complex128, or the same.

    Example:
      >>> widened("bfloat16"), widened("int32")
      (dtype('float64'), dtype('int32'))
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
        return dtype
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else dtype


def widen(leaf: Any) -> Any:
    """An array with its floats widened, on the host's CPU; needs x64 to be enabled."""
    if not hasattr(leaf, "dtype"):
        return leaf
    dtype = widened(leaf.dtype)
    if isinstance(leaf, Tracer) or leaf.dtype == dtype:
        return _convert(leaf, dtype)
    # NumPy: another device would hand over what it has rounded.
    return jnp.asarray(np.asarray(leaf).astype(dtype))


def obstacles(jaxpr: Any) -> list[str]:
    """Names what has no float64 reading in a trace, each kind once.

    Example:
      >>> import jax
      >>> bits = lambda x: jax.lax.bitcast_convert_type(x, "int32")
      >>> obstacles(jax.make_jaxpr(bits)(1.0))
      ["'bitcast_convert_type' looks at the bits of a float"]
    """
    return list(dict.fromkeys(_obstacles(jaxpr)))


def _obstacles(jaxpr: Any) -> Iterator[str]:
    body, _ = opened(jaxpr)
    for eqn in body.eqns:
        name = eqn.primitive.name
        inner = bodies(eqn)
        if _looks_at_bits(eqn) and not _comes_back(body, eqn.outvars[0]):
            yield f"{name!r} looks at the bits of a float"
        elif name == "while" and _decided_by_floats(eqn):
            yield "a 'while' loop whose number of steps floats decide"
        elif not inner and eqn.outvars and _runs_other_code(eqn):
            yield f"{name!r} runs code of its own"
        for each in inner:
            yield from _obstacles(each)


def _looks_at_bits(eqn: Any) -> bool:
    return (
        eqn.primitive.name == "bitcast_convert_type"
        and _is_float(eqn.invars[0].aval.dtype)
        and not _is_float(eqn.outvars[0].aval.dtype)
    )


def _comes_back(body: Any, var: Any) -> bool:
    """Whether the bits of a float are only masked and made a float again."""
    if var in body.outvars:
        return False
    uses = [eqn for eqn in body.eqns if var in eqn.invars]
    return all(
        _is_float(eqn.outvars[0].aval.dtype)
        if eqn.primitive.name == "bitcast_convert_type"
        else eqn.primitive.name in _MASKS and _comes_back(body, eqn.outvars[0])
        for eqn in uses
    )


def _runs_other_code(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name in _SCATTERS or name == "reduce":
        return False
    return any(True for _ in subjaxprs(eqn)) or "call" in name or name == "shard_map"


def _is_float(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and jnp.issubdtype(
        dtype, jnp.inexact
    )


def _decided_by_floats(eqn: Any) -> bool:
    test, _ = opened(eqn.params["cond_jaxpr"])
    values = (var for each in test.eqns for var in each.invars)
    return any(_is_float(var.aval.dtype) for var in values)


class Reading:
    """A trace on its way to being run in float64; compiles in the background.

    Args:
      jaxpr: a closed trace without :func:`obstacles`.
      wide: whether floats are widened; else the trace is run as it is, on JAX's
        default device, for the sake of what it names.

    Example:
      >>> import jax
      >>> reading = Reading(jax.make_jaxpr(lambda x: x / 3)(jnp.float32(1)))
      >>> outputs, named = reading([jnp.float32(1)])
      >>> float(outputs[0])
      0.3333333333333333
    """

    def __init__(self, jaxpr: Any, *, wide: bool = True):
        self._wide = wide

        body, self._consts = opened(jaxpr)
        self._names: list[str] = []

        def run(operands: Sequence[Any], consts: Sequence[Any]) -> Any:
            named: Named = {}
            outs = _Reader(named, wide).run(body, operands, consts)
            self._names = list(named)
            return outs, named

        with self._mode():
            # Constants are handed over too: XLA would fold large ones for minutes.
            abstract = [
                [self._abstract(var.aval) for var in variables]
                for variables in (body.invars, body.constvars)
            ]
            self._program = BackgroundProgram(run, *abstract, quick=True)

    @property
    def bytes(self) -> int:
        """Memory that a run needs: arguments, results and what lies between."""
        found = self._program.compiled.memory_analysis()
        return (
            found.temp_size_in_bytes
            + found.argument_size_in_bytes
            + found.output_size_in_bytes
        )

    def __call__(self, operands: Sequence[Any]) -> tuple[list[Any], Named]:
        """Runs it.

        Args:
          operands: the trace's inputs, in any precision, on any devices.

        Returns:
          The outputs and, by name, what the program names, in the order in which it
          does; what a scan names has an axis of steps in front. NumPy arrays.
        """
        with self._mode():
            given = [
                [widen(x) if self._wide else x for x in values]
                for values in (operands, self._consts)
            ]
            outs, named = jax.tree.map(_to_host, self._program(*given))
            return outs, {name: named[name] for name in self._names}

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        if not self._wide:
            yield
            return
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            yield

    def _abstract(self, aval: Any) -> Any:
        dtype = widened(aval.dtype) if self._wide else aval.dtype
        return jax.ShapeDtypeStruct(aval.shape, dtype, weak_type=aval.weak_type)


def _to_host(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return np.asarray(value)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Runs equations, widened or as they are, and collects what they name."""

    named: Named | None
    wide: bool

    def __call__(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        body, consts = opened(jaxpr)
        return self.run(body, operands, map(widen, consts) if self.wide else consts)

    def run(self, body: Any, operands: Sequence[Any], consts: Iterable[Any]) -> list:
        """Runs an open jaxpr."""
        values: dict[Any, Any] = dict(zip(body.constvars, consts))
        values.update(zip(body.invars, operands, strict=True))

        def value(atom: Any) -> Any:
            if not isinstance(atom, Literal):
                return values[atom]
            return _widen_literal(atom) if self.wide else atom.val

        for eqn in body.eqns:
            if eqn.effects and not eqn.outvars:  # such as jax.debug.print
                continue
            outs = self._visit(eqn, [value(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return [value(atom) for atom in body.outvars]

    def _visit(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        name, inner = eqn.primitive.name, bodies(eqn)
        if name == "name":
            if self.named is not None:
                self.named.setdefault(eqn.params["name"], []).append(ins[0])
            return ins
        if name == "scan" and self.named is not None:
            return self._scan(eqn, ins, self.named)
        if name in ("while", "cond", "scan"):
            silent = _Reader(None, self.wide)
            runs = [functools.partial(silent, body) for body in inner]
            return rerun(eqn, ins, runs)
        if inner:  # a plain call; its rule for derivatives plays no part any more
            return self(inner[0], ins)
        return _bind_wide(eqn, ins) if self.wide else bind(eqn, ins)

    def _scan(self, eqn: Any, ins: list[Any], named: Named) -> Sequence[Any]:
        """A scan that also stacks what its body names."""
        p = eqn.params
        first, carried = scan_parts(eqn)
        consts, carry = ins[:first], ins[first : first + carried]

        def step(carry: Any, xs: Any) -> Any:
            inside: Named = {}
            outs = _Reader(inside, self.wide)(p["jaxpr"], [*consts, *carry, *xs])
            return outs[:carried], (outs[carried:], inside)

        settings = {key: p[key] for key in ("length", "reverse", "unroll")}
        carry, (ys, inside) = jax.lax.scan(
            step, carry, ins[first + carried :], **settings
        )
        for name, values in inside.items():
            named.setdefault(name, []).extend(values)
        return [*carry, *ys]


def _widen_literal(atom: Any) -> Any:
    """A constant of the program, in the dtype that its place in the program has."""
    dtype = widened(atom.aval.dtype)
    return atom.val if dtype == atom.aval.dtype else np.asarray(atom.val, dtype)


def _bind_wide(eqn: Any, ins: list[Any]) -> Sequence[Any]:
    """One equation with its floats widened."""
    name = eqn.primitive.name
    if name in SAME or name == "reduce_precision":
        return ins
    if name == "convert_element_type":
        return [_convert(ins[0], widened(eqn.params["new_dtype"]))]
    if name == "bitcast_convert_type" or name.startswith("random_"):
        # Of integers, or of a float in the bits that it has; and a draw in float64
        # would be another draw.
        narrow = [_convert(x, var.aval.dtype) for x, var in zip(ins, eqn.invars)]
        return [widen(out) for out in bind(eqn, narrow)]
    if name in _SCATTERS:
        return [_scatter(eqn, ins)]
    if name == "reduce":
        return _reduce(eqn, ins)
    if name == "conv_general_dilated":
        return [convolve(ins[0], ins[1], _hashable(eqn.params))]
    return bind(_wide_equation(eqn), ins)


def _scatter(eqn: Any, ins: list[Any]) -> Any:
    p = eqn.params
    scatter: Any = _SCATTERS[eqn.primitive.name]
    return scatter(
        *ins,
        p["dimension_numbers"],
        indices_are_sorted=p["indices_are_sorted"],
        unique_indices=p["unique_indices"],
        mode=p["mode"],
    )


def _reduce(eqn: Any, ins: list[Any]) -> Sequence[Any]:
    """A reduction by the program's own code."""
    count = len(ins) // 2
    combine = _Reader(None, wide=True)

    def computation(xs: Any, ys: Any) -> Any:
        return tuple(combine(eqn.params["jaxpr"], [*xs, *ys]))

    axes = eqn.params["dimensions"]
    return list(
        jax.lax.reduce(tuple(ins[:count]), tuple(ins[count:]), computation, axes)
    )


def _convert(x: Any, dtype: Any) -> Any:
    if getattr(x, "dtype", None) == dtype:
        return x
    return jax.lax.convert_element_type(x, dtype)


def _wide_equation(eqn: Any) -> Any:
    params = {key: _wide_param(key, value) for key, value in eqn.params.items()}
    return eqn.replace(params=params)


def _wide_param(key: str, value: Any) -> Any:
    if key in PLACES or key == "precision":
        return None
    if isinstance(value, np.dtype | type) or type(value).__name__ == "dtype":
        return widened(value)
    return value


def _hashable(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    names = (
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation"),
        *("dimension_numbers", "feature_group_count", "batch_group_count"),
    )
    return tuple((name, params[name]) for name in names)
