"""Collects the nodes, initializers and names of one ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ....messages.errors import ExportError
from ...graph import Value, same_content

_DTYPES = ("float32", "float64", "float16", "int32", "int64", "int8", "uint8", "bool")


class Builder:
    """Collects nodes and initializers of one model."""

    def __init__(self, onnx: Any):
        self.onnx, self.helper = onnx, onnx.helper
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.known: dict[Any, str] = {}
        self.names: dict[str, int] = {}

    def info(self, value: Value, name: str) -> Any:
        """Return the description of an input or output."""
        kind = self.helper.np_dtype_to_tensor_dtype(self.checked(value.dtype))
        return self.helper.make_tensor_value_info(name, kind, value.dims or value.shape)

    def checked(self, dtype: np.dtype) -> np.dtype:
        """Return a dtype that ONNX Runtime computes in, or raise an ExportError."""
        if str(dtype) not in _DTYPES:
            raise ExportError(
                f"ONNX Runtime's CPU kernels don't support {dtype}. Cast params and "
                "inputs to float32, or pass runtime='iree'."
            )
        return dtype

    def unique(self, name: str) -> str:
        """Return a name that no other value has, from one that several may want."""
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        return name if not count else f"{name};{count}"

    def name(self, value: Value, wanted: str = "") -> str:
        """A value's name, given on first sight; a constant becomes an initializer."""
        if value in self.known:
            return self.known[value]
        if value.data is not None:
            label = value.source.leaf if value.source else "constant"
            return self.array(value, value.data, wanted or label, value.stored)
        self.known[value] = self.unique(wanted or "value")
        return self.known[value]

    def array(
        self, key: Any, data: Any, label: str, stored: np.dtype | None = None
    ) -> str:
        """Return the name of an initializer, or of its cast from 16 bits."""
        if stored is not None:
            if key not in self.known:
                half = self._initializer((key, stored), data.astype(stored), label)
                to = self.onnx.TensorProto.FLOAT
                self.known[key] = self.add("Cast", [half], self.unique(label), to=to)
            return self.known[key]
        array = np.asarray(data, order="C")  # ascontiguousarray gives scalars an axis
        self.checked(array.dtype)
        return self._initializer(key, array, label)

    def _initializer(self, key: Any, array: np.ndarray, label: str) -> str:
        same = same_content(array)
        if key not in self.known and same in self.known:
            self.known[key] = self.known[same]
        if key not in self.known:
            self.known[key] = self.unique(label)
            if same is not None:
                self.known[same] = self.known[key]
            made = self.onnx.numpy_helper.from_array(array, self.known[key])
            self.initializers.append(made)
        return self.known[key]

    def ints(self, numbers: ArrayLike) -> str:
        """Return the name of an initializer of int64, as shapes and axes are."""
        data = np.asarray(numbers, np.int64)
        return self.array((data.shape, data.tobytes()), data, "numbers")

    def floats(self, numbers: np.ndarray) -> str:
        """Return the name of an initializer of scales."""
        return self.array((numbers.shape, numbers.tobytes()), numbers, "scales")

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        out: str,
        label: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node and return the name of its output."""
        self.nodes.append(
            self.helper.make_node(
                op, list(inputs), [out], self.unique(f"{label or op}@"), **attributes
            )
        )
        return out

    def shape(self, dims: Sequence[Any]) -> str:
        """The name of a shape, of which some sizes may be those of other values."""
        if all(isinstance(n, int) for n in dims):
            return self.ints(dims)
        parts = []
        for n in dims:
            if isinstance(n, int):
                parts.append(self.ints([n]))
                continue
            (value, axis), size = n, self.unique("size")
            name = self.name(value)
            parts.append(self.add("Shape", [name], size, start=axis, end=axis + 1))
        return self.add("Concat", parts, self.unique("shape"), axis=0)
