"""Reasons: why a geometry has a dense layer's parameters or not, in words."""

from __future__ import annotations

import dataclasses
from typing import Any

from .convolution import ConvGeometry
from .windows import Dimension, times

_NO_FIX = (
    "Or opt in to unroll_conv: one Dense for this input size, its entries repeated."
)
# In the fix of every transposed convolution that has no dense form.
PHASES = (
    "Or opt in to phases ('PATH=phases'): one plain convolution for each residue of "
    "the strides, with the same kernel."
)


def why_it_holds(geometry: ConvGeometry) -> str:
    """Explain why a geometry has a dense layer's parameters."""
    base = geometry.base
    kernel, strides = times(geometry.kernel_size), times(geometry.strides)
    one = geometry.output_elements == 1
    words = []
    if base == "pointwise":
        words.append(
            f"The kernel {kernel} reads each input alone, as a Dense on the last axis "
            "does."
        )
    elif base == "full_window":
        words.append(
            f"The kernel {kernel} is as large as the input, so there is one output "
            "position and it reads every input once."
        )
    elif base == "unpatchify":
        words.append(
            "The only input fills the whole output, "
            if geometry.input_elements == 1
            else "Each input fills its own window of outputs, "
        )
        words[-1] += f"{kernel}, and no other input reaches it."
    else:
        words.append(
            f"The windows of {kernel} lie side by side, so each input is read by one "
            "position."
        )
    if geometry.subsample:
        words.append(
            f"Strides {strides} skip inputs: it equals the Dense on the strided "
            f"subsample {geometry.subsample}, {times(geometry.output_shape)} of "
            f"{times(geometry.input_shape)}."
        )
    elif one and any(s != 1 for s in geometry.strides):
        words.append(f"Strides {strides} change nothing: there is one position.")
    if geometry.covered_shape != geometry.input_shape:
        words.append(
            f"Inputs beyond the first {times(geometry.covered_shape)} are dropped."
        )
    if base != "unpatchify" and any(any(pads) for pads in geometry.padding):
        words.append("No window reaches the padding, so it changes nothing.")
    if geometry.groups > 1:
        words.append(
            f"Each of the {geometry.groups} groups of channels is a Dense of its own."
        )
    return " ".join(words)


def why_it_fails(geometry: ConvGeometry, transposed: bool = False) -> tuple[str, str]:
    """Return the first condition that fails and its fix.

    Args:
      geometry: without the parameters of a dense layer.
      transposed: whether it was given as a transposed convolution; one with strides of
        1 can't be told from a plain convolution.
    """
    if transposed or geometry.transposed:
        return _transposed_failure(geometry)
    dimensions = list(enumerate(geometry.dimensions))
    for i, d in dimensions:
        if d.reaches_padding and not d.reads_in_order:
            return _padding_failure(geometry, i, d)
    for i, d in dimensions:
        # A single tap is not spread, a single position does not step.
        steps = [d.spread] * (d.kernel > 1) + [d.stride] * (d.output > 1)
        if d.size > 1 and any(step % d.holes for step in steps):
            return (
                f"Input dilation {d.holes} puts holes between the inputs of dimension "
                f"{i}, and the windows read them.",
                f"Use input_dilation 1{_after(geometry, input_dilation=1)} {_NO_FIX}",
            )
    for i, d in dimensions:
        if d.kernel > 1 and d.spread != d.holes:
            return (
                f"Kernel dilation {d.spread} spreads the taps of dimension {i}, so a "
                "window skips the inputs between them.",
                f"Use kernel_dilation {d.holes}"
                f"{_after(geometry, kernel_dilation=d.holes)} {_NO_FIX}",
            )
    for i, d in dimensions:
        if not d.reads_in_order:
            return _stride_failure(geometry, i, d)
    raise AssertionError(f"no condition fails for {geometry}")


def _transposed_failure(geometry: ConvGeometry) -> tuple[str, str]:
    """Return the first failing condition of a transposed convolution and its fix."""
    # At strides of 1, or with taps spread like the inputs, phases would change nothing.
    fix = PHASES if geometry.transposed else _NO_FIX
    # One input has the output to itself, so nothing is left for the stride to do.
    steps = tuple(d.holes if d.size > 1 else d.kernel for d in geometry.dimensions)
    equal = f"Use strides equal to the kernel size {times(geometry.kernel_size)}"
    for i, d in enumerate(geometry.dimensions):
        if d.kernel > 1 and d.spread > 1:
            return (
                f"Kernel dilation {d.spread} spreads the taps of dimension {i}, so the "
                "outputs of one input are not adjacent.",
                f"Use kernel_dilation 1. {fix}",
            )
        if steps[i] > d.kernel:
            return (
                f"Stride {steps[i]} in dimension {i} is larger than the kernel "
                f"{d.kernel}: no input reaches the outputs in between.",
                f"{equal}. {fix}",
            )
        if steps[i] < d.kernel:
            return (
                f"Stride {steps[i]} in dimension {i} is smaller than the kernel "
                f"{d.kernel}: windows of outputs overlap, so an output adds up several "
                "inputs.",
                f"{equal}. {fix}",
            )
    i, d = next(
        (i, d) for i, d in enumerate(geometry.dimensions) if not d.writes_in_order
    )
    need = d.kernel - 1
    what = "crops" if d.low + d.high < 2 * need else "enlarges or shifts"
    # Behind a single input, VALID leaves room for a stride beyond the kernel.
    valid = "VALID, which is" if d.holes <= d.kernel else "of"
    return (
        f"Padding {(d.low, d.high)} around the spaced inputs {what} the output of "
        f"dimension {i}: it has {d.output} entries, the windows fill "
        f"{d.size * d.kernel}.",
        f"Use padding {valid} {(need, need)} here, and slice or pad the output. {fix}",
    )


