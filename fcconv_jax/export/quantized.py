"""The int8 files of an export: written, checked, and compiled for an Ethos-U."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..messages.errors import ExportError
from ..messages.progress import Progress
from ..plan import Plan
from ..plan.rules import Rule
from . import vela
from .fingerprint import fingerprint_of, resealed
from .forms import FileForm
from .graph import LOOPS, Graph
from .int8 import batches, check, same_outputs
from .integers import prove_layers
from .report import FormFigures
from .shipped import Shipped
from .size import size_of
from .written import Call, Written


def fewest_cycles(
    call: Call, rules: Sequence[Rule], folder: Path, show: Progress
) -> Plan:
    """The chip's mix; where Vela compiles for it, a pure form that Vela finds quicker.

    The chip's rules come from single layers. A network's own order of layers, and what
    its small sizes cost, Vela knows better.
    """
    assert call.chip is not None
    plan = call.plan("mix", rules)
    accelerator = call.chip.accelerator
    if accelerator is None or not vela.available():
        return plan
    arrays = [np.asarray(x) for x in call.bound.arrays]
    candidates: dict[Plan, int] = {}
    forms: tuple[FileForm, ...] = ("mix", "dense", "conv")
    for done, form in enumerate(forms):
        show("planning: Vela's cycles", done, len(forms))
        each = plan if form == "mix" else call.plan(form, rules)
        if each in candidates:
            continue
        file = folder / f"candidate{call.runtime.suffix}"
        written = call.write(each, form, file)
        try:
            content = _quantize(call, written, [arrays], show)
            candidates[each] = vela.compile_file(content, accelerator).cycles
        except ExportError:  # the report gives the reason
            continue
    # Of equals the chip's own mix, which comes first.
    return min(candidates, key=candidates.__getitem__, default=plan)


def quantized(
    call: Call,
    made: Mapping[FileForm, tuple[Written, FormFigures]],
    calibrate: Sequence[Any] | None,
    labels: Any,
    form: FileForm,
    path: Path,
    show: Progress,
) -> dict[str, Any]:
    """The int8 files of all forms that were made: written, checked, compiled by Vela.

    Without calibration data nothing is written: an Ethos-U's cycles are those of a
    file whose ranges are taken from the inputs, which change no cycle.

    Returns:
      Fields of the report.
    """
    chip = call.chip.accelerator if call.chip else None
    if calibrate is None and (chip is None or not vela.available()):
        return {}
    arrays = [np.asarray(x) for x in call.bound.arrays]
    examples = [arrays]
    if calibrate is not None:
        examples = batches(calibrate, arrays)
        labels = _checked(labels, len(calibrate[0]))
        _check_loops(made[form][0].graph)
    contents: dict[FileForm, bytes] = {}
    opened: dict[FileForm, Shipped] = {}
    rows: list[FormFigures] = []
    notes: list[str] = []
    for each, (written, figures) in made.items():
        try:
            contents[each] = _quantize(call, written, examples, show)
        except ExportError as error:
            if calibrate is not None:
                raise
            notes.append(f"no cycles of the {each} form: {error}")
            continue
        cycles = {}
        if chip is not None and vela.available():
            try:
                compiled = vela.compile_file(contents[each], chip)
            except ExportError as error:
                notes.append(f"no cycles of the {each} form: {error}")
            else:
                cycles[chip] = compiled.cycles
                if compiled.cpu:
                    of = f"{compiled.cpu} of {compiled.cpu + compiled.npu} operations"
                    notes.append(f"{chip}, {each} form: {of} stay on its CPU")
                for op, place, why in compiled.left:
                    known = vela.INSTEAD.get(op)
                    fix = f". To avoid it, {known}" if known else ""
                    notes.append(f"{chip}'s CPU runs {op} at {place}: {why}{fix}")
        rows.append(dataclasses.replace(figures, cycles=cycles))
    if calibrate is None:
        return {"figures": tuple(rows), "notes": tuple(notes)} if rows else {}
    written, _ = made[form]
    with tempfile.TemporaryDirectory() as folder:
        for each, content in contents.items():
            file = path if each == form else Path(folder) / path.name
            file.write_bytes(content)
            opened[each] = call.runtime.open(file)
    shipped = opened[form]
    about_layers = written.record, written.leaves, show
    layers = prove_layers(shipped.int8_layers(), *about_layers)
    original = call.runtime.open(written.path)
    found = check(shipped, original, examples, labels, show)
    outputs = dict(zip(written.graph.output_names, found.differences))
    about = {
        "weights": f"{len(layers)} layers, the parameters rounded",
        "difference from float32": ", ".join(
            (f"{name} " if len(outputs) > 1 else "")
            + f"{each.share:.1e} ({each.allowed:.1e} allowed)"
            for name, each in outputs.items()
        )
        + ", root mean square",
        "same choice as float32": f"{100 * found.same_choice:.1f} %",
        "calibrated on": f"{len(examples)} calls",
    }
    if labels is not None:
        exact, rounded = (100 * n / found.labelled for n in found.right)
        about["accuracy"] = (
            f"{rounded:.1f} % of {found.labelled:,} labels, {exact:.1f} % in float32"
        )
    for other, file in opened.items():
        if other == form:
            continue
        wrong, total = same_outputs(shipped, file, examples)
        about[f"{form} and {other} forms"] = (
            f"the same bits in {total:,} numbers"
            if not wrong
            else f"{wrong:,} of {total:,} numbers differ"
        )
    float_bytes = size_of(written.path)
    rows[0] = dataclasses.replace(rows[0], bytes=len(contents[form]))
    notes.append(f"the float file that it was quantized from: {float_bytes:,} bytes")
    return {
        "figures": tuple(rows),
        "notes": tuple(notes),
        "int8": about,
        "int8_layers": layers,
        "int8_failures": tuple(
            why
            for value, (name, each) in zip(written.graph.outputs, outputs.items())
            if value.dtype.kind == "f"  # others are indices: see the choices
            for why in each.failures(name)
        ),
    }


def _quantize(
    call: Call,
    written: Written,
    examples: Sequence[Sequence[np.ndarray]],
    show: Progress,
) -> bytes:
    """Return the content of an int8 file, made from a float one and sealed again."""
    quantize = call.runtime.quantize
    assert quantize is not None
    content = quantize(written.path.read_bytes(), call.input_names, examples, show)
    # The quantizers keep the float file's record, so its fingerprint is known.
    old = written.record.fingerprint
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / written.path.name
        made.write_bytes(content)
        return resealed(content, old, fingerprint_of(made, call.runtime.beside, old))


def _check_loops(graph: Graph) -> None:
    """Refuse loops, whose layers the quantizers leave in float32."""
    loops = sorted({node.op for node in graph.nodes} & LOOPS)
    if loops:
        raise ExportError(
            f"Expected no loop or branch for an int8 file, got {', '.join(loops)}. "
            "Pass unroll=N to unroll loops of up to N steps, or drop calibrate=."
        )


def _checked(labels: ArrayLike | None, count: int) -> np.ndarray | None:
    """Return the labels of the calibration examples as an array of integers."""
    if labels is None:
        return None
    found = np.asarray(labels)
    if found.dtype.kind not in "iu" or found.shape[:1] != (count,):
        raise ExportError(
            f"Expected labels= as {count} integers, one for each example of calibrate=,"
            f" got {found.dtype}{list(found.shape)}. Pass indices of classes."
        )
    return found
