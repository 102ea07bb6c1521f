"""Writes OpenVINO files (.xml with .bin), and reads them back.

The graph is written as ONNX and read by OpenVINO's own front end without its fusions,
which would multiply scales into weights. On a CPU with bfloat16, OpenVINO computes in
it unless it is told otherwise: the proof is run with its hint for float32, and says
when it is needed.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ...messages.errors import ExportError
from ...messages.extras import require
from ..graph import FUSED, WHOLE, Graph
from ..layers import Layer, compute
from ..probes import probes
from ..record import FileRecord
from ..shipped import (
    Shipped,
    ShippedLayer,
    arrange_conv,
    canonical_conv,
    channels_first,
    channels_last,
    is_rows,
    reversed_window,
)
from . import Runtime
from .onnx import writer as onnx_writer

RECORD = "fcconv_jax"
HINT = "INFERENCE_PRECISION_HINT"
_TRANSPOSED = "ConvolutionBackpropData"
_CONVS = ("Convolution", "GroupConvolution", _TRANSPOSED)


def _openvino() -> Any:
    """OpenVINO, imported without the process that its telemetry forks.

    A fork beside JAX's threads may hang, and nothing is to be sent in a user's name.
    """
    name = "openvino_telemetry"
    if "openvino" in sys.modules or name in sys.modules:
        return require("openvino", "openvino", "an OpenVINO file (.xml)")
    sys.modules[name] = None  # pyright: ignore
    try:
        return require("openvino", "openvino", "an OpenVINO file (.xml)")
    finally:
        del sys.modules[name]


def write(graph: Graph, record: FileRecord, path: Path) -> None:
    """Write a graph as an .xml file and the .bin with its weights beside it.

    Raises:
      ExportError: ONNX, which it goes through, has no such operation.
    """
    ov = _openvino()
    passes = require("openvino.passes", "openvino", "an OpenVINO file (.xml)")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx_writer.write(graph, record, file, gemm=False)
        model = ov.Core().read_model(str(file))
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    model.set_rt_info(record.to_text(), [RECORD])
    # By default OpenVINO rounds weights to float16.
    ov.save_model(model, str(path), compress_to_fp16=False)


class OpenVinoFile(Shipped):
    """An .xml file with its .bin, read back.

    Args:
      path: the .xml file.
      hint: the precision that is asked of the runtime; None for its own choice.

    Raises:
      ExportError: it is none.
    """

    runtime = "OpenVINO"

    def __init__(self, path: Path, hint: str | None = "f32"):
        ov = _openvino()
        self.path = path
        self.config = {} if hint is None else {HINT: hint}
        self.core = ov.Core()
        self.model = self._load()
        record = self.record()
        self._records = {e.name: e for e in record.layers} if record else {}

    def _load(self) -> Any:
        try:
            # OpenVINO tries readers of all its formats on other text, which print.
            root = ElementTree.parse(self.path).getroot()
            if root.tag != "net":
                raise ValueError(f"expected <net>, got <{root.tag}>")
            return self.core.read_model(str(self.path))
        except (RuntimeError, SyntaxError, ValueError, LookupError) as error:
            raise ExportError(
                f"{self.path} is not an OpenVINO file: {error}. Export it again."
            ) from None

    def load(self) -> None:
        """Compile the file in OpenVINO."""
        self.core.compile_model(self.model, "CPU", self.config)

    def record(self) -> FileRecord | None:
        """Return the file's own record."""
        if not self.model.has_rt_info([RECORD]):
            return None
        return FileRecord.from_text(self.model.get_rt_info([RECORD]).value)

    def ops(self) -> Mapping[str, int]:
        """Return how many operations there are of each kind; constants are none."""
        kinds = (op.get_type_name() for op in _operations(self.model))
        return Counter(k for k in kinds if k not in ("Constant", "Parameter", "Result"))

    def constants(self) -> Sequence[np.ndarray]:
        """Return every constant."""
        return [
            op.data
            for op in _operations(self.model)
            if op.get_type_name() == "Constant"
        ]

    def output_names(self) -> Sequence[str]:
        """Return the outputs."""
        return [sorted(out.get_names())[0] for out in self.model.outputs]

    def products(self) -> Sequence[str]:
        """Products of two activations."""
        return [
            f"MatMul {_label(op)}"
            for op in _operations(self.model)
            if op.get_type_name() == "MatMul" and _side(op) is None
        ]

    def layers(self) -> Sequence[ShippedLayer]:
        """Return the operations of a weight."""
        found = []
        for name, op in self._named(self.model).items():
            kind, side = op.get_type_name(), _side(op)
            assert side is not None
            kernel = np.array(_constant(op, side).data)
            layer = self._records.get(name)
            if kind in _CONVS:
                kernel = _canonical(kernel, kind, layer.kernel_shape if layer else ())
            elif _swapped(op, side):
                kernel = kernel.swapaxes(-1, -2)
            bias = _bias(op, layer)
            array = None if bias is None else np.array(bias[1].data).reshape(-1)
            form = "conv" if kind in _CONVS else "dense"
            found.append(ShippedLayer(name, kind, form, kernel, array))
        return found

    def _named(self, model: Any) -> dict[str, Any]:
        """Return the operations of a weight by their layer.

        OpenVINO calls what comes last by the output's name: that is the one layer that
        no other operation is called by.
        """
        found = {self._layer_of(op): op for op in _linear(model)}
        unknown = [name for name in found if name not in self._records]
        missing = [name for name in self._records if name not in found]
        # Only one may have lost its name: two could be each other's.
        if len(unknown) == len(missing) == 1:
            found[missing[0]] = found.pop(unknown[0])
        return found

    def _layer_of(self, op: Any) -> str:
        """The layer of an operation: of a transposed one, its bias bears the name."""
        ends = [target.get_node() for target in op.output(0).get_target_inputs()]
        added = [node for node in ends if node.get_type_name() == "Add"]
        names = [_label(each) for each in (op, *added)]
        return next((name for name in names if name in self._records), names[0])

    def run_layer(
        self,
        layer: Layer,
        x: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | None,
    ) -> np.ndarray:
        """Run one operation, cut out of the file, with other numbers in it."""
        ov = _openvino()
        model = self._load()  # a copy: what is cut is changed
        op = self._named(model).get(layer.name)
        if op is None:
            raise ExportError(
                f"{self.path} has no layer {layer.name!r}. Export it again."
            )
        kind, side = op.get_type_name(), _side(op)
        assert side is not None
        stored = _constant(op, side).data
        conv = kind in _CONVS
        if conv:
            rows = is_rows(stored, layer.kernel_shape)
            # Stored on rows of pixels, see as_rows in passes/nchw.py.
            if rows:
                n, h, w, c = x.shape
                x = x.reshape(n, 1, h, w * c)
                laid = arrange_conv(kernel, "OHWI").reshape(stored.shape)
            else:
                x = x.transpose(channels_first(x.ndim))
                laid = arrange_conv(kernel, "OIHW")
                if kind == _TRANSPOSED:
                    laid = arrange_conv(reversed_window(kernel), "IOHW")
                laid = laid.reshape(stored.shape)
        else:
            options = layer.options
            laid = kernel
            if layer.op == "matmul":
                laid = kernel.swapaxes(-1, -2) if _adjoint(options, side) else kernel
                x = x.swapaxes(-1, -2) if _adjoint(options, 1 - side) else x
            laid = laid.swapaxes(-1, -2) if _swapped(op, side) else laid
            if laid.shape != stored.shape:
                raise ExportError(
                    f"Expected a weight of shape {laid.shape}, got {stored.shape} in "
                    "the file. Export it again."
                )
        ops = require("openvino.opset13", "openvino", "running an OpenVINO file")
        floats = stored.dtype
        entering = ops.parameter(list(x.shape), floats)
        op.input(1 - side).replace_source_output(entering.output(0))
        weight = ops.constant(np.ascontiguousarray(laid, floats))
        op.input(side).replace_source_output(weight.output(0))
        last = op
        added = _bias(op, layer)
        if added is not None and bias is not None:
            last, old, place = added
            new = ops.constant(bias.astype(floats).reshape(old.data.shape))
            last.input(place).replace_source_output(new.output(0))
        cut = ov.Model([last.output(0)], [entering], "layer")
        y = self._run(cut, [x.astype(floats)])[0]
        return y.transpose(channels_last(y.ndim)) if conv else y

    def _run(self, model: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        compiled = self.core.compile_model(model, "CPU", self.config)
        found = compiled([np.ascontiguousarray(x) for x in inputs])
        return [np.array(found[out]) for out in compiled.outputs]

    def runner(self, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Return one run of the whole file, to be timed."""
        compiled = self.core.compile_model(self.model, "CPU", self.config)
        request = compiled.create_infer_request()
        given = [np.ascontiguousarray(x) for x in inputs]
        return lambda: request.infer(given) and None

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the whole file."""
        return self._run(self.model, inputs)

    def remarks(self, record: FileRecord) -> list[str]:
        """Return whether the runtime lowers the precision if it is left to itself."""
        own = OpenVinoFile(self.path, hint=None)
        half = {x.name for x in self.layers() if x.kernel.dtype.itemsize < 4}
        for layer in record.layers:
            for probe in () if layer.name in half else probes(layer):
                want = compute(layer, probe.x, probe.kernel, probe.bias)
                got = own.run_layer(layer, probe.x, probe.kernel, probe.bias)
                if not np.array_equal(got.astype(np.float64), want):
                    used = "a lower precision"
                    with contextlib.suppress(RuntimeError):
                        compiled = self.core.compile_model(self.model, "CPU", {})
                        used = compiled.get_property(HINT).get_type_name()
                    return [
                        f"OpenVINO by default computes in {used} here without being "
                        f"asked (layer {layer.name!r} is not exact then): compile the "
                        f'file with {{"{HINT}": "f32"}}, as this proof did'
                    ]
        return []


def _operations(model: Any) -> Iterator[Any]:
    """Yield the operations of a model, and those of its loops' bodies."""
    for op in model.get_ordered_ops():
        yield op
        if op.get_type_name() == "TensorIterator":
            yield from _operations(op.get_body())


def _linear(model: Any) -> list[Any]:
    return [
        op
        for op in _operations(model)
        if op.get_type_name() in (*_CONVS, "MatMul") and _side(op) is not None
    ]


def _constant(op: Any, side: int) -> Any:
    return op.input(side).get_source_output().get_node()


def _side(op: Any) -> int | None:
    """Return which operand is the weight; None if both are activations."""
    sides = (1, 0) if op.get_type_name() == "MatMul" else (1,)
    for side in sides:
        if _constant(op, side).get_type_name() == "Constant":
            return side
    return None


def _bias(op: Any, layer: Layer | None) -> tuple[Any, Any, int] | None:
    """The addition of a layer's bias, its constant, and which operand that is."""
    if layer is None or not layer.has_bias:
        return None
    for target in op.output(0).get_target_inputs():
        add = target.get_node()
        if add.get_type_name() != "Add":
            continue
        for place in (0, 1):
            other = _constant(add, place)
            if other.get_type_name() == "Constant":
                return add, other, place
    return None


def _swapped(op: Any, side: int) -> bool:
    return bool(op.get_attributes()["transpose_b" if side == 1 else "transpose_a"])


def _adjoint(options: Mapping[str, Any], side: int) -> bool:
    return bool(options["adj_b" if side == 1 else "adj_a"])


def _canonical(kernel: np.ndarray, kind: str, shape: Sequence[int]) -> np.ndarray:
    if kind == "GroupConvolution":  # (G, O/G, I, H, W)
        kernel = kernel.reshape(-1, *kernel.shape[2:])
    elif kind == _TRANSPOSED:
        return reversed_window(canonical_conv(kernel, "IOHW"))
    elif is_rows(kernel, shape):
        return canonical_conv(kernel.reshape(kernel.shape[0], *shape[:-1]), "OHWI")
    return canonical_conv(kernel, "OIHW")


def _label(op: Any) -> str:
    """Return an operation's name, without what keeps names apart."""
    return op.get_friendly_name().partition("@")[0]


RUNTIME = Runtime(
    *("openvino", "OpenVINO", ".xml", OpenVinoFile, write),
    beside=".bin",
    images="first",
    open_sizes=frozenset({"any_batch", "any_size"}),
    # It reads ONNX's Scan over arrays; Loop, If and a Scan that counts fail or differ.
    # OpenVINO's reader takes an LpNormalization apart, into more than it replaces.
    fused=(FUSED | WHOLE | {"scan"}) - {"l2_normalize", "silu"},
)