def _padding_failure(geometry: ConvGeometry, i: int, d: Dimension) -> tuple[str, str]:
    fix = f"Use padding VALID{_after(geometry, padding=0)}"
    if geometry.kernel_size == geometry.input_shape and _plain(geometry):
        offsets = tuple(dim.low for dim in geometry.dimensions)
        padded = times(dim.padded for dim in geometry.dimensions)
        output = times(geometry.output_shape)
        reason = (
            f"Padding enlarges the input from {times(geometry.input_shape)} to "
            f"{padded}, so the kernel {times(geometry.kernel_size)} no longer sees it "
            f"all at once: the output is {output}"
        )
        position = tuple(dim.low // dim.stride for dim in geometry.dimensions)
        if all(dim.low % dim.stride == 0 for dim in geometry.dimensions):
            return (
                f"{reason}, position {_tuple(position)} of it is the Dense's value and "
                "the rest are not.",
                f"{fix} Or keep only position {_tuple(position)} of the output.",
            )
        return (
            f"{reason}, and the Dense's value is lost: it stands at offset "
            f"{_tuple(offsets)} of the padded input, which strides "
            f"{times(geometry.strides)} step over.",
            f"{fix} Or use strides 1 and keep only position {_tuple(offsets)}.",
        )
    if d.low < 0:
        reason = f"Padding {(d.low, d.high)} crops the first inputs of dimension {i}."
        return reason, f"Crop the input first, then use padding VALID. {_NO_FIX}"
    what = {
        "zeros": "zeros, so some taps meet no input",
        "circular": "inputs from the other end, which other taps read too",
        "reflect": "mirrored inputs, which other taps read too",
    }[d.mode]
    reason = f"Padding {(d.low, d.high)} in dimension {i} lets the windows read {what}."
    return reason, f"{fix} {_NO_FIX}"


def _stride_failure(geometry: ConvGeometry, i: int, d: Dimension) -> tuple[str, str]:
    step = d.holes * d.kernel
    fix = (
        f"Use strides equal to the kernel size"
        f"{_after(geometry, strides=tuple(_steps(geometry)))}"
    )
    if d.stride > step:
        return (
            f"Stride {d.stride} in dimension {i} is larger than the kernel {d.kernel}: "
            "the inputs between two windows are skipped.",
            f"{fix} {_NO_FIX}",
        )
    return (
        f"Stride {d.stride} in dimension {i} is smaller than the kernel {d.kernel}, "
        f"and the kernel is smaller than the input {d.size}: windows overlap, so a "
        "dense matrix repeats the kernel's entries.",
        f"{fix} Or use a kernel as large as the input. {_NO_FIX}",
    )


def _after(geometry: ConvGeometry, **changes: Any) -> str:
    """Return the result of a fix, checked, as the end of a sentence."""
    rank = len(geometry.input_shape)
    if "padding" in changes:
        changes = {"padding": ((0, 0),) * rank, "padding_mode": "zeros"}
    changes = {k: (v,) * rank if isinstance(v, int) else v for k, v in changes.items()}
    try:
        fixed = dataclasses.replace(geometry, **changes)
    # Without the padding, the kernel no longer fits into the input.
    except ValueError:
        return ", with a kernel cropped to the taps that meet an input."
    if fixed.base != "unrolled":
        return f": that makes it {fixed.base}."
    return f"; then the next condition fails: {why_it_fails(fixed)[0]}"


def _steps(geometry: ConvGeometry) -> list[int]:
    return [d.holes * d.kernel for d in geometry.dimensions]


def _plain(geometry: ConvGeometry) -> bool:
    """Return whether taps and inputs are adjacent and nothing is cropped."""
    return all(
        d.holes == 1 and (d.spread == 1 or d.kernel == 1) and min(d.low, d.high) >= 0
        for d in geometry.dimensions
    )


def _tuple(numbers: tuple[int, ...]) -> str:
    return str(numbers) if len(numbers) > 1 else ", ".join(map(str, numbers))
