"""Writes a model as a file for an edge runtime, and proves the file: ``export``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..backends.timing import milliseconds
from ..default_settings import default_settings
from ..errors import ExportError
from ..frontends.convert_model import convert_model
from ..frontends.kinds import ModelProgram, frontend_of, kind_of
from ..params.trees import convert_params
from ..plan import Plan
from ..plan.rules import Rule, as_rules
from ..progress import Progress, ProgressOption, shown
from ..verification.agreement import named_leaves
from .chips import Chip, chip_of
from .fingerprint import BLANK, seal
from .forms import FORMS, Form, plan_of_form
from .graph import Graph, Source
from .layers import Record, computed_values, constants_of, layers_of, leaves_read
from .lowering import lower
from .memory import peak_bytes
from .proof import Proof, Reference, parameter_leaves, prove, reference_of
from .putting import beside
from .report import ExportReport, FormFigures
from .simplify import simplify
from .size import size_of
from .targets import Name, Target, target_of


def export(
    model: Any,
    params: Any,
    *inputs: Any,
    to: Name,
    path: str | Path,
    plan: Plan | None = None,
    form: Form = "conv",
    chip: str | None = None,
    rules: Iterable[Rule | str] = (),
    unroll: int = 0,
    calibrate: Sequence[Any] | None = None,
    compare: bool = False,
    progress: ProgressOption = None,
    **kwargs: Any,
) -> ExportReport:
    """Writes a model for an edge runtime and proves what was written.

    The model is traced once in the form that is asked for, lowered to a few
    operations, and written with its layout kept. Then the file itself is checked: the
    bits of its weights, each linear operation cut out of it and run in its runtime on
    integers, and the whole of it on ``inputs`` against float64
    (:mod:`fcconv_jax.export.proof`).

    Args:
      model: a ``flax.linen`` or ``flax.nnx`` Module, or a function of params, inputs.
      params: its params or variables, in the model's own form; None for an NNX model's
        own.
      *inputs: what it is called with; their shapes are the file's.
      to: ``"litert"``, ``"onnx"``, ``"openvino"``, ``"iree"``, ``"coreml"`` or
        ``"stablehlo"``.
      path: the file to write.
      plan: which layers go where; made from ``form`` where it is None.
      form: ``"conv"``: no matmul with a weight is left; ``"dense"``: no convolution
        that has a dense form; ``"mix"``: each layer as the chip's rules say.
      chip: the chip that the file is for, see :mod:`fcconv_jax.export.chips`.
      rules: as for :func:`fcconv_jax.make_plan`, where the plan is made here.
      unroll: loops (``nn.scan``) of up to this many steps are written out.
      calibrate: for an int8 file: arrays of inputs, one for each positional input, with
        examples along the first axis.
      compare: whether to make the other forms as well, for the report's figures.
      progress: as for :func:`fcconv_jax.verify`.
      **kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
      A report; ``report.passed`` tells, ``print(report)`` shows.

    Raises:
      ExportError: the target cannot take the model: names what, and the way out. What
        was at ``path`` before stays.
      PlanError: a rule matches no layer.

    Source:
      The formats' own schemas: TensorFlow Lite's flatbuffer, ONNX, StableHLO.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> export(model, params, x, to="tflite", path="model.tflite")
      Traceback (most recent call last):
        ...
      fcconv_jax.errors.ExportError: expected to= one of litert, ...
    """
    target = target_of(to)
    if Path(path).suffix != target.suffix:
        raise ExportError(
            f"expected a path that ends in {target.suffix} for to={to!r}, got {path}"
        )
    if form not in FORMS:
        raise ExportError(f"expected form= one of {', '.join(FORMS)}, got {form!r}")
    made_for = None if chip is None else chip_of(chip)
    if form == "mix" and made_for is None and plan is None:
        raise ExportError(
            "expected a chip for form='mix', whose rules decide; got none. Pass "
            "chip='ethos-u55', or plan= of your own"
        )
    if calibrate is not None and to != "litert":
        raise ExportError(
            f"expected to='litert' for an int8 file, got {to!r}: its quantizer is "
            "LiteRT's. Drop calibrate= for a file in float32"
        )
    call = _Call(model, params, inputs, kwargs, target, made_for, unroll)
    with (
        default_settings(),
        shown(progress) as tell,
        beside(Path(path)) as place,
        tempfile.TemporaryDirectory() as folder,
    ):
        tell("planning", 0, 1)
        if plan is not None:
            form = plan.to
        elif form == "mix" and to == "litert":
            plan = fewest_cycles(call, as_rules(rules), Path(folder), tell)
        else:
            plan = call.plan(form, as_rules(rules))
        tell("planning", 1, 1)
        last = place / Path(path).name
        first = last if calibrate is None else Path(folder) / f"float{target.suffix}"
        written = call.write(plan, form, first)  # refuses what it cannot, at once
        reference, notes = reference_of(call.program, call.variables)
        proof, figures = call.check(written, reference, tell)
        made: dict[Form, tuple[Written, FormFigures]] = {form: (written, figures)}
        chosen: list[Form] = ["dense", "conv"]
        if made_for is not None:
            chosen.append("mix")
        for other in chosen if compare else ():
            if other != form:
                tell(f"{target.title}: {other} form", 0, 1)
                there = Path(folder) / f"{other}{target.suffix}"
                again = call.write(call.plan(other, as_rules(rules)), other, there)
                made[other] = again, call.figures(again, reference)
        found: Mapping[str, Any] = {}
        if to == "litert":
            found = quantized(call, made, calibrate, form, last, tell)
        report = call.report(
            *(written, proof, [each for _, each in made.values()], notes)
        )
        return dataclasses.replace(report, path=str(path), **found)


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A file with what it was written from."""

    path: Path
    form: str
    plan: Plan
    graph: Graph
    record: Record
    leaves: Mapping[str, np.ndarray]
    computed: Mapping[str, np.ndarray]


