"""Makes the batch of an ONNX file symbolic."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....messages.extras import require
from ...batches import depends, of_any_batch


def any_batch(path: Path, other: Path, batch: int) -> None:
    """Rewrite a file for one batch size, given that for another, to take any.

    Raises:
      ExportError: a node depends on the batch in another way than by its shape.
    """
    del batch
    onnx = require("onnx", "onnx", "an ONNX file")
    model, more = (onnx.load_model_from_string(p.read_bytes()) for p in (path, other))
    arrays, others = (
        {t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer}
        for m in (model, more)
    )
    pairs = list(zip(model.graph.node, more.graph.node))
    if len(model.graph.node) != len(more.graph.node):
        raise depends("number of nodes")
    for one, two in pairs:
        if one.op_type != two.op_type or list(one.attribute) != list(two.attribute):
            raise depends(one.op_type)
        for place, (x, y) in enumerate(zip(one.input, two.input)):
            a, b = arrays.get(x), others.get(y)
            if a is None or b is None or np.array_equal(a, b):
                continue
            found = of_any_batch(one.op_type, a, b)
            if one.op_type == "Slice" and place == 2:
                found[found < 0] = np.iinfo(np.int64).max
            elif one.op_type == "Expand":
                found[found < 0] = 1  # the operand's own size
            elif one.op_type != "Reshape":
                raise depends(one.op_type)
            one.input[place] = f"{x}/{one.output[0]}"
            made = onnx.numpy_helper.from_array(found, one.input[place])
            model.graph.initializer.append(made)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in list(model.graph.initializer):
        if tensor.name not in read:
            model.graph.initializer.remove(tensor)
    for field in ("input", "output"):
        for one, two in zip(getattr(model.graph, field), getattr(more.graph, field)):
            dims = (v.type.tensor_type.shape.dim for v in (one, two))
            for a, b in zip(*dims):
                if a.dim_value != b.dim_value:
                    a.dim_param = "batch"
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
