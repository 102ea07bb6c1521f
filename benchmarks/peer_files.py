"""Writes files of the same networks with other converters, in their environment.

    python benchmarks/peer_files.py NETWORK FOLDER

``keras.tflite`` with TensorFlow's converter, ``keras-int8.tflite`` likewise, and
``jax2onnx.onnx``, simplified by onnxsim. See ``peers.py``, which runs it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peer_networks import DESCRIPTIONS, examples, flax_network, keras_network


def keras_files(name: str, folder: Path) -> None:
    """Writes what Keras and TensorFlow make of a network, in float32 and int8."""
    tf = importlib.import_module("tensorflow")
    _, variables, _ = flax_network(name)
    converter = tf.lite.TFLiteConverter.from_keras_model(
        keras_network(name, jax.tree.map(np.asarray, variables), tf.keras)
    )
    (folder / "keras.tflite").write_bytes(converter.convert())

    def batches() -> Iterator[list[np.ndarray]]:
        for image in examples(name, 16, seed=1):
            yield [image[None]]

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = batches
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    (folder / "keras-int8.tflite").write_bytes(converter.convert())


def onnx_file(name: str, folder: Path) -> None:
    """Writes what jax2onnx and onnxsim make of a network."""
    jax2onnx, onnxsim = map(importlib.import_module, ("jax2onnx", "onnxsim"))

    model, variables, x = flax_network(name)

    def call(x: Any) -> Any:
        return model.apply(variables, x)

    made = jax2onnx.to_onnx(call, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    simple, _ = onnxsim.simplify(made)
    (folder / "jax2onnx.onnx").write_bytes(simple.SerializeToString())


if __name__ == "__main__":
    network, place = sys.argv[1], Path(sys.argv[2])
    if network in DESCRIPTIONS:
        keras_files(network, place)
    onnx_file(network, place)
