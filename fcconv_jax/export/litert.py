"""Writes LiteRT files (.tflite) from a graph, on the schema that ai-edge-litert ships.

Neither TensorFlow nor PyTorch nor a converter is needed: the layout stays channel-last
as the model has it, and no transpose is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError
from .errors import require
from .graph import Graph, Node, Value
from .layers import Record

RECORD = "fcconv_jax"
_DTYPES = {
    "float32": "FLOAT32",
    "int32": "INT32",
    "int64": "INT64",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
_PLAIN = {
    "abs": "ABS",
    "add": "ADD",
    "and": "LOGICAL_AND",
    "ceil": "CEIL",
    "cos": "COS",
    "div": "DIV",
    "eq": "EQUAL",
    "exp": "EXP",
    "floor": "FLOOR",
    "ge": "GREATER_EQUAL",
    "gt": "GREATER",
    "le": "LESS_EQUAL",
    "log": "LOG",
    "logistic": "LOGISTIC",
    "lt": "LESS",
    "max": "MAXIMUM",
    "min": "MINIMUM",
    "mul": "MUL",
    "ne": "NOT_EQUAL",
    "neg": "NEG",
    "not": "LOGICAL_NOT",
    "or": "LOGICAL_OR",
    "pow": "POW",
    "relu": "RELU",
    "relu6": "RELU6",
    "round": "ROUND",
    "rsqrt": "RSQRT",
    "select": "SELECT_V2",
    "sign": "SIGN",
    "sin": "SIN",
    "sqrt": "SQRT",
    "sub": "SUB",
    "tanh": "TANH",
}
# The options of an operation, where the schema has some of its name.
_OPTIONS = {
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "DIV": "DivOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "TRANSPOSE": "TransposeOptions",
    "SELECT_V2": "SelectV2Options",
    "EXP": "ExpOptions",
    "NEG": "NegOptions",
    "COS": "CosOptions",
    "POW": "PowOptions",
    "ABS": "AbsOptions",
    "SIGN": "SignOptions",
    "LESS": "LessOptions",
    "LESS_EQUAL": "LessEqualOptions",
    "GREATER": "GreaterOptions",
    "GREATER_EQUAL": "GreaterEqualOptions",
    "EQUAL": "EqualOptions",
    "NOT_EQUAL": "NotEqualOptions",
    "LOGICAL_AND": "LogicalAndOptions",
    "LOGICAL_OR": "LogicalOrOptions",
    "LOGICAL_NOT": "LogicalNotOptions",
    "PAD": "PadOptions",
    "PADV2": "PadV2Options",
    "REVERSE_V2": "ReverseV2Options",
    "BROADCAST_TO": "BroadcastToOptions",
    "SLICE": "SliceOptions",
}
_REDUCTIONS = {
    "reduce_sum": "SUM",
    "reduce_mean": "MEAN",
    "reduce_max": "REDUCE_MAX",
    "reduce_min": "REDUCE_MIN",
    "reduce_prod": "REDUCE_PROD",
}
# Of operators that the runtime does not have in version 1.
_VERSIONS = {"BROADCAST_TO": 2}
_FUSED = {"relu": "RELU", "relu6": "RELU6"}


def schema() -> Any:
    """The generated schema.

    Raises:
      MissingExtraError: it is not installed.
    """
    return require(
        "ai_edge_litert.schema_py_generated", "litert", "a LiteRT file (.tflite)"
    )


def write(graph: Graph, record: Record, path: Path) -> None:
    """Writes a graph as a .tflite file.

    Args:
      graph: what to write.
      record: what the file says about itself.
      path: where to.

    Raises:
      ExportError: LiteRT has no such operation or dtype; names it and the way out.
    """
    writer = _Writer(schema())
    path.write_bytes(pack(writer.model(graph, record)))


def pack(model: Any) -> bytes:
    """A model of the schema's objects as the bytes of a file."""
    flatbuffers = require("flatbuffers", "litert", "a LiteRT file (.tflite)")
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _Writer:
    """Collects tensors, buffers and operators of one model."""

    def __init__(self, s: Any):
        self.s = s
        self.buffers = [s.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[Any] = []
        self.known: dict[Any, int] = {}
        self.names: dict[str, int] = {}
        self.uses: dict[Value, int] = {}

    def model(self, graph: Graph, record: Record) -> Any:
        s, self.uses = self.s, graph.uses()
        names = dict(zip(graph.inputs, graph.input_names))
        names |= {n.out: n.name for n in graph.linear()}
        for value in graph.inputs:
            self.tensor(value, names[value])
        skip: set[Node] = set()
        readers: dict[Value, Node] = {v: n for n in graph.nodes for v in n.inputs}
        for node in graph.nodes:
            if node in skip:
                continue
            follower = readers.get(node.out) if len(node.outputs) == 1 else None
            fused = ""
            if node.op in ("conv", "dense", "add", "sub", "mul") and follower:
                lone = self.uses[node.out] == 1 and follower.op in _FUSED
                if lone and node.out.dtype == np.float32:
                    fused = _FUSED[follower.op]
                    skip.add(follower)
                    # The layer's output is what comes out of the activation.
                    names.setdefault(follower.out, names.get(node.out, ""))
                    node = Node(
                        node.op, node.inputs, follower.outputs, node.attrs, node.name
                    )
            for value in node.outputs:
                self.tensor(value, names.get(value, "") or node.op)
            self.emit(node, fused)
        outputs = []
        for value, name in zip(graph.outputs, graph.output_names):
            outputs.append(self.tensor(value, name))
        subgraph = s.SubGraphT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs = [self.tensor(v) for v in graph.inputs]
        subgraph.outputs, subgraph.name = outputs, "main"
        model = s.ModelT()
        model.version, model.description = 3, "written by fcconv_jax"
        model.operatorCodes, model.subgraphs = self.codes, [subgraph]
        entry = s.MetadataT()
        entry.name, entry.buffer = RECORD, self.buffer(record.to_json().encode())
        model.metadata, model.buffers = [entry], self.buffers
        model.signatureDefs = [self.signature(graph, subgraph)]
        return model

    def signature(self, graph: Graph, subgraph: Any) -> Any:
        s = self.s
        signature = s.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        for field, names, tensors in (
            ("inputs", graph.input_names, subgraph.inputs),
            ("outputs", graph.output_names, subgraph.outputs),
        ):
            maps = []
            for name, index in zip(names, tensors):
                entry = s.TensorMapT()
                entry.name, entry.tensorIndex = name, index
                maps.append(entry)
            setattr(signature, field, maps)
        return signature

    def buffer(self, data: bytes) -> int:
        buffer = self.s.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def tensor(self, value: Value, name: str = "") -> int:
        """The index of a value's tensor, made where there is none yet."""
        if value in self.known:
            return self.known[value]
        return self._tensor(value, value, name)

    def _tensor(self, key: Any, value: Value, name: str) -> int:
        tensor = self.s.TensorT()
        tensor.shape, tensor.hasRank = list(value.shape), True
        kind = _DTYPES.get(str(value.dtype))
        if kind is None:
            other = "iree" if str(value.dtype) == "bfloat16" else "onnx"
            raise ExportError(
                f"LiteRT has no {value.dtype} in its kernels, found at {name!r}. Cast "
                f"params and inputs to float32, or pass to={other!r}"
            )
        tensor.type = getattr(self.s.TensorType, kind)
        if value.data is not None:
            tensor.buffer = self.buffer(np.ascontiguousarray(value.data).tobytes())
            name = name or (value.source.leaf if value.source else "constant")
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        tensor.name = name if not count else f"{name};{count}"
        self.tensors.append(tensor)
        self.known[key] = len(self.tensors) - 1
        return self.known[key]

    def constant(self, data: Any, dtype: Any = np.int32, name: str = "") -> int:
        """The index of a constant's tensor; equal small ones share one."""
        array = np.asarray(data, dtype)
        key = (array.shape, str(array.dtype), array.tobytes())
        if key in self.known:
            return self.known[key]
        value = Value(tuple(array.shape), array.dtype, array)
        return self._tensor(key, value, name or "constant")

    def arranged(self, value: Value, move: Any, tag: str) -> int:
        """The index of a weight's tensor, laid out as an operation wants it."""
        key = (value, tag)
        if key in self.known:
            return self.known[key]
        assert value.data is not None
        data = np.ascontiguousarray(move(value.data))
        laid = Value(tuple(data.shape), value.dtype, data)
        name = value.source.leaf if value.source else "+".join(sorted(value.leaves))
        return self._tensor(key, laid, name or "weight")

    def code(self, name: str) -> int:
        number = getattr(self.s.BuiltinOperator, name)
        for index, code in enumerate(self.codes):
            if code.builtinCode == number:
                return index
        code = self.s.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
        code.version = _VERSIONS.get(name, 1)
        self.codes.append(code)
        return len(self.codes) - 1

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[Value],
        kind: str | None = None,
        **options: Any,
    ) -> None:
        """Appends an operator."""
        operator = self.s.OperatorT()
        operator.opcodeIndex = self.code(name)
        operator.inputs = list(inputs)
        operator.outputs = [self.tensor(value) for value in outputs]
        kind = kind or _OPTIONS.get(name)
        if kind is not None:
            operator.builtinOptionsType = getattr(self.s.BuiltinOptions, kind)
            operator.builtinOptions = getattr(self.s, f"{kind}T")()
            for field, value in options.items():
                setattr(operator.builtinOptions, field, value)
        self.operators.append(operator)

    def activation(self, name: str) -> int:
        return getattr(self.s.ActivationFunctionType, name or "NONE")

    def emit(self, node: Node, fused: str = "") -> None:
        """Appends what a node is in LiteRT."""
        method = getattr(self, f"_{node.op}", None)
        if method is not None:
            method(node, fused)
        elif node.op in _REDUCTIONS:
            axes = self.constant(node.attrs["axes"])
            self.op(
                *(_REDUCTIONS[node.op], [self.tensor(node.inputs[0]), axes]),
                *(node.outputs, "ReducerOptions"),
                keepDims=node.attrs["keepdims"],
            )
        elif node.op in _PLAIN:
            options = {}
            if fused:
                options["fusedActivationFunction"] = self.activation(fused)
            inputs = [self.tensor(value) for value in node.inputs]
            self.op(_PLAIN[node.op], inputs, node.outputs, **options)
        else:
            raise ExportError(
                f"LiteRT has no {node.op!r}{_HINTS.get(node.op, '')}; "
                "to='onnx' takes it"
            )

    def _conv(self, node: Node, fused: str) -> None:
        x, kernel = node.inputs[:2]
        p = node.attrs
        window, groups = kernel.shape[:2], p["groups"]
        same = tuple(
            _same(n, k, s, d)
            for n, k, s, d in zip(x.shape[1:3], window, p["strides"], p["dilation"])
        )
        entering = self.tensor(x)
        padding = "SAME" if tuple(p["padding"]) == same else "VALID"
        if not any(map(any, p["padding"])):
            padding = "VALID"
        elif padding == "VALID":
            widths = [(0, 0), *p["padding"], (0, 0)]
            shape = [n + a + b for n, (a, b) in zip(x.shape, widths)]
            wide = Value(tuple(shape), x.dtype)
            self.tensor(wide, "pad")
            self.op("PAD", [entering, self.constant(widths)], [wide])
            entering = self.tensor(wide)
        depthwise = groups > 1 and groups == x.shape[-1]
        options = {
            "padding": getattr(self.s.Padding, padding),
            "strideH": p["strides"][0],
            "strideW": p["strides"][1],
            "dilationHFactor": p["dilation"][0],
            "dilationWFactor": p["dilation"][1],
            "fusedActivationFunction": self.activation(fused),
        }
        bias = self._bias(node, kernel.shape[-1])
        if depthwise:
            weight = self.arranged(
                kernel, lambda k: k.reshape(1, *window, k.shape[-1]), "depthwise"
            )
            options["depthMultiplier"] = kernel.shape[-1] // groups
            name, kind = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        else:
            weight = self.arranged(kernel, lambda k: k.transpose(3, 0, 1, 2), "OHWI")
            name, kind = "CONV_2D", "Conv2DOptions"
        self.op(name, [entering, weight, bias], node.outputs, kind, **options)

    def _dense(self, node: Node, fused: str) -> None:
        x, kernel = node.inputs[:2]
        weight = self.arranged(kernel, lambda k: k.T, "OI")
        self.op(
            *("FULLY_CONNECTED", [self.tensor(x), weight]),
            *(node.outputs, "FullyConnectedOptions"),
            fusedActivationFunction=self.activation(fused),
            keepNumDims=len(x.shape) != 2,
        )
        if len(node.inputs) > 2:
            self.operators[-1].inputs.append(self._bias(node, kernel.shape[-1]))
        else:
            self.operators[-1].inputs.append(-1)

    def _bias(self, node: Node, features: int) -> int:
        if len(node.inputs) > 2:
            return self.tensor(node.inputs[2])
        return self.constant(np.zeros(features), np.float32, "no bias")

    def _matmul(self, node: Node, fused: str) -> None:
        a, b = map(self.tensor, node.inputs)
        self.op(
            *("BATCH_MATMUL", [a, b], node.outputs, "BatchMatMulOptions"),
            adjX=node.attrs["adj_a"],
            adjY=node.attrs["adj_b"],
        )

    def _pool(self, node: Node, name: str) -> None:
        x, p = node.inputs[0], node.attrs
        ones = (1,) * len(p["window"])
        same = tuple(map(_same, x.shape[1:3], p["window"], p["strides"], ones))
        entering = self.tensor(x)
        padding = "SAME" if tuple(p["padding"]) == same else "VALID"
        if not any(map(any, p["padding"])):
            padding = "VALID"
        elif padding == "VALID" or name == "AVERAGE_POOL_2D":
            widths = [(0, 0), *p["padding"], (0, 0)]
            shape = [n + a + b for n, (a, b) in zip(x.shape, widths)]
            wide = Value(tuple(shape), x.dtype)
            self.tensor(wide, "pad")
            lowest = self.constant(np.finfo(np.float32).min, np.float32)
            self.op("PADV2", [entering, self.constant(widths), lowest], [wide])
            entering, padding = self.tensor(wide), "VALID"
        self.op(
            *(name, [entering], node.outputs, "Pool2DOptions"),
            padding=getattr(self.s.Padding, padding),
            strideH=p["strides"][0],
            strideW=p["strides"][1],
            filterHeight=p["window"][0],
            filterWidth=p["window"][1],
        )

    def _pool_max(self, node: Node, fused: str) -> None:
        self._pool(node, "MAX_POOL_2D")

    def _pool_mean(self, node: Node, fused: str) -> None:
        self._pool(node, "AVERAGE_POOL_2D")

    def _reshape(self, node: Node, fused: str) -> None:
        shape = self.constant(node.out.shape)
        inputs = [self.tensor(node.inputs[0]), shape]
        self.op(
            *("RESHAPE", inputs, node.outputs, "ReshapeOptions"),
            newShape=list(node.out.shape),
        )

    def _transpose(self, node: Node, fused: str) -> None:
        perm = self.constant(node.attrs["perm"])
        self.op("TRANSPOSE", [self.tensor(node.inputs[0]), perm], node.outputs)

    def _broadcast(self, node: Node, fused: str) -> None:
        shape = self.constant(node.out.shape)
        self.op("BROADCAST_TO", [self.tensor(node.inputs[0]), shape], node.outputs)

    def _concat(self, node: Node, fused: str) -> None:
        self.op(
            *("CONCATENATION", [self.tensor(v) for v in node.inputs]),
            *(node.outputs, "ConcatenationOptions"),
            axis=node.attrs["axis"],
        )

    def _slice(self, node: Node, fused: str) -> None:
        p = node.attrs
        parts = [self.constant(p[name]) for name in ("start", "stop", "steps")]
        self.op(
            *("STRIDED_SLICE", [self.tensor(node.inputs[0]), *parts]),
            *(node.outputs, "StridedSliceOptions"),
        )

    def _pad(self, node: Node, fused: str) -> None:
        widths = self.constant(node.attrs["widths"])
        inputs = [self.tensor(node.inputs[0]), widths]
        fill = node.attrs["value"]
        if fill == 0:
            self.op("PAD", inputs, node.outputs)
        else:
            value = self.constant(fill, node.out.dtype)
            self.op("PADV2", [*inputs, value], node.outputs)

    def _reverse(self, node: Node, fused: str) -> None:
        # One axis at a time: it takes several only where they stand side by side.
        x, (*first, last) = node.inputs[0], node.attrs["axes"]
        for axis in first:
            turned = Value(x.shape, x.dtype)
            self.tensor(turned, "reverse")
            self.op("REVERSE_V2", [self.tensor(x), self.constant([axis])], [turned])
            x = turned
        axis = self.constant([last])
        self.op("REVERSE_V2", [self.tensor(x), axis], node.outputs)

    def _gather(self, node: Node, fused: str) -> None:
        inputs = [self.tensor(value) for value in node.inputs]
        axis = node.attrs["axis"]
        self.op("GATHER", inputs, node.outputs, "GatherOptions", axis=axis)

    def _softmax(self, node: Node, fused: str) -> None:
        x = self.tensor(node.inputs[0])
        self.op("SOFTMAX", [x], node.outputs, "SoftmaxOptions", beta=1.0)

    def _gelu(self, node: Node, fused: str) -> None:
        self.op(
            *("GELU", [self.tensor(node.inputs[0])], node.outputs, "GeluOptions"),
            approximate=node.attrs["approximate"],
        )

    def _cast(self, node: Node, fused: str) -> None:
        x = node.inputs[0]
        types = self.s.TensorType
        self.op(
            *("CAST", [self.tensor(x)], node.outputs, "CastOptions"),
            inDataType=getattr(types, _DTYPES[str(x.dtype)]),
            outDataType=getattr(types, _DTYPES[str(node.out.dtype)]),
        )

    def _argmax(self, node: Node, fused: str) -> None:
        name, kind = ("ARG_MAX", "ArgMaxOptions")
        if node.op == "argmin":
            name, kind = ("ARG_MIN", "ArgMinOptions")
        inputs = [self.tensor(node.inputs[0]), self.constant(node.attrs["axis"])]
        types = self.s.TensorType
        out = getattr(types, _DTYPES[str(node.out.dtype)])
        self.op(name, inputs, node.outputs, kind, outputType=out)

    _argmin = _argmax

    def _cumsum(self, node: Node, fused: str) -> None:
        inputs = [self.tensor(node.inputs[0]), self.constant(node.attrs["axis"])]
        back = node.attrs["reverse"]
        self.op("CUMSUM", inputs, node.outputs, "CumsumOptions", reverse=back)


_HINTS = {
    "erf": ". Use nn.gelu, or nn.gelu(approximate=False) as a whole",
    "rem": ". Compute the remainder before the model",
}


def _same(n: int, k: int, stride: int, dilation: int) -> tuple[int, int]:
    """The padding that the runtime adds where it is told SAME."""
    span = (k - 1) * dilation + 1
    total = max((-(-n // stride) - 1) * stride + span - n, 0)
    return total // 2, total - total // 2
