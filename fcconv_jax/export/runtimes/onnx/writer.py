"""Writes ONNX files from a graph, with the onnx package alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ....messages.extras import require
from ...graph import Graph, Node, Value
from ...passes.blocks import find_blocks
from ...passes.norms import find_batch_norms
from ...record import FileRecord
from ...shipped import arrange_conv, crops, reversed_window
from .builder import Builder

RECORD = "fcconv_jax"
# The first opset with Gelu; its files have the IR version 9.
OPSET, IR = 20, 9
# RMSNormalization needs a later one, which fewer readers take.
_OPSET_OF_RMS, _IR_OF_RMS = 23, 11
_NAMESAKES = """
    abs add and ceil cos div elu erf exp floor log max min mish mul neg not or pow
    relu round sign sin softplus softsign sqrt sub tanh
""".split()
_PLAIN = {op: op.capitalize() for op in _NAMESAKES} | {
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "hard_swish": "HardSwish",
    "le": "LessOrEqual",
    "logistic": "Sigmoid",
    "lt": "Less",
    "select": "Where",
}
_REDUCTIONS = {
    "reduce_sum": "ReduceSum",
    "reduce_mean": "ReduceMean",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}


def write(graph: Graph, record: FileRecord, path: Path, gemm: bool = True) -> None:
    """Write a graph whose images are channel-first as an .onnx file.

    Args:
      graph: what to write; it is rewritten.
      record: what the file says about itself.
      path: where to.
      gemm: whether a dense layer on rows is a Gemm; else a MatMul and an Add.

    Raises:
      ExportError: ONNX Runtime has no such operation or dtype.
    """
    onnx = require("onnx", "onnx", "an ONNX file")
    for part in graph.graphs():
        find_batch_norms(part)
        find_blocks(part, "first")
    model = _Writer(onnx, gemm).model(graph, record)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


class _Writer(Builder):
    """Appends what the nodes of a graph are in ONNX."""

    def __init__(self, onnx: Any, gemm: bool):
        super().__init__(onnx)
        self.gemm = gemm

    def model(self, graph: Graph, record: FileRecord) -> Any:
        inputs = [
            self.info(value, self.name(value, name))
            for value, name in zip(graph.inputs, graph.input_names)
        ]
        self.emit_all(graph, dict(zip(graph.outputs, graph.output_names)))
        outputs = []
        for value, name in zip(graph.outputs, graph.output_names):
            if self.known[value] != name:
                self.add("Identity", [self.known[value]], name)
            outputs.append(self.info(value, name))
        made = self.helper.make_graph(
            self.nodes, "main", inputs, outputs, self.initializers
        )
        late = any(part.count("rms_norm") for part in graph.graphs())
        opset, ir = (_OPSET_OF_RMS, _IR_OF_RMS) if late else (OPSET, IR)
        model = self.helper.make_model(
            made,
            opset_imports=[self.helper.make_opsetid("", opset)],
            producer_name="fcconv_jax",
            ir_version=ir,
        )
        self.helper.set_model_props(model, {RECORD: record.to_text()})
        return model

    def emit_all(self, graph: Graph, reserved: Mapping[Value, str]) -> None:
        for node in graph.nodes:
            for value in node.outputs:
                self.name(value, reserved.get(value, node.name or node.op))
            self.emit(node)

    def body(
        self, graph: Graph, captured: Sequence[Value] = (), before: Sequence[Value] = ()
    ) -> Any:
        """The graph of a loop or a branch; it reads values from around it by name.

        Constants are its own: OpenVINO takes those from around it for no constants.
        """
        for inner, value in zip(graph.inputs, captured):
            self.known[inner] = self.name(value)
        outside = self.nodes, self.initializers, self.known
        self.nodes, self.initializers = [], []
        self.known = {
            value: name
            for value, name in self.known.items()
            if isinstance(value, Value) and value.data is None
        }
        entering = [*before, *graph.inputs[len(captured) :]]
        inputs = [self.info(value, self.name(value)) for value in entering]
        self.emit_all(graph, {})
        own = {name for node in self.nodes for name in node.output}
        outputs = []
        for value in graph.outputs:
            name = self.name(value)
            if name not in own:  # of an input, a constant, or the same output again
                name = self.add("Identity", [name], self.unique("same"))
            own.discard(name)
            outputs.append(self.info(value, name))
        made = self.helper.make_graph(
            self.nodes, self.unique("body"), inputs, outputs, self.initializers
        )
        self.nodes, self.initializers, self.known = outside
        return made

    def emit(self, node: Node) -> None:
        """Append what a node is in ONNX."""
        method: Callable[..., None] | None = getattr(self, f"_{node.op}", None)
        out = self.known[node.out]
        if method is not None:
            method(node, out)
            return
        inputs = [self.name(value) for value in node.inputs]
        if node.op in _REDUCTIONS:
            axes = self.ints(node.attrs["axes"])
            keep = int(node.attrs["keepdims"])
            self.add(_REDUCTIONS[node.op], [*inputs, axes], out, keepdims=keep)
        elif node.op in _PLAIN:
            self.add(_PLAIN[node.op], inputs, out)
        else:
            raise ExportError(
                f"The ONNX writer doesn't support {node.op!r}. Pass another runtime=."
            )

    def _conv(self, node: Node, out: str) -> None:
        x, kernel = node.inputs[:2]
        p = node.attrs
        assert kernel.data is not None
        spread = "spread" in p
        laid = arrange_conv(kernel.data, "OIHW")
        strides, padding = p["strides"], p["padding"]
        if spread:
            laid = arrange_conv(reversed_window(kernel.data), "IOHW")
            strides = p["spread"]
            padding = crops(kernel.shape, padding)
        if "rows" in p:
            h, w, c, o = kernel.shape
            laid = arrange_conv(kernel.data, "OHWI").reshape(o, 1, h, w * c)
        label = kernel.source.leaf if kernel.source else "weight"
        inputs = [
            self.name(x),
            self.array((kernel, "rows" in p, "conv"), laid, label, kernel.stored),
        ]
        if len(node.inputs) > 2:
            inputs.append(self.name(node.inputs[2]))
        self.add(
            *("ConvTranspose" if spread else "Conv", inputs, out, node.name),
            strides=list(strides),
            **_pads(node, padding),
            dilations=list(p["dilation"]),
            group=p["groups"],
            kernel_shape=list(laid.shape[2:]),
        )

    def _dense(self, node: Node, out: str) -> None:
        if "columns" in node.attrs:
            self._columns(node, out)
            return
        inputs = [self.name(value) for value in node.inputs]
        if self.gemm and len(node.inputs[0].shape) == 2:
            self.add("Gemm", inputs, out, node.name)
        elif len(inputs) == 2:
            self.add("MatMul", inputs, out, node.name)
        else:
            product = self.unique(f"{node.name}/product")
            self.add("MatMul", inputs[:2], product, node.name)
            self.add("Add", [product, inputs[2]], out, f"{node.name}/bias")

    def _columns(self, node: Node, out: str) -> None:
        x, kernel, *biases = node.inputs
        assert kernel.data is not None
        label = kernel.source.leaf if kernel.source else "weight"
        added = [
            self.array((bias, "column"), np.asarray(bias.data)[:, None], "bias")
            for bias in biases
        ]
        if len(x.shape) == 2:
            inputs = [self.name(kernel), self.name(x), *added]
            self.add("Gemm", inputs, out, node.name, transA=1)
            return
        laid = self.array((kernel, "rows"), kernel.data.T, label, kernel.stored)
        inputs = [laid, self.name(x)]
        product = self.unique(f"{node.name}/product") if added else out
        self.add("MatMul", inputs, product, node.name)
        if added:
            self.add("Add", [product, *added], out, f"{node.name}/bias")

    def _matmul(self, node: Node, out: str) -> None:
        self.add("MatMul", [self.name(v) for v in node.inputs], out, node.name)

    def _pool_max(self, node: Node, out: str) -> None:
        p = node.attrs
        name = "MaxPool"
        more: dict[str, Any] = {}
        if node.op == "pool_mean":
            name, more["count_include_pad"] = "AveragePool", int("valid" not in p)
        self.add(
            *(name, [self.name(node.inputs[0])], out),
            kernel_shape=list(p["window"]),
            strides=list(p["strides"]),
            **_pads(node, p["padding"]),
            **more,
        )

    _pool_mean = _pool_max

    def _reshape(self, node: Node, out: str) -> None:
        shape = self.shape(node.attrs.get("dims", node.out.shape))
        self.add("Reshape", [self.name(node.inputs[0]), shape], out)

    def _transpose(self, node: Node, out: str) -> None:
        perm = list(node.attrs["perm"])
        self.add("Transpose", [self.name(node.inputs[0])], out, perm=perm)

    def _broadcast(self, node: Node, out: str) -> None:
        shape = self.ints(node.attrs.get("dims", node.out.shape))
        self.add("Expand", [self.name(node.inputs[0]), shape], out)

    def _concat(self, node: Node, out: str) -> None:
        inputs = [self.name(value) for value in node.inputs]
        self.add("Concat", inputs, out, axis=node.attrs["axis"])

    def _slice(self, node: Node, out: str) -> None:
        p = node.attrs
        axes = range(len(node.out.shape))
        parts = [self.ints(v) for v in (p["start"], p["stop"], axes, p["steps"])]
        self.add("Slice", [self.name(node.inputs[0]), *parts], out)

    def _reverse(self, node: Node, out: str) -> None:
        axes = node.attrs["axes"]
        ends = [np.iinfo(np.int64).min] * len(axes)
        parts = [self.ints(v) for v in ([-1] * len(axes), ends, axes, [-1] * len(axes))]
        self.add("Slice", [self.name(node.inputs[0]), *parts], out)

    def _pad(self, node: Node, out: str) -> None:
        widths = node.attrs["widths"]
        pads = self.ints([a for a, _ in widths] + [b for _, b in widths])
        fill = np.asarray(node.attrs["value"], node.out.dtype)
        value = self.array((fill.tobytes(), str(fill.dtype)), fill, "fill")
        self.add("Pad", [self.name(node.inputs[0]), pads, value], out)

    def _gather(self, node: Node, out: str) -> None:
        inputs = [self.name(value) for value in node.inputs]
        self.add("Gather", inputs, out, axis=node.attrs["axis"])

    def _softmax(self, node: Node, out: str) -> None:
        axis = node.attrs.get("axis", -1)
        self.add("Softmax", [self.name(node.inputs[0])], out, axis=axis)

    def _log_softmax(self, node: Node, out: str) -> None:
        axis = node.attrs.get("axis", -1)
        self.add("LogSoftmax", [self.name(node.inputs[0])], out, axis=axis)

    def _l2_normalize(self, node: Node, out: str) -> None:
        axis = node.attrs.get("axis", -1)
        self.add("LpNormalization", [self.name(node.inputs[0])], out, axis=axis, p=2)

    def _one_hot(self, node: Node, out: str) -> None:
        ids, depth = self.name(node.inputs[0]), node.attrs["depth"]
        if node.attrs["natural"]:
            values = self.floats(np.array([0, 1], np.float32))
            count = self.array(("depth", depth), np.array([depth], np.int32), "depth")
            self.add("OneHot", [ids, count, values], out)
            return
        # ONNX's own counts negative numbers from the end; JAX's is zero there.
        row = self.array(("row", depth), np.arange(depth, dtype=np.int32), "row")
        ids = self.add("Unsqueeze", [ids, self.ints([-1])], self.unique("ids"))
        test = self.add("Equal", [ids, row], self.unique("equal"))
        self.add("Cast", [test], out, to=self.onnx.TensorProto.FLOAT)

    def _prelu(self, node: Node, out: str) -> None:
        self.add("PRelu", [self.name(v) for v in node.inputs], out)

    def _resize(self, node: Node, out: str) -> None:
        # By scales, not sizes: those would contain the batch.
        inner = node.inputs[0].shape[2:]
        scales = np.asarray([1, 1, *map(_scale, inner, node.attrs["size"])], np.float32)
        # JAX takes the nearest pixel by floor(place), which is place - 0.5 with halves
        # rounded up: half_pixel and round_prefer_ceil.
        mode, corners = node.attrs["mode"], "half_pixel"
        if mode == "aligned":
            mode, corners = "linear", "align_corners"
        self.add(
            *("Resize", [self.name(node.inputs[0]), "", self.floats(scales)], out),
            mode=mode,
            coordinate_transformation_mode=corners,
            nearest_mode="round_prefer_ceil",
        )

    def _batch_norm(self, node: Node, out: str) -> None:
        inputs = [self.name(value) for value in node.inputs]
        # The scale contains variance and epsilon already: here they are 1 and 0.
        self.add("BatchNormalization", inputs, out, epsilon=0.0)

    def _layer_norm(self, node: Node, out: str) -> None:
        inputs = [self.name(value) for value in node.inputs]
        epsilon = node.attrs["epsilon"]
        self.add("LayerNormalization", inputs, out, axis=-1, epsilon=epsilon)

    def _rms_norm(self, node: Node, out: str) -> None:
        inputs = [self.name(value) for value in node.inputs]
        epsilon = node.attrs["epsilon"]
        self.add("RMSNormalization", inputs, out, axis=-1, epsilon=epsilon)

    def _depth_to_space(self, node: Node, out: str) -> None:
        name = "DepthToSpace" if node.op == "depth_to_space" else "SpaceToDepth"
        self.add(name, [self.name(node.inputs[0])], out, **node.attrs)

    _space_to_depth = _depth_to_space

    def _gelu(self, node: Node, out: str) -> None:
        how = "tanh" if node.attrs["approximate"] else "none"
        self.add("Gelu", [self.name(node.inputs[0])], out, approximate=how)

    def _leaky_relu(self, node: Node, out: str) -> None:
        x, alpha = self.name(node.inputs[0]), node.attrs["alpha"]
        self.add("LeakyRelu", [x], out, alpha=alpha)

    def _selu(self, node: Node, out: str) -> None:
        alpha, gamma = node.attrs["alpha"], node.attrs["gamma"]
        x = self.name(node.inputs[0])
        if gamma == 1:
            self.add("Elu", [x], out, alpha=alpha)
        else:
            self.add("Selu", [x], out, alpha=alpha, gamma=gamma)

    def _celu(self, node: Node, out: str) -> None:
        self.add("Celu", [self.name(node.inputs[0])], out, **node.attrs)

    def _hard_sigmoid(self, node: Node, out: str) -> None:
        x = self.name(node.inputs[0])
        self.add("HardSigmoid", [x], out, alpha=1 / 6, beta=0.5)

    def _cast(self, node: Node, out: str) -> None:
        to = self.helper.np_dtype_to_tensor_dtype(self.checked(node.out.dtype))
        self.add("Cast", [self.name(node.inputs[0])], out, to=to)

    def _argmax(self, node: Node, out: str) -> None:
        name = "ArgMax" if node.op == "argmax" else "ArgMin"
        wide = self.unique("index")
        x = self.name(node.inputs[0])
        self.add(name, [x], wide, axis=node.attrs["axis"], keepdims=0)
        to = self.helper.np_dtype_to_tensor_dtype(node.out.dtype)
        self.add("Cast", [wide], out, to=to)

    _argmin = _argmax

    def _top_k(self, node: Node, out: str) -> None:
        x, k = self.name(node.inputs[0]), self.ints([node.attrs["k"]])
        wide, indices = self.unique("index"), self.known[node.outputs[1]]
        self.add("TopK", [x, k], out)
        self.nodes[-1].output.append(wide)
        to = self.helper.np_dtype_to_tensor_dtype(node.outputs[1].dtype)
        self.add("Cast", [wide], indices, to=to)

    def _cumsum(self, node: Node, out: str) -> None:
        axis = self.array(
            ("axis", node.attrs["axis"]), np.int64(node.attrs["axis"]), "axis"
        )
        back = int(node.attrs["reverse"])
        self.add("CumSum", [self.name(node.inputs[0]), axis], out, reverse=back)

    def _scan(self, node: Node, out: str) -> None:
        p = node.attrs
        captured, carried, (body,) = p["captured"], p["carried"], p["bodies"]
        rows = len(node.inputs) - captured - carried
        stacks, back = len(node.outputs) - carried, int(p["reverse"])
        self.add(
            *("Scan", [self.name(v) for v in node.inputs[captured:]], out),
            body=self.body(body, node.inputs[:captured]),
            num_scan_inputs=rows,
            scan_input_directions=[back] * rows,
            scan_output_directions=[back] * stacks or None,
        )
        self.nodes[-1].output.extend(self.known[v] for v in node.outputs[1:])

    def _while(self, node: Node, out: str) -> None:
        begin, *others = node.inputs
        captured, (body,) = node.attrs["captured"], node.attrs["bodies"]
        step, on = Value((), np.dtype(np.int64)), Value((), np.dtype(np.bool_))
        inputs = ["", self.name(begin), *map(self.name, others[captured:])]
        self.add(
            *("Loop", inputs, out),
            body=self.body(body, others[:captured], [step, on]),
        )
        self.nodes[-1].output.extend(self.known[v] for v in node.outputs[1:])

    def _cond(self, node: Node, out: str) -> None:
        no, yes = (self.body(b, node.inputs[1:]) for b in node.attrs["bodies"])
        predicate = self.name(node.inputs[0])
        self.add("If", [predicate], out, then_branch=yes, else_branch=no)
        self.nodes[-1].output.extend(self.known[v] for v in node.outputs[1:])

    def _rsqrt(self, node: Node, out: str) -> None:
        root = self.add("Sqrt", [self.name(node.inputs[0])], self.unique("sqrt"))
        self.add("Reciprocal", [root], out)

    def _relu6(self, node: Node, out: str) -> None:
        least, most = (
            self.array(("clip", n), np.asarray(n, node.out.dtype), "bound")
            for n in (0, 6)
        )
        self.add("Clip", [self.name(node.inputs[0]), least, most], out)

    def _ne(self, node: Node, out: str) -> None:
        inputs = [self.name(value) for value in node.inputs]
        self.add("Not", [self.add("Equal", inputs, self.unique("equal"))], out)

    def _rem(self, node: Node, out: str) -> None:
        inputs = [self.name(value) for value in node.inputs]
        self.add("Mod", inputs, out, fmod=1)


def _pads(node: Node, padding: Sequence[tuple[int, int]]) -> dict[str, Any]:
    if "same" in node.attrs:
        return {"auto_pad": "SAME_UPPER"}
    return {"pads": [a for a, _ in padding] + [b for _, b in padding]}


def _scale(inner: int, outer: int) -> np.float32:
    """The least scale of at least outer / inner at which a size is not rounded down."""
    scale = np.float32(outer / inner)
    while np.floor(np.float32(inner) * scale) < outer:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale
