"""Reads Core ML packages back: their weights and geometry; they are not run."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ....messages.extras import require
from ...layers import Layer
from ...record import FileRecord
from ...shipped import (
    Shipped,
    ShippedLayer,
    canonical_conv,
    crops,
    is_rows,
    reversed_window,
)

RECORD = "fcconv_jax"
_CONVS = ("conv", "conv_transpose")


def coremltools() -> Any:
    """coremltools, without its remarks on versions that it does not know."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require("coremltools", "coreml", "a Core ML package (.mlpackage)")


@contextlib.contextmanager
def _untouched(path: Path) -> Iterator[Path]:
    """Yield a package with the same data, as coremltools rewrites a manifest it reads.

    That would repair some damage before the fingerprint is compared, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.mkdir()
        (copy / "Data").symlink_to((path / "Data").absolute())
        shutil.copyfile(path / "Manifest.json", copy / "Manifest.json")
        yield copy


class CoreMlFile(Shipped):
    """An .mlpackage, read back; it is not run.

    Raises:
      ExportError: it is none.
    """

    runtime = "Core ML"
    moving = ("transpose", "reshape")
    executed = False

    def __init__(self, path: Path):
        ct = coremltools()
        self.path = path
        module = "coremltools.converters.mil.frontend.milproto.load"
        load = require(module, "coreml", "reading a Core ML package")
        try:
            with warnings.catch_warnings(), _untouched(path) as copy:
                warnings.simplefilter("ignore")
                # Not loaded: that compiles the model by Core ML, which only macOS has.
                self.model = ct.models.MLModel(str(copy), skip_model_load=True)
                self.spec = self.model.get_spec()
                self.program = load.load(
                    *(self.spec, self.spec.specificationVersion),
                    self.model.weights_dir,
                )
        except Exception as error:  # coremltools' own kinds
            raise ExportError(
                f"{path} is not a Core ML package: {error}. Export it again."
            ) from None
        self.operations = list(self.program.functions["main"].operations)

    def load(self) -> None:
        """Nothing more: Core ML does not run here, coremltools has read the package."""

    def record(self) -> FileRecord | None:
        """Return the file's own record."""
        text = self.model.user_defined_metadata.get(RECORD)
        return None if text is None else FileRecord.from_text(text)

    def ops(self) -> Mapping[str, int]:
        """Return how many operations there are of each kind; constants are none."""
        found = Counter(op.op_type for op in self.operations)
        # They compute nothing: an `identity` gives an output its name.
        del found["const"], found["identity"]
        return found

    def constants(self) -> Sequence[np.ndarray]:
        """Return every constant."""
        found = [op.outputs[0].val for op in self.operations if op.op_type == "const"]
        return [array for array in found if isinstance(array, np.ndarray)]

    def output_names(self) -> Sequence[str]:
        """Return the outputs."""
        return [var.name for var in self.program.functions["main"].outputs]

    def products(self) -> Sequence[str]:
        """Products of two activations."""
        return [f"matmul {op.name}" for op in self.operations if _is_product(op)]

    def layers(self) -> Sequence[ShippedLayer]:
        """The operations of a weight, by the order in which the record has them."""
        record = self.record()
        wanted = list(record.layers) if record else []
        found = []
        for number, op in enumerate(self._linear()):
            layer = wanted[number] if number < len(wanted) else None
            name = op.name if layer is None else layer.name
            found.append(_shipped(op, name, layer))
        return found

    def _linear(self) -> list[Any]:
        """Return the operations of a weight, in the order in which they run."""
        return [
            op
            for op in self.operations
            if op.op_type in (*_CONVS, "linear") or _is_weighted_product(op)
        ]

    def geometry_failures(self, layer: Layer) -> list[str]:
        """Where a convolution's geometry is another than the model's, as read."""
        record = self.record()
        names = [each.name for each in record.layers] if record else []
        op = self._linear()[names.index(layer.name)]
        if layer.op != "conv" or op.op_type not in _CONVS:
            return []
        options = layer.options
        strides = list(options.get("spread", options["strides"]))
        padding = options["padding"]
        if "spread" in options:
            padding = crops(layer.kernel_shape, padding)
        if is_rows(np.asarray(op.weight.val), layer.kernel_shape):
            # A row holds the channels of all its pixels: one pixel further is that many
            # entries.
            strides[1] *= layer.kernel_shape[2]
        wanted = {
            "strides": strides,
            "dilations": list(options["dilation"]),
            "groups": options["groups"],
            "pad": [n for pair in padding for n in pair],
        }
        found = []
        for name, want in wanted.items():
            got = np.asarray(getattr(op, name).val).tolist()
            if got != want:
                found.append(f"expected {name} {want}, the file has {got}")
        if op.pad_type.val != "custom":
            found.append(f"expected pad_type 'custom', got {op.pad_type.val!r}")
        return found


def _is_product(op: Any) -> bool:
    return op.op_type == "matmul" and op.x.val is None and op.y.val is None


def _is_weighted_product(op: Any) -> bool:
    return op.op_type == "matmul" and not _is_product(op)


def _shipped(op: Any, name: str, layer: Layer | None) -> ShippedLayer:
    if op.op_type == "matmul":
        kernel = np.asarray(op.y.val if op.x.val is None else op.x.val)
        if layer is not None:
            options = layer.options
            swapped = options["adj_a" if options["side"] == 0 else "adj_b"]
            kernel = kernel.swapaxes(-1, -2) if swapped else kernel
        return ShippedLayer(name, op.op_type, "dense", kernel, None)
    kernel, bias = np.asarray(op.weight.val), op.bias
    array = None if bias is None or bias.val is None else np.asarray(bias.val)
    if op.op_type == "linear":
        return ShippedLayer(name, "linear", "dense", kernel.T, array)
    if layer is not None and layer.op == "conv" and is_rows(kernel, layer.kernel_shape):
        inner = layer.kernel_shape[:-1]
        kernel = canonical_conv(kernel.reshape(kernel.shape[0], *inner), "OHWI")
    elif op.op_type == "conv_transpose":
        kernel = reversed_window(canonical_conv(kernel, "IOHW"))
    else:
        kernel = canonical_conv(kernel, "OIHW")
    return ShippedLayer(name, op.op_type, "conv", kernel, array)
