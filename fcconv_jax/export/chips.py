"""The forms that each chip accepts and prefers, with the sources.

*Run* means with the chip's own compiler, as Arm's Vela compiles for the Ethos-U on any
machine. *Read* means that it is in the vendor's documentation. *Inferred* means that it
follows from such a document, and was not tried. No file was run on any of these chips.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from ..messages.errors import ExportError
from ..plan import Form
from .layers import Layer

Evidence = Literal["run", "read", "inferred"]
# Where a layer may sit: a window on its stride, one window on all of its input, tokens
# (several rows) or a head (one row for each example).
LayerPlace = Literal["patchify", "full_window", "tokens", "head"]


@dataclasses.dataclass(frozen=True)
class ChipRule:
    """One thing that a chip does not take.

    Args:
      says: the rule, as it is told to the user.
      breaks: whether a layer breaks it.
      how: whether it was run, read or inferred.
      source: the document.
    """

    says: str
    breaks: Callable[[Layer], bool]
    how: Evidence
    source: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip: its rules and preferences.

    Args:
      name: as ``chip=`` takes it.
      title: as its maker calls it.
      prefers: for each place the forms, the better first.
      why: what the preference rests on.
      how: whether it was run, read or inferred.
      source: the document.
      rules: what it does not take.
      accelerator: what Vela calls it, where that compiles for it.
    """

    name: str
    title: str
    prefers: tuple[tuple[LayerPlace, tuple[Form, ...]], ...]
    why: str
    how: Evidence
    source: str
    rules: tuple[ChipRule, ...] = ()
    accelerator: str | None = None

    def breaks(self, layer: Layer) -> list[str]:
        """Return the rules that a layer breaks, with their source.

        Example:
          >>> shapes = (16, 16, 3, 192), None, False, (1, 32, 32, 3), (1, 2, 2, 192)
          >>> geometry = (
          ...     ("dilation", (1, 1)), ("groups", 1),
          ...     ("padding", ((0, 0), (0, 0))), ("strides", (16, 16)),
          ... )
          >>> patches = Layer("embed", "conv", None, *shapes, geometry)
          >>> chip_of("artpec-9").breaks(patches)[0]
          'kernel sizes are 1, 2, 3, 5, 7 or 9 (read: ARTPEC-9 supported operations)'
        """
        return [
            f"{rule.says} ({rule.how}: {rule.source})"
            for rule in self.rules
            if rule.breaks(layer)
        ]

    def order(self, place: LayerPlace) -> tuple[Form, ...]:
        """The forms of a layer at a place, the better first; none where it is open."""
        return dict(self.prefers).get(place, ())


def chip_of(name: str) -> Chip:
    """Return the chip of this name.

    Raises:
      ExportError: the table has no such chip.
    """
    if name not in CHIPS:
        raise ExportError(
            f"Expected chip= one of {', '.join(CHIPS)}, got {name!r}. For another "
            "chip, pass to='conv' or to='dense', or your own plan=."
        )
    return CHIPS[name]


def _conv(test: Callable[[Layer], bool]) -> Callable[[Layer], bool]:
    return lambda layer: layer.op == "conv" and test(layer)


def _window(layer: Layer) -> tuple[int, ...]:
    return layer.kernel_shape[:2]


def _strides(layer: Layer) -> tuple[int, ...]:
    return layer.options["strides"]


def _several_groups(layer: Layer) -> bool:
    groups = layer.options["groups"]
    return 1 < groups < layer.input_shape[-1]


def _long_stride(layer: Layer) -> bool:
    padded = any(map(any, layer.options["padding"]))
    return max(_strides(layer)) > 3 and (padded or max(layer.options["dilation"]) > 1)


def _inner_dims(layer: Layer) -> int:
    return max(sum(n > 1 for n in s) for s in (layer.input_shape, layer.output_shape))


def _kernel_of(*sizes: int) -> Callable[[Layer], bool]:
    return _conv(lambda layer: not set(_window(layer)) <= set(sizes))


