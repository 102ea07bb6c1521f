"""int8 layers against integer arithmetic, from the file's own scales and zero points.

A layer sums products of integers in 32 bits and brings each sum to the output's scale.
Two roundings of that step are in use. XNNPACK, LiteRT's default, multiplies by a scale
in float32 and rounds halves to even (``qs8-requantization``), as ONNX Runtime does
(``MlasRequantizeOutput``). LiteRT's own kernels multiply by a fixed-point number of 31
bits and shift, rounding twice, as gemmlowp does (``MultiplyByQuantizedMultiplier``).
They differ by one step at most, in few entries. A layer must equal one of them in every
entry.

ONNX Runtime does not fuse every layer between DequantizeLinear and QuantizeLinear, and
computes the others in float32. Such a layer may differ by one step where the exact sum
is as close to a half as float32's rounding of that many terms moves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..messages.errors import ExportError
from ..messages.progress import Progress
from .layers import Layer, compute, expected
from .proof import Int8Comparison, LayerProof, first_line
from .record import FileRecord

_INT8 = np.iinfo(np.int8)
_RANGE = _INT8.min, _INT8.max
_EPS = float(np.finfo(np.float32).eps)


def by_float(
    sums: np.ndarray, scale_in: float, scales: np.ndarray, scale_out: float
) -> np.ndarray:
    """Bring sums to the output's scale as XNNPACK does.

    Example:
      >>> by_float(np.array([3, 5]), 0.5, np.array([1.0]), 1.0)
      array([2, 2])
    """
    # In this order, as XNNPACK does: float32 rounds after each operation.
    one = np.float32(scale_in) * scales.astype(np.float32) / np.float32(scale_out)
    return np.rint(sums.astype(np.float32) * one).astype(np.int64)


def by_fixed_point(
    sums: np.ndarray, scale_in: float, scales: np.ndarray, scale_out: float
) -> np.ndarray:
    """Bring sums to the output's scale as LiteRT's own kernels do.

    Example:
      >>> by_fixed_point(np.array([3, 5]), 0.5, np.array([1.0]), 1.0)
      array([2, 3])
    """
    share, shift = np.frexp(float(scale_in) * scales.astype(np.float64) / scale_out)
    factor = np.floor(share * 2.0**31 + 0.5).astype(np.int64)
    # A share that rounds up to 1 doesn't fit 31 bits.
    over = factor == 2**31
    factor, shift = np.where(over, factor // 2, factor), shift + over
    product = (sums << np.maximum(shift, 0)) * factor
    # Rounded to the upper half, halves away from zero; then shifted likewise.
    nudged = product + np.where(product >= 0, 2**30, 1 - 2**30)
    high = np.sign(nudged) * (np.abs(nudged) >> 31)  # towards zero, as C divides
    right = np.maximum(-shift, 0).astype(np.int64)
    mask = (np.int64(1) << right) - 1
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0))


_ROUNDINGS: dict[str, Callable[..., np.ndarray]] = {
    "float32 scale": by_float,
    "fixed point": by_fixed_point,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Int8Layer:
    """A linear operation of an int8 file, with the scales and zero points around it.

    Args:
      op: the runtime's own word.
      form: ``"conv"`` or ``"dense"``.
      kernel: its integers, in the graph's arrangement.
      bias: its integers; None for a layer without.
      scales: of the kernel, one for each feature or one.
      zero: the zero point of the kernel.
      bias_scales: of the bias; None for a layer without.
      entering: scale and zero point of the input.
      leaving: those of the output.
      run: runs the operation alone on integers, in the file's runtime.
      bounds: the least and the largest number behind a fused activation.
      behind: the integers and the scale of a bias that another operation adds.
      dequantized: whether the runtime may compute it in float32 instead.
    """

    op: str
    form: str
    kernel: np.ndarray
    bias: np.ndarray | None
    scales: np.ndarray
    zero: int
    bias_scales: np.ndarray | None
    entering: tuple[float, int]
    leaving: tuple[float, int]
    run: Callable[[np.ndarray], np.ndarray]
    bounds: tuple[float, float] = (-np.inf, np.inf)
    behind: tuple[np.ndarray, float] | None = None
    dequantized: bool = False

    @property
    def steps(self) -> tuple[float, np.ndarray, float]:
        """The scales of the input, of the kernel and of the output."""
        return self.entering[0], self.scales, self.leaving[0]

    def clip(self, numbers: np.ndarray) -> np.ndarray:
        """Return sums at the output's scale as the integers that leave."""
        scale, zero = self.leaving
        low, high = (np.floor(x / scale + 0.5) + zero for x in self.bounds)
        low, high = max(low, _INT8.min), min(high, _INT8.max)
        return np.clip(numbers + zero, low, high).astype(np.int64)


