"""Reads LiteRT files back: their layers, each run alone, and the whole file."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ...integers import Int8Layer
from ...layers import Layer
from ...record import FileRecord
from ...shipped import (
    Shipped,
    ShippedLayer,
    arrange_conv,
    canonical_conv,
    reading,
    reversed_window,
)
from .schema import RECORD, pack, schema
from .session import caller, feed, interpreter, run

_CONVS = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "TRANSPOSE_CONV")
_LINEAR = (*_CONVS, "FULLY_CONNECTED", "BATCH_MATMUL")
# What fused activations leave: none, RELU, RELU_N1_TO_1, RELU6.
_BOUNDS = {
    0: (-math.inf, math.inf),
    1: (0.0, math.inf),
    2: (-1.0, 1.0),
    3: (0.0, 6.0),
}
# Entries that any machine holds: such a tensor is not worth a question.
_LARGE = 1 << 20
_NUMPY = {
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


class LiteRTFile(Shipped):
    """A .tflite file, read back.

    Raises:
      ExportError: it is none.
    """

    runtime = "LiteRT"
    moving = ("TRANSPOSE", "RESHAPE")

    def __init__(self, path: Path):
        s = schema()
        self.path, self.content = path, path.read_bytes()
        if self.content[4:8] != b"TFL3":
            raise ExportError(
                f"{path} is not a LiteRT file: it lacks the identifier 'TFL3'. Pass "
                "the path of an exported file."
            )
        try:
            self.model = s.ModelT.InitFromPackedBuf(self.content, 0)
        except Exception as error:  # struct's and flatbuffers' own kinds
            raise ExportError(
                f"{path} is a damaged LiteRT file: {error}. Export it again."
            ) from None
        with reading(path):
            self._bring_in_buffers()
            self._index(s)

    def _index(self, s: Any) -> None:
        self.graph = self.model.subgraphs[0]
        builtin = {v: k for k, v in vars(s.BuiltinOperator).items() if k.isupper()}
        self.codes = [
            # Older files fill only the older field; newer ones have 127 there.
            builtin[max(code.builtinCode, code.deprecatedBuiltinCode)]
            for code in self.model.operatorCodes
        ]
        types = {v: k for k, v in vars(s.TensorType).items() if k.isupper()}
        self._types = types
        # A file of its own for each loop's graph, the buffers in common.
        self.parts = [self]
        self._halves: dict[int, int] = {}
        for graph in self.model.subgraphs:
            part = self if graph is self.graph else copy.copy(self)
            part.graph = graph
            # Weights of 16 bits count as what the operators take.
            part._halves = {
                int(op.outputs[0]): int(op.inputs[0])
                for op in graph.operators
                if part.name(op) == "DEQUANTIZE"
                and types[graph.tensors[op.inputs[0]].type] == "FLOAT16"
            }
            if part is not self:
                self.parts.append(part)

    def _bring_in_buffers(self) -> None:
        """Read the buffers behind the flatbuffer, as LiteRT's tools write them.

        An offset of 0 or 1 stands for a buffer that is inside.
        """
        for buffer in self.model.buffers:
            start, size = buffer.offset, buffer.size
            if start > 1:
                if start + size > len(self.content):
                    raise ExportError(
                        f"{self.path} is truncated: a buffer of {size} bytes begins at "
                        f"{start}, the file has {len(self.content)}. Export it again."
                    )
                buffer.data = np.frombuffer(self.content, np.uint8, size, start)
                buffer.offset = buffer.size = 0

    def name(self, operator: Any) -> str:
        """Return the runtime's word for an operator."""
        return self.codes[operator.opcodeIndex]

    def array(self, index: int) -> np.ndarray | None:
        """Return the entries of a constant tensor."""
        if index < 0:
            return None
        if index in self._halves:
            half = self.array(self._halves[index])
            return None if half is None else half.astype(np.float32)
        tensor = self.graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if data is None or tensor.buffer == 0:
            return None
        dtype = _NUMPY.get(self._types[tensor.type])
        if dtype is None:
            return None
        shape = () if tensor.shape is None else tuple(tensor.shape)
        return np.ascontiguousarray(data, np.uint8).view(dtype).reshape(shape)

    def load(self) -> None:
        """Load the file in LiteRT.

        Raises:
          ExportError: a shape is out of all proportion: LiteRT would allocate it, tens
            of GB after one damaged byte.
        """
        tensors = [t for part in self.parts for t in part.graph.tensors]
        shapes = [t.shape for t in tensors if t.shape is not None]
        largest = max((math.prod(map(int, shape)) for shape in shapes), default=0)
        record = self.record()
        layers = record.layers if record else ()
        known = [math.prod(s) for e in layers for s in (e.input_shape, e.output_shape)]
        if largest > max(_LARGE, 1024 * max(known, default=largest)):
            raise ExportError(
                f"{self.path} has a tensor of {largest:,} entries, and its layers "
                f"have at most {max(known):,}: it is damaged. Export it again."
            )
        interpreter(self.content)

    def record(self) -> FileRecord | None:
        """Return the file's own record."""
        for entry in self.model.metadata or ():
            name = entry.name.decode() if isinstance(entry.name, bytes) else entry.name
            if name == RECORD:
                data = np.asarray(self.model.buffers[entry.buffer].data, np.uint8)
                return FileRecord.from_bytes(data.tobytes())
        return None

    def ops(self) -> Mapping[str, int]:
        """Return how many operators there are of each kind."""
        graphs = [part.graph for part in self.parts]
        return Counter(self.name(op) for graph in graphs for op in graph.operators)

    def output_names(self) -> Sequence[str]:
        """Return the outputs, as the signature names them."""
        for signature in self.model.signatureDefs or ():
            by_index = {
                entry.tensorIndex: entry.name.decode()
                if isinstance(entry.name, bytes)
                else entry.name
                for entry in signature.outputs
            }
            return [by_index[index] for index in self.graph.outputs]
        return []

    def constants(self) -> Sequence[np.ndarray]:
        """Return every constant tensor."""
        found = [
            part.array(i) for part in self.parts for i in range(len(part.graph.tensors))
        ]
        return [array for array in found if array is not None]

    def products(self) -> Sequence[str]:
        """Products of two activations."""
        return [
            f"BATCH_MATMUL {part._label(op.outputs[0])}"
            for part in self.parts
            for op in part.graph.operators
            if part.name(op) in ("BATCH_MATMUL", "FULLY_CONNECTED")
            and all(part.array(i) is None for i in list(op.inputs)[:2])
        ]

    def layers(self) -> Sequence[ShippedLayer]:
        """Return the linear operators with a weight."""
        return [layer for part in self.parts for layer in part._own_layers()]

    def _own_layers(self) -> list[ShippedLayer]:
        found = []
        for op in self.linear_operators():
            name = self.name(op)
            side = self._side(op)
            kernel = self.array(op.inputs[side])
            assert kernel is not None
            place = self.bias_of(op)
            # The operator needs a bias: the writer gives those of no bias zeros of this
            # name.
            bias = None if self._label(place) == "no bias" else self.array(place)
            if name == "CONV_2D":
                kernel = canonical_conv(kernel, "OHWI")
            elif name == "DEPTHWISE_CONV_2D":
                kernel = kernel.transpose(1, 2, 0, 3)
            elif name == "TRANSPOSE_CONV":
                kernel = reversed_window(canonical_conv(kernel, "OHWI"))
            elif name == "FULLY_CONNECTED":
                kernel = kernel.T
            form = "conv" if name in _CONVS else "dense"
            found.append(
                ShippedLayer(self._label(op.outputs[0]), name, form, kernel, bias)
            )
        return found

    def linear_operators(self) -> list[Any]:
        """Return the linear operators with a weight, those of loops aside."""
        return [
            op
            for op in self.graph.operators
            if self.name(op) in _LINEAR and self._side(op) is not None
        ]

    def bias_of(self, op: Any) -> int:
        """Return the tensor of a linear operator's bias; -1 if there is none."""
        place = 3 if self.name(op) == "TRANSPOSE_CONV" else 2
        return int(op.inputs[place]) if len(op.inputs) > place else -1

    def _entering(self, op: Any) -> int:
        """Return the tensor of a linear operator's activation."""
        # Its first operand is the shape of the result.
        transposed = self.name(op) == "TRANSPOSE_CONV"
        return int(op.inputs[2 if transposed else 1 - self._side(op)])

    def _side(self, op: Any) -> Any:
        """Return which operand is the weight; None if both are activations."""
        # A product has its weight on either side; all others have it second.
        for side in (1, 0):
            if self.array(op.inputs[side]) is not None:
                return side
        return None

    def _label(self, index: int) -> str:
        """Return a tensor's name, without the number that keeps names apart."""
        if index < 0:
            return ""
        name = self.graph.tensors[index].name or b""
        text = name.decode() if isinstance(name, bytes) else name
        return text.partition(";")[0]

    def run_layer(
        self,
        layer: Layer,
        x: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | None,
    ) -> np.ndarray:
        """Run one operator, cut out of the file, with other numbers in its buffers."""
        for part in self.parts:
            for operator in part.linear_operators():
                if part._label(operator.outputs[0]) == layer.name:
                    return part._run_operator(operator, layer, x, kernel, bias)
        raise ExportError(f"{self.path} has no layer {layer.name!r}. Export it again.")

    def int8_layers(self) -> Mapping[str, Callable[[Layer], Int8Layer]]:
        """Return what reads each linear operator of an int8 file, by name."""
        operators = self.linear_operators()
        return {
            shipped.name: functools.partial(self._int8_layer, shipped, operator)
            for shipped, operator in zip(self.layers(), operators)
        }

    def _int8_layer(
        self, shipped: ShippedLayer, operator: Any, layer: Layer
    ) -> Int8Layer:
        # Cut when it first runs: the weights are compared even where that fails.
        @functools.cache
        def alone() -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
            return caller(self._cut(*self._chain(operator, layer)), integers=True)

        place = self.bias_of(operator)
        (scale_in,), zero_in = self.scales(self._entering(operator))
        (scale_out,), zero_out = self.scales(operator.outputs[0])
        scales, zero = self.scales(operator.inputs[self._side(operator)])
        number = getattr(operator.builtinOptions, "fusedActivationFunction", 0)
        return Int8Layer(
            *(shipped.op, shipped.form, shipped.kernel, shipped.bias, scales, zero),
            bias_scales=None if shipped.bias is None else self.scales(place)[0],
            entering=(scale_in, zero_in),
            leaving=(scale_out, zero_out),
            bounds=_BOUNDS[number],
            run=lambda x: alone()([x])[0],
        )

    def scales(self, index: int) -> tuple[np.ndarray, int]:
        """Return a quantized tensor's scales and its zero point.

        Raises:
          ExportError: it is a float, a scale is not positive, or zero points differ.
        """
        found = self.graph.tensors[index].quantization
        if found is None or found.scale is None:
            found = schema().QuantizationParametersT()
            found.scale = found.zeroPoint = []
        scales = np.asarray(found.scale, np.float32)
        zeros = np.unique(np.asarray(found.zeroPoint, np.int64))
        known = len(scales) and (np.isfinite(scales) & (scales > 0)).all()
        if not known or len(zeros) != 1:
            raise ExportError(
                f"Expected positive scales and one zero point at {self._label(index)!r}"
                f", got {scales[:3]} and {zeros[:3]}. Quantize the file again."
            )
        return scales, int(zeros[0])

    def _chain(self, operator: Any, layer: Layer) -> tuple[list[Any], int]:
        """Return an operator behind the pad that is part of it, and what enters."""
        chain, entering = [operator], self._entering(operator)
        makers = {i: op for op in self.graph.operators for i in op.outputs}
        before = makers.get(entering)
        if before is not None and self.name(before) == "PAD":
            # Padding that the operator cannot say itself is part of it, if the model's
            # input is what comes before.
            inner = self.graph.tensors[before.inputs[0]].shape
            if tuple(inner)[1:] == layer.input_shape[1:]:
                chain.insert(0, before)
                entering = before.inputs[0]
        return chain, entering

    def _run_operator(
        self,
        operator: Any,
        layer: Layer,
        x: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | None,
    ) -> np.ndarray:
        name = self.name(operator)
        side = self._side(operator)
        if name == "CONV_2D":
            stored = arrange_conv(kernel, "OHWI")
        elif name == "DEPTHWISE_CONV_2D":
            stored = kernel.transpose(2, 0, 1, 3)
        elif name == "TRANSPOSE_CONV":
            stored = arrange_conv(reversed_window(kernel), "OHWI")
        elif name == "FULLY_CONNECTED":
            stored = kernel.T
        else:
            stored = kernel
        chain, entering = self._chain(operator, layer)
        new = {operator.inputs[side]: stored.astype(np.float32)}
        place = self.bias_of(operator)
        # Zeros of the file's own where the model has no bias.
        zeros = self.array(place) if bias is None else bias
        if place >= 0 and zeros is not None:
            new[place] = zeros.astype(np.float32)
        content = self._cut(chain, entering, new)
        return run(content, [x.astype(np.float32)])[0]

    def _cut(
        self,
        chain: Sequence[Any],
        entering: int,
        new: Mapping[int, np.ndarray] | None = None,
    ) -> bytes:
        """Return a file of some operators alone: as they are, or with other numbers."""
        s = schema()
        model, graph = s.ModelT(), s.SubGraphT()
        model.version, model.buffers = 3, [s.BufferT()]
        # The same codes and versions: the runtime takes the same kernels as for the
        # file.
        model.operatorCodes = self.model.operatorCodes
        graph.tensors, graph.operators = [], []
        numbers: dict[int, int] = {}

        def take(index: int) -> int:
            if index < 0 or index in numbers:
                return numbers.get(index, -1)
            tensor = copy.copy(self.graph.tensors[index])
            data = None if new is None else new.get(index)
            if data is not None:  # may be of 16 bits in the file
                tensor.type, tensor.quantization = s.TensorType.FLOAT32, None
            if data is None and index != entering:
                data = self.array(index)
            tensor.buffer = 0
            if data is not None:
                if tuple(data.shape) != tuple(tensor.shape):
                    raise ExportError(
                        f"Expected a weight of shape {data.shape} at "
                        f"{self._label(index)!r}, got {tuple(tensor.shape)} in the "
                        "file. Export it again."
                    )
                buffer = s.BufferT()
                raw = np.ascontiguousarray(data).tobytes()
                buffer.data = np.frombuffer(raw, np.uint8)
                model.buffers.append(buffer)
                tensor.buffer = len(model.buffers) - 1
            graph.tensors.append(tensor)
            numbers[index] = len(graph.tensors) - 1
            return numbers[index]

        for operator in chain:
            part = copy.deepcopy(operator)
            part.inputs = [take(i) for i in operator.inputs]
            part.outputs = [take(i) for i in operator.outputs]
            # Probes have negative sums, which an activation would hide.
            if new and hasattr(part.builtinOptions, "fusedActivationFunction"):
                part.builtinOptions.fusedActivationFunction = 0
            graph.operators.append(part)
        graph.inputs = [numbers[entering]]
        graph.outputs = [numbers[chain[-1].outputs[0]]]
        model.subgraphs = [graph]
        return pack(model)

    def runner(self, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Return one run of the whole file, to be timed."""
        ready = interpreter(self.content)
        feed(ready, inputs)
        return ready.invoke

    def caller(
        self, integers: bool = False
    ) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
        """Load the file, and return what runs it."""
        return caller(self.content, integers)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the whole file."""
        return run(self.content, inputs)
