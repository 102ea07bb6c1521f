"""The files that can be written: the name of each, its extra, its suffix, its room."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Literal

from ..errors import ExportError
from .shipped import Shipped

Name = Literal["litert", "onnx", "openvino", "iree", "coreml", "stablehlo"]
Images = Literal["last", "first"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file.

    Args:
      name: as ``to=`` takes it.
      title: as people call it.
      suffix: of its files.
      extra: of this package, which installs what writes and runs it.
      writer: the module of this room that has ``write(graph, record, path)``.
      reader: the module and the class that reads it back.
      images: where images have their channels.
      executed: whether its runtime runs here.
      from_program: whether it is written from JAX's own program, not from a graph.
    """

    name: Name
    title: str
    suffix: str
    extra: str
    writer: str
    reader: tuple[str, str]
    images: Images
    executed: bool = True
    from_program: bool = False

    def open(self, path: Path) -> Shipped:
        """Reads a file back."""
        module, name = self.reader
        made: Shipped = getattr(_module(module), name)(path)
        return made

    def room(self) -> Any:
        """The module that writes it."""
        return _module(self.writer)


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            *("litert", "LiteRT", ".tflite", "litert", "litert"),
            ("litert_file", "LiteRTFile"),
            "last",
        ),
        Target(
            *("onnx", "ONNX", ".onnx", "onnx", "onnx_writer"),
            ("onnx_file", "OnnxFile"),
            "first",
        ),
        Target(
            *("openvino", "OpenVINO", ".xml", "openvino", "openvino_file"),
            ("openvino_file", "OpenVinoFile"),
            "first",
        ),
        Target(
            *("iree", "IREE", ".vmfb", "iree", "iree_file"),
            ("iree_file", "IreeFile"),
            "last",
            from_program=True,
        ),
        Target(
            *("coreml", "Core ML", ".mlpackage", "coreml", "coreml_file"),
            ("coreml_file", "CoreMlFile"),
            "first",
            executed=False,
        ),
        Target(
            *("stablehlo", "StableHLO", ".stablehlo", "stablehlo", "stablehlo_file"),
            ("stablehlo_file", "StableHloFile"),
            "last",
            from_program=True,
        ),
    )
}


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
      ExportError: there is none.

    Example:
      >>> target_of("litert").suffix
      '.tflite'
    """
    if name not in TARGETS:
        raise ExportError(f"expected to= one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def target_of_file(path: Path) -> Target | None:
    """The target whose files end like this; None where there is none."""
    return next((t for t in TARGETS.values() if t.suffix == path.suffix), None)