def prove_layers(
    layers: Mapping[str, Callable[[Layer], Int8Layer]],
    record: FileRecord,
    leaves: Mapping[str, np.ndarray],
    show: Progress,
) -> tuple[LayerProof, ...]:
    """Compare an int8 file's layers with the parameters and with integer arithmetic.

    A weight may be half a step of its feature's scale from the parameter, and what
    float32 rounds.

    Args:
      layers: what reads each layer of the file, by name.
      record: what they are to be.
      leaves: the parameters in the file's form, by path.
      show: takes the progress.
    """
    found = []
    for done, layer in enumerate(record.layers):
        show("int8: exact layers", done, len(record.layers))
        read, failures = layers.get(layer.name), list[str]()
        why: list[str] = []
        op, form, bits, compared = "-", layer.form, None, None
        try:
            if read is None:
                failures.append("is not in the file")
            else:
                mine = read(layer)
                op, form = mine.op, mine.form
                bits, failures = _parameters(layer, mine, leaves)
                if layer.form != form:
                    failures.append(f"expected {layer.op}, the file has {op}")
                compared, why = _on_integers(layer, mine)
                failures += why
        except ExportError as error:
            failures.append(str(error))
        except (RuntimeError, ValueError) as error:
            failures.append(f"it does not run on its own: {first_line(error)}")
        exact = None if compared is None else not why
        found.append(
            LayerProof(
                *(layer.name, op, form, bits, exact, 0, tuple(failures)),
                stored="int8",
                constant=layer.constant,
                folded=layer.folded is not None,
                int8=compared,
            )
        )
    show("int8: exact layers", len(record.layers), len(record.layers))
    return tuple(found)


def _on_integers(
    layer: Layer, mine: Int8Layer
) -> tuple[Int8Comparison | None, list[str]]:
    """Compare an operation, cut out of its file, with integer arithmetic."""
    wants: dict[str, list[np.ndarray]] = {name: [] for name in _ROUNDINGS}
    gots, exact, most = [], [], []
    for x in _draws(layer, mine):
        shifted = x.astype(np.int64) - mine.entering[1]
        sums = compute(layer, shifted, mine.kernel, mine.bias)
        got = mine.run(x)
        if got.shape != sums.shape:
            return None, [f"on integers: expected shape {sums.shape}, got {got.shape}"]
        gots.append(got.astype(np.int64))
        for name, rounding in _ROUNDINGS.items():
            wants[name].append(mine.clip(rounding(sums, *mine.steps)))
        if mine.dequantized:
            step = float(mine.entering[0]) * mine.scales.astype(np.float64)
            step = step / float(mine.leaving[0])
            bias = None if mine.bias is None else np.abs(mine.bias)
            sizes = compute(layer, np.abs(shifted), np.abs(mine.kernel * 1.0), bias)
            exact.append(np.clip(sums * step + mine.leaving[1], *_RANGE))
            # Roundings of n terms add up like steps of a random walk.
            most.append(0.5 + (layer.terms**0.5 + 8) * _EPS * (sizes * step + 256))
    got = np.stack(gots)
    off = {name: np.abs(got - np.stack(want)) for name, want in wants.items()}
    name = min(off, key=lambda name: int(np.count_nonzero(off[name])))
    count, largest = int(np.count_nonzero(off[name])), int(off[name].max(initial=0))
    found = Int8Comparison(got.size, count, largest, name)
    if not count:
        return found, []
    if mine.dequantized and (np.abs(got - np.stack(exact)) <= np.stack(most)).all():
        return dataclasses.replace(found, rounding="float32 sums"), []
    place = tuple(int(i) for i in np.argwhere(off[name])[0])
    want = np.stack(wants[name])[place]
    return found, [
        f"on integers: expected {want} at {place[1:]}, got {got[place]} ({count:,} of "
        f"{got.size:,} entries off, by up to {largest} steps)"
    ]


