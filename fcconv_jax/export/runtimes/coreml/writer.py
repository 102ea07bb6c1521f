"""Writes Core ML packages (.mlpackage) with coremltools' own builder.

In float32, and without coremltools' fusions, which change weights. Core ML runs on
Apple's systems only: the file is written and read back here, its weights are compared
bit by bit, and it is reported as converted, not run.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ....messages.extras import require
from ...graph import Graph, Node, Value
from ...record import FileRecord
from ...shipped import arrange_conv, crops, reversed_window
from .reader import RECORD, coremltools

_NAMESAKES = """
    abs ceil cos erf exp floor relu relu6 round sign silu sin softplus softsign sqrt
    tanh
""".split()
_UNARY = {op: op for op in _NAMESAKES} | {
    "not": "logical_not",
    "logistic": "sigmoid",
}
_BINARY = {
    "add": "add",
    "and": "logical_and",
    "div": "real_div",
    "eq": "equal",
    "ge": "greater_equal",
    "gt": "greater",
    "le": "less_equal",
    "lt": "less",
    "max": "maximum",
    "min": "minimum",
    "mul": "mul",
    "ne": "not_equal",
    "or": "logical_or",
    "pow": "pow",
    "sub": "sub",
}


def write(graph: Graph, record: FileRecord, path: Path) -> None:
    """Write a graph whose images are channel-first as an .mlpackage.

    Raises:
      ExportError: Core ML has no such operation or dtype.
    """
    ct = coremltools()
    mil = require("coremltools.converters.mil.mil", "coreml", "a Core ML package")
    types = mil.types
    kinds = {"float32": types.fp32, "int32": types.int32}
    placeholders = {}
    for value, name in zip(graph.inputs, graph.input_names):
        if str(value.dtype) not in kinds:
            raise ExportError(
                f"Expected float32 or int32 inputs for Core ML, got {value.dtype} at "
                f"{name!r}. Cast inside the model."
            )
        placeholders[name] = mil.Builder.placeholder(
            shape=value.shape, dtype=kinds[str(value.dtype)]
        )
    program = mil.Program()
    with (
        warnings.catch_warnings(),
        mil.Function(placeholders, opset_version=ct.target.iOS17) as function,
    ):
        warnings.simplefilter("ignore")
        writer = _Writer(mil.Builder, graph, function.inputs)
        outputs = [
            writer.output(v, n) for v, n in zip(graph.outputs, graph.output_names)
        ]
        function.set_outputs(outputs)
        program.add_function("main", function)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # and no bars of its own
        model = ct.convert(
            program,
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS17,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.user_defined_metadata[RECORD] = record.to_text()
        model.save(str(path))


class _Writer:
    """Builds each node of a graph with coremltools."""

    def __init__(self, mb: Any, graph: Graph, inputs: Mapping[str, Any]):
        self.mb, self.names = mb, {}
        self.made: dict[Value, Any] = {
            value: inputs[name] for value, name in zip(graph.inputs, graph.input_names)
        }
        for node in graph.nodes:
            self.made[node.out] = self.emit(node)

    def unique(self, name: str) -> str:
        """Return a name that Core ML takes, and that is not used yet."""
        plain = "".join(c if c.isalnum() else "_" for c in name)
        count = self.names[plain] = self.names.get(plain, -1) + 1
        return plain if not count else f"{plain}__{count}"

    def output(self, value: Value, name: str) -> Any:
        # Gives an output a name of its own, even where it is an input or another
        # output, too.
        return self.mb.identity(x=self.made[value], name=self.unique(name))

    def value(self, value: Value) -> Any:
        """Return a value, or a constant's entries."""
        if value.data is None:
            return self.made[value]
        return self.constant(value, value.data)

    def constant(self, value: Value, data: np.ndarray) -> Any:
        label = value.source.leaf if value.source else "constant"
        array = np.ascontiguousarray(data)
        return self.mb.const(val=array, name=self.unique(label))

    def emit(self, node: Node) -> Any:
        """Append a node; return its output."""
        method: Callable[[Node, str], Any] | None = getattr(self, f"_{node.op}", None)
        # A layer's name is found again by its number, as Core ML takes no slashes.
        name = self.unique(node.name or node.op)
        if method is not None:
            return method(node, name)
        mb, inputs = self.mb, [self.value(v) for v in node.inputs]
        if node.op in _UNARY:
            return getattr(mb, _UNARY[node.op])(x=inputs[0], name=name)
        if node.op in _BINARY:
            return getattr(mb, _BINARY[node.op])(x=inputs[0], y=inputs[1], name=name)
        if node.op.startswith("reduce_"):  # whose names are Core ML's
            return getattr(mb, node.op)(
                x=inputs[0],
                axes=list(node.attrs["axes"]),
                keep_dims=node.attrs["keepdims"],
                name=name,
            )
        raise ExportError(
            f"Core ML doesn't support {node.op!r} here. Pass a path that ends in .onnx."
        )

    def _conv(self, node: Node, name: str) -> Any:
        kernel, p = node.inputs[1], node.attrs
        assert kernel.data is not None
        laid = arrange_conv(kernel.data, "OIHW")
        if "rows" in p:
            h, w, c, o = kernel.shape
            laid = arrange_conv(kernel.data, "OHWI").reshape(o, 1, h, w * c)
        more = {}
        if len(node.inputs) > 2:
            more["bias"] = self.value(node.inputs[2])
        make, strides, padding = self.mb.conv, p["strides"], p["padding"]
        if "spread" in p:
            make, strides = self.mb.conv_transpose, p["spread"]
            laid = arrange_conv(reversed_window(kernel.data), "IOHW")
            padding = crops(kernel.shape, padding)
        return make(
            x=self.value(node.inputs[0]),
            weight=self.constant(kernel, laid),
            strides=list(strides),
            pad_type="custom",
            pad=[n for pair in padding for n in pair],
            dilations=list(p["dilation"]),
            groups=p["groups"],
            name=name,
            **more,
        )

    def _dense(self, node: Node, name: str) -> Any:
        kernel = node.inputs[1]
        assert kernel.data is not None
        more = {}
        if len(node.inputs) > 2:
            more["bias"] = self.value(node.inputs[2])
        x, weight = self.value(node.inputs[0]), self.constant(kernel, kernel.data.T)
        return self.mb.linear(x=x, weight=weight, name=name, **more)

    def _matmul(self, node: Node, name: str) -> Any:
        a, b = (self.value(v) for v in node.inputs)
        return self.mb.matmul(x=a, y=b, name=name)

    def _pool(self, node: Node, name: str, kind: str) -> Any:
        p = node.attrs
        options = {"exclude_padding_from_average": p.get("valid", False)}
        options = {} if kind == "max_pool" else options
        return getattr(self.mb, kind)(
            x=self.value(node.inputs[0]),
            kernel_sizes=list(p["window"]),
            strides=list(p["strides"]),
            pad_type="custom",
            pad=[n for pair in p["padding"] for n in pair],
            name=name,
            **options,
        )

    def _pool_max(self, node: Node, name: str) -> Any:
        return self._pool(node, name, "max_pool")

    def _pool_mean(self, node: Node, name: str) -> Any:
        return self._pool(node, name, "avg_pool")

    def _reshape(self, node: Node, name: str) -> Any:
        x, shape = self.value(node.inputs[0]), list(node.out.shape)
        return self.mb.reshape(x=x, shape=shape, name=name)

    def _transpose(self, node: Node, name: str) -> Any:
        x, perm = self.value(node.inputs[0]), list(node.attrs["perm"])
        return self.mb.transpose(x=x, perm=perm, name=name)

    def _concat(self, node: Node, name: str) -> Any:
        values = [self.value(v) for v in node.inputs]
        return self.mb.concat(values=values, axis=node.attrs["axis"], name=name)

    def _slice(self, node: Node, name: str) -> Any:
        p = node.attrs
        return self.mb.slice_by_index(
            x=self.value(node.inputs[0]),
            begin=list(p["start"]),
            end=list(p["stop"]),
            stride=list(p["steps"]),
            name=name,
        )

    def _softmax(self, node: Node, name: str) -> Any:
        axis = node.attrs.get("axis", -1)
        return self.mb.softmax(x=self.value(node.inputs[0]), axis=axis, name=name)

    def _layer_norm(self, node: Node, name: str) -> Any:
        x, *vectors = (self.value(v) for v in node.inputs)
        more = dict(zip(("gamma", "beta"), vectors))
        epsilon = np.float32(node.attrs["epsilon"])
        return self.mb.layer_norm(x=x, axes=[-1], epsilon=epsilon, name=name, **more)

    def _gelu(self, node: Node, name: str) -> Any:
        mode = "TANH_APPROXIMATION" if node.attrs["approximate"] else "EXACT"
        return self.mb.gelu(x=self.value(node.inputs[0]), mode=mode, name=name)

    def _leaky_relu(self, node: Node, name: str) -> Any:
        x, alpha = self.value(node.inputs[0]), node.attrs["alpha"]
        return self.mb.leaky_relu(x=x, alpha=alpha, name=name)

    def _elu(self, node: Node, name: str) -> Any:
        return self.mb.elu(x=self.value(node.inputs[0]), alpha=1.0, name=name)

    def _hard_sigmoid(self, node: Node, name: str) -> Any:
        x = self.value(node.inputs[0])
        return self.mb.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5, name=name)

    def _select(self, node: Node, name: str) -> Any:
        which, a, b = (self.value(v) for v in node.inputs)
        return self.mb.select(cond=which, a=a, b=b, name=name)

    def _gather(self, node: Node, name: str) -> Any:
        x, ids = (self.value(v) for v in node.inputs)
        return self.mb.gather(x=x, indices=ids, axis=node.attrs["axis"], name=name)

    def _rsqrt(self, node: Node, name: str) -> Any:
        # Core ML adds 1e-12 by default.
        return self.mb.rsqrt(x=self.value(node.inputs[0]), epsilon=0.0, name=name)

    def _neg(self, node: Node, name: str) -> Any:
        minus = np.asarray(-1, node.out.dtype)
        return self.mb.mul(x=self.value(node.inputs[0]), y=minus, name=name)

    def _cast(self, node: Node, name: str) -> Any:
        kinds = {"float32": "fp32", "int32": "int32", "bool": "bool"}
        if str(node.out.dtype) not in kinds:
            raise ExportError(
                f"Core ML doesn't support {node.out.dtype}. Cast to float32."
            )
        to = kinds[str(node.out.dtype)]
        return self.mb.cast(x=self.value(node.inputs[0]), dtype=to, name=name)
