"""int8 LiteRT files, made by LiteRT's own quantizer."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ....messages.errors import ExportError
from ....messages.extras import require
from ....messages.progress import Progress


def quantize(
    content: bytes,
    names: Sequence[str],
    examples: Sequence[Sequence[np.ndarray]],
    show: Progress,
) -> bytes:
    """A float file with int8 weights, one scale for each feature, and int8 activations.

    An activation's range is that of all the examples: the quantizer's own default, a
    moving average over calls, cuts off what only some of them reach.

    Args:
      content: of the float file.
      names: of its inputs.
      examples: for each call, its inputs.
      show: takes the progress.

    Raises:
      MissingExtraError: the quantizer is not installed.
      ExportError: it cannot take the file.
    """
    modules = ("quantizer", "recipe", "calibrator", "recipe_manager", "utils.qsv_utils")
    quantizer, recipe, calibrator, recipes, ranges = (
        require(f"litert_quantizer.{name}", "litert", "an int8 LiteRT file")
        for name in modules
    )
    rules = recipes.RecipeManager()
    rules.load_quantization_recipe(recipe.static_wi8_ai8())
    try:
        with _quiet():
            made = quantizer.Quantizer(bytearray(content), recipe.static_wi8_ai8())
            found = calibrator.Calibrator(
                content, 1, qsv_update_func=ranges.min_max_update
            )
        for done, each in enumerate(examples):
            show("int8: calibration", done, len(examples))
            data = dict(zip(names, each, strict=True))
            with _quiet():
                found.calibrate({"serving_default": [data]}, rules)
        show("int8: calibration", len(examples), len(examples))
        with _quiet():
            result = made.quantize(
                _widened(found.get_model_qsvs()),
                enable_progress_bar=False,
                enable_progress_report=False,
            )
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"LiteRT's quantizer can't process the model: {error}. Export in float32."
        ) from error
    return bytes(result.quantized_model)


def _widened(ranges: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Give activations that are always 0 a range: XNNPACK refuses scales near 0."""
    sizes = {
        key: float(np.max(np.abs([known["min"], known["max"]])))
        for key, known in ranges.items()
        if known and np.size(known["max"]) == 1
    }
    largest = max(sizes.values())
    dead = {key for key, size in sizes.items() if size < 1e-6 * largest}
    return {
        key: {**known, "max": np.full_like(known["max"], 1e-3 * largest)}
        if key in dead
        else known
        for key, known in ranges.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the quantizer prints, and its warning that it keeps every tensor."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
