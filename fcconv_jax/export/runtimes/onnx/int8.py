"""int8 ONNX files (QDQ), made by ONNX Runtime's own quantizer."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ....messages.extras import require
from ....messages.progress import Progress


def quantize(
    content: bytes,
    names: Sequence[str],
    examples: Sequence[Sequence[np.ndarray]],
    show: Progress,
) -> bytes:
    """A float file with QuantizeLinear and DequantizeLinear around its operators.

    Weights have a scale for each feature, activations the range of all the examples.

    Args:
      content: of the float file.
      names: of its inputs.
      examples: for each call, its inputs.
      show: takes the progress.

    Raises:
      MissingExtraError: onnxruntime is not installed.
      ExportError: the quantizer cannot take the file.
    """
    onnx = require("onnx", "onnx", "an int8 ONNX file")
    quantization = require("onnxruntime.quantization", "onnx", "an int8 ONNX file")

    class Reader(quantization.CalibrationDataReader):
        done = 0

        def get_next(self) -> dict[str, Any] | None:
            show("int8: calibration", self.done, len(examples))
            if self.done == len(examples):
                return None
            self.done += 1
            return dict(zip(names, examples[self.done - 1], strict=True))

    with tempfile.TemporaryDirectory() as folder, _quiet():
        made = Path(folder) / "int8.onnx"
        try:
            model = onnx.load_model_from_string(content)
            _own_weights(model.graph)
            quantization.quantize_static(
                model,
                made,
                Reader(),
                per_channel=True,
                extra_options={
                    # Else it changes scales of weights; a bias needs 32 bits anyway.
                    "QDQDisableWeightAdjustForInt32Bias": True,
                },
            )
        except Exception as error:  # the quantizer's and the runtime's own kinds
            raise ExportError(
                f"ONNX Runtime's quantizer can't process the model: {error}. Export in "
                "float32."
            ) from error
        return made.read_bytes()


def _own_weights(graph: Any) -> None:
    """Give each layer that shares its weights with others a copy of them.

    ONNX Runtime 1.32 fails to load an int8 file whose layers share weights: "Attempt to
    replace the existing tensor".
    """
    arrays = {each.name: each for each in graph.initializer}
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        for place, name in enumerate(node.input):
            if name in seen:
                copy = graph.initializer.add()
                copy.CopyFrom(arrays[name])
                copy.name = node.input[place] = f"{name};layer{number}"
            elif name in arrays:
                seen.add(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the quantizer's advice to optimize the graph first, which is done here."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
