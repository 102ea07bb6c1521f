"""ONNX: writes .onnx files, and reads them back with ONNX Runtime."""

from ...graph import FUSED, LOOPS, WHOLE
from .. import Runtime
from .int8 import quantize
from .reader import OnnxFile
from .writer import write

RUNTIME = Runtime(
    *("onnx", "ONNX", ".onnx", OnnxFile, write),
    images="first",
    gemm=True,
    open_sizes=frozenset({"any_batch", "any_size"}),
    quantize=quantize,
    weights=frozenset({"float16", "bfloat16"}),
    fused=(FUSED | WHOLE | LOOPS) - {"silu"},
)
