"""Reads ONNX files back: their layers, each run alone, and the whole file."""

from __future__ import annotations

import contextlib
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ....messages.extras import require
from ...integers import Int8Layer
from ...layers import Layer
from ...record import FileRecord
from ...shipped import (
    Shipped,
    ShippedLayer,
    arrange_conv,
    canonical_conv,
    channels_first,
    channels_last,
    is_rows,
    reversed_window,
)
from .writer import RECORD

_CONVS = ("Conv", "ConvTranspose")
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_LINEAR = (*_CONVS, "Gemm", "MatMul")


class OnnxFile(Shipped):
    """An .onnx file, read back.

    Raises:
      ExportError: it is none.
    """

    runtime = "ONNX Runtime"

    def __init__(self, path: Path):
        self.onnx = require("onnx", "onnx", "reading an ONNX file")
        self.path, self.content = path, path.read_bytes()
        try:
            self.model = self.onnx.load_model_from_string(self.content)
        except Exception as error:  # protobuf's own kinds
            raise ExportError(
                f"{path} is not an ONNX file: {error}. Export it again."
            ) from None
        self.arrays = {
            tensor.name: self.onnx.numpy_helper.to_array(tensor)
            for graph in _graphs(self.model.graph)
            for tensor in graph.initializer
        }
        self.nodes = [node for g in _graphs(self.model.graph) for node in g.node]
        # Weights of 16 bits count as what the nodes take, those of 8 bits as they are.
        for node in self.nodes:
            if node.op_type == "DequantizeLinear" and node.input[0] in self.arrays:
                self.arrays[node.output[0]] = self.arrays[node.input[0]]
            half = self.arrays.get(node.input[0]) if node.op_type == "Cast" else None
            if half is not None and half.dtype.itemsize == 2:
                self.arrays[node.output[0]] = half.astype(np.float32)
        record = self.record()
        self._records = {e.name: e for e in record.layers} if record else {}

    def load(self) -> None:
        """Load the file in ONNX Runtime."""
        session(self.content)

    def record(self) -> FileRecord | None:
        """Return the file's own record."""
        for entry in self.model.metadata_props:
            if entry.key == RECORD:
                return FileRecord.from_text(entry.value)
        return None

    def ops(self) -> Mapping[str, int]:
        """Return how many nodes there are of each kind."""
        return Counter(node.op_type for node in self.nodes)

    def output_names(self) -> Sequence[str]:
        """Return the outputs."""
        return [entry.name for entry in self.model.graph.output]

    def constants(self) -> Sequence[np.ndarray]:
        """Return every initializer."""
        return list(self.arrays.values())

    def products(self) -> Sequence[str]:
        """Products of two activations."""
        return [
            f"{node.op_type} {_label(node)}"
            for node in self.nodes
            if node.op_type in _LINEAR and self._side(node) is None
        ]

    def layers(self) -> Sequence[ShippedLayer]:
        """Return the nodes of a weight."""
        found = []
        for node in self._linear():
            side = self._side(node)
            assert side is not None
            kernel = self.arrays[node.input[side]]
            name, attributes = _label(node), self._attributes(node)
            bias = self._bias(node)
            if node.op_type == "Conv":
                layer = self._records.get(name)
                shape = layer.kernel_shape if layer else ()
                if is_rows(kernel, shape):
                    kernel = kernel.reshape(kernel.shape[0], *shape[:-1])
                    kernel = canonical_conv(kernel, "OHWI")
                else:
                    kernel = canonical_conv(kernel, "OIHW")
            elif node.op_type == "ConvTranspose":
                kernel = reversed_window(canonical_conv(kernel, "IOHW"))
            elif attributes.get("transB") or self._is_left(
                node, self._records.get(name)
            ):
                kernel = kernel.T
            form = "conv" if node.op_type in _CONVS else "dense"
            array = None if bias is None else self.arrays[bias].reshape(-1)
            found.append(ShippedLayer(name, node.op_type, form, kernel, array))
        return found

    def _linear(self) -> list[Any]:
        return [
            node
            for node in self.nodes
            if node.op_type in _LINEAR and self._side(node) is not None
        ]

    def _side(self, node: Any) -> int | None:
        return next((i for i in (1, 0) if node.input[i] in self.arrays), None)

    def _attributes(self, node: Any) -> dict[str, Any]:
        read = self.onnx.helper.get_attribute_value
        return {entry.name: read(entry) for entry in node.attribute}

    def _add_of(self, node: Any) -> Any:
        """Return the addition of a bias that is part of a layer."""
        for other in self.nodes:
            ours = other.op_type == "Add" and _label(other).endswith("/bias")
            if ours and self._before(other.input[0]) == node.output[0]:
                return other if other.input[1] in self.arrays else None
        return None

    def _before(self, name: str) -> str:
        """Return what a value is before it was quantized and dequantized."""
        while name in self._makers and self._makers[name].op_type in _QDQ:
            name = self._makers[name].input[0]
        return name

    @functools.cached_property
    def _makers(self) -> dict[str, Any]:
        return {name: node for node in self.nodes for name in node.output}

    def _bias(self, node: Any) -> str | None:
        if node.op_type != "MatMul":
            return node.input[2] if len(node.input) > 2 else None
        add = self._add_of(node)
        return None if add is None else add.input[1]

    def run_layer(
        self,
        layer: Layer,
        x: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | None,
    ) -> np.ndarray:
        """Run one node, cut out of the file, with other numbers for its weights."""
        node = next((n for n in self._linear() if _label(n) == layer.name), None)
        if node is None:
            raise ExportError(
                f"{self.path} has no layer {layer.name!r}. Export it again."
            )
        side = self._side(node)
        assert side is not None
        stored = self.arrays[node.input[side]]
        dtype = stored.dtype
        if node.op_type == "ConvTranspose":
            laid = arrange_conv(reversed_window(kernel), "IOHW")
        elif node.op_type == "Conv" and is_rows(stored, layer.kernel_shape):
            laid = arrange_conv(kernel, "OHWI").reshape(stored.shape)
        elif node.op_type == "Conv":
            laid = arrange_conv(kernel, "OIHW")
        else:
            turned = self._attributes(node).get("transB")
            laid = kernel.T if turned or self._is_left(node, layer) else kernel
            if (
                layer.op == "matmul"
                and layer.options["adj_a" if side == 0 else "adj_b"]
            ):
                laid = laid.swapaxes(-1, -2)
        if laid.shape != stored.shape:
            raise ExportError(
                f"Expected a weight of shape {laid.shape}, got {stored.shape} in the "
                "file. Export it again."
            )
        nodes = [node]
        add = self._add_of(node) if node.op_type == "MatMul" else None
        if add is not None:
            nodes.append(add)
        new = {node.input[side]: laid.astype(dtype)}
        name = self._bias(node)
        if name is not None and bias is not None:
            new[name] = bias.astype(dtype).reshape(self.arrays[name].shape)
        turned = self._turned(node, layer, x).astype(dtype)
        y = self._run_nodes(nodes, node.input[1 - side], turned, new)
        if side == 0 and layer.op == "dense":
            return y.swapaxes(-1, -2).reshape(*x.shape[:-1], y.shape[-2])
        return self._returned(node, layer, x, y)

    def _returned(
        self, node: Any, layer: Layer, x: np.ndarray, y: np.ndarray
    ) -> np.ndarray:
        """Return a node's output as the layer has it."""
        tokens = node.op_type == "Gemm"  # whose places are one axis there
        if node.op_type in _CONVS:
            stored, shape = self.arrays[node.input[1]], layer.kernel_shape
            tokens = is_rows(stored, shape) and shape[:2] == (1, 1)
            y = y.transpose(channels_last(y.ndim))
        return y.reshape(*x.shape[:-1], y.shape[-1]) if tokens else y

    def _is_left(self, node: Any, layer: Layer | None) -> bool:
        """Return whether a dense layer's node takes ``kernel.T`` on the left."""
        dense = layer is not None and layer.op == "dense"
        return dense and node.op_type == "MatMul" and self._side(node) == 0

    def _turned(self, node: Any, layer: Layer, x: np.ndarray) -> np.ndarray:
        """Return a layer's input as its node takes it."""
        side = self._side(node)
        assert side is not None
        stored = self.arrays[node.input[side]]
        if node.op_type == "Conv" and is_rows(stored, layer.kernel_shape):
            n, h, w, c = x.shape
            if layer.kernel_shape[:2] == (1, 1):
                return x.reshape(1, 1, n * h * w, c)
            return x.reshape(n, 1, h, w * c)
        if node.op_type in _CONVS:
            return x.transpose(channels_first(x.ndim))
        if side == 0 and layer.op == "dense":  # on the columns of one image, or more
            lead = x.shape[:1] if node.op_type == "MatMul" else ()
            return x.reshape(*lead, -1, x.shape[-1]).swapaxes(-1, -2)
        if node.op_type == "Gemm":
            return x.reshape(-1, x.shape[-1])
        swap = layer.op == "matmul" and layer.options["adj_b" if side == 0 else "adj_a"]
        return x.swapaxes(-1, -2) if swap else x

    def int8_layers(self) -> Mapping[str, Callable[[Layer], Int8Layer]]:
        """Return what reads each linear node of an int8 file, by name."""
        pairs = zip(self.layers(), self._linear())
        return {
            shipped.name: functools.partial(self._int8_layer, shipped, node)
            for shipped, node in pairs
        }

    def _int8_layer(self, shipped: ShippedLayer, node: Any, layer: Layer) -> Int8Layer:
        makers = self._makers
        side = self._side(node)
        assert side is not None
        inputs: list[Any] = [makers.get(name) for name in node.input]
        readers = [each for each in self.nodes if node.output[0] in each.input]
        leaving = next((n for n in readers if n.op_type == "QuantizeLinear"), None)
        if leaving is None or any(
            each is None or each.op_type != "DequantizeLinear" for each in inputs
        ):
            raise ExportError(
                "Expected int8 around it, got float32. Quantize it again."
            )
        parts = [*inputs, node, leaving]
        made = {name for part in parts for name in part.output}
        read = {name for part in parts for name in part.input} - made

        def run_alone(x: np.ndarray) -> np.ndarray:
            entering = inputs[1 - side].input[0]
            known = {n: self.arrays[n] for n in read - {entering} if n in self.arrays}
            y = self._run_nodes(parts, entering, self._turned(node, layer, x), known)
            return self._returned(node, layer, x, y)

        (scale_in,), zero_in = self._scales(inputs[1 - side])
        (scale_out,), zero_out = self._scales(leaving)
        scales, zero = self._scales(inputs[side])
        bias, bias_scales, behind = shipped.bias, None, None
        add = self._add_of(node) if node.op_type == "MatMul" else None
        if bias is not None and add is not None:
            (step,), shift = self._scales(makers[add.input[1]])
            bias, behind = None, (bias.astype(np.int64) - shift, step)
        elif bias is not None:
            bias_scales, _ = self._scales(inputs[2])
        return Int8Layer(
            *(shipped.op, shipped.form, shipped.kernel, bias, scales, zero),
            bias_scales=bias_scales,
            behind=behind,
            dequantized=True,
            entering=(scale_in, zero_in),
            leaving=(scale_out, zero_out),
            run=run_alone,
        )

    def _scales(self, node: Any) -> tuple[np.ndarray, int]:
        """Return the scales and the zero point of a (de)quantization."""
        zeros = np.unique(self.arrays[node.input[2]]) if len(node.input) > 2 else [0]
        scales = np.atleast_1d(self.arrays[node.input[1]])
        if len(zeros) != 1 or not (np.isfinite(scales) & (scales > 0)).all():
            raise ExportError(
                f"Expected positive scales and one zero point at {node.input[0]!r}, "
                f"got {scales[:3]} and {zeros[:3]}. Quantize the file again."
            )
        return scales, int(zeros[0])

    def _run_nodes(
        self, nodes: Sequence[Any], entering: str, x: np.ndarray, new: Any
    ) -> np.ndarray:
        helper = self.onnx.helper
        nodes = list(nodes)
        kind = helper.np_dtype_to_tensor_dtype(x.dtype)
        out = nodes[-1].output[0]
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info(entering, kind, list(x.shape))],
            [helper.make_tensor_value_info(out, kind, None)],
            [
                self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
                for name, array in new.items()
            ],
        )
        model = helper.make_model(
            graph,
            opset_imports=list(self.model.opset_import),
            ir_version=self.model.ir_version,
        )
        return run(model.SerializeToString(), [x])[0]

    def runner(self, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Return one run of the whole file, to be timed."""
        ready = session(self.content)
        names = [entry.name for entry in ready.get_inputs()]
        feeds = dict(zip(names, map(np.asarray, inputs), strict=True))
        return lambda: ready.run(None, feeds)

    def caller(
        self, integers: bool = False
    ) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
        """Load the file, and return what runs it."""
        return caller(self.content)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the whole file."""
        return run(self.content, inputs)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph, and those that its loops and branches hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def session(content: bytes) -> Any:
    """Return the runtime's session of a file's content."""
    ort = require("onnxruntime", "onnx", "running an ONNX file")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Without VNNI, x86 saturates the 16-bit sums of int8 products; not with this.
    options.add_session_config_entry("session.x64quantprecision", "1")
    with contextlib.redirect_stdout(io.StringIO()):  # prints its retries
        providers = ["CPUExecutionProvider"]
        return ort.InferenceSession(content, options, providers=providers)


def caller(content: bytes) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Load a file's content; return what runs it on arrays, in its inputs' order."""
    runner = session(content)
    names = [entry.name for entry in runner.get_inputs()]

    def call(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        feeds = dict(zip(names, map(np.asarray, inputs), strict=True))
        return runner.run(None, feeds)

    return call


def run(content: bytes, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a file's content once, see :func:`caller`."""
    return caller(content)(inputs)


def _label(node: Any) -> str:
    """Return a node's name, without the number that keeps names apart."""
    return node.name.partition("@")[0]