def _kernel_to(most: int) -> Callable[[Layer], bool]:
    return _conv(lambda layer: max(_window(layer)) > most)


def _stride_of(*sizes: int) -> Callable[[Layer], bool]:
    return _conv(lambda layer: not set(_strides(layer)) <= set(sizes))


def _rank_to(most: int) -> Callable[[Layer], bool]:
    return lambda layer: max(len(layer.input_shape), len(layer.output_shape)) > most


def _uniform(order: Sequence[Form]) -> tuple[tuple[LayerPlace, tuple[Form, ...]], ...]:
    places: tuple[LayerPlace, ...] = ("patchify", "full_window", "tokens", "head")
    return tuple((place, tuple(order)) for place in places)


_VELA = "vela 5.2 --supported-ops-report"
_ETHOS_RULES = (
    ChipRule(
        "a stride above 3 needs VALID padding and no dilation",
        _conv(_long_stride),
        "run",
        _VELA,
    ),
)
_ETHOS_WHY = (
    "Vela's cycles: a patch embedding is tens of times quicker as space-to-depth and "
    "FULLY_CONNECTED; a window on one position is quicker as 1x1, which Vela makes "
    "FULLY_CONNECTED"
)
_ARTPEC_9 = "ARTPEC-9 supported operations"
_DPU = "AMD UG1414"
_K210 = "nncase FAQ, nncase#533"
_MDLA = "MediaTek MDLA 2.0 guidelines"


