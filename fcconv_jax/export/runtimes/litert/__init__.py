"""LiteRT: writes and reads .tflite files, in float32 and in int8."""

from .. import Runtime
from . import int8
from .reader import LiteRTFile, run
from .writer import write

__all__ = ["RUNTIME", "LiteRTFile", "run", "write"]

RUNTIME = Runtime(
    *("litert", "LiteRT", ".tflite", "litert", LiteRTFile, write),
    fused=frozenset({"elu", "gelu", "hard_swish", "leaky_relu"}),
    int8=int8,
)