def _draws(layer: Layer, mine: Int8Layer) -> Iterator[np.ndarray]:
    """Yield int8 inputs: over the whole range, then so small that few sums saturate."""
    rng = np.random.default_rng(0)
    (_, zero), shape = mine.entering, layer.input_shape
    x = rng.integers(_INT8.min, _INT8.max, shape, endpoint=True).astype(np.int8)
    yield x
    sums = compute(layer, x.astype(np.int64) - zero, mine.kernel, None)
    spread = float(np.std(by_float(sums, *mine.steps))) or 1.0
    most = int(np.clip(127 * 40 / spread, 1, 127))  # 40 of 127 steps
    small = rng.integers(-most, most, shape, endpoint=True) + zero
    yield np.clip(small, _INT8.min, _INT8.max).astype(np.int8)


def _parameters(
    layer: Layer, mine: Int8Layer, leaves: Mapping[str, np.ndarray]
) -> tuple[bool | None, list[str]]:
    """Return whether a layer's integers are the parameters, and what is wrong."""
    kernel, bias = expected(layer, leaves)
    failures: list[str] = []
    if mine.zero:
        failures.append("the zero point of its weights is not 0, as kernels assume")
    if kernel is not None:
        failures += _rounded("weights are", mine.kernel, mine.scales, kernel)
    if mine.behind is not None:
        if bias is not None:
            integers, scale = mine.behind
            scales = np.full(bias.shape, scale)
            failures += _rounded("bias is", integers, scales, bias)
    elif layer.has_bias and mine.bias is None:
        failures.append("its bias is not in the file")
    elif mine.bias is not None and mine.bias.any() and not layer.has_bias:
        failures.append("it has a bias in the file, and none in the model")
    elif mine.bias is not None and mine.bias_scales is not None:
        # Kernels add it to the sums, whose scale is this, whatever scale it has itself.
        product = mine.entering[0] * mine.scales.astype(np.float64)
        if np.any(np.abs(mine.bias_scales / product - 1) > 1e-5):
            failures.append("the scale of its bias is not that of input times weights")
        elif bias is not None:
            failures += _rounded("bias is", mine.bias, product, bias)
    return None if kernel is None else not failures, failures


def _rounded(
    what: str, values: np.ndarray, scales: np.ndarray, wanted: np.ndarray
) -> list[str]:
    """Return what is wrong with integers of some scales, along the features."""
    if values.shape != wanted.shape:
        noun = what.split()[0]
        return [f"its {noun} should be {wanted.shape}, the file has {values.shape}"]
    exact = values * scales.astype(np.float64)
    # Float32, in which quantizers divide, rounds large integers.
    most = 0.501 * scales + np.finfo(np.float32).eps * np.abs(wanted)
    # NaN compares as neither more nor less, and infinity as within its own rounding.
    within = (np.abs(exact - wanted) <= most) & np.isfinite(wanted)
    wrong = np.argwhere(~within)
    if not len(wrong):
        return []
    index = tuple(int(i) for i in wrong[0])
    return [
        f"its {what} not the parameter's, rounded: expected {wanted[index].item():.6g} "
        f"at {index}, got {exact[index].item():.6g} ({len(wrong)} of {wanted.size})"
    ]
