"""TensorFlow Lite's schema, as ai-edge-litert ships it."""

from __future__ import annotations

from typing import Any

from ....messages.extras import require

RECORD = "fcconv_jax"
DTYPES = {
    "float16": "FLOAT16",
    "float32": "FLOAT32",
    "int32": "INT32",
    "int64": "INT64",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}


def schema() -> Any:
    """Return the generated schema.

    Raises:
      MissingExtraError: it is not installed.
    """
    return require(
        "ai_edge_litert.schema_py_generated", "litert", "a LiteRT file (.tflite)"
    )


def pack(model: Any) -> bytes:
    """Return a model of the schema's objects as the bytes of a file."""
    flatbuffers = require("flatbuffers", "litert", "a LiteRT file (.tflite)")
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
