"""Holds a file against a checkpoint, and against its model if there is one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from ..backends.default_settings import default_settings
from ..frontends.bind import bind
from ..frontends.options import check_options
from ..messages.errors import ExportError, FcconvError
from ..messages.flags import check_kind
from ..messages.progress import Progress, ProgressOption, shown
from ..params.moves import map_leaves
from .fingerprint import fingerprint_of
from .int8 import differences
from .integers import prove_layers
from .proof import (
    Proof,
    ReferenceOutputs,
    about_parameters,
    parameter_leaves,
    prove,
    reference_of,
)
from .record import FileRecord
from .report import ExportReport, FormFigures
from .runtimes import Runtime, runtime_of
from .shipped import Shipped, reading
from .size import size_of

_CHANGED = (
    "the file has been changed since it was proved: no weight and no layer that was "
    "read is another, but its bytes are not those that were proved. Export it again"
)


def verify_file(
    path: str | Path,
    params: PyTree | None = None,
    *inputs: PyTree,
    model: object = None,
    progress: ProgressOption = None,
    **kwargs: PyTree,
) -> ExportReport:
    """Check a file that :func:`fcconv_jax.export` wrote against parameters.

    The file's manifest names the parameter of each weight and how it was rearranged,
    so the weights and each layer can be checked without the model. To check the
    outputs of the whole file, too, pass ``model`` and ``inputs``.

    Args:
      path: the file.
      params: the params or variables, in the model's original form.
      *inputs: the model's inputs.
      model: the model, to compare its outputs on ``inputs`` with the file's.
      progress: as for :func:`fcconv_jax.verify`.
      **kwargs: keyword arguments of the call.

    Returns:
      A report; ``report.passed`` is the verdict.

    Raises:
      ExportError: the file isn't one that :func:`fcconv_jax.export` wrote.

    Source:
      The formats' own schemas: TensorFlow Lite's flatbuffer and ONNX.

    Example:
      >>> verify_file("model.h5", {})
      Traceback (most recent call last):
        ...
      fcconv_jax.messages.errors.ExportError: Expected a path that ends in one of ...
    """
    kinds = (str, os.PathLike)
    check_kind("the path", path, kinds, "that of an exported file", "'model.tflite'")
    path = Path(path)
    runtime = runtime_of(path)
    if not path.exists():
        raise ExportError(f"{path}: no such file. Pass the path of an exported file.")
    if model is None and (params is None or inputs or kwargs):
        # A misspelled model= is among the keyword arguments.
        first = next((f"{name}=" for name in kwargs), "inputs")
        given = "no params" if params is None else first
        raise ExportError(
            f"Expected params alone, or params, inputs and model=, got {given} without "
            f"a model. Call verify_file({str(path)!r}, params), or verify_file(..., "
            "params, *inputs, model=model)."
        )
    refused: Exception | None = None
    with reading(path):
        shipped = runtime.open(path)
        record = shipped.record()
        if record is None:
            raise ExportError(
                f"{path} has no manifest of its parameters: fcconv_jax didn't write "
                "it. Export the model with fcconv export."
            )
        sealed = record.fingerprint
        known = sealed == fingerprint_of(path, runtime.beside, sealed)
        if not (known or runtime.layers) and shipped.native:
            raise ExportError(f"{path}: {_CHANGED}.")
        try:
            # The reader accepts what the runtime refuses: one byte of 1,000 is enough.
            # Machine code that was changed would crash here, or do anything.
            if known or not shipped.native:
                shipped.load()
        except FcconvError:
            raise
        except Exception as error:  # each runtime has its own kinds
            refused = error
    with default_settings(), shown(progress) as show:
        variables = params
        # The record's paths begin with the collection.
        if not (isinstance(params, Mapping) and "params" in params):
            variables = {"params": params}
        reference, notes = None, []
        if model is not None:
            bound = bind(model, params, *inputs, **kwargs)
            check_options(verify_file, bound)
            bound.check_library()
            if not bound.arrays:
                raise ExportError(
                    "Expected the inputs of the model, got none. Call "
                    "verify_file(path, params, *inputs, model=model)."
                )
            variables = bound.variables
            if known or not shipped.native:
                stored = {x.stored for x in record.layers} - {""}
                reference, notes = reference_of(bound, *stored)
        else:
            notes.append("the outputs were not compared: that needs the model")
        with reading(path):
            leaves = parameter_leaves(map_leaves(variables, record.plan))
            if model is None:
                # A checkpoint may hold a model's state among its params, as NNX does.
                names = {f"state/{n.removeprefix('params/')}": n for n in leaves}
                leaves |= {new: leaves[n] for new, n in names.items()}
            given = shipped, record, leaves, show, reference
            proof = _prove(*given, shipped.output_names())
            if refused is not None:
                # A fault in a layer names the cause; without one, only this is known.
                if not proof.all_failures:
                    raise refused
                first = str(refused).strip().partition("\n")[0]
                why = f"{shipped.runtime} does not load the file: {first}"
                proof = dataclasses.replace(proof, failures=(*proof.failures, why))
            # A fault in a layer is more precise than a changed fingerprint.
            if not known and not proof.all_failures:
                proof = dataclasses.replace(proof, failures=(_CHANGED,))
            return _report(path, runtime, shipped, record, proof, notes)


def _prove(
    shipped: Shipped,
    record: FileRecord,
    leaves: Mapping[str, np.ndarray],
    show: Progress,
    reference: ReferenceOutputs | None,
    names: Sequence[str],
) -> Proof:
    rounded = any(layer.kernel.dtype == np.int8 for layer in shipped.layers())
    if rounded:
        notes = ["an int8 file: its weights and biases are the parameters, rounded"]
        failures, more = about_parameters(record, leaves)
        notes += more
        digested = {name for name, _ in record.digests}
        unseen = {source.leaf for source in record.constants} - digested
        if unseen:  # of an older version, whose record lacks their digests
            found = ", ".join(sorted(unseen))
            notes.append(f"other parameters, rounded too, were not compared: {found}")
        found = differences(shipped, reference, names) if reference is not None else {}
        for name, each in found.items():
            notes.append(
                f"{name!r} differs by {each.share:.1e} from float64, root mean square "
                f"({each.allowed:.1e} allowed)"
            )
            failures += each.failures(name)
        known = {layer.name for layer in record.layers}
        others = [x.name for x in shipped.layers() if x.name not in known]
        failures += [
            f"the file has a layer {x!r} that the model has not" for x in others
        ]
        layers = prove_layers(shipped.int8_layers(), record, leaves, show)
        return Proof(layers, (), 0, tuple(failures), tuple(notes))
    return prove(shipped, record, leaves, show, None, reference, names)


def _report(
    path: Path,
    runtime: Runtime,
    shipped: Shipped,
    record: FileRecord,
    proof: Proof,
    notes: Sequence[str],
) -> ExportReport:
    transposes, reshapes = shipped.moves()
    errors = [error.converted for error in proof.outputs]
    figures = FormFigures(
        record.form,
        size_of(path, runtime.beside),
        dict(shipped.ops()),
        transposes,
        reshapes,
        None,
        error=max(errors, default=None),
    )
    wanted = record.form
    left = tuple(
        (layer.name, layer.op)
        for layer in proof.layers
        if wanted in ("conv", "dense") and layer.form != wanted and not layer.constant
    )
    return ExportReport(
        path=str(path),
        runtime=runtime.name,
        title=shipped.runtime,
        form=wanted,
        chip=record.chip,
        plan=record.plan,
        proof=proof,
        figures=(figures,),
        products=tuple(shipped.products()),
        left=left,
        executed=runtime.executed,
        notes=tuple(notes),
    )
