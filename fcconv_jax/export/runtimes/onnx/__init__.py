"""ONNX: writes .onnx files, and reads them back with ONNX Runtime."""

from ...graph import FUSED, WHOLE
from .. import Runtime
from .reader import OnnxFile
from .writer import write

RUNTIME = Runtime(
    *("onnx", "ONNX", ".onnx", "onnx", OnnxFile, write),
    images="first",
    fused=FUSED | WHOLE,
)
