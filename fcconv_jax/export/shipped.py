"""A file as the proof reads it: its layers, each cut out, and the whole file."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..messages.errors import ExportError, FcconvError, MissingExtraError
from .layers import Layer
from .record import FileRecord


@dataclasses.dataclass(frozen=True, eq=False)
class ShippedLayer:
    """A linear operation with a weight, as a file holds it.

    Args:
      name: that of the layer.
      op: the runtime's own word: ``"CONV_2D"``, ``"Gemm"``.
      form: ``"conv"`` or ``"dense"``.
      kernel: in the graph's arrangement, whatever the file's is.
      bias: None for a layer without a bias.
    """

    name: str
    op: str
    form: str
    kernel: np.ndarray
    bias: np.ndarray | None


class Shipped(abc.ABC):
    """A file, read back; a runtime's reader derives from it.

    Attributes:
      runtime: what runs the file.
      executed: whether that runs here.
      native: whether damage may crash the process that reads or loads it.
      moving: the runtime's words for a transpose and for a reshape.
    """

    runtime: ClassVar[str]
    executed: ClassVar[bool] = True
    native: ClassVar[bool] = False
    moving: ClassVar[tuple[str, str]] = ("Transpose", "Reshape")

    @abc.abstractmethod
    def record(self) -> FileRecord | None:
        """Return the file's own record; None if another tool wrote the file."""

    @abc.abstractmethod
    def layers(self) -> Sequence[ShippedLayer]:
        """Return the linear operations with a weight."""

    @abc.abstractmethod
    def constants(self) -> Sequence[np.ndarray]:
        """Return every constant array."""

    @abc.abstractmethod
    def ops(self) -> Mapping[str, int]:
        """Return how many operations there are of each kind, in the runtime's words."""

    @abc.abstractmethod
    def output_names(self) -> Sequence[str]:
        """Return the outputs, by their paths in what the model returns."""

    @abc.abstractmethod
    def load(self) -> None:
        """Load the file in its runtime, which may refuse what the reader accepts."""

    def products(self) -> Sequence[str]:
        """The products of two activations, such as attention's, if they are listed."""
        return []

    def moves(self) -> tuple[int, int]:
        """Return how many transposes and how many reshapes there are."""
        found = self.ops()
        transposes, reshapes = (found.get(name, 0) for name in self.moving)
        return transposes, reshapes

    def run_layer(
        self,
        layer: Layer,
        x: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray | None,
    ) -> np.ndarray:
        """Run one layer, cut out of the file, with other numbers for its weights.

        Args:
          layer: which, and how the model has it.
          x: its input.
          kernel: in the graph's arrangement.
          bias: likewise.
        """
        raise ExportError(f"layer {layer.name!r} can't run alone in {self.runtime}")

    def int8_layers(self) -> Mapping[str, Callable[[Layer], Any]]:
        """Return what reads each layer of an int8 file, by name; none of a float one.

        Each is an :class:`fcconv_jax.export.integers.Int8Layer`.
        """
        return {}

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the whole file in its runtime."""
        raise ExportError(f"{self.runtime} doesn't run on this machine")

    def caller(
        self, integers: bool = False
    ) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
        """Load the file, and return what runs it.

        Args:
          integers: whether outputs of int8 come out as they are.
        """
        return self.run

    def runner(self, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Return one run of the whole file, to be timed."""
        return lambda: self.run(inputs)

    def geometry_failures(self, layer: Layer) -> Sequence[str]:
        """What differs in a layer's geometry, where it is read and not run."""
        return []

    def remarks(self, record: FileRecord) -> Sequence[str]:
        """What else there is to know about the proof of the file."""
        return []


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong while a file is read as an ExportError that names it.

    Damaged files make the formats' own readers raise errors of every kind.
    """
    try:
        yield
    # The file isn't to blame.
    except MissingExtraError:
        raise
    except FcconvError as error:  # such as a damaged plan in the record
        # It names the file already, or one that belongs to it, such as its `.bin`.
        if isinstance(error, ExportError) and f"{path.stem}." in str(error):
            raise
        raise ExportError(f"{path}: {error}") from error
    except Exception as error:
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise ExportError(
            f"{path} is damaged, or not a file of its suffix's format: "
            f"{type(error).__name__}: {why}. Export it again."
        ) from error


def arrange_conv(kernel: np.ndarray, order: str) -> np.ndarray:
    """Return a kernel ``HWIO`` (or ``DHWIO``) in another order of its axes.

    Example:
      >>> arrange_conv(np.zeros((3, 5, 2, 7)), "OHWI").shape
      (7, 3, 5, 2)
    """
    own, order = _axes(kernel, order)
    return np.ascontiguousarray(kernel.transpose([own.index(a) for a in order]))


def reversed_window(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel ``HWIO`` as transposed convolutions of runtimes apply it."""
    return kernel[::-1, ::-1]


def crops(
    kernel_shape: Sequence[int], padding: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return what a transposed convolution's padding takes away from its whole output.

    Example:
      >>> crops((3, 3, 8, 4), ((2, 1), (2, 2)))
      [(0, 1), (0, 0)]
    """
    return [(k - 1 - a, k - 1 - b) for k, (a, b) in zip(kernel_shape, padding)]


def canonical_conv(kernel: np.ndarray, order: str) -> np.ndarray:
    """Return a kernel ``HWIO``, from one in another order of its axes."""
    own, order = _axes(kernel, order)
    return kernel.transpose([order.index(a) for a in own])


def _axes(kernel: np.ndarray, order: str) -> tuple[str, str]:
    """The axes of our arrangement and of another, with the depth before the height."""
    height = "DH" if kernel.ndim == 5 else "H"
    return f"{height}WIO", order.replace("H", height)


def is_rows(kernel: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether a file's kernel takes the channels of a row as columns.

    Args:
      kernel: as a channel-first runtime stores it.
      shape: of the model's kernel, ``(H, W, C, O)``; others are never stored so.

    Example:
      >>> is_rows(np.zeros((7, 1, 3, 10)), (3, 5, 2, 7))
      True
    """
    if len(shape) != 4:
        return False
    height, width, channels, _ = shape
    return channels > 1 and kernel.shape[1:] == (1, height, width * channels)


def channels_first(rank: int) -> tuple[int, ...]:
    """Return the permutation of a channel-last image of so many axes."""
    return (0, rank - 1, *range(1, rank - 1))


def channels_last(rank: int) -> tuple[int, ...]:
    """Return the permutation of a channel-first image of so many axes."""
    return (0, *range(2, rank), 1)
