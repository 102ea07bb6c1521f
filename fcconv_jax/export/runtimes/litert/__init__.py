"""LiteRT: writes and reads .tflite files, in float32 and in int8."""

from ...graph import FUSED, LOOPS, WHOLE
from .. import Runtime
from . import int8
from .batches import any_batch
from .reader import LiteRTFile, run
from .writer import write

__all__ = ["RUNTIME", "LiteRTFile", "run", "write"]

RUNTIME = Runtime(
    *("litert", "LiteRT", ".tflite", "litert", LiteRTFile, write),
    fused=(FUSED | WHOLE | LOOPS) - {"hard_sigmoid", "layer_norm"},
    one_batch=frozenset({"transposed"}),
    any_batch=any_batch,
    int8=int8,
)
