"""int8 files as a whole: calibration data, and the comparison with the float file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..messages.errors import ExportError
from ..messages.progress import Progress
from .proof import ReferenceOutputs
from .shipped import Shipped


def batches(
    arrays: Sequence[Any], inputs: Sequence[jax.ShapeDtypeStruct | np.ndarray]
) -> list[list[np.ndarray]]:
    """Calibration data cut into calls of the file's own batch size.

    Args:
      arrays: one for each input, examples along the first axis.
      inputs: of the file: their shapes and dtypes.

    Raises:
      ExportError: an array does not fit its input.

    Example:
      >>> len(batches([np.zeros((7, 3))], [np.zeros((2, 3))]))
      3
    """
    if len(arrays) != len(inputs):
        raise ExportError(
            f"Expected calibration data for {len(inputs)} inputs, got {len(arrays)}. "
            "Pass calibrate=[...] with an array for each input."
        )
    calls: list[list[np.ndarray]] = []
    for array, like in zip(map(np.asarray, arrays), inputs):
        shape = like.shape
        if array.ndim != len(shape) or array.shape[1:] != tuple(shape[1:]):
            wanted = ", ".join(map(str, ("N", *shape[1:])))
            raise ExportError(
                f"Expected calibration data of shape ({wanted}), got {array.shape}. "
                "Pass examples along the first axis."
            )
        numbers = array.astype(np.float64) if array.dtype.kind == "V" else array
        # LiteRT's quantizer takes a range of NaN for an address, and crashes.
        if numbers.dtype.kind not in "biuf" or not np.isfinite(numbers).all():
            raise ExportError(
                f"Expected finite numbers as calibration data, got {array.dtype} with "
                "NaN, infinity or something else. Pass real inputs."
            )
        # Pixels from 0 to 255 give ranges of which a model of 0 to 1 uses one step.
        if jnp.issubdtype(like.dtype, jnp.floating) != (numbers.dtype.kind == "f"):
            raise ExportError(
                f"Expected calibration data of {like.dtype}, like the input, got "
                f"{array.dtype}. Pass what the model is called on, such as "
                "images / 255."
            )
    counts = {len(array) for array in arrays}
    if len(counts) > 1:
        raise ExportError(
            "Expected the same number of examples for each input, got "
            f"{sorted(counts)}. Pass as many for each."
        )
    size = inputs[0].shape[0]
    count = len(arrays[0]) // size
    if not count:
        raise ExportError(
            f"Expected at least {size} examples of calibration data, one batch, got "
            f"{len(arrays[0])}. Pass more."
        )
    # A rest smaller than a batch is left out: the file takes no other batch.
    for i in range(count):
        calls.append([np.asarray(a[i * size : (i + 1) * size]) for a in arrays])
    return calls


@dataclasses.dataclass
class Difference:
    """How far an int8 file's output is from what it is to be, over all examples.

    Example:
      >>> found = Difference()
      >>> found.add(np.array([0.0, 4.0]), np.array([0.5, 4.5]))
      >>> round(found.share, 3), round(found.allowed, 3)
      (0.177, 0.354)
    """

    off: float = 0.0
    squares: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, exact: np.ndarray, found: np.ndarray) -> None:
        """Count the output of one call."""
        exact = exact.astype(np.float64)
        self.off += float(((exact - found) ** 2).sum())
        self.squares += float((exact**2).sum())
        self.total += float(exact.sum())
        self.count += exact.size

    @property
    def share(self) -> float:
        """The root mean square of the difference, as a part of that of the output."""
        return (self.off / (self.squares or self.count or 1)) ** 0.5

    @property
    def allowed(self) -> float:
        """The largest share that passes: half of the output's standard deviation.

        An output off by all of it has as much in common with the model's as a constant.
        A single number has no deviation: half of it passes.
        """
        squares, mean = self.squares / (self.count or 1), self.total / (self.count or 1)
        if self.count < 2 or not squares:
            return 0.5
        return (max(squares - mean**2, 0) / squares) ** 0.5 / 2

    def failures(self, name: str) -> list[str]:
        """Return the sentence about an output that is too far off."""
        if self.share <= self.allowed:
            return []
        return [
            f"{name!r} is {self.share:.1e} from the float model's (root mean square), "
            f"{self.allowed:.1e} allowed, half of its standard deviation. Calibrate on "
            "examples like the real inputs, or export in float32"
        ]


@dataclasses.dataclass(frozen=True)
class Int8Check:
    """An int8 file as a whole, against the float file.

    Args:
      differences: of each output.
      same_choice: the part of examples whose largest first output is at the same place.
      right: how many choices of the float file and of the int8 file are the labels.
      labelled: how many choices have a label.
    """

    differences: tuple[Difference, ...]
    same_choice: float
    right: tuple[int, int]
    labelled: int


def check(
    quantized: Shipped,
    original: Shipped,
    examples: Sequence[Sequence[np.ndarray]],
    labels: np.ndarray | None,
    show: Progress,
) -> Int8Check:
    """Compare an int8 file with the float file that it was made from, on examples.

    Args:
      quantized: the int8 file.
      original: the float file.
      examples: to run both on.
      labels: the right index into the first output's last axis, for each example.
      show: takes the progress.

    Raises:
      ExportError: the labels have another shape than the choices.
    """
    exact, rounded = original.caller(), quantized.caller()
    differences = [Difference() for _ in quantized.output_names()]
    same = count = labelled = 0
    right = [0, 0]
    for done, each in enumerate(examples):
        show("int8: against float32", done, len(examples))
        pairs = list(zip(exact(each), rounded(each)))
        for difference, (a, b) in zip(differences, pairs):
            difference.add(a, b)
        # A model may return its choice itself.
        chosen = [y.argmax(-1) if y.dtype.kind == "f" else y for y in pairs[0]]
        same, count = same + int((chosen[0] == chosen[1]).sum()), count + chosen[0].size
        if labels is None:
            continue
        size = len(each[0])
        wanted = labels[done * size : (done + 1) * size]
        if wanted.shape != chosen[0].shape:
            shape = ", ".join(map(str, ("N", *chosen[0].shape[1:])))
            raise ExportError(
                f"Expected labels= of shape ({shape}), an index for each example of "
                f"calibrate=, got {labels.shape}. Pass integers in their order."
            )
        labelled += wanted.size
        right = [n + int((c == wanted).sum()) for n, c in zip(right, chosen)]
    show("int8: against float32", len(examples), len(examples))
    found = tuple(differences), same / count
    return Int8Check(*found, (right[0], right[1]), labelled)


def differences(
    file: Shipped, reference: ReferenceOutputs, names: Sequence[str] = ()
) -> dict[str, Difference]:
    """How far each output of an int8 file is from its model in float64.

    Args:
      file: the int8 file.
      reference: of the model.
      names: the outputs that the file has, as for :func:`.proof.whole_errors`.
    """
    exact = dict(reference.exact)
    found = {}
    for name, got in zip(names or exact, file.run(reference.inputs), strict=True):
        if got.dtype.kind == "f":  # others are indices
            found[name] = Difference()
            found[name].add(exact[name], got)
    return found


def same_outputs(
    one: Shipped, other: Shipped, examples: Sequence[Sequence[np.ndarray]]
) -> tuple[int, int]:
    """Return how many numbers of two int8 files' outputs differ, and of how many."""
    wrong = total = 0
    calls = [file.caller(integers=True) for file in (one, other)]
    for each in examples:
        for a, b in zip(*(call(each) for call in calls)):
            wrong += int((a != b).sum())
            total += a.size
    return wrong, total
