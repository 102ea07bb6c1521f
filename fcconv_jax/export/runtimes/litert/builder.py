"""Collects the tensors, buffers and operators of one LiteRT file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from ....messages.errors import ExportError
from ...graph import Value, same_content
from .schema import DTYPES

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
    "HARD_SWISH": "HardSwishOptions",
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
# Of operators that the runtime does not have in version 1.
_VERSIONS = {"BROADCAST_TO": 2, "DEQUANTIZE": 3, "TRANSPOSE_CONV": 4}


class Builder:
    """Collects the tensors, buffers and operators of one model."""

    def __init__(self, s: Any):
        self.s = s
        # The schema wants buffer 0 empty: it stands for tensors without data.
        self.buffers = [s.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[Any] = []
        self.known: dict[Any, int] = {}
        self.names: dict[str, int] = {}

    def buffer(self, data: bytes) -> int:
        """Return the index of a new buffer."""
        buffer = self.s.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def tensor(self, value: Value, name: str = "") -> int:
        """Return the index of a value's tensor, made on first use."""
        if value in self.known:
            return self.known[value]
        return self._tensor(value, value, name)

    def _tensor(self, key: Any, value: Value, name: str) -> int:
        if value.stored is not None:
            return self._dequantized(key, value, name)
        tensor = self.s.TensorT()
        tensor.shape, tensor.hasRank = list(value.shape), True
        # The signature has -1 for an open size; the shape is that of the example.
        if value.dims not in (None, value.shape):
            tensor.shapeSignature = [
                -1 if isinstance(n, str) else n for n in value.dims
            ]
        kind = DTYPES.get(str(value.dtype))
        # Weights may have 16 bits, as they are dequantized at loading; no kernel
        # computes in 16.
        if kind is None or (kind == "FLOAT16" and value.data is None):
            other = "iree" if str(value.dtype) == "bfloat16" else "onnx"
            raise ExportError(
                f"LiteRT's kernels don't support {value.dtype}, found at {name!r}. "
                f"Cast params and inputs to float32, or pass runtime={other!r}."
            )
        tensor.type = getattr(self.s.TensorType, kind)
        if value.data is not None:
            same = same_content(value.data)
            if same in self.known:
                self.known[key] = self.known[same]
                return self.known[key]
            if same is not None:
                self.known[same] = len(self.tensors)
            tensor.buffer = self.buffer(np.ascontiguousarray(value.data).tobytes())
            name = name or (value.source.leaf if value.source else "constant")
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        # Readers find layers by name, and cut off what keeps equal names apart.
        tensor.name = name if not count else f"{name};{count}"
        self.tensors.append(tensor)
        self.known[key] = len(self.tensors) - 1
        return self.known[key]

    def _dequantized(self, key: Any, value: Value, name: str) -> int:
        """Return the index of a constant of 16 bits, brought to float32 at loading."""
        assert value.data is not None
        assert value.stored is not None
        data = value.data.astype(value.stored)
        half = Value(value.shape, value.stored, data, value.source)
        out = Value(value.shape, value.dtype)
        self.op("DEQUANTIZE", [self.tensor(half, name)], [out], "DequantizeOptions")
        self.known[key] = self.known[out]
        return self.known[key]

    def constant(
        self, data: ArrayLike, dtype: DTypeLike = np.int32, name: str = ""
    ) -> int:
        """Return the index of a constant's tensor; equal small ones share one."""
        array = np.asarray(data, dtype)
        key = (array.shape, str(array.dtype), array.tobytes())
        if key in self.known:
            return self.known[key]
        value = Value(tuple(array.shape), array.dtype, array)
        return self._tensor(key, value, name or "constant")

    def arranged(
        self, value: Value, move: Callable[[np.ndarray], np.ndarray], tag: str
    ) -> int:
        """Return the index of a weight's tensor, laid out as an operation wants it."""
        key = (value, tag)
        if key in self.known:
            return self.known[key]
        assert value.data is not None
        data = np.ascontiguousarray(move(value.data))
        laid = Value(tuple(data.shape), value.dtype, data, stored=value.stored)
        name = value.source.leaf if value.source else "+".join(sorted(value.leaves))
        return self._tensor(key, laid, name or "weight")

    def code(self, name: str) -> int:
        """Return the index of an operator's code."""
        number = getattr(self.s.BuiltinOperator, name)
        for index, code in enumerate(self.codes):
            if code.builtinCode == number:
                return index
        code = self.s.OperatorCodeT()
        # The older field has one byte; 127 refers readers to the newer one.
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
        """Append an operator."""
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
        """Return the number of a fused activation."""
        return getattr(self.s.ActivationFunctionType, name or "NONE")
