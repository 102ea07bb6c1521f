"""Makes the batch of a LiteRT file one that the interpreter may resize."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from ...batches import SIZES, depends, of_any_batch
from .reader import LiteRTFile
from .schema import pack, schema


def any_batch(path: Path, other: Path, batch: int) -> None:
    """Rewrite a file for one batch size, given that for another, to take any.

    Raises:
      ExportError: an operator depends on the batch in another way than by its shape.
    """
    one, two = LiteRTFile(path), LiteRTFile(other)
    if len(one.parts) > 1:
        raise depends("loop")
    if len(one.graph.operators) != len(two.graph.operators):
        raise depends("number of operators")
    for a, b in zip(one.graph.operators, two.graph.operators):
        name = one.name(a)
        if name != two.name(b):
            raise depends(name)
        for place, (i, j) in enumerate(zip(a.inputs, b.inputs)):
            x, y = one.array(i), two.array(j)
            if x is None or y is None or np.array_equal(x, y):
                continue
            found = of_any_batch(name, x, y)
            if name == "STRIDED_SLICE" and place == 2:
                a.builtinOptions.endMask |= 1 << int(np.flatnonzero(found < 0)[0])
            elif name == "RESHAPE":
                a.inputs = [*a.inputs]
                a.inputs[place] = _constant(one, i, found)
                a.builtinOptions.newShape = found
            else:
                raise depends(name)
    ends = [
        pair
        for field in ("inputs", "outputs")
        for part in ([one.graph, *one.graph.operators],)
        for a, b in zip(part, [two.graph, *two.graph.operators])
        for pair in zip(getattr(a, field), getattr(b, field))
    ]
    done: set[int] = set()
    for i, j in ends:
        if i < 0 or i in done or one.array(i) is not None:
            continue
        done.add(i)
        tensor, shape = one.graph.tensors[i], two.graph.tensors[j].shape
        pairs = list(zip(map(int, tensor.shape), map(int, shape)))
        tensor.shapeSignature = [-1 if a != b else a for a, b in pairs]
        tensor.shape = [a * batch // SIZES[0] if a != b else a for a, b in pairs]
    path.write_bytes(pack(one.model))


def _constant(file: LiteRTFile, index: int, numbers: np.ndarray) -> int:
    """Append a constant with other numbers, and return its index."""
    buffer: Any = schema().BufferT()
    buffer.data = np.frombuffer(numbers.tobytes(), np.uint8)
    file.model.buffers.append(buffer)
    tensor = copy.copy(file.graph.tensors[index])
    tensor.buffer = len(file.model.buffers) - 1
    file.graph.tensors.append(tensor)
    return len(file.graph.tensors) - 1
