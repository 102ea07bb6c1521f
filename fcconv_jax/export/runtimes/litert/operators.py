"""Emits the operators of LiteRT for a graph's operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ...graph import Node, Value
from ...passes.symbolic import END, REST, depends
from ...shipped import reversed_window
from .builder import Builder
from .schema import DTYPES

_NAMESAKES = """
    abs add ceil cos div elu exp floor hard_swish log logistic mul neg pow relu
    relu6 round rsqrt sign sin sqrt sub tanh
""".split()
_PLAIN = {op: op.upper() for op in _NAMESAKES} | {
    "and": "LOGICAL_AND",
    "eq": "EQUAL",
    "ge": "GREATER_EQUAL",
    "gt": "GREATER",
    "le": "LESS_EQUAL",
    "lt": "LESS",
    "max": "MAXIMUM",
    "min": "MINIMUM",
    "ne": "NOT_EQUAL",
    "not": "LOGICAL_NOT",
    "or": "LOGICAL_OR",
    "select": "SELECT_V2",
}
_REDUCTIONS = {
    "reduce_sum": "SUM",
    "reduce_mean": "MEAN",
    "reduce_max": "REDUCE_MAX",
    "reduce_min": "REDUCE_MIN",
    "reduce_prod": "REDUCE_PROD",
}


class Emitter(Builder):
    """Appends the operators of a graph's nodes."""

    def emit(self, node: Node, fused: str = "") -> None:
        """Append what a node is in LiteRT."""
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
                f"LiteRT doesn't support {node.op!r}{_HINTS.get(node.op, '')}. Pass "
                "runtime='onnx'."
            )

    def _conv(self, node: Node, fused: str) -> None:
        x, kernel = node.inputs[:2]
        p = node.attrs
        if "spread" in p:
            self._transposed(node, fused)
            return
        window, groups = kernel.shape[:-2], p["groups"]
        same = tuple(
            _same(n, k, s, d)
            for n, k, s, d in zip(x.shape[1:], window, p["strides"], p["dilation"])
        )
        entering = self.tensor(x)
        padding = "SAME" if tuple(p["padding"]) == same else "VALID"
        if not any(map(any, p["padding"])):
            padding = "VALID"
        # The schema has two kinds of padding and no numbers: anything else is a pad in
        # front.
        elif padding == "VALID":
            entering = self._padded(x, p["padding"])
        # An operator of its own, in which every channel is a group.
        depthwise = groups > 1 and groups == x.shape[-1]
        options = {
            "padding": getattr(self.s.Padding, padding),
            "fusedActivationFunction": self.activation(fused),
        }
        for axis, step, spread in zip("WHD", p["strides"][::-1], p["dilation"][::-1]):
            options |= {f"stride{axis}": step, f"dilation{axis}Factor": spread}
        bias = self._bias(node, kernel.shape[-1])
        if len(window) == 3:
            if groups > 1:
                raise ExportError(
                    "LiteRT doesn't support groups in three dimensions, found at "
                    f"{node.name!r}. Pass a path that ends in .onnx."
                )
            weight = self.arranged(kernel, lambda k: k, "DHWIO")
            name, kind = "CONV_3D", "Conv3DOptions"
        elif depthwise:
            weight = self.arranged(
                kernel, lambda k: k.reshape(1, *window, k.shape[-1]), "depthwise"
            )
            options["depthMultiplier"] = kernel.shape[-1] // groups
            name, kind = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        else:
            weight = self.arranged(kernel, lambda k: k.transpose(3, 0, 1, 2), "OHWI")
            name, kind = "CONV_2D", "Conv2DOptions"
        self.op(name, [entering, weight, bias], node.outputs, kind, **options)

    def _transposed(self, node: Node, fused: str) -> None:
        kernel, spread = node.inputs[1], node.attrs["spread"]
        weight = self.arranged(
            kernel, lambda k: reversed_window(k).transpose(3, 0, 1, 2), "reversed"
        )
        # The schema names the forward convolution's padding: VALID takes nothing off
        # the result.
        whole = tuple((k - 1, k - 1) for k in kernel.shape[:2])
        padding = "VALID" if node.attrs["padding"] == whole else "SAME"
        inputs = [self.constant(node.out.shape), weight, self.tensor(node.inputs[0])]
        inputs += [self.tensor(bias) for bias in node.inputs[2:]]
        self.op(
            *("TRANSPOSE_CONV", inputs, node.outputs, "TransposeConvOptions"),
            padding=getattr(self.s.Padding, padding),
            strideH=spread[0],
            strideW=spread[1],
            fusedActivationFunction=self.activation(fused),
        )

    def _padded(self, x: Value, padding: Any, fill: float = 0.0) -> int:
        """Append a pad of the spatial axes, and return its output's tensor."""
        widths = ((0, 0), *padding, (0, 0))
        shape = [n + a + b for n, (a, b) in zip(x.shape, widths)]
        wide = Value(tuple(shape), x.dtype)
        made = self.tensor(wide, "pad")
        self._pad(Node("pad", [x], [wide], {"widths": widths, "value": fill}), "")
        return made

    def _dense(self, node: Node, fused: str) -> None:
        x, kernel = node.inputs[:2]
        # keepNumDims: else the operator joins all axes but the last into rows.
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
            # The schema's number for an operand that is left out.
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
        # The runtime's own padding does not count in a mean.
        own = node.op == "pool_max" or p.get("valid", False)
        if not any(map(any, p["padding"])):
            padding = "VALID"
        elif padding == "VALID" or not own:
            fill = np.finfo(np.float32).min if node.op == "pool_max" else 0
            entering, padding = self._padded(x, p["padding"], float(fill)), "VALID"
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
        shape = list(node.attrs.get("dims", node.out.shape))
        if len({*shape} - {*node.out.shape, REST}):  # more than one size is open
            raise depends("reshape")
        inputs = [self.tensor(node.inputs[0]), self.constant(shape)]
        self.op("RESHAPE", inputs, node.outputs, "ReshapeOptions", newShape=shape)

    def _transpose(self, node: Node, fused: str) -> None:
        perm = self.constant(node.attrs["perm"])
        self.op("TRANSPOSE", [self.tensor(node.inputs[0]), perm], node.outputs)

    def _broadcast(self, node: Node, fused: str) -> None:
        if "dims" in node.attrs:
            raise depends("broadcast")
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
            endMask=sum((n == END) << axis for axis, n in enumerate(p["stop"])),
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
        # One axis at a time: several must be adjacent.
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

    def _log_softmax(self, node: Node, fused: str) -> None:
        x = self.tensor(node.inputs[0])
        self.op("LOG_SOFTMAX", [x], node.outputs, "LogSoftmaxOptions")

    def _l2_normalize(self, node: Node, fused: str) -> None:
        x = self.tensor(node.inputs[0])
        self.op("L2_NORMALIZATION", [x], node.outputs, "L2NormOptions")

    def _one_hot(self, node: Node, fused: str) -> None:
        ids, depth = self.tensor(node.inputs[0]), self.constant(node.attrs["depth"])
        values = [self.constant(value, np.float32) for value in (1, 0)]
        inputs = [ids, depth, *values]
        self.op("ONE_HOT", inputs, node.outputs, "OneHotOptions", axis=-1)

    def _prelu(self, node: Node, fused: str) -> None:
        self.op("PRELU", [self.tensor(v) for v in node.inputs], node.outputs)

    def _resize(self, node: Node, fused: str) -> None:
        inputs = [self.tensor(node.inputs[0]), self.constant(node.attrs["size"])]
        name, kind = "RESIZE_BILINEAR", "ResizeBilinearOptions"
        if node.attrs["mode"] == "nearest":
            name, kind = "RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions"
        aligned = node.attrs["mode"] == "aligned"
        corners = {"alignCorners": aligned, "halfPixelCenters": not aligned}
        self.op(name, inputs, node.outputs, kind, **corners)

    def _depth_to_space(self, node: Node, fused: str) -> None:
        name, kind = "DEPTH_TO_SPACE", "DepthToSpaceOptions"
        if node.op == "space_to_depth":
            name, kind = "SPACE_TO_DEPTH", "SpaceToDepthOptions"
        inputs = [self.tensor(node.inputs[0])]
        self.op(name, inputs, node.outputs, kind, blockSize=node.attrs["blocksize"])

    _space_to_depth = _depth_to_space

    def _gelu(self, node: Node, fused: str) -> None:
        self.op(
            *("GELU", [self.tensor(node.inputs[0])], node.outputs, "GeluOptions"),
            approximate=node.attrs["approximate"],
        )

    def _leaky_relu(self, node: Node, fused: str) -> None:
        self.op(
            *("LEAKY_RELU", [self.tensor(node.inputs[0])]),
            *(node.outputs, "LeakyReluOptions"),
            alpha=node.attrs["alpha"],
        )

    def _cast(self, node: Node, fused: str) -> None:
        x = node.inputs[0]
        types = self.s.TensorType
        self.op(
            *("CAST", [self.tensor(x)], node.outputs, "CastOptions"),
            inDataType=getattr(types, DTYPES[str(x.dtype)]),
            outDataType=getattr(types, DTYPES[str(node.out.dtype)]),
        )

    def _argmax(self, node: Node, fused: str) -> None:
        name, kind = ("ARG_MAX", "ArgMaxOptions")
        if node.op == "argmin":
            name, kind = ("ARG_MIN", "ArgMinOptions")
        inputs = [self.tensor(node.inputs[0]), self.constant(node.attrs["axis"])]
        types = self.s.TensorType
        out = getattr(types, DTYPES[str(node.out.dtype)])
        self.op(name, inputs, node.outputs, kind, outputType=out)

    _argmin = _argmax

    def _top_k(self, node: Node, fused: str) -> None:
        inputs = [self.tensor(node.inputs[0]), self.constant(np.int32(node.attrs["k"]))]
        self.op("TOPK_V2", inputs, node.outputs, "TopKV2Options")

    def _cumsum(self, node: Node, fused: str) -> None:
        inputs = [self.tensor(node.inputs[0]), self.constant(node.attrs["axis"])]
        back = node.attrs["reverse"]
        self.op("CUMSUM", inputs, node.outputs, "CumsumOptions", reverse=back)


_HINTS = {
    "erf": ". Use nn.gelu, or nn.gelu(approximate=False) as a whole",
    "rem": ". Compute the remainder before the model",
}


def _same(n: int, k: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return the padding that the runtime adds where it is told SAME."""
    span = (k - 1) * dilation + 1
    total = max((-(-n // stride) - 1) * stride + span - n, 0)
    return total // 2, total - total // 2
