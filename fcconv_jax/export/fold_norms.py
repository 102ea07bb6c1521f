"""Folds norms at inference into the layers of a JAX model: ``fold_norms``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..frontends.bind import bind
from ..frontends.bound import BoundModel
from ..frontends.options import check_options
from ..messages.errors import ExportError
from ..params.leaves import flatten_with_path
from ..tracing import jaxprs
from ..tracing.protocols import Equation
from .graph import Graph, Node, Value
from .lowering.trace import Lowering, as_value, computed, parameters, refusal
from .passes import fold

Params = dict[str, jax.Array]


def fold_norms(
    model: object, params: PyTree = None, *inputs: PyTree, **kwargs: PyTree
) -> tuple[Callable[..., PyTree], Params]:
    """Fold a model's norms into its layers; returns a function of fewer params.

    A norm at inference, a layer's scale, or ``(x - mean) / std`` is ``x * scale +
    shift`` for each channel. After a convolution or a matmul, or before one if its
    padding allows it, the scale and the shift are folded into the kernel and the bias,
    in float64 and rounded once. Everything else that depends only on the params is
    precomputed, too.

    Args:
      model: a ``flax.linen`` or ``flax.nnx`` Module, a function of params and inputs,
        or a model of another library that :func:`fcconv_jax.export` takes.
      params: its params or variables; None for those that the model holds.
      *inputs: the model's inputs.
      **kwargs: keyword arguments of the call, such as ``train=False``. They are fixed
        in the function.

    Returns:
      A function, to be called as ``function(folded, *inputs)``, and the folded params:
      arrays by name. The function is pure: jit it. It accepts inputs of all sizes that
      the model accepts, and traces the model once for each.

    Raises:
      PlanError: the model is in training mode.
      ExportError: the model draws random numbers.

    Source:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018, section 3.2.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Sequential(
      ...     [nn.Conv(4, (3, 3)), nn.BatchNorm(use_running_average=True)]
      ... )
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> function, folded = fold_norms(model, variables, x)
      >>> sorted(folded)
      ['params/layers_0/bias', 'params/layers_0/kernel']
      >>> bool(jnp.allclose(function(folded, x), model.apply(variables, x), atol=1e-6))
      True
    """
    bound = bind(model, params, *inputs, **kwargs)
    check_options(fold_norms, bound)
    with bound.explaining():
        bound.check_inference()
        bound.check_library()
        first = _folded_model(bound)
    programs = {_shapes(bound.args): first}

    def function(params: Mapping[str, jax.Array], *inputs: PyTree) -> PyTree:
        called, key = dataclasses.replace(bound, args=inputs), _shapes(inputs)
        if key not in programs:
            programs[key] = _folded_model(called)
        return programs[key](params, called.arrays)

    return function, first.params


def folded_outputs(bound: BoundModel) -> list[jax.Array]:
    """Return what a model computes with its norms folded."""
    program = _folded_model(bound)
    return jax.tree.leaves(jax.jit(program)(program.params, bound.arrays))


def _shapes(inputs: PyTree) -> object:
    leaves, tree = jax.tree.flatten(inputs)
    return tree, tuple((jnp.shape(x), getattr(x, "dtype", type(x))) for x in leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class _FoldedModel:
    """A graph of JAX's own equations, and the arrays that it takes.

    Args:
      graph: in which norms have been folded.
      names: of the constants that come from parameters.
      tree: of the outputs.
    """

    graph: Graph
    names: Mapping[Value, str]
    tree: PyTree

    @property
    def params(self) -> Params:
        """The arrays by name."""
        return {name: jnp.asarray(v.data) for v, name in self.names.items()}

    def __call__(
        self, params: Mapping[str, jax.Array], arrays: Sequence[jax.Array]
    ) -> PyTree:
        """Run the graph."""
        missing = sorted({*self.names.values()} - {*params})
        if missing:
            raise ExportError(
                "Expected the params that fold_norms returned, got a tree without "
                f"{missing[0]!r}. Pass those params first."
            )
        values: dict[Value, Any] = {v: params[name] for v, name in self.names.items()}
        values |= zip(self.graph.inputs, arrays, strict=True)

        def read(value: Value) -> PyTree:
            return values.get(value, value.data)

        for node in self.graph.nodes:
            operands = [read(value) for value in node.inputs]
            outs = jaxprs.bind(node.attrs["eqn"], operands[: node.attrs["arity"]])
            if len(operands) > node.attrs["arity"]:  # the bias that folding added
                y, axis = outs[0], node.attrs["after"]
                beside = [1] * y.ndim
                beside[axis] = y.shape[axis]
                outs = [y + operands[-1].reshape(beside)]
            values.update(zip(node.outputs, outs, strict=True))
        return jax.tree.unflatten(self.tree, [read(v) for v in self.graph.outputs])


def _folded_model(bound: BoundModel) -> _FoldedModel:
    """Trace a model, fold its norms, and name the arrays that are left."""
    flat, tree = jax.tree.flatten(bound.variables)
    paths = [
        path
        for path, node in flatten_with_path(bound.variables)[0]
        for _ in jax.tree.leaves(node)
    ]

    def call(leaves: PyTree, arrays: PyTree) -> PyTree:
        return bound.output(jax.tree.unflatten(tree, leaves), arrays)

    closed, shape = jax.make_jaxpr(call, return_shape=True)(flat, bound.arrays)
    lowering = _Equations()
    body, _ = jaxprs.opened(closed)
    inputs = [Value(x.aval.shape, x.aval.dtype) for x in body.invars[len(flat) :]]
    with jax.ensure_compile_time_eval():  # the function may be traced in a jit
        outputs = lowering.run(closed, [*parameters(zip(paths, flat)), *inputs])
    graph = Graph(inputs, outputs, lowering.nodes, [], [])
    fold.fold_norms(graph)
    graph.prune()
    names: dict[Value, str] = {}
    counts: dict[str, int] = {}
    for value, wanted in _constants(graph):
        if value not in names:
            counts[wanted] = counts.get(wanted, 0) + 1
            # Several arrays may come from the same parameters, such as a kernel and its
            # slice.
            number = f"#{counts[wanted]}" if counts[wanted] > 1 else ""
            names[value] = wanted + number
    return _FoldedModel(graph, names, jax.tree.structure(shape))


def _constants(graph: Graph) -> Iterator[tuple[Value, str]]:
    """The constants of parameters in a graph, and the biases that folding made."""
    for node in graph.nodes:
        if "kernel" in node.attrs:  # laid out as the equation has it
            stored, order = node.attrs["kernel"]
            if node.folded is not None:
                stored = node.inputs[1].moved("transpose", order)
            node.inputs[1] = stored
        kinds = node.inputs[: node.attrs["arity"]]
        yield from ((v, _name(v)) for v in kinds if v.leaves)
        for bias in node.inputs[node.attrs["arity"] :]:
            yield bias, f"{_name(node.inputs[1]).rpartition('/')[0]}/bias"
    yield from ((v, _name(v)) for v in graph.outputs if v.leaves)


def _name(value: Value) -> str:
    return "+".join(sorted(value.leaves))


class _Equations(Lowering):
    """Keeps JAX's own equations, those of the parameters alone computed."""

    def visit(self, eqn: Equation, operands: Sequence[Any]) -> list[Value]:
        """What one equation makes."""
        values = [as_value(operand) for operand in operands]
        body = jaxprs.call_body(eqn)
        if body is not None:
            return self.run(body, values)
        if all(value.data is not None for value in values):
            if eqn.primitive.name == "random_bits":
                raise refusal(eqn)
            return computed(eqn, values)
        op, attrs = eqn.primitive.name, {"eqn": eqn, "arity": len(values)}
        if op == "conv_general_dilated":
            op, values, more = _conv(eqn, values)
            attrs |= more
        elif op == "dot_general":
            plain = (((len(values[0].shape) - 1,), (0,)), ((), ()))
            known = values[1].data is not None and len(values[1].shape) == 2
            if known and eqn.params["dimension_numbers"] == plain:
                op, attrs["after"] = "dense", len(values[0].shape) - 1
        elif op in ("squeeze", "expand_dims"):
            op = "reshape"
        elif op == "transpose":
            attrs["perm"] = eqn.params["permutation"]
        elif op == "pad":
            known = values[1].data is not None
            op, attrs["value"] = "pad" if known else "other", values[1].data
        outs = [Value(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
        self.nodes.append(Node(op, values, outs, attrs))
        return outs


def _conv(
    eqn: Equation, values: list[Value]
) -> tuple[str, list[Value], dict[str, Any]]:
    """A convolution with its kernel's features last, where it can take a norm."""
    p = eqn.params
    if values[1].data is None or p["batch_group_count"] != 1:
        return "other", values, {}
    lhs, rhs, out = p["dimension_numbers"]
    order = [*rhs[2:], rhs[1], rhs[0]]
    # Zeros between entries of the input are a padding, too.
    spread = set(p["lhs_dilation"]) != {1}
    return (
        "conv",
        [values[0], values[1].moved("transpose", order)],
        {
            "kernel": (values[1], tuple(order.index(i) for i in range(len(order)))),
            "before": lhs[1],
            "after": out[1],
            "groups": p["feature_group_count"],
            "padding": ((1, 1),) if spread else p["padding"],
        },
    )