def _ethos(number: int, tokens: tuple[Form, ...], config: str) -> Chip:
    return Chip(
        f"ethos-u{number}",
        f"Arm Ethos-U{number}",
        (
            ("patchify", ("dense", "conv")),
            ("full_window", ("dense", "conv")),
            ("tokens", tokens),
            ("head", ("dense", "conv")),
        ),
        f"{_ETHOS_WHY}; tokens are quickest as 1x1 convolutions on one row",
        "run",
        "vela 5.2 (its own estimates); executorch#18294",
        _ETHOS_RULES,
        config,
    )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _ethos(55, ("conv", "dense"), "ethos-u55-128"),
        _ethos(65, ("conv", "dense"), "ethos-u65-256"),
        _ethos(85, ("conv", "dense"), "ethos-u85-256"),
        Chip(
            "edgetpu",
            "Google Edge TPU, Axis ARTPEC-7",
            (
                ("tokens", ("conv", "dense")),
                ("head", ("dense", "conv")),
                ("full_window", ("dense", "conv")),
                ("patchify", ("conv", "dense")),
            ),
            "FULLY_CONNECTED gives one axis only, so tokens need a convolution",
            "inferred",
            "developer.axis.com, ARTPEC-7 supported operations",
            (
                ChipRule(
                    "at most three axes may be larger than 1",
                    lambda layer: _inner_dims(layer) > 3,
                    "read",
                    "developer.axis.com, ARTPEC-7",
                ),
                ChipRule(
                    "FULLY_CONNECTED gives one axis only",
                    lambda layer: (
                        layer.op == "dense"
                        and sum(n > 1 for n in layer.output_shape) > 1
                    ),
                    "read",
                    "developer.axis.com, ARTPEC-7",
                ),
            ),
        ),
        Chip(
            "artpec-8",
            "Axis ARTPEC-8",
            (),
            "3x3 kernels, stride 2 and filters in multiples of 6 are quickest; the "
            "better form of a linear layer is open: each stays as the model has it",
            "read",
            "ARTPEC-8 optimization tips",
        ),
        Chip(
            "artpec-9",
            "Axis ARTPEC-9",
            _uniform(("conv", "dense")),
            "convolutions where their window is one of its sizes; multiples of 16 "
            "channels are best",
            "inferred",
            _ARTPEC_9,
            (
                ChipRule(
                    "kernel sizes are 1, 2, 3, 5, 7 or 9",
                    _kernel_of(1, 2, 3, 5, 7, 9),
                    "read",
                    _ARTPEC_9,
                ),
                ChipRule("strides are 1 or 2", _stride_of(1, 2), "read", _ARTPEC_9),
                ChipRule("at most four axes", _rank_to(4), "read", _ARTPEC_9),
                ChipRule(
                    "the batch is 1",
                    lambda layer: layer.op == "conv" and layer.input_shape[0] != 1,
                    "read",
                    _ARTPEC_9,
                ),
            ),
        ),
        Chip(
            "hexagon",
            "Qualcomm Hexagon (HTP)",
            _uniform(("conv", "dense")),
            "its own pass turns linear layers into 1x1 convolutions, (N, C, 1, dim)",
            "read",
            "executorch convert_linear_to_conv2d.py, executorch#9025",
        ),
        Chip(
            "ane",
            "Apple Neural Engine",
            _uniform(("conv", "dense")),
            "Conv2d in the place of linear layers, (B, C, 1, S)",
            "read",
            "apple/ml-ane-transformers",
        ),
        Chip(
            "dpu",
            "AMD DPU",
            _uniform(("conv", "dense")),
            "a matrix product becomes a convolution where it fits",
            "read",
            _DPU,
            (
                ChipRule("kernel sizes are at most 16", _kernel_to(16), "read", _DPU),
                ChipRule(
                    "strides are at most 8",
                    _conv(lambda layer: max(_strides(layer)) > 8),
                    "read",
                    _DPU,
                ),
            ),
        ),
        Chip(
            "k210",
            "Kendryte K210",
            _uniform(("dense", "conv")),
            "a convolution with an output below 4x4 goes to its CPU",
            "read",
            _K210,
            (
                ChipRule("kernel sizes are 1 or 3", _kernel_of(1, 3), "read", _K210),
                ChipRule("strides are 1 or 2", _stride_of(1, 2), "read", _K210),
                ChipRule(
                    "a convolution's output is at least 4x4",
                    _conv(lambda layer: min(layer.output_shape[1:3]) < 4),
                    "read",
                    _K210,
                ),
                ChipRule(
                    "a convolution has at most 1024 channels",
                    _conv(
                        lambda layer: (
                            max(layer.input_shape[-1], layer.output_shape[-1]) > 1024
                        )
                    ),
                    "read",
                    _K210,
                ),
            ),
        ),
        Chip(
            "mdla",
            "MediaTek MDLA",
            _uniform(("dense", "conv")),
            "either form; FULLY_CONNECTED for 1, 2, 4 or 8 rows",
            "read",
            "MediaTek MDLA 2.0 and 3.0 guidelines",
            (
                ChipRule("kernel sizes are at most 16", _kernel_to(16), "read", _MDLA),
                ChipRule(
                    *("strides are 1, 2, 3, 4 or 8", _stride_of(1, 2, 3, 4, 8)),
                    *("read", _MDLA),
                ),
                ChipRule(
                    "no groups but depthwise", _conv(_several_groups), "read", _MDLA
                ),
                ChipRule(
                    "FULLY_CONNECTED has 1, 2, 4 or 8 rows",
                    lambda layer: (
                        layer.op == "dense"
                        and math.prod(layer.input_shape[:-1]) not in (1, 2, 4, 8)
                    ),
                    "read",
                    "MediaTek MDLA 3.0 guidelines",
                ),
            ),
        ),
        Chip(
            "tidl",
            "TI TIDL",
            (
                ("patchify", ("dense", "conv")),
                ("full_window", ("conv", "dense")),
                ("tokens", ("dense", "conv")),
                ("head", ("dense", "conv")),
            ),
            "a window as wide as its stride is not currently optimal",
            "inferred",
            "edgeai-tidl-tools supported_ops_rts_versions",
            (
                ChipRule(
                    "odd kernels to 7 are validated",
                    _kernel_of(1, 3, 5, 7),
                    "read",
                    "edgeai-tidl-tools supported_ops",
                ),
            ),
        ),
    )
}
