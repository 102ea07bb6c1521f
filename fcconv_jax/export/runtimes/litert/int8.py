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

from ....messages.errors import ExportError
from ....messages.extras import require
from ...fingerprint import fingerprint_of, resealed
from ...layers import FileRecord, expected
from ...proof import LayerProof, ReferenceOutputs, on_integers
from .reader import LiteRTFile, run


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
    quantizer = require("litert_quantizer.quantizer", "litert", "an int8 LiteRT file")
    recipe = require("litert_quantizer.recipe", "litert", "an int8 LiteRT file")
    data = [dict(zip(names, each, strict=True)) for each in examples]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        # It asks the interpreter to keep every tensor, which warns about memory.
        warnings.simplefilter("ignore")
        made = quantizer.Quantizer(bytearray(content), recipe.static_wi8_ai8())
        try:
            ranges = made.calibrate({"serving_default": data}, num_threads=1)
            result = made.quantize(
                ranges, enable_progress_bar=False, enable_progress_report=False
            )
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"LiteRT's quantizer cannot take the model: {error}. Export in float32"
            ) from error
    made_of = LiteRTFile.of(content, Path("float")).record()
    content = bytes(result.quantized_model)
    if made_of is None:
        return content
    found = fingerprint_of(LiteRTFile.of(content, Path("int8")), made_of)
    return resealed(content, made_of.fingerprint, found)


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
    """The checks of an int8 file.

    Args:
      layers: whether the weights of each linear operation are the parameters, rounded.
      difference: the root mean square of the difference from the float file's outputs,
        as a part of that of the outputs.
      same_choice: the part of examples whose largest output is at the same place.
    """

    layers: tuple[LayerProof, ...]
    difference: float
    same_choice: float


def check(
    quantized: bytes,
    float_content: bytes,
    record: FileRecord,
    leaves: Mapping[str, np.ndarray],
    examples: Sequence[Sequence[np.ndarray]],
) -> Int8Check:
    """Hold an int8 file against the parameters and against the float file.

    Args:
      quantized: the int8 file.
      float_content: the float file that it was made from.
      record: of the layers.
      leaves: the parameters in the file's form.
      examples: to run both on.
    """
    layers = prove_weights(LiteRTFile.of(quantized, Path("int8")), record, leaves)
    small, whole = [], []
    for each in examples:
        small.append(run(quantized, each)[0])
        whole.append(run(float_content, each)[0])
    a, b = np.concatenate(small), np.concatenate(whole)
    scale = float(np.sqrt((b.astype(np.float64) ** 2).mean())) or 1.0
    off = float(np.sqrt(((a - b).astype(np.float64) ** 2).mean()))
    chosen = a.argmax(-1) == b.argmax(-1)
    return Int8Check(layers, off / scale, float(chosen.mean()))


def difference(
    file: LiteRTFile, reference: ReferenceOutputs, names: Sequence[str] = ()
) -> float:
    """How far an int8 file is from its model in float64, as a part of the outputs.

    Args:
      file: the int8 file.
      reference: of the model.
      names: the outputs that the file has, as for :func:`.proof.whole_errors`.
    """
    exact = dict(reference.exact)
    off = total = 0.0
    for name, got in zip(names or exact, file.run(reference.inputs), strict=True):
        off += float(((got - exact[name]) ** 2).sum())
        total += float((exact[name].astype(np.float64) ** 2).sum())
    return (off / total) ** 0.5 if total else off**0.5


def prove_weights(
    file: LiteRTFile, record: FileRecord, leaves: Mapping[str, np.ndarray]
) -> tuple[LayerProof, ...]:
    """Hold each layer's integers, times their scales, against the parameters.

    Rounding leaves half a step of the feature's scale, and float32 a little. What the
    layer computes is held against integer arithmetic as a float layer's is.
    """
    operators = dict(zip((x.name for x in file.layers()), file.linear_operators()))
    shipped = {layer.name: layer for layer in file.layers()}
    found = []
    for layer in record.layers:
        kernel, bias = expected(layer, leaves)
        if layer.name not in shipped:
            why = ("is not in the file",)
            found.append(LayerProof(layer.name, "-", layer.form, None, None, 0, why))
            continue
        mine, operator = shipped[layer.name], operators[layer.name]
        failures: list[str] = []
        if kernel is not None:
            why = _rounded("weights", file, operator, mine.kernel, kernel)
            failures += [why] if why else []
        if layer.has_bias and mine.bias is None:
            failures.append("its bias is not in the file")
        elif mine.bias is not None and mine.bias.any() and not layer.has_bias:
            failures.append("it has a bias in the file, and none in the model")
        elif bias is not None and mine.bias is not None:
            why = _rounded("bias", file, operator, mine.bias, bias)
            failures += [why] if why else []
        bits = None if kernel is None else not failures
        if layer.form != mine.form:
            failures.append(f"expected {layer.op}, the file has {mine.op}")
        exact, count, why = on_integers(file, layer)
        failures += why
        found.append(
            LayerProof(
                *(layer.name, mine.op, mine.form, bits, exact, count, tuple(failures)),
                rounded=True,
                constant=layer.constant,
                folded=layer.folded is not None,
            )
        )
    return tuple(found)


def _rounded(
    what: str, file: LiteRTFile, operator: Any, values: np.ndarray, wanted: np.ndarray
) -> str | None:
    """Return what is wrong with a layer's integers, or None."""
    tensor, dtype, verb = file.bias_of(operator), np.dtype(np.int32), "is"
    if what == "weights":
        verb, dtype = "are", np.dtype("int8")
        tensor = operator.inputs[int(file.array(operator.inputs[1]) is not None)]
    quantization = file.graph.tensors[tensor].quantization
    if values.dtype != dtype or quantization is None:
        return f"its {what} should be {dtype}, the file has {values.dtype}"
    if values.shape != wanted.shape:
        return f"its {what} should be {wanted.shape}, the file has {values.shape}"
    if np.any(quantization.zeroPoint):
        return f"the zero point of its {what} is not 0, which kernels do not read"
    # Scales stand along the features, which come last in the graph's arrangement.
    scales = np.asarray(quantization.scale, np.float64)
    if not (np.isfinite(scales) & (scales > 0)).all():
        return f"the scales of its {what} are not positive numbers"
    off = abs(values.astype(np.float64) * scales - wanted) / scales
    wrong = np.argwhere(off > 0.501)
    if not len(wrong):
        return None
    index = tuple(int(i) for i in wrong[0])
    return (
        f"its {what} {verb} not the parameter's, rounded: expected "
        f"{wanted[index].item():.6g} at {index}, got "
        f"{(values * scales)[index].item():.6g} ({len(wrong)} of {wanted.size})"
    )


def same_outputs(
    one: bytes, other: bytes, examples: Sequence[Sequence[np.ndarray]]
) -> tuple[int, int]:
    """Return how many numbers of two int8 files' outputs differ, and of how many."""
    wrong = total = 0
    for each in examples:
        pair = (run(content, each, integers=True) for content in (one, other))
        for a, b in zip(*pair):
            wrong += int((a != b).sum())
            total += a.size
    return wrong, total