class _Call:
    """A model on its inputs, on its way to a target."""

    def __init__(
        self,
        model: Any,
        params: Any,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        target: Target,
        chip: Chip | None,
        unroll: int,
    ):
        self.model, self.params, self.inputs, self.kwargs = (
            model,
            params,
            inputs,
            kwargs,
        )
        self.target, self.chip, self.unroll = target, chip, unroll
        self.room = frontend_of(model, "export")
        self.variables = self.room.variables(model, params)
        self.program = self.room.model_program(model, inputs, kwargs)
        tree = jax.eval_shape(self.program.call, self.variables, self.program.arrays)
        self.outputs = [name for name, _ in named_leaves(tree, "output")]
        self.input_names = [
            f"{name}_in" if name in self.outputs else name
            for name in input_names(inputs, kwargs)
        ]

    def plan(self, form: Form, rules: Sequence[Rule]) -> Plan:
        """The plan of a form."""
        args, options = self.room.planning_call(self.params, self.inputs, self.kwargs)
        return plan_of_form(
            self.model, args, options, form, rules, self.target, self.chip
        )

    def write(self, plan: Plan, form: str, path: Path) -> Written:
        """Writes a file."""
        changed = convert_model(self.model, plan)
        variables = convert_params(self.variables, plan)
        program = self.room.model_program(changed, self.inputs, self.kwargs)
        leaves = parameter_leaves(variables)
        graph = self._lowered(program, variables, leaves)
        record = Record(
            tuple(layers_of(graph)),
            plan,
            form,
            self.chip.name if self.chip else None,
            constants_of(graph),
            kind_of(self.model, "export"),
            BLANK,
        )
        computed = {
            name: value.data
            for name, value in computed_values(graph).items()
            if value.data is not None and not self.target.from_program
        }
        room = self.target.room()
        if self.target.from_program:
            if self.target.name == "stablehlo":
                # No layer is cut out of it: every parameter is looked for as it is.
                used = tuple(Source(leaf) for leaf in leaves_read(graph))
                record = dataclasses.replace(record, layers=(), constants=used)
            graph.notes += room.write_program(
                *(program.call, variables, program.arrays, self.outputs, record, path)
            )
        else:
            room.write(graph, record, path)
        seal(path, self.target.open(path))
        return Written(path, form, plan, graph, record, leaves, computed)

    def _lowered(
        self, program: ModelProgram, variables: Any, leaves: Mapping[str, np.ndarray]
    ) -> Graph:
        """The graph of a model; an empty one where only JAX can say it, and may."""
        flat, tree = jax.tree.flatten(variables)

        def call(flat: Any, arrays: Any) -> Any:
            return program.call(jax.tree.unflatten(tree, flat), arrays)

        jaxpr = jax.make_jaxpr(call)(flat, program.arrays)
        pairs = list(leaves.items())
        try:
            graph = lower(jaxpr, pairs, self.input_names, self.outputs, self.unroll)
        except ExportError as error:
            if not self.target.from_program:
                raise
            why = f"its layers are not compared one by one: {error}"
            return Graph([], [], [], [], list(self.outputs), [why])
        if self.target.from_program:
            # Its file has the outputs that no input changes, too, and computes each
            # kernel that is no parameter's entries itself.
            graph.output_names, graph.notes = list(self.outputs), []
        return simplify(graph)

    def check(
        self, written: Written, reference: Reference | None, tell: Progress
    ) -> tuple[Proof, FormFigures]:
        """Proves a file."""
        shipped = self.target.open(written.path)
        proof = prove(
            *(shipped, written.record, written.leaves, tell, written.computed),
            reference,
            written.graph.output_names,
        )
        errors = [error.converted for error in proof.outputs]
        return proof, self._figures(written, max(errors, default=None))

    def figures(self, written: Written, reference: Reference | None) -> FormFigures:
        """The figures of a file, without its proof."""
        shipped = self.target.open(written.path)
        error = None
        if reference is not None and self.target.executed:
            error = whole_error(shipped, reference, written.graph.output_names)
        return self._figures(written, error)

    def _figures(self, written: Written, error: float | None) -> FormFigures:
        shipped = self.target.open(written.path)
        transposes, reshapes = shipped.moves()
        arrays = [np.asarray(x) for x in self.program.arrays]
        time = None
        run: Callable[..., Any] | None = getattr(shipped, "runner", None)
        if run is not None and error is not None:
            time = milliseconds({"file": run(arrays)})["file"]
        return FormFigures(
            form=written.form,
            bytes=size_of(written.path),
            ops=dict(shipped.ops()),
            transposes=transposes,
            reshapes=reshapes,
            activation_bytes=peak_bytes(written.graph),
            milliseconds=time,
            error=error,
        )

    def report(
        self,
        written: Written,
        proof: Proof,
        rows: Sequence[FormFigures],
        notes: Sequence[str],
    ) -> ExportReport:
        """All that was found."""
        shipped = self.target.open(written.path)
        wanted = written.form
        # Where the file's layers are not cut out, those that it was written from.
        found = proof.layers or layers_of(written.graph)
        left = tuple(
            (layer.name, f"{layer.op}: {_why(written.plan, layer.name)}")
            for layer in found
            if wanted in ("conv", "dense") and layer.form != wanted
        )
        broken: list[tuple[str, str]] = []
        if self.chip is not None:
            for layer in written.record.layers:
                broken += [(layer.name, why) for why in self.chip.breaks(layer)]
        return ExportReport(
            path=str(written.path),
            to=self.target.name,
            runtime=shipped.runtime,
            form=wanted,
            chip=self.chip.name if self.chip else None,
            plan=written.plan,
            proof=proof,
            figures=tuple(rows),
            products=tuple(shipped.products()),
            left=left,
            broken=tuple(broken),
            executed=self.target.executed,
            notes=tuple(dict.fromkeys([*notes, *written.graph.notes])),
        )


