"""The runtimes that files are written for: a file or a folder here for each.

A module of this package registers itself by having a ``RUNTIME``. Adding a runtime
takes that module, its extra in pyproject.toml, its test and its row in the how-to.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from ...messages.errors import ExportError
from ..graph import Graph
from ..record import FileRecord
from ..shipped import Shipped


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A runtime, with what writes its files and what reads them back.

    Its module is imported to list the runtimes, so it imports the packages of its extra
    only inside its functions.

    Args:
      name: as ``runtime=`` takes it.
      title: the runtime's own name.
      suffix: of its files.
      open: reads a file back.
      write: writes a graph; None if the file is written from JAX's own program.
      write_program: writes JAX's own program, given ``(call, variables, arrays, output
        names, record, path)``; returns notes on the file.
      beside: the suffix of a second file, which holds the weights, if there is one.
      images: which axis of an image its channels are.
      gemm: whether it multiplies and adds a bias in one operation for matrices alone,
        whose rows or columns may be what a dense layer is on.
      executed: whether the runtime runs here.
      layers: whether single layers of a file can be run.
      fused: what it has as one operation, of ``FUSED`` and ``WHOLE``.
      one_batch: what of that contains the batch size.
      open_sizes: which of ``any_batch`` and ``any_size`` its files can be.
      weights: the dtypes that it reads weights in, besides float32.
      quantize: makes an int8 file's content of a float file's, given the names of the
        inputs, what it is called on, and what takes the progress.
    """

    name: str
    title: str
    suffix: str
    open: Callable[[Path], Shipped]
    write: Callable[[Graph, FileRecord, Path], None] | None = None
    write_program: Callable[..., list[str]] | None = None
    beside: str = ""
    images: Literal["last", "first"] = "last"
    gemm: bool = False
    executed: bool = True
    layers: bool = True
    fused: frozenset[str] = frozenset()
    one_batch: frozenset[str] = frozenset()
    open_sizes: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset()
    quantize: Callable[..., bytes] | None = None


@functools.cache
def runtimes() -> Mapping[str, Runtime]:
    """Return every runtime by its name.

    Example:
      >>> runtimes()["onnx"].suffix
      '.onnx'
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f".{name}", __name__) for name in names]
    return {module.RUNTIME.name: module.RUNTIME for module in modules}


def runtime_of(path: Path, name: str | None = None) -> Runtime:
    """Return the runtime of a file.

    Args:
      path: whose suffix decides.
      name: of the runtime that the file is to be for, where it is given.

    Raises:
      ExportError: no runtime has such files, or the named one has not.

    Example:
      >>> runtime_of(Path("m.tflite")).name, runtime_of(Path("m.xml"), "openvino").title
      ('litert', 'OpenVINO')
    """
    known = runtimes()
    if name is not None and name not in known:
        raise ExportError(
            f"Expected runtime= one of {', '.join(known)}, got {name!r}. Drop it to "
            "select the runtime by the suffix of path=."
        )
    if name is not None:
        if path.suffix != known[name].suffix:
            raise ExportError(
                f"Expected a path that ends in {known[name].suffix} for "
                f"runtime={name!r}, got {path}. Rename it, or drop runtime=."
            )
        return known[name]
    found = next((each for each in known.values() if each.suffix == path.suffix), None)
    if found is None:
        wanted = ", ".join(f"{each.suffix} ({key})" for key, each in known.items())
        raise ExportError(
            f"Expected a path that ends in one of {wanted}, got {path}. Rename it."
        )
    return found
