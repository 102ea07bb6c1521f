"""Runs LiteRT files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ....messages.extras import require


def interpreter(content: bytes) -> Any:
    """Return the runtime's interpreter of a file's content."""
    litert = require("ai_edge_litert.interpreter", "litert", "running a LiteRT file")
    made = litert.Interpreter(model_content=content)
    made.allocate_tensors()
    return made


def caller(
    content: bytes, integers: bool = False
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Load a file's content; return what runs it on arrays, in its inputs' order.

    Arrays may be floats where the file takes int8: they are rounded as it says.

    Args:
      content: the file's bytes.
      integers: whether int8 outputs come out as they are; else as the floats that they
        stand for.
    """
    runner = interpreter(content)

    def call(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        feed(runner, inputs)
        runner.invoke()
        found = []
        for detail in runner.get_output_details():
            # A copy: the interpreter reuses its memory in the next call.
            y = np.array(runner.get_tensor(detail["index"]))
            scale, zero = detail["quantization"]
            if scale and not integers:
                y = ((y.astype(np.float64) - zero) * scale).astype(np.float32)
            found.append(y)
        return found

    return call


def run(content: bytes, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a file's content once, see :func:`caller`."""
    return caller(content)(inputs)


def feed(runner: Any, inputs: Sequence[np.ndarray]) -> None:
    """Set the inputs of an interpreter, resized where they have another batch size."""
    details = runner.get_input_details()
    shapes = [(d, np.shape(x)) for d, x in zip(details, inputs, strict=True)]
    if any(tuple(detail["shape"]) != shape for detail, shape in shapes):
        for detail, shape in shapes:  # another batch size
            runner.resize_tensor_input(detail["index"], shape)
        runner.allocate_tensors()
    for detail, x in zip(details, inputs):
        scale, zero = detail["quantization"]
        if scale and np.issubdtype(np.asarray(x).dtype, np.floating):
            info = np.iinfo(detail["dtype"])
            x = np.clip(np.round(x / scale) + zero, info.min, info.max)
        runner.set_tensor(detail["index"], np.asarray(x, detail["dtype"]))
