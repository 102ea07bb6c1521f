"""LiteRT: writes and reads .tflite files, in float32 and in int8."""

from ...graph import FUSED, LOOPS, WHOLE
from .. import Runtime
from .int8 import quantize
from .reader import LiteRTFile
from .session import run
from .writer import write

__all__ = ["RUNTIME", "LiteRTFile", "run", "write"]

RUNTIME = Runtime(
    *("litert", "LiteRT", ".tflite", LiteRTFile, write),
    fused=(FUSED | WHOLE | LOOPS)
    - {"celu", "hard_sigmoid", "layer_norm", "mish", "rms_norm", "selu", "silu"}
    - {"softplus", "softsign"},
    # A scan's stacked results are filled with zeros at first: that shape is fixed.
    one_batch=frozenset({"transposed", "scan"}),
    open_sizes=frozenset({"any_batch"}),
    weights=frozenset({"float16"}),
    quantize=quantize,
)
