"""Core ML: writes .mlpackage folders and reads them back; Apple's systems run them."""

from ...graph import FUSED
from .. import Runtime
from .reader import CoreMlFile
from .writer import write

RUNTIME = Runtime(
    *("coreml", "Core ML", ".mlpackage", CoreMlFile, write),
    images="first",
    executed=False,
    fused=(FUSED | {"layer_norm", "transposed"})
    - {"celu", "hard_swish", "mish", "prelu", "selu"},
)
