"""Writes LiteRT files (.tflite) from a graph, on the schema that ai-edge-litert ships.

Neither TensorFlow nor PyTorch nor a converter is needed: the layout stays channel-last
as the model has it, and no transpose is added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...graph import Graph, Node, Value
from ...layers import FileRecord
from ...passes.blocks import find_blocks
from .operators import Emitter
from .schema import RECORD, pack, schema

_FUSED = {"relu": "RELU", "relu6": "RELU6"}


def write(graph: Graph, record: FileRecord, path: Path) -> None:
    """Write a graph as a .tflite file.

    Args:
      graph: what to write.
      record: what the file says about itself.
      path: where to.

    Raises:
      ExportError: LiteRT has no such operation or dtype; names it and a fix.
    """
    path.write_bytes(pack(model(graph, record)))


def model(graph: Graph, record: FileRecord) -> Any:
    """Return the model of a graph, as the schema's object."""
    s = schema()
    find_blocks(graph, "last")
    out = Emitter(s)
    uses = graph.uses()
    names = dict(zip(graph.inputs, graph.input_names))
    names |= {n.out: n.name for n in graph.linear()}
    for value in graph.inputs:
        out.tensor(value, names[value])
    skip: set[Node] = set()
    readers: dict[Value, Node] = {v: n for n in graph.nodes for v in n.inputs}
    for node in graph.nodes:
        if node in skip:
            continue
        follower = readers.get(node.out) if len(node.outputs) == 1 else None
        fused = ""
        if node.op in ("conv", "dense", "add", "sub", "mul") and follower:
            lone = uses[node.out] == 1 and follower.op in _FUSED
            if lone and node.out.dtype == np.float32:
                fused = _FUSED[follower.op]
                skip.add(follower)
                # The layer's output is what comes out of the activation.
                names.setdefault(follower.out, names.get(node.out, ""))
                node = Node(
                    node.op, node.inputs, follower.outputs, node.attrs, node.name
                )
        for value in node.outputs:
            out.tensor(value, names.get(value, "") or node.op)
        out.emit(node, fused)
    outputs = []
    for value, name in zip(graph.outputs, graph.output_names):
        outputs.append(out.tensor(value, name))
    subgraph = s.SubGraphT()
    subgraph.tensors, subgraph.operators = out.tensors, out.operators
    subgraph.inputs = [out.tensor(v) for v in graph.inputs]
    subgraph.outputs, subgraph.name = outputs, "main"
    model = s.ModelT()
    model.version, model.description = 3, "written by fcconv_jax"
    model.operatorCodes, model.subgraphs = out.codes, [subgraph]
    entry = s.MetadataT()
    entry.name, entry.buffer = RECORD, out.buffer(record.to_json().encode())
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
