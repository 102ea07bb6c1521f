"""Writes a model as a file for an edge runtime, and proves the file: ``export``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from ..backends.default_settings import default_settings
from ..backends.timing import milliseconds
from ..dense_prediction.slide import Slide
from ..frontends.bind import bind
from ..frontends.bound import BoundModel
from ..frontends.options import check_concrete, check_options
from ..messages.errors import ExportError
from ..messages.flags import check_flags
from ..messages.progress import Progress, ProgressOption, shown
from ..plan import Plan
from ..plan.rules import Rule, as_rules
from ..tracing.arguments import is_key
from ..tracing.inputs_read import inputs_read
from ..verification.agreement import WorkingError, named_leaves, working_errors
from .arguments import check_arguments, check_arrays
from .chips import Chip
from .fingerprint import BLANK, seal
from .fold_norms import folded_outputs
from .forms import FileForm, plan_of_form
from .graph import Graph, Source
from .layers import (
    computed_values,
    constants_of,
    layers_of,
    leaves_read,
    unplaced_leaves,
)
from .lowering.trace import input_names, lower
from .memory import peak_bytes
from .open_sizes import (
    BATCHES,
    OpenSizes,
    fails_with_others,
    first_step,
    image_axes,
    repeat_rows,
)
from .passes.fold import fold_norms
from .passes.nchw import to_nchw
from .passes.round import round_weights
from .passes.simplify import multiply, simplify
from .passes.symbolic import make_symbolic, rescale
from .passes.tokens import flatten_windows
from .proof import (
    Proof,
    ReferenceOutputs,
    parameter_leaves,
    prove,
    reference_of,
    whole_error,
)
from .putting import emptied, folder_for, put
from .quantized import fewest_cycles, quantized
from .record import FileRecord, digest_of
from .report import ExportReport, FormFigures
from .runtimes import Runtime
from .size import size_of
from .written import Written


def export(
    model: object,
    params: PyTree | None = None,
    *inputs: PyTree,
    path: str | Path,
    runtime: str | None = None,
    to: FileForm = "conv",
    plan: Plan | None = None,
    chip: str | None = None,
    rules: Iterable[Rule | str] = (),
    unroll: int = 0,
    fold: bool = True,
    any_batch: bool = False,
    any_size: bool = False,
    weights: str | None = None,
    calibrate: Sequence[ArrayLike] | None = None,
    labels: ArrayLike | None = None,
    compare: bool = False,
    progress: ProgressOption = None,
    **kwargs: PyTree,
) -> ExportReport:
    """Write a model as a file for an edge runtime, and verify the file.

    The model is traced once in the requested form, lowered to a few operations, and
    written with its layout kept. Then the file itself is checked: the bits of its
    weights, each linear operation (extracted from the file and run in its runtime on
    integers), and the whole file on ``inputs``, against float64
    (:mod:`fcconv_jax.export.proof`).

    Args:
      model: a ``flax.linen`` or ``flax.nnx`` Module, or a function of params, inputs.
      params: its params or variables, in the model's original form; None for an NNX
        model's own.
      *inputs: the model's inputs; the file accepts inputs of their shapes.
      path: the file to write. Its suffix selects the runtime: ``.tflite``, ``.onnx``,
        ``.xml`` (OpenVINO), ``.vmfb`` (IREE), ``.mlpackage``, ``.stablehlo``. If the
        file exists and the new one fails a check, the old one is kept and the new one
        is written next to it; see ``report.path``.
      runtime: the name of the runtime, such as ``"litert"``; must match the suffix.
      to: ``"conv"`` converts every matmul with a weight, ``"dense"`` every convolution
        that has a dense form, and ``"mix"`` gives each layer the form that the chip
        prefers.
      plan: which layers to convert, instead of ``to``.
      chip: the chip that the file is for, see :mod:`fcconv_jax.export.chips`.
      rules: as for :func:`fcconv_jax.make_plan`, if ``plan`` is None.
      unroll: unroll loops (``nn.scan``) of up to this many steps.
      fold: whether to fold norms at inference and other per-channel affines into the
        layers before or after them. They are folded in float64 and rounded once. If the
        file's error would then exceed twice the model's own, nothing is folded, and the
        report lists the layers. False keeps the bits of every parameter. IREE and
        StableHLO files, which are JAX's own program, fold nothing.
      any_batch: whether the file accepts any batch size (the first axis of the inputs):
        resizable in LiteRT, symbolic in ONNX, OpenVINO and StableHLO. It is verified
        with three sizes. A StableHLO file accepts any batch size by default, if the
        model allows it; with True, it is an error if the model doesn't.
      any_size: whether an ONNX, OpenVINO or StableHLO file accepts images of the
        inputs' spatial size and larger. The model must be fully convolutional or the
        result of :func:`fcconv_jax.slide`, which then computes each crop separately. If
        it accepts only multiples of 8, say, so does the file. It is verified with three
        sizes.
      weights: the dtype to which kernels and embeddings are rounded in the file, for
        half its size: ``"float16"`` in LiteRT and ONNX, ``"bfloat16"`` in ONNX. The
        runtime converts them to float32 when it loads the file. Other parameters stay
        float32.
      calibrate: for an int8 file, arrays of example inputs, one for each positional
        input, with examples along the first axis.
      labels: the class of each of these examples. The report then shows the accuracy of
        the float and the int8 file, which choose the largest entry of the first output.
      compare: whether to export the other forms as well and show their figures.
      progress: as for :func:`fcconv_jax.verify`.
      **kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
      A report; ``report.passed`` is the verdict, ``print(report)`` shows the checks.

    Raises:
      ExportError: the runtime can't run the model; names the operation and a fix. An
        existing file at ``path`` is kept.
      PlanError: a rule matches no layer.

    Source:
      The formats' own schemas: TensorFlow Lite's flatbuffer, ONNX, StableHLO.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> export(model, params, x, path="model.h5")
      Traceback (most recent call last):
        ...
      fcconv_jax.messages.errors.ExportError: Expected a path that ends in one of ...
    """
    check_flags(fold=fold, any_batch=any_batch, any_size=any_size, compare=compare)
    form = to
    target, made_for = check_arguments(
        *(path, runtime, form, chip, plan, weights, calibrate, labels),
        *(unroll, kwargs),
        any_batch=any_batch,
        any_size=any_size,
    )
    axes: tuple[int, ...] = ()
    if any_size and isinstance(model, Slide):
        given = inputs if params is None else (params, *inputs)
        axes, model = model.axes, model.each_crop(*given, **kwargs)
    bound = bind(model, params, *inputs, **kwargs)
    check_options(export, bound)
    check_concrete(export, bound)
    check_arrays(bound)
    bound.check_inference()
    bound.check_library()
    axes = axes or (image_axes(bound) if any_size else ())
    sizes = OpenSizes(any_batch, axes)
    int8 = calibrate is not None
    call = _Call(bound, target, made_for, unroll, fold, sizes, weights, int8)
    with (
        default_settings(),
        shown(progress) as show,
        folder_for(Path(path)) as place,
        tempfile.TemporaryDirectory() as folder,
    ):
        show("planning", 0, 1)
        if plan is not None:
            form = plan.to
        elif form == "mix" and target.quantize is not None:
            plan = fewest_cycles(call, as_rules(rules), Path(folder), show)
        else:
            plan = call.plan(form, as_rules(rules))
        show("planning", 1, 1)
        last = place / Path(path).name
        # Quantizers make an int8 file from a float one, which isn't kept.
        first = last if calibrate is None else Path(folder) / f"float{target.suffix}"
        written = call.write(plan, form, first)  # refuses what it cannot, at once
        reference, notes = reference_of(call.bound, weights)
        proof, figures = call.check(written, reference, show)
        unfolded = _not_folded(written, call.folding_errors(written, proof, reference))
        # Folded params are rounded once more, which a network may magnify.
        if unfolded:
            call.fold = False
            written = call.write(plan, form, emptied(first))
            proof, figures = call.check(written, reference, show)
            notes = [*notes, *unfolded]
        made: dict[FileForm, tuple[Written, FormFigures]] = {form: (written, figures)}
        chosen: list[FileForm] = ["dense", "conv"]
        if made_for is not None:
            chosen.append("mix")
        for other in chosen if compare else ():
            if other != form:
                show(f"{target.title}: {other} form", 0, 1)
                there = Path(folder) / f"{other}{target.suffix}"
                again = call.write(call.plan(other, as_rules(rules)), other, there)
                made[other] = again, call.figures(again, reference)
        found: dict[str, Any] = {}
        if target.quantize is not None:
            found |= quantized(call, made, calibrate, labels, form, last, show)
        rows = [each for _, each in made.values()]
        report = call.report(written, proof, rows, notes)
        about = {"notes": (*report.notes, *found.pop("notes", ()))}
        report = dataclasses.replace(report, path=str(path), **about, **found)
        final = put(place, Path(path), report.passed)
        if final != Path(path):
            kept = f"{path} was there and stays; the new file is {final}"
            report = dataclasses.replace(
                report, path=str(final), notes=(*report.notes, kept)
            )
        return report


def _not_folded(written: Written, errors: Sequence[WorkingError]) -> list[str]:
    """Why no norm may be folded, by layer; none where the file is accurate enough."""
    wrong = [error for error in errors if not error.passed]
    return [
        f"not folded: {layer.name}: with norms folded into layers, {error.path} had an "
        f"error of {error.converted:.1e} ({error.allowed:.1e} allowed)"
        for layer in written.record.layers
        for error in wrong[:1]
        if layer.folded
    ]


class _Call:
    """A model on its inputs, on its way to a target."""

    def __init__(
        self,
        bound: BoundModel,
        runtime: Runtime,
        chip: Chip | None,
        unroll: int,
        fold: bool,
        sizes: OpenSizes,
        weights: str | None,
        int8: bool,
    ):
        self.bound, self.runtime, self.chip, self.int8 = bound, runtime, chip, int8
        self.unroll, self.fold, self.sizes = unroll, fold, sizes
        self.weights = weights
        self.whole = runtime.fused - (runtime.one_batch if sizes else frozenset())
        tree = bound.traced[1]
        self.outputs = [name for name, _ in named_leaves(tree, "output")]
        self.input_names = [
            # Two values of a file can't have one name.
            f"{name}_in" if name in self.outputs else name
            for name in input_names(bound.args, bound.kwargs)
        ]

    def plan(self, form: FileForm, rules: Sequence[Rule]) -> Plan:
        """The plan of a form."""
        images = "last" if self.sizes.axes else self.runtime.images
        return plan_of_form(self.bound, form, rules, images, self.chip)

    def write(self, plan: Plan, form: str, path: Path) -> Written:
        """Writes a file."""

        def attempt(step: int) -> Written:
            self.sizes = dataclasses.replace(self.sizes, step=step)
            return self._write(plan, form, path)

        return first_step(attempt) if self.sizes.axes else attempt(1)

    def _write(self, plan: Plan, form: str, path: Path) -> Written:
        changed = self.bound.convert(plan)
        leaves = parameter_leaves(changed.variables)
        base, others = changed, dict[str, BoundModel]()
        if self.runtime.write is not None:
            base, others = self.sizes.variants(changed)
        graph = self._lowered(base, leaves)
        more = self._other_sizes(others, leaves)
        graphs = [graph, *more.values()]
        if self.sizes.batch and more:
            repeat_rows(graphs)
        fixed = not self.sizes.axes
        gemm = fixed and self.runtime.gemm
        for each in graphs if gemm else ():
            flatten_windows(each)
        layers = tuple(layers_of(graph))
        computed = {
            name: value.data
            for name, value in computed_values(graph).items()
            if value.data is not None and self.runtime.write
        }
        # Constants turn with the images: they are recorded as the file has them.
        for each in graphs if self.runtime.images == "first" else ():
            to_nchw(each, rows=fixed, columns=gemm and not self.int8, gemm=gemm)
        # A constant is looked for anywhere in the file: it may equal another parameter.
        unplaced = unplaced_leaves(graph) if self.runtime.layers else graph.leaves
        record = FileRecord(
            layers,
            plan,
            form,
            self.chip.name if self.chip else None,
            constants_of(graph),
            BLANK,
            tuple((leaf, digest_of(leaves[leaf])) for leaf in unplaced),
        )
        if self.runtime.write is not None:
            if more:
                make_symbolic(graph, more)
            if self.sizes.batch:
                rescale(graph, "batch", BATCHES[0], len(self.bound.arrays[0]))
            self.runtime.write(graph, record, path)
        else:
            assert self.runtime.write_program is not None
            if not self.runtime.layers:
                # No layer is cut out of it: every parameter is looked for as it is.
                used = tuple(Source(leaf) for leaf in leaves_read(graph))
                record = dataclasses.replace(record, layers=(), constants=used)
            graph.notes += self.runtime.write_program(
                *(changed.call, changed.variables, changed.arrays),
                *(self.outputs, record, path),
                **({"sizes": self.sizes} if self.sizes else {}),
            )
        sealed = seal(path, self.runtime.beside)
        record = dataclasses.replace(record, fingerprint=sealed)
        return Written(path, form, plan, graph, record, leaves, computed)

    def _other_sizes(
        self, others: Mapping[str, BoundModel], leaves: Mapping[str, np.ndarray]
    ) -> dict[str, Graph]:
        try:
            return {name: self._lowered(each, leaves) for name, each in others.items()}
        except Exception as error:  # models refuse sizes with errors of every kind
            if isinstance(error, ExportError) or not self.sizes.axes:
                raise
            raise fails_with_others(error) from error

    def _lowered(self, bound: BoundModel, leaves: Mapping[str, np.ndarray]) -> Graph:
        """The graph of a model; an empty one where only JAX can say it, and may."""
        flat, tree = jax.tree.flatten(bound.variables)
        # No file holds the keys of dropout: they are constants, which nothing may read.
        stored = [i for i, leaf in enumerate(flat) if not is_key(leaf)]

        def call(values: PyTree, arrays: PyTree) -> PyTree:
            merged = flat.copy()
            for i, value in zip(stored, values):
                merged[i] = value
            return bound.call(jax.tree.unflatten(tree, merged), arrays)

        jaxpr = jax.make_jaxpr(call)([flat[i] for i in stored], bound.arrays)
        pairs = list(leaves.items())
        read = [name for name, used in zip(leaves, inputs_read(jaxpr)) if used]
        try:
            names = self.input_names, self.outputs
            graph = lower(jaxpr, pairs, *names, self.unroll, self.whole)
        except ExportError as error:
            if self.runtime.write is not None:
                raise
            why = f"its layers are not compared one by one: {error}"
            return Graph([], [], [], [], list(self.outputs), [why], read)
        graph.leaves = read
        if self.runtime.write is None:
            # Its file has the outputs that no input changes, too, and computes each
            # computed kernel itself.
            graph.output_names, graph.notes = list(self.outputs), []
        any_padding = self.runtime.images == "first"
        simplify(graph, self.whole, any_padding)
        folds = self.fold and self.runtime.write is not None
        if folds and sum(map(fold_norms, graph.graphs())):
            simplify(graph, self.whole, any_padding)
        if self.fold and self.chip is not None and self.chip.accelerator:
            multiply(graph)
        if self.weights is not None:
            round_weights(graph, jnp.dtype(self.weights))
        return graph

    def check(
        self, written: Written, reference: ReferenceOutputs | None, show: Progress
    ) -> tuple[Proof, FormFigures]:
        """Proves a file."""
        shipped = self.runtime.open(written.path)
        proof = prove(
            *(shipped, written.record, written.leaves, show, written.computed),
            reference,
            written.graph.output_names,
        )
        if self.sizes and reference is not None:
            names = written.graph.output_names
            given = self.bound, shipped, names, proof, self.weights
            proof = self.sizes.tried(*given)
        errors = [error.converted for error in proof.outputs]
        return proof, self._figures(written, max(errors, default=None))

    def folding_errors(
        self, written: Written, proof: Proof, reference: ReferenceOutputs | None
    ) -> Sequence[WorkingError]:
        """The errors of outputs; of JAX with norms folded, if the file can't run."""
        folded = any(layer.folded for layer in written.record.layers)
        if self.runtime.executed or reference is None or not folded:
            return proof.outputs
        made = folded_outputs(self.bound)
        exact = reference.exact[: len(made)]  # the state that a call returns is last
        return working_errors("outputs", exact, reference.own, made)

    def figures(
        self, written: Written, reference: ReferenceOutputs | None
    ) -> FormFigures:
        """The figures of a file, without its proof."""
        shipped = self.runtime.open(written.path)
        error = None
        if reference is not None and self.runtime.executed:
            error = whole_error(shipped, reference, written.graph.output_names)
        return self._figures(written, error)

    def _figures(self, written: Written, error: float | None) -> FormFigures:
        shipped = self.runtime.open(written.path)
        transposes, reshapes = shipped.moves()
        arrays = [np.asarray(x) for x in self.bound.arrays]
        time = None
        if error is not None:
            time = milliseconds({"file": shipped.runner(arrays)})["file"]
        return FormFigures(
            form=written.form,
            bytes=size_of(written.path, self.runtime.beside),
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
        shipped = self.runtime.open(written.path)
        wanted = written.form
        # Where the file's layers are not cut out, those that it was written from.
        found = proof.layers or layers_of(written.graph)
        left = tuple(
            (layer.name, f"{layer.op}: {_why(written.plan, layer.name)}")
            for layer in found
            if wanted in ("conv", "dense")
            and layer.form != wanted
            and not layer.constant
        )
        broken: list[tuple[str, str]] = []
        if self.chip is not None:
            for layer in written.record.layers:  # a resize's matrices, too
                broken += [(layer.name, why) for why in self.chip.breaks(layer)]
        return ExportReport(
            path=str(written.path),
            runtime=self.runtime.name,
            title=shipped.runtime,
            form=wanted,
            chip=self.chip.name if self.chip else None,
            plan=written.plan,
            proof=proof,
            figures=tuple(rows),
            products=tuple(shipped.products()),
            left=left,
            broken=tuple(broken),
            executed=self.runtime.executed,
            notes=tuple(dict.fromkeys([*notes, *written.graph.notes])),
        )


def _why(plan: Plan, name: str) -> str:
    """Why a layer has another form than was asked for."""
    reason = plan.skipped.get(name.partition("#")[0], "it has no other form here")
    return reason.partition(". ")[0].rstrip(".")
