"""Lowers a traced program to the graph that every writer takes.

What does not depend on the program's inputs is computed here, once. A constant that is
a parameter's entries, each once or some of them, remembers which and how they were
moved: that is what the proof inside the file starts from. What no runtime takes is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...messages.errors import ExportError
from ...tracing.arguments import is_array, is_key
from ...tracing.jaxprs import AnyJaxpr, bind, call_body, evaluate, opened
from ...tracing.primitives import MOVES, SAME
from ...tracing.protocols import Equation
from ..graph import Graph, Source, Value, constant

# Each module registers its rules when it is imported.
from . import elementwise, linear, loops, movement, reductions  # noqa: F401
from .builder import RULES, Builder, refusal
from .resize import resize

_ROUNDED_ONCE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

# The dtype of a random key, which NumPy does not have.
_KEY = np.dtype(object)


class Lowering(Builder):
    """Collects the operations of a program as it is walked.

    Args:
      unroll: loops of up to this many steps are written out.
      whole: what the runtime has as one operation.
    """

    def __init__(self, unroll: int = 0, whole: frozenset[str] = frozenset()):
        super().__init__()
        self.unroll, self.whole = unroll, whole

    def visit(self, eqn: Equation, operands: Sequence[Any]) -> list[Value]:
        """What one equation makes."""
        # Literals of a trace may be Python's numbers, whose dtype only the trace has.
        values = [as_value(x, v.aval) for x, v in zip(operands, eqn.invars)]
        body = call_body(eqn)
        if body is not None:
            if eqn.params.get("name") == "_resize" and "resize" in self.whole:
                made = resize(self, body, values[0])
                if made is not None:
                    return [made]
            return self.run(body, values)
        name = eqn.primitive.name
        known = all(value.data is not None for value in values)
        # Keys that nothing is drawn from, as a carry of zeros has, do no harm.
        keys = any(value.dtype == _KEY for value in values)
        # The rules of these move a constant's entries, and remember how.
        moved = name in SAME | MOVES and not keys
        if name == "random_bits":
            raise refusal(eqn)
        if known and not moved:
            return computed(eqn, values)
        if name == "cond" and values[0].data is not None:
            branches = eqn.params["branches"]
            # lax.switch clamps its index.
            which = min(max(int(values[0].data), 0), len(branches) - 1)
            return self.run(branches[which], values[1:])
        rule = RULES.get(name)
        if rule is None:
            raise refusal(eqn)
        made = rule(self, eqn, *values)
        return [made] if isinstance(made, Value) else list(made)

    def run(self, jaxpr: AnyJaxpr, values: Sequence[Value]) -> list[Value]:
        """Walk a jaxpr."""
        ends = opened(jaxpr)[0].outvars
        outs = evaluate(jaxpr, values, self.visit)
        return [as_value(x, v.aval) for x, v in zip(outs, ends)]


def lower(
    jaxpr: AnyJaxpr,
    leaves: Sequence[tuple[str, Any]],
    input_names: Sequence[str],
    output_names: Sequence[str],
    unroll: int = 0,
    whole: frozenset[str] = frozenset(),
) -> Graph:
    """Return the graph of a closed jaxpr.

    Args:
      jaxpr: takes the parameters, then the inputs.
      leaves: path and array of each parameter.
      input_names: one for each input.
      output_names: one for each output.
      unroll: loops of up to this many steps are written out.
      whole: what the runtime has as one operation.

    Raises:
      ExportError: no runtime supports the program; names the primitive and a fix.

    Example:
      >>> import jax
      >>> w = np.ones((3, 2), np.float32)
      >>> jaxpr = jax.make_jaxpr(lambda w, x: x @ w)(w, np.ones((1, 3), np.float32))
      >>> print(lower(jaxpr, [("w", w)], ["x"], ["y"]))
      %1[1, 2] = dense(%0, w[3, 2])
    """
    body, _ = opened(jaxpr)
    count = len(leaves)
    for var, name in zip(body.invars[count:], input_names, strict=True):
        if jnp.issubdtype(var.aval.dtype, jax.dtypes.extended):
            raise ExportError(
                f"the input {name!r} is a random key. Call the model as for inference "
                "(train=False, deterministic=True), without rngs=."
            )
    inputs = [
        Value(tuple(map(int, var.aval.shape)), np.dtype(var.aval.dtype))
        for var in body.invars[count:]
    ]
    params = parameters(leaves)
    lowering = Lowering(unroll, whole)
    outs = lowering.run(jaxpr, [*params, *inputs])
    names = list(output_names)
    constant_ones = [n for n, v in zip(names, outs) if v.data is not None]
    if constant_ones:
        lowering.notes.append(
            f"omitted, independent of the inputs: {', '.join(constant_ones)}"
        )
    kept = [(n, v) for n, v in zip(names, outs) if v.data is None]
    if not kept:
        raise ExportError(
            "Expected outputs that depend on the inputs, got constants only. Check the "
            "inputs."
        )
    return Graph(
        inputs,
        [value for _, value in kept],
        lowering.nodes,
        list(input_names),
        [name for name, _ in kept],
        lowering.notes,
    )


def input_names(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A name for each array among a call's arguments, in the order of its program.

    Example:
      >>> input_names([np.ones(2), 3], {"mask": np.ones(2), "train": False})
      ['input0', 'mask']
    """
    found = []
    tree = (tuple(inputs), dict(kwargs))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not is_array(leaf):
            continue
        parts = [str(getattr(p, "key", getattr(p, "idx", p))) for p in path[1:]]
        first = f"input{parts[0]}" if parts[0].isdigit() else parts[0]
        found.append("_".join([first, *parts[1:]]))
    return found


def parameters(leaves: Iterable[tuple[str, Any]]) -> list[Value]:
    """Return a constant for each parameter, which remembers its path."""
    made = []
    for path, leaf in leaves:
        if is_key(leaf):
            made.append(as_value(leaf))
            continue
        array = np.asarray(leaf)
        known = Source(path), frozenset({path})
        made.append(Value(tuple(array.shape), array.dtype, array, *known))
    return made


def as_value(operand: Any, aval: Any = None) -> Value:
    """Return a value, or a number of the trace as one."""
    if isinstance(operand, Value):
        return operand
    if is_key(operand):
        return Value(tuple(operand.shape), _KEY, operand)
    return constant(operand, None if aval is None else aval.dtype)


def computed(eqn: Equation, values: Sequence[Value]) -> list[Value]:
    """Return what an equation of constants makes."""
    data = [value.data for value in values]
    function = _ROUNDED_ONCE.get(eqn.primitive.name)
    if function and all(value.dtype == np.float32 for value in values):
        # The same bits without a compilation for each shape, which takes 50 ms.
        with np.errstate(all="ignore"):
            outs = [np.asarray(function(*data), np.float32)]
    else:
        # On a GPU or TPU, constants might be computed in a lower precision.
        with jax.default_device(jax.devices("cpu")[0]):
            outs = bind(eqn, data)
    leaves = frozenset[str]().union(*(value.leaves for value in values))
    same = eqn.primitive.name == "convert_element_type"
    found = []
    for out in outs:
        if is_key(out):
            found.append(Value(tuple(out.shape), _KEY, out, None, leaves))
            continue
        data = np.asarray(out)
        source = None
        if same and values and values[0].data is not None:
            # A cast to the same dtype, which only drops the weak type.
            source = values[0].source if data.dtype == values[0].dtype else None
        found.append(Value(tuple(data.shape), data.dtype, data, source, leaves))
    return found
