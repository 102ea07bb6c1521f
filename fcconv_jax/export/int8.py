"""int8 LiteRT files, made by LiteRT's own quantizer, and what is checked of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ExportError, require
from .layers import Record, expected
from .litert_file import LiteRTFile, interpreter, run


def quantize(
    content: bytes, names: Sequence[str], examples: Sequence[Sequence[np.ndarray]]
) -> bytes:
    """A float file with int8 weights, one scale for each feature, and int8 activations.

    Args:
      content: of the float file.
      names: of its inputs.
      examples: for each, what it is called on: the ranges of activations are theirs.

    Raises:
      MissingExtraError: the quantizer is not installed.
      ExportError: it cannot take the file.
    """
    room = require("litert_quantizer.quantizer", "litert", "an int8 LiteRT file")
    recipe = require("litert_quantizer.recipe", "litert", "an int8 LiteRT file")
    data = [dict(zip(names, each, strict=True)) for each in examples]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # It asks the interpreter to keep every tensor, which warns about memory.
        warnings.simplefilter("ignore")
        made = room.Quantizer(bytearray(content), recipe.static_wi8_ai8())
        try:
            ranges = made.calibrate({"serving_default": data}, num_threads=1)
            result = made.quantize(
                ranges, enable_progress_bar=False, enable_progress_report=False
            )
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"LiteRT's quantizer cannot take the model: {error}. Export in float32"
            ) from error
    return bytes(result.quantized_model)


def batches(
    arrays: Sequence[Any], shapes: Sequence[tuple[int, ...]], most: int = 256
) -> list[list[np.ndarray]]:
    """Calibration data cut into calls of the file's own batch size.

    Args:
      arrays: one for each input, examples along the first axis.
      shapes: of the file's inputs.
      most: calls at most.

    Raises:
      ExportError: an array does not fit its input.

    Example:
      >>> len(batches([np.zeros((7, 3))], [(2, 3)]))
      3
    """
    if len(arrays) != len(shapes):
        raise ExportError(
            f"expected calibration data for {len(shapes)} inputs, got {len(arrays)}"
        )
    calls: list[list[np.ndarray]] = []
    for array, shape in zip(map(np.asarray, arrays), shapes):
        if array.ndim != len(shape) or array.shape[1:] != tuple(shape[1:]):
            wanted = ", ".join(map(str, ("N", *shape[1:])))
            raise ExportError(
                f"expected calibration data of shape ({wanted}), got {array.shape}"
            )
    size = shapes[0][0]
    count = min(most, len(arrays[0]) // size)
    if not count:
        raise ExportError(
            f"expected at least {size} examples of calibration data, one batch; got "
            f"{len(arrays[0])}"
        )
    for i in range(count):
        calls.append([np.asarray(a[i * size : (i + 1) * size]) for a in arrays])
    return calls


@dataclasses.dataclass(frozen=True)
class Int8Check:
    """What was found about an int8 file.

    Args:
      layers: linear operations whose int8 weights are the parameters, rounded.
      failures: what is wrong.
      difference: the largest difference of an output from the float file's, as a part
        of the largest output.
      same_choice: the part of examples whose largest output is at the same place.
    """

    layers: int
    failures: tuple[str, ...]
    difference: float
    same_choice: float


def check(
    quantized: bytes,
    float_content: bytes,
    record: Record,
    leaves: Mapping[str, np.ndarray],
    examples: Sequence[Sequence[np.ndarray]],
) -> Int8Check:
    """Holds an int8 file against the parameters and against the float file.

    Args:
      quantized: the int8 file.
      float_content: the float file that it was made from.
      record: of the layers.
      leaves: the parameters in the file's form.
      examples: to run both on.
    """
    failures = []
    weights = int8_weights(quantized)
    count = 0
    for layer in record.layers:
        kernel, _ = expected(layer, leaves)
        if kernel is None:
            continue
        if layer.name not in weights:
            failures.append(f"int8: layer {layer.name!r} kept its floats")
            continue
        values, scales = weights[layer.name]
        off = abs(values * scales - kernel) / scales
        # Rounding leaves half a step, and float32 a little.
        if off.max(initial=0.0) > 0.501:
            failures.append(
                f"int8: the weights of {layer.name!r} are not the parameter's, rounded"
            )
        count += 1
    small, whole = [], []
    for each in examples:
        small.append(run(quantized, each)[0])
        whole.append(run(float_content, each)[0])
    a, b = np.concatenate(small), np.concatenate(whole)
    scale = float(abs(b).max(initial=0.0)) or 1.0
    chosen = a.argmax(-1) == b.argmax(-1)
    return Int8Check(
        count, tuple(failures), float(abs(a - b).max()) / scale, float(chosen.mean())
    )


def int8_weights(content: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The integers and scales of each layer's kernel, in the graph's arrangement."""
    file = LiteRTFile.of(content, Path("int8"))
    found = {}
    for layer, operator in zip(file.layers(), file.linear_operators()):
        side = 0 if file.array(operator.inputs[1]) is None else 1
        tensor = file.graph.tensors[operator.inputs[side]]
        quantization = tensor.quantization
        if layer.kernel.dtype != np.int8 or quantization is None:
            continue
        # Scales stand along the features, which come last in the graph's arrangement.
        scales = np.asarray(quantization.scale, np.float64)
        found[layer.name] = (layer.kernel.astype(np.float64), scales)
    return found


def same_outputs(
    one: bytes, other: bytes, examples: Sequence[Sequence[np.ndarray]]
) -> tuple[int, int]:
    """How many numbers of two int8 files' outputs differ, and of how many."""
    wrong = total = 0
    for each in examples:
        for a, b in zip(run(one, each), run(other, each)):
            wrong += int((a != b).sum())
            total += a.size
    return wrong, total


def input_details(content: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """Signature name and shape of each input of a file."""
    runner: Any = interpreter(content)
    signature = runner.get_signature_list()["serving_default"]["inputs"]
    details = runner.get_signature_runner("serving_default").get_input_details()
    return [(name, tuple(map(int, details[name]["shape"]))) for name in signature]