def fewest_cycles(
    call: _Call, rules: Sequence[Rule], folder: Path, tell: Progress
) -> Plan:
    """The chip's mix; where Vela compiles for it, a pure form that Vela finds quicker.

    The chip's rules come from single layers. A network's own order of layers, and what
    its small sizes cost, Vela knows better.
    """
    from . import int8, vela

    assert call.chip is not None
    plan = call.plan("mix", rules)
    accelerator = call.chip.accelerator
    if accelerator is None or not vela.available():
        return plan
    arrays = [np.asarray(x) for x in call.program.arrays]
    candidates: dict[Plan, int] = {}
    forms: tuple[Form, ...] = ("mix", "dense", "conv")
    for done, form in enumerate(forms):
        tell("planning: Vela's cycles", done, len(forms))
        each = plan if form == "mix" else call.plan(form, rules)
        if each in candidates:
            continue
        file = folder / f"candidate{call.target.suffix}"
        call.write(each, form, file)
        try:
            content = int8.quantize(file.read_bytes(), call.input_names, [arrays])
            candidates[each] = vela.compile_file(content, accelerator).cycles
        except ExportError:  # the report says why
            continue
    # Of equals the chip's own mix, which comes first.
    return min(candidates, key=candidates.__getitem__, default=plan)


def quantized(
    call: _Call,
    made: Mapping[Form, tuple[Written, FormFigures]],
    calibrate: Sequence[Any] | None,
    form: Form,
    path: Path,
    tell: Progress,
) -> dict[str, Any]:
    """The int8 files of all forms that were made: written, checked, compiled by Vela.

    Without calibration data nothing is written: an Ethos-U's cycles are those of a
    file whose ranges are taken from the inputs, which change no cycle.

    Returns:
      What the report says of it, by field.
    """
    from . import int8, vela

    chip = call.chip.accelerator if call.chip else None
    if calibrate is None and (chip is None or not vela.available()):
        return {}
    names = call.input_names
    arrays = [np.asarray(x) for x in call.program.arrays]
    examples = [arrays]
    if calibrate is not None:
        examples = int8.batches(calibrate, [x.shape for x in arrays])
    contents: dict[Form, bytes] = {}
    rows: list[FormFigures] = []
    notes: list[str] = []
    for each, (written, figures) in made.items():
        tell(f"int8: {each} form", 0, 1)
        content = written.path.read_bytes()
        try:
            contents[each] = int8.quantize(content, names, examples)
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
        rows.append(dataclasses.replace(figures, cycles=cycles))
    if calibrate is None:
        return {"figures": tuple(rows), "notes": tuple(notes)} if rows else {}
    written, _ = made[form]
    path.write_bytes(contents[form])
    found = int8.check(
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
        wrong, total = int8.same_outputs(contents[form], content, examples)
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


def _why(plan: Plan, name: str) -> str:
    """Why a layer has another form than was asked for."""
    reason = plan.skipped.get(name.partition("#")[0], "it has no other form here")
    return reason.partition(". ")[0].rstrip(".")


def input_names(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A name for each array among a call's arguments, in the order of its program.

    Example:
      >>> input_names([np.ones(2), 3], {"mask": np.ones(2), "train": False})
      ['input0', 'mask']
    """
    from ..tracing.arguments import is_array

    found = []
    tree = (tuple(inputs), dict(kwargs))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not is_array(leaf):
            continue
        parts = [str(getattr(p, "key", getattr(p, "idx", p))) for p in path[1:]]
        first = f"input{parts[0]}" if parts[0].isdigit() else parts[0]
        found.append("_".join([first, *parts[1:]]))
    return found


def whole_error(shipped: Any, reference: Reference, names: Sequence[str]) -> float:
    """The largest error of a file against the reference."""
    from .proof import whole_errors

    errors = whole_errors(shipped, reference, names)
    return max((error.converted for error in errors), default=0.0)
