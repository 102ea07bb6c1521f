"""The int8 files of an export: written, checked, and compiled for an Ethos-U."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..messages.errors import ExportError
from ..messages.progress import Progress
from ..plan import Plan
from ..plan.rules import Rule
from . import vela
from .forms import FileForm
from .report import FormFigures
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
    quantizer = call.runtime.int8
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
        call.write(each, form, file)
        try:
            content = quantizer.quantize(file.read_bytes(), call.input_names, [arrays])
            candidates[each] = vela.compile_file(content, accelerator).cycles
        except ExportError:  # the report gives the reason
            continue
    # Of equals the chip's own mix, which comes first.
    return min(candidates, key=candidates.__getitem__, default=plan)


def quantized(
    call: Call,
    made: Mapping[FileForm, tuple[Written, FormFigures]],
    calibrate: Sequence[Any] | None,
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
    quantizer = call.runtime.int8
    chip = call.chip.accelerator if call.chip else None
    if calibrate is None and (chip is None or not vela.available()):
        return {}
    names = call.input_names
    arrays = [np.asarray(x) for x in call.bound.arrays]
    examples = [arrays]
    if calibrate is not None:
        examples = quantizer.batches(calibrate, [x.shape for x in arrays])
    contents: dict[FileForm, bytes] = {}
    rows: list[FormFigures] = []
    notes: list[str] = []
    for each, (written, figures) in made.items():
        show(f"int8: {each} form", 0, 1)
        content = written.path.read_bytes()
        try:
            contents[each] = quantizer.quantize(content, names, examples)
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
    path.write_bytes(contents[form])
    found = quantizer.check(
        *(contents[form], written.path.read_bytes(), written.record, written.leaves),
        examples,
    )
    failures = [
        f"int8: layer {layer.name!r}: {why}"
        for layer in found.layers
        for why in layer.failures
    ]
    about: dict[str, Any] = {
        "weights": f"{len(found.layers)} layers, the parameters rounded",
        "difference from float32": f"{found.difference:.1e} (root mean square)",
        "same choice as float32": f"{100 * found.same_choice:.1f} %",
        "calibrated on": f"{len(examples)} calls",
    }
    for other, content in contents.items():
        if other == form:
            continue
        wrong, total = quantizer.same_outputs(contents[form], content, examples)
        about[f"{form} and {other} forms"] = (
            f"the same bits in {total:,} numbers"
            if not wrong
            else f"{wrong:,} of {total:,} numbers differ"
        )
    about["failures"] = failures
    float_bytes = size_of(written.path)
    rows[0] = dataclasses.replace(rows[0], bytes=len(contents[form]))
    notes.append(f"the float file that it was quantized from: {float_bytes:,} bytes")
    return {"figures": tuple(rows), "notes": tuple(notes), "int8": about}
