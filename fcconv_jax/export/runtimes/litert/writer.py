"""Writes LiteRT files (.tflite) from a graph, on the schema that ai-edge-litert ships.

Neither TensorFlow nor PyTorch nor a converter is needed: the layout stays channel-last
as the model has it, and no transpose is added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...graph import Graph
from ...passes.blocks import find_blocks
from ...record import FileRecord
from .loops import GraphEmitter
from .schema import RECORD, pack, schema


def write(graph: Graph, record: FileRecord, path: Path) -> None:
    """Write a graph as a .tflite file.

    Raises:
      ExportError: LiteRT has no such operation or dtype; names it and a fix.
    """
    path.write_bytes(pack(model(graph, record)))


def model(graph: Graph, record: FileRecord) -> Any:
    """Return the model of a graph, as the schema's object."""
    s = schema()
    for part in graph.graphs():
        find_blocks(part, "last")
    out = GraphEmitter(s)
    names = dict(zip(graph.inputs, graph.input_names))
    for value, name in names.items():
        out.tensor(value, name)
    out.emit_all(graph, names)
    ends = [out.tensor(v, n) for v, n in zip(graph.outputs, graph.output_names)]
    subgraph = out.finish([out.tensor(v) for v in graph.inputs], ends, "main")
    model = s.ModelT()
    model.version, model.description = 3, "written by fcconv_jax"
    model.operatorCodes, model.subgraphs = out.codes, out.subgraphs
    entry = s.MetadataT()
    entry.name, entry.buffer = RECORD, out.buffer(record.to_bytes())
    model.metadata, model.buffers = [entry], out.buffers
    model.signatureDefs = [_signature(graph, subgraph)]
    return model


def _signature(graph: Graph, subgraph: Any) -> Any:
    s = schema()
    signature = s.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    for field, names, tensors in (
        ("inputs", graph.input_names, subgraph.inputs),
        ("outputs", graph.output_names, subgraph.outputs),
    ):
        maps = []
        for name, index in zip(names, tensors):
            entry = s.TensorMapT()
            entry.name, entry.tensorIndex = name, index
            maps.append(entry)
        setattr(signature, field, maps)
    return signature
